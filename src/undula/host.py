"""The one host: adapters on a live model.

An adapted layer stays the object that it was (same name, same weight, same state-dict keys): while an adapter is
selected its class is a subclass of its own whose `forward` is the method's, and the adapter's factors hang below it as
`undula.*`.  Unselected adapters are no part of the model's tree, so the thousandth costs what the first did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .kernels.grouped import Rows
from .method import Factors, Method, Reweight
from .sites import LinearView, Where, choose, matches, site, view


class Slot(nn.Module):
    """What hangs below an adapted layer: a method, the layer as a matrix, and the factors as parameters."""

    def __init__(self, method: Method | Rows, layer: LinearView, factors: Factors):
        super().__init__()
        self.method, self.layer = method, layer
        self._parameters.update(factors)  # type: ignore[arg-type]


class Adapted:
    """Mixed into the class of a layer while an adapter is selected."""

    undula: Slot
    original: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        slot = self.undula
        return slot.method.forward(x, slot.layer, slot._parameters)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (self.original,), self.__getstate__()  # type: ignore[attr-defined]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _classes:
        _classes[original] = type(f"Adapted{original.__name__}", (Adapted, original), {"original": original})
    return _classes[original]


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = _adapted(original)
    return cls.__new__(cls)


def _put(slot: Slot) -> None:
    module = slot.layer.module
    module.__dict__.pop("forward", None)  # an accelerate hook: `slot.layer` holds and calls it
    module.__class__ = _adapted(type(module))
    module._modules["undula"] = slot
    slot.train(module.training)


def _take(module: nn.Module) -> None:
    slot = module._modules.pop("undula")
    module.__class__ = module.original  # type: ignore[assignment]
    if slot.layer.override is not None:  # type: ignore[union-attr]
        module.forward = slot.layer.override  # type: ignore[union-attr,method-assign]


@dataclass
class Host:
    """The adapters of one model.  Kept on the model itself, so that copies and pickles keep it."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    selected: str | None = None
    hosted: list[nn.Module] = field(default_factory=list)  # layers that are adapted now
    merged: dict[str, nn.Parameter] | None = None  # the base's own weights, while merged
    own: dict[str, nn.Parameter] = field(default_factory=dict)  # the base's parameters that `full` stands in for
    thawed: list[nn.Parameter] = field(default_factory=list)  # what trained before anything was attached


def _host(model: nn.Module) -> Host:
    return model.__dict__.setdefault("_undula", Host())


def _find(model: nn.Module, name: str | None) -> tuple[Host, Adapter]:
    host = _host(model)
    name = host.selected if name is None else name
    if name not in host.adapters:
        there = ", ".join(host.adapters) or "none"
        asked = "no adapter is selected" if name is None else f"no adapter is called {name!r}"
        raise LookupError(f"{asked}; attached are: {there}")
    return host, host.adapters[name]


def attach(
    model: nn.Module,
    what: Method | Adapter,
    where: Where = "all-linear",
    *,
    name: str = "default",
    overrides: Mapping[str, Method] | None = None,
    full: Sequence[str] = (),
) -> Adapter:
    """Puts a new adapter of the method `what` (or an existing Adapter) on `model` and selects it.

    Its factors are from now on the model's only trainable parameters.  `where` chooses layers (see `sites.choose`);
    `overrides` gives other methods to the layers that match a pattern, the first match counts; `full` names parameters
    or modules to train in full beside them (a new classification head).  Factors are float32 (float64 over a float64
    base).  Raises LookupError for names that match nothing, ValueError for an adapter that does not fit the model; the
    model is then unchanged.
    """
    host = _host(model)
    if host.merged is not None:
        raise RuntimeError("an adapter is merged into this model: unmerge it before attaching another")
    if name in host.adapters:
        raise ValueError(f"an adapter called {name!r} is attached already; attached are: {', '.join(host.adapters)}")
    before = host.selected
    select(model, None)
    try:
        adapter = fitted(model, what) if isinstance(what, Adapter) else fresh(model, what, where, overrides or {}, full)
    except BaseException:
        select(model, before)
        raise
    if not host.adapters:
        host.thawed = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
    host.adapters[name] = adapter
    select(model, name)
    return adapter


def fresh(
    model: nn.Module, method: Method, where: Where, overrides: Mapping[str, Method], full: Sequence[str]
) -> Adapter:
    """A new adapter for `model`, not attached."""
    methods: dict[str, Method] = {}
    factors: dict[str, Factors] = {}
    shapes: dict[str, tuple[int, int]] = {}
    shared: dict[Any, Any] = {}
    once: dict[int, tuple[Tensor, nn.Parameter]] = {}  # holds the tensors too, so that no id is used twice
    layers = choose(model, where)
    for pattern in overrides:
        if not any(matches(n, pattern) for n in layers):
            raise LookupError(f"the override {pattern!r} matches none of the chosen layers: {', '.join(layers)}")
    for path, layer in layers.items():
        methods[path] = next((m for p, m in overrides.items() if matches(path, p)), method)
        where_to = site(path, layer, shared)
        shapes[path] = where_to.shape
        made = methods[path].init(where_to)
        factors[path] = {
            k: once.setdefault(id(t), (t, nn.Parameter(t.detach(), t.requires_grad)))[1] for k, t in made.items()
        }
    in_full = {n: _thawed(p) for n, p in _chosen_parameters(model, full).items()}
    return Adapter(methods, factors, shapes, in_full)


