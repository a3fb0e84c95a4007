"""Changing the rank of live factors, with the optimiser's state following."""

from __future__ import annotations

import torch
from torch import Tensor


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
