"""The one host: adapters on a live model.

An adapted layer stays the object that it was (same name, same weight, same state-dict keys): while an adapter is
selected its class is a subclass of its own whose `forward` is the method's, and the adapter's factors hang below it as
`undula.*`.  Unselected adapters are no part of the model's tree, so the thousandth costs what the first did.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from ..core.calls import called
from ..core.method import Factors, Method
from ..core.site import Evident
from . import masters, quantised
from .around import APART, in_parallel, of_sentences
from .build import check_what, fresh
from .fitting import fitted, narrowed
from .matrices import layers_at
from .saving import guard, unguard
from .sharded import is_fsdp
from .shelf import Held
from .slots import Slot, install, remove
from .state import (
    Host,
    _check_live,
    _named,
    changing,
    check_shape,
    exchange,
    find,
    host_of,
    parameter,
    replaced,
    stand_in,
)
from .views import LinearView
from .where import Where, inner


@called(
    "undula.attach(model, undula.LoRA(r=8), where=['q_proj', 'v_proj'], name='mine')",
    target_modules="It is called where",
    exclude_modules="It is called exclude",
    modules_to_save="It is called full",
    adapter_name="It is called name",
    rank_pattern="It is called overrides, {pattern: method}",
    r="It is an option of the method: LoRA(r=8)",
    alpha="It is an option of the method: LoRA(alpha=16)",
)
def attach(
    model: nn.Module,
    what: Method | Adapter,
    where: Where | None = None,
    *,
    exclude: Where = (),
    name: str = "default",
    overrides: Mapping[str, Method] | None = None,
    full: Sequence[str] = (),
    probe: Evident | None = None,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Adapter:
    """Puts a new adapter of the method `what` (or an existing Adapter) on `model` and selects it.

    Its factors are from now on the model's only trainable parameters.  `where` chooses layers (see `where.choose`;
    "all-linear" where nothing is said), `exclude` leaves some of them out; `overrides` gives other methods to the
    layers that match a pattern, the first match counts; `full` names parameters or modules to train in full beside them
    (a new classification head); `probe` tells gradients and activations to methods that start from them (see
    `undula.Probe`).  Factors and what trains in full are float32 (float64 over a float64 base); with `dtype` the
    factors are of that type (torch.bfloat16 for many adapters that only serve: in training small steps would be lost in
    it).  Layers whose own parameters train go on computing in the base's type.  An Adapter that is given is copied; a
    live one that was detached goes on as the object that it is.  With `frozen` an Adapter is attached for `rows`: it
    does not train, is not selected, and lies in one stack with others like it, so that a batch of hundreds costs no
    more to enter than its rows.  Raises LookupError for names that match nothing,
    ValueError for an adapter that does not fit the model; the model is then unchanged.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"an adapter is called by a text, found name={name!r}")
    within = inner(model)
    if in_parallel(model, ()):
        warnings.warn(APART, stacklevel=3)
    if whole := of_sentences(model):
        warnings.warn(whole, stacklevel=3)
    model = within
    host = model.__dict__.setdefault("_undula", Host())
    try:
        with changing(host, "attach"):
            model.__dict__["_undula"] = host  # where another thread's refused attach took it away
            return _attach(model, host, what, where, exclude, name, overrides or {}, full, probe, dtype, frozen)
    finally:
        forget(model, host)


