"""Changing the rank of live factors, with the optimiser's state following."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..host.host import change, selected
from ..host.state import host_of
from ..host.views import LinearView, site


@torch.no_grad()
def adopt(model: nn.Module, saved: Adapter) -> None:
    """Puts the methods and numbers of a saved adapter onto the live one of the same sites, to go on training it.

    Parameters that train stay the objects that an optimiser knows, though their shapes may change; what sites share in
    `saved` is one.  Raises ValueError, with nothing changed, where the two have other sites or train other factors.
    """
    adapter = selected(model)
    taken = _taken(adapter, saved)
    layers = live_layers(model)
    for path in adapter.factors:
        where = site(path, layers[path])
        for t in saved.factors[path].values():
            dtype = where.dtype if t.is_floating_point() else t.dtype
            data = t.detach().to(where.device, dtype, copy=True)
            if t.requires_grad:
                taken[id(t)].data, taken[id(t)].grad = data, None
            elif id(t) not in taken:
                taken[id(t)] = nn.Parameter(data, requires_grad=False)
        change(model, path, saved.methods[path], {k: taken[id(t)] for k, t in saved.factors[path].items()})
    for name, p in adapter.full.items():
        p.data, p.grad = saved.full[name].detach().to(p.device, p.dtype, copy=True), None


def _taken(adapter: Adapter, saved: Adapter) -> dict[int, Tensor]:
    """{id of a trained tensor of `saved`: the live parameter that takes its numbers}."""
    if adapter.shapes != saved.shapes or set(adapter.full) != set(saved.full):
        odd = [str(o) for o in {*adapter.shapes.items()} ^ {*saved.shapes.items()}] + [*{*adapter.full} ^ {*saved.full}]
        raise ValueError(f"the saved adapter is for other sites or parameters than the live one: {sorted(odd)[:3]}")
    pairs: dict[tuple[int, int], Tensor] = {}
    for path, f in adapter.factors.items():
        ours, theirs = ({k: t for k, t in g.items() if t.requires_grad} for g in (f, saved.factors[path]))
        if set(ours) != set(theirs):
            raise ValueError(f"{path}: the live adapter trains {sorted(ours)}, the saved one {sorted(theirs)}")
        pairs |= {(id(ours[k]), id(theirs[k])): ours[k] for k in ours}
    if not len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
        raise ValueError("the saved adapter shares other tensors between its sites than the live one")
    return {theirs: p for (_, theirs), p in pairs.items()}


def live_layers(model: nn.Module) -> dict[str, LinearView]:
    """The layers under the selected adapter, as they are without it."""
    return {path: host_of(model).slots[path].layer for path in selected(model).factors}