def _thawed(p: nn.Parameter) -> nn.Parameter:
    if not p.is_floating_point():
        raise TypeError(f"only floating-point parameters can be trained in full, found {p.dtype}")
    return nn.Parameter(p.detach().clone())


def _chosen_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        found = {
            n: p
            for n, p in parameters.items()
            if matches(n, pattern) or any(matches(n[:i], pattern) for i, c in enumerate(n) if c == ".")
        }
        if not found:
            tops = sorted({n.split(".")[0] for n in parameters})
            raise LookupError(f"full={pattern!r} matches no parameter and no module; at the top are: {', '.join(tops)}")
        chosen |= found
    return chosen


def fitted(model: nn.Module, adapter: Adapter) -> Adapter:
    """`adapter` as parameters that fit `model` (types and devices adjusted).  Raises ValueError where it does not."""
    layers = {n: v for n, m in model.named_modules() if n in adapter.factors and (v := view(m)) is not None}
    missing = [n for n in adapter.factors if n not in layers]
    if missing:
        raise ValueError(f"the adapter has sites that this model has not: {', '.join(missing[:5])}")
    parameters = dict(model.named_parameters())
    once: dict[int, nn.Parameter] = {}

    def live(t: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        if id(t) not in once:
            as_is = isinstance(t, nn.Parameter) and t.device == device and t.dtype == dtype
            fresh_copy = t if as_is else nn.Parameter(t.detach().to(device, dtype, copy=True), t.requires_grad)
            once[id(t)] = fresh_copy  # type: ignore[assignment]
        return once[id(t)]

    factors: dict[str, Factors] = {}
    for path, f in adapter.factors.items():
        where = site(path, layers[path])
        if where.shape != adapter.shapes[path]:
            raise ValueError(f"{path} is {where.shape} (O, I) in this model, {adapter.shapes[path]} in the adapter")
        check_shapes(path, f, adapter.methods[path].init(where.outline()))
        dtypes = {k: where.dtype if t.is_floating_point() else t.dtype for k, t in f.items()}
        factors[path] = {k: live(t, where.device, dtypes[k]) for k, t in f.items()}
    for path, t in adapter.full.items():
        if path not in parameters or parameters[path].shape != t.shape:
            found = tuple(parameters[path].shape) if path in parameters else "no such parameter"
            raise ValueError(f"the adapter holds {path} {tuple(t.shape)} in full; in this model: {found}")
    full = {n: live(t, parameters[n].device, parameters[n].dtype) for n, t in adapter.full.items()}
    return Adapter(dict(adapter.methods), factors, dict(adapter.shapes), full)


def check_shapes(path: str, found: Factors, wanted: Factors) -> None:
    """Raises ValueError where names or shapes differ from what the method makes for this site."""
    if set(found) != set(wanted):
        raise ValueError(f"{path}: the method has the factors {sorted(wanted)}, the adapter has {sorted(found)}")
    for k, t in found.items():
        if t.shape != wanted[k].shape:
            raise ValueError(
                f"{path}: factor {k} is {tuple(t.shape)} in the adapter; on this model's layer the method has "
                f"{tuple(wanted[k].shape)}"
            )


def select(model: nn.Module, name: str | None) -> None:
    """Makes the attached adapter `name` the active one; None: the base alone, exactly as it was before."""
    host = _host(model)
    if name is not None:
        _find(model, name)
    if host.merged is not None:
        raise RuntimeError("an adapter is merged into this model: unmerge it before selecting")
    _clear(model, host)
    host.selected = name
    if name is None:
        return
    adapter = host.adapters[name]
    for path, f in adapter.factors.items():
        layer = view(model.get_submodule(path))
        assert layer is not None
        device = layer.module.weight.device
        for t in f.values():
            if t.device != device:
                t.data = t.data.to(device)
        _put(Slot(adapter.methods[path], layer, f))
        host.hosted.append(layer.module)
    for path, p in adapter.full.items():
        host.own[path] = _exchange(model, path, p)


def _exchange(model: nn.Module, path: str, new: Tensor) -> nn.Parameter:
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = owner._parameters[leaf]
    owner._parameters[leaf] = new  # type: ignore[assignment]
    return old  # type: ignore[return-value]


def _clear(model: nn.Module, host: Host) -> None:
    for module in host.hosted:
        _take(module)
    for path, p in host.own.items():
        _exchange(model, path, p)
    host.hosted, host.own = [], {}


def detach(model: nn.Module, name: str | None = None) -> Adapter:
    """Removes an adapter (the selected one by default) and returns it.  When the last one goes, the model is as it was
    before the first came, its trainable parameters included."""
    host, adapter = _find(model, name)
    name = name if name is not None else host.selected
    if host.selected == name:
        if host.merged is not None:
            unmerge(model)
        select(model, None)
    del host.adapters[name]  # type: ignore[arg-type]
    if not host.adapters:
        for p in host.thawed:
            p.requires_grad_(True)
        del model.__dict__["_undula"]
    return adapter


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name."""
    return dict(_host(model).adapters)


def selected(model: nn.Module) -> Adapter:
    """The active adapter.  Raises LookupError when there is none."""
    return _find(model, None)[1]


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> dict[str, float]:
    """Writes the selected adapter into the weights; the layers are plain again.

    Returns per site the rounding error that storing costs: |stored - exact| / |exact - W| (about 1e-7 in float32; large
    on a bf16 or quantised base).  `keep` holds the base's own weights for `unmerge`, bit for bit; without it the
    adapters are gone.  A weight that other layers share is not changed for them: the layer gets its own.
    Raises TypeError for a method on the bare Method rung, naming the sites; nothing is changed then.
    """
    host, adapter = _find(model, None)
    if host.merged is not None:
        raise RuntimeError("the adapter is merged already")
    bare = {s: m for s, m in adapter.methods.items() if not isinstance(m, Reweight)}
    if bare:
        site_name, method = next(iter(bare.items()))
        raise TypeError(
            f"{method!r} cannot be merged: it stands on the rung {method.rung()}, no weight gives its function "
            f"({len(bare)} sites, the first {site_name}). undula.collapse fits a LowRank adapter and reports the error"
        )
    errors, weights = {}, {}
    for module, path in zip(host.hosted, adapter.factors, strict=True):
        slot = module.undula
        W_OI = slot.layer.weight
        exact = slot.method.weight(W_OI, slot._parameters)
        weights[path] = slot.layer.put(exact)
        errors[path] = rounding(slot.layer, module, weights[path], exact, W_OI)
    hosted = host.hosted
    for module in hosted:
        _take(module)
    host.hosted = []
    host.merged = {}
    for module, (path, weight) in zip(hosted, weights.items(), strict=True):
        host.merged[path] = module._parameters["weight"]  # type: ignore[assignment]
        module._parameters["weight"] = weight
    if not keep:
        del model.__dict__["_undula"]
    return errors


def rounding(layer: LinearView, module: nn.Module, weight: nn.Parameter, exact: Tensor, W_OI: Tensor) -> float:
    """|stored - exact| / |exact - W| for a weight in the form in which the module would store it."""
    own = module._parameters["weight"]
    module._parameters["weight"] = weight
    try:
        wide = torch.promote_types(exact.dtype, torch.float32)
        lost = (layer.weight.to(wide) - exact.to(wide)).norm()
    finally:
        module._parameters["weight"] = own
    change = (exact.to(wide) - W_OI.to(wide)).norm()
    return float(lost / change) if change > 0 else 0.0


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`: the base's own weights are back, bit for bit, and the adapter is live again."""
    host = _host(model)
    if host.merged is None:
        raise RuntimeError("nothing is merged into this model (or it was merged with keep=False)")
    for path, p in host.merged.items():
        _exchange(model, f"{path}.weight" if path else "weight", p)
    name, host.merged = host.selected, None
    select(model, name)


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context, row i of every batch goes through the adapter names[i]; None: the base alone.

        with undula.rows(model, ["french", None, "german"]):
            model.generate(...)

    Adapters of any methods mix; those on the LowRank rung share grouped products.  Layers must see the batch as their
    first dimension.  Raises LookupError for a name that is not attached, ValueError for parameters trained in full
    (one model has one head).
    """
    host, before = _host(model), _host(model).selected
    used = {n: _find(model, n)[1] for n in dict.fromkeys(names) if n is not None}
    held = [n for n, a in used.items() if a.full]
    if held:
        raise ValueError(f"{held[0]!r} trains parameters in full ({', '.join(used[held[0]].full)}): not row by row")
    select(model, None)
    for path in dict.fromkeys(s for a in used.values() for s in a.factors):
        layer = view(model.get_submodule(path))
        assert layer is not None
        laws = {n: (a.methods[path], a.factors[path]) for n, a in used.items() if path in a.factors}
        _put(Slot(Rows(laws, tuple(names)), layer, {}))
        host.hosted.append(layer.module)
    try:
        yield
    finally:
        select(model, before)