def _attach(
    model: nn.Module,
    host: Host,
    what: Method | Adapter,
    where: Where | None,
    exclude: Where,
    name: str,
    overrides: Mapping[str, Method],
    full: Sequence[str],
    probe: Evident | None,
    dtype: torch.dtype | None,
    frozen: bool,
) -> Adapter:
    check_what(what, overrides)
    if frozen and not isinstance(what, Adapter):
        raise TypeError(f"frozen=True is for an Adapter that was trained; {what!r} would stay at its initialisation")
    if isinstance(what, Adapter) and (where is not None or exclude or overrides or full or probe is not None):
        raise ValueError(
            "an Adapter knows its own sites: `where`, `exclude`, `overrides`, `full` and `probe` go with a method alone"
        )
    check_free(host, name)
    before = host.selected
    _select(model, host, None)
    try:
        made = (
            fitted(model, what)
            if isinstance(what, Adapter)
            else fresh(model, what, "all-linear" if where is None else where, overrides, full, probe, exclude)
        )
        adapter: Live
        if frozen:
            adapter = Held.on(narrowed(made, dtype), layers_at(model, made.factors), host.shelves)
        else:
            adapter = Live.of(narrowed(made, dtype))
            if isinstance(what, Live) and not what.attached:
                adapter = what.resumed(adapter)
    except BaseException:
        _select(model, host, before)
        raise
    if not host.adapters:
        host.trainable_before = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
    host.adapters[name], adapter.attached = adapter, True
    model.__dict__["_undula"] = host
    _select(model, host, before if frozen else name)
    quantised.keep_gradients(model)
    quantised.warn_where_cut(model)
    return adapter


def check_free(host: Host, name: str) -> None:
    """Raises RuntimeError for a merged adapter, ValueError for a name that is taken."""
    if host.merged is not None:
        raise RuntimeError("an adapter is merged into this model: unmerge it before attaching another")
    if name in host.adapters:
        raise ValueError(
            f"an adapter called {name!r} is attached already; attached are: {', '.join(host.adapters)}. Where a cell "
            "runs again: undula.detach(model) before it; for a second adapter beside the first: attach(..., name=...)"
        )


def select(model: nn.Module, name: str | None) -> None:
    """Makes the attached adapter `name` the active one; None: the base alone, exactly as it was before."""
    model = inner(model)
    host = host_of(model)
    with changing(host, "select"):
        _select(model, host, name)
    if name is not None and in_parallel(model, host.adapters[name].parameters()):
        warnings.warn(APART, stacklevel=2)


def _select(model: nn.Module, host: Host, name: str | None) -> None:
    if name is not None:
        adapter = _named(model, name)[1]
    if host.merged is not None:
        raise RuntimeError("an adapter is merged into this model: unmerge it before selecting")
    if is_fsdp(model):
        raise RuntimeError(
            "this model is sharded (fully_shard): which adapter is live cannot change any more. Attach and select "
            "before fully_shard; adapter.save gathers what was trained"
        )
    if name is not None and host.slots:
        _check_live(model, host)
    _clear(model, host)
    host.selected = None
    if name is None:
        return
    layers = layers_now(model, adapter.factors)
    for path, layer in layers.items():
        check_shape(path, layer, adapter)
    host.selected = name
    for path, p in adapter.full.items():
        host.own[path], host.placed[path] = stand_in(model, path, p), p
    adapter.full = InPlace(model, adapter.full)
    for path, f in adapter.factors.items():
        layer = layers[path]
        for t in f.values():
            if t.device != layer.device:
                t.data = t.data.to(layer.device)
        adapt(host, Slot(host, path, adapter.methods[path], layer, f))
    unnest(model, host)
    guard(model)


def deselect(model: nn.Module) -> None:
    """`select(model, None)` within another verb."""
    model = inner(model)
    _select(model, host_of(model), None)


def change(model: nn.Module, site: str, method: Method, factors: Factors) -> None:
    """Another method and other factors at one site of the selected adapter, which stays the object that it is.  For
    allocators; trained factors that go on training are passed as the parameters that they are.  Raises LookupError."""
    model = inner(model)
    host, adapter = _named(model, None)
    if site not in adapter.factors:
        raise LookupError(f"the adapter has no site {site!r}; it has: {', '.join(adapter.factors)}")
    slot = host.slots[site]
    live: dict[str, Any] = {
        k: t if isinstance(t, nn.Parameter) else nn.Parameter(t, t.requires_grad) for k, t in factors.items()
    }
    if isinstance(adapter, Held):
        raise RuntimeError(f"{host.selected!r} was attached with frozen=True: no allocator changes what does not train")
    if host.routes:
        raise RuntimeError("an allocator changes an adapter within `undula.rows`: train with it outside of the block")
    host.forms.pop(host.selected, None)  # type: ignore[arg-type]
    adapter._methods[site], adapter.factors[site] = method, live
    slot.method, slot._parameters = method, live


