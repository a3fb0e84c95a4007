"""Changing the rank of live factors, with the optimiser's state following."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..host import change, selected


@torch.no_grad()
def set_data(optimizer: torch.optim.Optimizer | None, p: Tensor, new: Tensor, rows: Tensor, dim: int) -> None:
    """Gives the live parameter `p` the numbers of `new`, whose indices along `dim` were `rows` of the old ones (-1:
    new there).  What the optimiser remembers of an entry stays with it, of a new one it remembers nothing."""
    state = {} if optimizer is None else optimizer.state.get(p, {})
    for name, t in state.items():
        if isinstance(t, Tensor) and t.shape == p.shape:
            taken = t.index_select(dim, rows.clamp_min(0))
            keep = (rows >= 0).view([-1 if d == dim else 1 for d in range(t.ndim)])
            state[name] = taken * keep
    p.data, p.grad = new, None


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer | None, p: Tensor, rows: Tensor, dim: int) -> None:
    """Clears what the optimiser remembers of the indices `rows` of `p` along `dim`: they start again."""
    state = {} if optimizer is None else optimizer.state.get(p, {})
    for t in state.values():
        if isinstance(t, Tensor) and t.shape == p.shape:
            t.index_fill_(dim, rows, 0.0)


@torch.no_grad()
def adopt(model: nn.Module, saved: Adapter) -> None:
    """Puts the methods and numbers of `saved` onto the selected adapter of `model`, which has the same sites.

    Factors that are there already stay the objects that the optimiser knows, even where their shape changes; tensors
    that `saved` shares are shared.  Raises ValueError for other sites or other parameters in full.
    """
    live = selected(model)
    if set(live.factors) != set(saved.factors) or set(live.full) != set(saved.full):
        raise ValueError(
            f"the saved adapter has {len(saved.factors)} sites and {len(saved.full)} parameters in full; the live one "
            f"has {len(live.factors)} and {len(live.full)}, or others"
        )
    once: dict[int, nn.Parameter] = {}
    for site, f in saved.factors.items():
        now = live.factors[site]
        change(model, site, saved.methods[site], {k: _taken(now.get(k), t, once) for k, t in f.items()})
    for name, t in saved.full.items():
        live.full[name].copy_(t)


def _taken(old: Tensor | None, new: Tensor, once: dict[int, nn.Parameter]) -> nn.Parameter:
    """The parameter `old` (or a new one) with the numbers of `new`; one for each tensor that is shared."""
    if id(new) not in once:
        p = old if isinstance(old, nn.Parameter) else nn.Parameter(new.detach().clone(), new.requires_grad)
        if p is old:
            p.data = new.detach().to(p.device, p.dtype, copy=True)
        once[id(new)] = p
    return once[id(new)]
