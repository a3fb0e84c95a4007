"""An adapter that is there, brought onto a model: whether it fits, types, devices.  Nothing here touches the model."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Factors, Site
from .apart import apart, check_theirs
from .build import kernels
from .checks import check_acts, check_padding, check_range, check_shapes, check_there
from .masters import wide
from .matrices import aliases, layers_at
from .views import LinearView, site
from .weights import check_once


def check_all_there(adapter: Adapter, layers: Container[str], first: Mapping[str, str]) -> None:
    """Raises ValueError for sites that are not among a model's layers; `first` are its `aliases`."""
    missing = [n for n in adapter.factors if n not in layers]
    if missing:
        told = [f"{n} (known as {first[n]} here)" if n in first else n for n in missing[:5]]
        raise ValueError(f"the adapter has sites that this model has not: {', '.join(told)}")


def check_site(where: Site, layer: LinearView, adapter: Adapter, odd: str | None) -> dict[str, torch.dtype]:
    """The types that an adapter's factors have at one site of a model; `odd` is what `Adapter.apart` says of the layer.
    Raises ValueError or TypeError where the adapter does not fit; of one without numbers (an outline on the meta
    device) as far as shapes tell."""
    path = where.name
    method, f = adapter.methods[path], adapter.factors[path]
    check_acts(path, layer, method)
    check_theirs(path, odd, adapter.apart.get(path))
    if where.shape != adapter.shapes[path]:
        raise ValueError(f"{path} is {where.shape} (O, I) in this model, {adapter.shapes[path]} in the adapter")
    check_shapes(path, f, method.init(where.outline()))
    dtypes = {k: where.dtype if t.is_floating_point() else t.dtype for k, t in f.items()}
    if any(t.is_meta for t in f.values()):
        return dtypes
    method.check(where, f)
    check_padding(path, layer, method, f, adapter.kernels.get(path))
    for k, t in f.items():
        check_range(f"{path}.{k}", t, dtypes[k])
    return dtypes


def fitted(model: nn.Module, adapter: Adapter) -> Adapter:
    """`adapter` as parameters of its own that fit `model` (types and devices adjusted).  Raises ValueError where it
    does not fit."""
    adapter.check_usable()
    layers = layers_at(model, adapter.factors)
    check_once(layers)
    check_all_there(adapter, layers, aliases(model))
    # a parameter under each of its names: one that is tied to another (an output head) may be replaced alone
    parameters = dict(model.named_parameters(remove_duplicate=False))
    once: dict[int, nn.Parameter] = {}

    def live(t: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        if id(t) not in once:
            once[id(t)] = nn.Parameter(t.detach().to(device, dtype, copy=True), t.requires_grad)
        return once[id(t)]

    factors: dict[str, Factors] = {}
    odd = apart(layers)
    for path, f in adapter.factors.items():
        check_there(path, layers[path])
        where = site(path, layers[path])
        dtypes = check_site(where, layers[path], adapter, odd.get(path))
        factors[path] = {k: live(t, where.device, dtypes[k]) for k, t in f.items()}
    in_full = _tied(adapter.full, parameters).items()
    full = {n: live(t, parameters[n].device, wide(parameters[n].dtype)) for n, t in in_full}
    here = {**adapter.apart, **odd}
    return Adapter(adapter.methods, factors, adapter.shapes, full, kernels(layers), adapter.about, here)


def check_full(full: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where what an adapter holds in full is no parameter of these, or has another shape."""
    for path, t in full.items():
        if path not in parameters or parameters[path].shape != t.shape:
            found = tuple(parameters[path].shape) if path in parameters else "no such parameter"
            raise ValueError(f"the adapter holds {path} {tuple(t.shape)} in full; in this model: {found}")
        check_range(path, t, wide(parameters[path].dtype))


def _tied(full: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`full` with one tensor for equal ones that stand for one parameter of the model.  Raises ValueError for what does
    not fit."""
    check_full(full, parameters)
    firsts: dict[int, Tensor] = {}
    tied = {}
    for n, t in full.items():
        first = firsts.setdefault(id(parameters[n]), t)
        tied[n] = first if first is t or torch.equal(first, t) else t
    return tied


def narrowed(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """The adapter with its floating-point factors in `dtype`; None leaves them.  Raises TypeError for another kind of
    type, ValueError where numbers are beyond its range."""
    if dtype is None:
        return adapter
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"factors are floating-point numbers of 16 bits or more (torch.bfloat16, torch.float32 ...); found {dtype}"
        )
    once: dict[int, Tensor] = {}

    def cast(key: str, t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.dtype == dtype:
            return t
        check_range(key, t, dtype)
        return once.setdefault(id(t), nn.Parameter(t.detach().to(dtype), t.requires_grad))

    return replace(
        adapter, factors={s: {k: cast(f"{s}.{k}", t) for k, t in f.items()} for s, f in adapter.factors.items()}
    )
