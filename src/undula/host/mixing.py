"""Batches whose rows go through different adapters."""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..core.adapter import Live
from .copies import renew
from .host import (
    adapt,
    forget,
    layers_now,
    nest,
    unnest,
)
from .matrices import resolve
from .route import ROUTES, Route
from .rowwise import Base
from .sharded import is_fsdp
from .shelf import Held, OnShelf, marked
from .slots import Slot
from .state import (
    PATIENCE,
    Host,
    check_shape,
    dismiss,
    find,
    replaced,
)
from .tables import Shelf
from .weights import own
from .where import inner

KEPT = 3  # routes of blocks that were left within a block: the next step of an engine is often like the last


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None], tokens: Sequence[int] | None = None) -> Iterator[None]:
    """Within the context, row i of every batch goes through the adapter names[i]; None: the base alone.

        with undula.rows(model, ["french", None, "german"]):
            model.generate(...)

    With `tokens` the batch is flat, as engines make it of requests of different lengths: inputs are (1, T, ...) or
    (T, ...), tokens[i] of them in turn are of request i, and sum to T.

    Adapters of any methods mix; those on the LowRank rung share grouped products, in training too.  Layers must see the
    batch as their first dimension.  An inner `rows` counts until it is left.  Threads and tasks may each be inside one
    of their own; meanwhile a forward outside of any raises RuntimeError, and what changes the layers (`select`,
    `attach`, `merge`) waits.  A generator that yields within the block leaves it in force for its caller.  With
    gradient checkpointing the backward belongs into the block too.  Raises LookupError for a name that is not attached,
    ValueError for parameters trained in full (one model has one head), in the batch's adapters or in the selected one,
    RuntimeError for an adapter that is merged.
    """
    if isinstance(names, str):
        raise TypeError(f"rows takes a name for each row of the batch, as [{names!r}] * len(batch); found a text")
    names, counts = tuple(names), None if tokens is None else tuple(map(operator.index, tokens))
    if counts is not None and (len(counts) != len(names) or min(counts, default=0) < 0):
        raise ValueError(
            f"`tokens` are how many each of the {len(names)} names has, 0 or more; found {len(counts)}: {tokens!r:.80}"
        )
    model = inner(model)
    host = model.__dict__.setdefault("_undula", Host())  # also a bare model's: nothing is attached within the block
    try:
        with host.lock.lock:
            route = _enter(model, host, names, counts)
        ROUTES.set((*ROUTES.get(), route))
        try:
            yield
            if route.owed:
                warnings.warn(
                    "layers were computed without gradients from inputs that want them, as reentrant gradient "
                    "checkpointing does, and no backward followed within `undula.rows`: outside of the block they "
                    "would be computed again without the rows' adapters. Call backward within it",
                    stacklevel=3,
                )
        finally:
            ROUTES.set(tuple(r for r in ROUTES.get() if r is not route))
            _exit(model, host, route)
    finally:
        forget(model, host)


def _enter(model: nn.Module, host: Host, names: tuple[str | None, ...], tokens: tuple[int, ...] | None) -> Route:
    """A route for batches whose rows go through these adapters, with the layers that it needs adapted."""
    inside = any(r.thread == threading.get_ident() for r in host.routes) or bool(ROUTES.get())
    if not inside and not host.lock.lock.wait_for(lambda: not host.waiting, PATIENCE):  # verbs come first
        raise RuntimeError(f"`undula.rows` waited {PATIENCE:g} s for another thread's verb, which waits itself")
    if host.merged is not None:
        raise RuntimeError("an adapter is merged into this model: unmerge it before rows go through adapters")
    if "torch.distributed.fsdp" in sys.modules and is_fsdp(model):
        raise RuntimeError("this model is sharded (fully_shard): rows of different adapters are not possible there")
    around = next(reversed(host.mine()), None)
    if around is not None and (names, tokens) in around.within:
        route = around.within.pop((names, tokens))
        route.entered()
    else:
        route = _routed(model, host, names, tokens, around)
    host.routes.append(route)
    host.routed = True
    return route


def _exit(model: nn.Module, host: Host, route: Route) -> None:
    """The block of a route ends; what it was made of is kept for the same names in the block around it."""
    with host.lock.lock:
        host.routes.remove(route)
        around = next(reversed(host.mine()), None)
        if around is not None and route.tokens is not None and not route.owed:
            around.within = {**dict([*around.within.items()][-KEPT:]), (route.names, route.tokens): route}
        if not host.routes:
            _leave(model, host)
            host.lock.lock.notify_all()