class InPlace(Mapping[str, Tensor]):
    """What trains in full, read where it stands in the model: whatever replaces parameters (FSDP2) replaces these."""

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        parts = {path: path.rpartition(".") for path in paths}
        self.owners = {path: (model.get_submodule(parent), leaf) for path, (parent, _, leaf) in parts.items()}

    def __getitem__(self, path: str) -> Tensor:
        owner, leaf = self.owners[path]
        return owner._parameters[leaf]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def layers_now(model: nn.Module, paths: Iterable[str]) -> dict[str, LinearView]:
    """The layers of these sites.  Raises RuntimeError for one that is there no more."""
    layers = layers_at(model, paths)
    for path in paths:
        if path not in layers:
            raise RuntimeError(replaced(path, "there is no such layer now"))
    return layers


def layer_at(model: nn.Module, path: str) -> LinearView:
    """The layer of one site, adapted now or not.  Raises RuntimeError where there is none."""
    slot = host_of(model).slots.get(path)
    return layers_now(inner(model), [path])[path] if slot is None else slot.layer


def adapt(host: Host, slot: Slot) -> None:
    install(slot)
    host.slots[slot.path] = slot


def _clear(model: nn.Module, host: Host) -> None:
    unguard(model)
    for slot in host.slots.values():
        remove(slot)
    for path, p in host.own.items():
        parent, _, leaf = path.rpartition(".")
        if parameter(model, path) is host.placed[path]:  # a parameter that was put there since then stays
            masters.narrow(model.get_submodule(parent), leaf)
            exchange(model, path, p)
    if host.selected in host.adapters:
        host.adapters[host.selected].full = dict(host.placed)
    nest(host)
    host.slots, host.own, host.placed = {}, {}, {}


def nest(host: Host) -> None:
    """Undoes `unnest`."""
    for encoder in host.nested:
        encoder.use_nested_tensor = True
    host.nested = []


def unnest(model: nn.Module, host: Host) -> None:
    """torch's encoder gives its layers nested tensors where the fast path is to take them.  Adapted layers leave the
    fast path (see `Slot`), so above them it must not."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    host.nested += [m for m in encoders if any(isinstance(below, Slot) for below in m.modules())]
    for encoder in host.nested:
        encoder.use_nested_tensor = False


def detach(model: nn.Module, name: str | None = None) -> Adapter:
    """Removes an adapter (the selected one by default) and returns it.  When the last one goes, the model is as it was
    before the first came, its trainable parameters included."""
    model = inner(model)
    host = _named(model, name)[0]
    with changing(host, "detach"):
        host, adapter = _named(model, name)
        if isinstance(adapter, Held):
            adapter.check_own(name or host.selected, "detach")
        _detach(model, host, name if name is not None else host.selected)
        return adapter.off(host.shelves) if isinstance(adapter, Held) else adapter


def _detach(model: nn.Module, host: Host, name: str | None) -> None:
    if host.selected == name:
        if host.merged is not None:
            restore(model, host)
        _select(model, host, None)
    host.forms.pop(name, None)  # type: ignore[arg-type]
    host.adapters.pop(name).attached = False  # type: ignore[arg-type]
    if not host.adapters:
        for p in host.trainable_before:
            p.requires_grad_(True)
        del model.__dict__["_undula"]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name."""
    return dict(host_of(model).adapters)


def selected(model: nn.Module) -> Adapter:
    """The active adapter.  Raises LookupError when there is none."""
    return find(model, None)[1]


def restore(model: nn.Module, host: Host) -> None:
    """The base's own weights in the place of merged ones."""
    for path, p in (host.merged or {}).items():
        exchange(model, path, p)
    for config in host.untied:
        config.tie_word_embeddings = True
    host.merged, host.untied = None, []


def forget(model: nn.Module, host: Host) -> None:
    """Takes a host away that holds nothing."""
    if not host.adapters and not host.routes and model.__dict__.get("_undula") is host:
        del model.__dict__["_undula"]
