"""The adapters of a model as an object, and what may change it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from . import masters, quantised
from .route import ROUTES, Route, innermost
from .sharded import is_fsdp
from .share import Form, form
from .slots import Slot, remove
from .tables import Shelf
from .views import LinearView
from .weights import Read
from .where import inner

PATIENCE = 60.0  # seconds that a verb or a `rows` waits for others to leave
_current_backward = torch._C._current_graph_task_id  # -1 outside of a backward


class Lock:
    """A lock that one thread can take several times, and wait in; a copy of it is a new one."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


@dataclass
class Host:
    """The adapters of one model.  Kept on the model itself, so that copies and pickles keep it."""

    adapters: dict[str, Live] = field(default_factory=dict)
    selected: str | None = None
    slots: dict[str, Slot] = field(default_factory=dict)  # of the layers that are adapted now, by site
    guests: dict[str, Slot] = field(default_factory=dict)  # those of them that are so for `rows` alone
    spare: dict[str, Slot] = field(default_factory=dict)  # of the last `rows`, for the next
    merged: dict[str, nn.Parameter] | None = None  # the base's own weights by their full names, while merged
    untied: list[Any] = field(default_factory=list)  # configurations that said "tied", see `merging.untie`
    own: dict[str, nn.Parameter] = field(default_factory=dict)  # the base's parameters that `full` stands in for
    placed: dict[str, Tensor] = field(default_factory=dict)  # what was put in their places
    trainable_before: list[nn.Parameter] = field(default_factory=list)  # what trained before anything was attached
    nested: list[nn.TransformerEncoder] = field(default_factory=list)  # whose nested tensors are off, see `unnest`
    routes: list[Route] = field(default_factory=list)  # that somebody is inside
    routed: bool = False  # whether anybody ever was
    waiting: int = 0  # verbs that wait until nobody is
    shelves: list[Shelf] = field(default_factory=list)  # of the adapters that do not train
    forms: dict[str, Form] = field(default_factory=dict)  # of the adapters that went through `rows`
    lock: Lock = field(default_factory=Lock, repr=False)  # held while layers change

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nobody is inside that."""
        return {**self.__dict__, "routes": [], "waiting": 0}

    def mine(self) -> list[Route]:
        """The routes of this context that are not left yet, the innermost last."""
        routes = ROUTES.get()
        return [r for r in routes if r.host is self and r in self.routes] if routes else []

    def route(self, slot: Slot) -> Route | None:
        """The route of a forward; None outside of `rows`.  Raises RuntimeError where it is not known."""
        if torch.compiler.is_compiling():  # dynamo reads no contexts
            return self.routes[-1] if self.routes else None
        mine = self.mine()
        again = _current_backward() != -1  # gradient checkpointing, maybe in a thread of autograd's
        route = innermost(mine) if mine else None
        if again and route is None and len(self.routes) == 1 and self.routes[0].number == slot.last:
            route = self.routes[0]
        if again and slot.last != (0 if route is None else route.number):
            raise RuntimeError(
                f"{slot.path} is computed again in a backward (gradient checkpointing) within another `undula.rows` "
                "than its forward, or outside of it: call backward within the block of the forward"
            )
        if route is None and self.routes:
            raise RuntimeError(
                "another thread is inside `undula.rows` on this model, or another task: its names say which adapter "
                "each row goes through. Compute within a `rows` of your own, or give each thread its own copy"
            )
        if again and route is not None:
            route.owed = False
        number = 0 if route is None else route.number
        if not again and slot.last != number:
            slot.__dict__["last"] = number  # past nn.Module's own __setattr__, which is slow
        return route

    def formed(self, name: str) -> Form:
        """`share.form` of an adapter that is not on a shelf, one object for equal ones."""
        if name not in self.forms:
            new = form(self.adapters[name])
            self.forms[name] = next((f for f in self.forms.values() if f == new), new)
        return self.forms[name]


def host_of(model: nn.Module) -> Host:
    """The adapters of `model`; where there are none an empty host, which the model does not keep."""
    return inner(model).__dict__.get("_undula") or Host()


def find(model: nn.Module, name: str | None) -> tuple[Host, Live]:
    """The host and one of its adapters, the selected one where no name is given.  Raises LookupError, and RuntimeError
    where the model no longer computes with what the selected adapter trains."""
    host, adapter = _named(model, name)
    if name in (None, host.selected):
        _check_live(inner(model), host)
    return host, adapter


def _named(model: nn.Module, name: str | None) -> tuple[Host, Live]:
    host = host_of(model)
    name = host.selected if name is None else name
    if name not in host.adapters:
        there = ", ".join(host.adapters) or "none"
        asked = "no adapter is selected" if name is None else f"no adapter is called {name!r}"
        hint = "" if host.adapters else ". Attach one: undula.attach(model, undula.LoRA())"
        raise LookupError(f"{asked}; attached are: {there}{hint}")
    return host, host.adapters[name]


def _check_live(model: nn.Module, host: Host) -> None:
    """Raises RuntimeError where a layer or parameter of the selected adapter was replaced behind its back (a resized
    vocabulary, a library that swaps modules): what is trained there no longer counts."""
    if host.selected is None or host.merged is not None:
        return
    adapter = host.adapters[host.selected]
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in adapter.factors:
        slot = host.slots[path]
        layer = slot.layer
        if not slot.hangs(modules.get(layer.place if isinstance(layer, Read) else path)):
            raise RuntimeError(replaced(path, "the layer is another one now"))
        check_shape(path, layer, adapter)
    for path, placed in () if is_fsdp(model) else host.placed.items():
        if parameter(model, path) is not placed:
            raise RuntimeError(replaced(path, "the parameter is another one now"))


def check_shape(path: str, layer: LinearView, adapter: Adapter) -> None:
    if quantised.is_plain(layer.module.weight) and tuple(layer.weight.shape) != adapter.shapes[path]:
        change = f"its weight is {tuple(layer.weight.shape)} now, it was {adapter.shapes[path]} (O, I)"
        raise RuntimeError(replaced(path, change))


def replaced(path: str, how: str) -> str:
    return (
        f"{path} was changed after the adapter was attached: {how}, and what the adapter trained there no longer "
        "counts. Detach the adapter (`undula.detach`) before layers are replaced or resized, and attach it afterwards"
    )


@contextlib.contextmanager
def changing(host: Host, verb: str) -> Iterator[None]:
    """Nobody is inside `rows` or changes the layers meanwhile.  Raises RuntimeError within a `rows` of this context,
    and where waiting for others would never end."""
    if host.mine():
        raise RuntimeError(f"`{verb}` within `undula.rows`: leave the block first, its batches are routed by names")
    with host.lock.lock:
        if host.routes and (ROUTES.get() or any(r.thread == threading.get_ident() for r in host.routes)):
            raise RuntimeError(
                f"`{verb}` while another task of this thread, or a block of another model around it, is inside "
                "`undula.rows`: nobody could leave while it waits. Leave that block first"
            )
        host.waiting += 1
        try:
            if not host.lock.lock.wait_for(lambda: not host.routes, PATIENCE):
                raise RuntimeError(f"`{verb}` waited {PATIENCE:g} s for other threads to leave `undula.rows`")
        finally:
            host.waiting -= 1
            host.lock.lock.notify_all()
        dismiss(host)  # those of a copy that was made within `rows`
        yield


def exchange(model: nn.Module, path: str, new: Tensor) -> nn.Parameter:
    """Puts a parameter in the place of the one at `path`; returns that one."""
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = owner._parameters[leaf]
    owner._parameters[leaf] = new  # type: ignore[assignment]
    if isinstance(owner, nn.RNNBase) and leaf in owner._flat_weights_names:  # it keeps its weights in a list too
        owner._flat_weights[owner._flat_weights_names.index(leaf)] = new
    return old  # type: ignore[return-value]


def stand_in(model: nn.Module, path: str, new: Tensor) -> nn.Parameter:
    """`exchange`; where the one at `path` is of a narrower type, the module computes in that type all the same."""
    old = exchange(model, path, new)
    if old.dtype != new.dtype:
        parent, _, leaf = path.rpartition(".")
        masters.widen(model.get_submodule(parent), leaf, old.dtype)
    return old


def parameter(model: nn.Module, path: str) -> Tensor | None:
    """The parameter at `path`, None where there is none."""
    parent, _, leaf = path.rpartition(".")
    try:
        return model.get_submodule(parent)._parameters.get(leaf)
    except AttributeError:
        return None


def dismiss(host: Host) -> None:
    """Makes the layers plain that are adapted for `rows` alone."""
    for path, slot in host.guests.items():
        remove(slot)
        del host.slots[path]
    host.guests = {}