def _routed(
    model: nn.Module,
    host: Host,
    names: tuple[str | None, ...],
    tokens: tuple[int, ...] | None,
    around: Route | None,
) -> Route:
    """A new route.  Within a block around it, whose adapters' layers were looked at and no verb came since, only the
    layers of others are."""
    used = {n: find(model, n)[1] for n in dict.fromkeys(names) if n is not None}
    ready = around.ready if around else set()
    new = {n: adapter for n, adapter in used.items() if n not in ready}
    for n in dict.fromkeys([*new, *([host.selected] if host.selected else [])]):
        if host.adapters[n].full:
            raise ValueError(
                f"{n!r} trains parameters in full ({', '.join(host.adapters[n].full)}): not row by row, one model has "
                "one head. Give rows to adapters without; if it is the selected one, call undula.select(model, None)"
            )
    _make_ready(model, host, new)
    route = Route(host, used, names, tokens, host.formed)
    route.ready = set(used)
    try:
        if new or around is None:
            _invite(model, host, route)
        elif len(set(names)) > 1:
            for path, slot in host.slots.items():
                _check_one_weight(path, slot, route)
    except BaseException:
        if not host.routes:
            _leave(model, host)
        raise
    if around is not None:
        around.ready |= route.ready
        route.ready = around.ready
    return route


def _make_ready(model: nn.Module, host: Host, new: Mapping[str, Live]) -> None:
    """Puts what adapters have where their layers are, and makes anew what they have of weights that changed."""
    for name, adapter in new.items():
        _move_beside(model, host, name, adapter)
    for shelf in {id(a.shelf): a.shelf for a in new.values() if isinstance(a, Held) and a.shelf}.values():
        for path in shelf.tables:
            shelf.to(path, _device(model, path))
        _settle(model, host, shelf)
    for adapter in new.values():
        if isinstance(adapter, Held) and adapter.copies:
            renew(adapter, model)


def _move_beside(model: nn.Module, host: Host, name: str, adapter: Live) -> None:
    """Puts factors where their layers are: `model.to` moves those of the selected adapter alone."""
    factors = adapter.factors.rest if isinstance(adapter.factors, OnShelf) else adapter.factors
    first = next(iter(factors), None)
    if first is None or _device(model, first) == next(iter(factors[first].values())).device:
        return
    for path, f in factors.items():
        for t in f.values():
            t.data = t.data.to(_device(model, path))
    host.forms.pop(name, None)


def _settle(model: nn.Module, host: Host, shelf: Shelf) -> None:
    """Makes anew what adapters on a shelf have of weights that were changed since."""
    layers = layers_now(model, [path for path in shelf.marks if path not in host.slots])
    layers |= {path: host.slots[path].layer for path in shelf.marks if path in host.slots}
    moved = {path: layer for path, layer in layers.items() if marked(layer) != shelf.marks[path]}
    if moved:
        for adapter in host.adapters.values():
            if isinstance(adapter, Held) and adapter.shelf is shelf:
                adapter.settle(moved)
        shelf.marks |= {path: marked(layer) for path, layer in moved.items()}


def _device(model: nn.Module, path: str) -> torch.device:
    found = resolve(model, path)
    if found is None:
        raise RuntimeError(replaced(path, "there is no such layer now"))
    return own(found[0], found[2]).device


def _invite(model: nn.Module, host: Host, route: Route) -> None:
    """Adapts those layers of a route that no selected adapter has."""
    sites = route.sites()
    slots: dict[str, Slot] = {}
    for path, _ in sites:
        slot = host.slots.get(path) or host.spare.get(path)
        found = resolve(model, path)
        if slot is not None and found is not None and slot.fits(found[0]):
            slots[path] = slot
        elif path in host.slots:
            raise RuntimeError(replaced(path, "the layer is another one now"))
    new = [path for path, _ in sites if path not in slots]
    for path, layer in (layers_now(model, new) if new else {}).items():
        slots[path] = host.spare[path] = Slot(host, path, Base(), layer, {})
    for path, adapter in sites:
        slot = slots[path]
        check_shape(path, slot.layer, adapter)
        _check_one_weight(path, slot, route)
        if path not in host.slots:
            adapt(host, slot)
            host.guests[path] = slot
    unnest(model, host)


def _check_one_weight(path: str, slot: Slot, route: Route) -> None:
    """Raises ValueError for rows of several adapters through a weight that is read: all rows have the same."""
    if slot.layer.reader is not None and len(set(route.names)) > 1:
        names = ", ".join(repr(n) for n in dict.fromkeys(route.names))
        raise ValueError(
            f"{path} is a weight that {slot.layer.reader} reads once for the whole batch: its rows cannot go through "
            f"{names} at a time. Give all rows one name, in a batch for each adapter, or leave that weight out of the "
            "adapters (`exclude`)"
        )


def _leave(model: nn.Module, host: Host) -> None:
    """Makes the layers what they were before somebody was inside `rows`."""
    dismiss(host)
    nest(host)
    unnest(model, host)
