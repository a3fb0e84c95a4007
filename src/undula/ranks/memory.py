"""What an optimiser remembers of parameters, where an allocator makes some of their entries begin again.

Adam divides its moments by 1 - b^t, with t the steps of the whole parameter.  An entry whose moments were zeroed at
t - k has moments of k steps: undivided they would make its steps up to max_k (1 - b1^k) / sqrt(1 - b2^k), 6.5 times, as
long as those of a parameter that begins.  So the optimiser's state keeps for each entry at which t it began, and after
the optimiser's step the entry is put where 1 - b^k would have sent it.  Its memory of a parameter being the optimiser's
state, it is saved and loaded with that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BEGAN = "undula_began"  # in the optimiser's state of a parameter: t at which each entry began, 0 for the first


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """What the optimiser remembers of p entry by entry.  Raises TypeError where it keeps that in sums or in a
    quantised form, of which no single entry can be changed."""
    state = optimizer.state.get(p, {})
    found = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == p.shape and k != BEGAN}
    odd = [k for k, t in found.items() if not t.is_floating_point()]
    if odd:
        raise TypeError(
            f"{type(_bare(optimizer)).__name__} keeps {', '.join(odd)} as {found[odd[0]].dtype}: an allocator cannot "
            "make single entries begin again there. Use an optimiser with 32-bit state"
        )
    if sums := [k for k, t in state.items() if isinstance(t, Tensor) and k != BEGAN and _sums(t, p)]:
        raise TypeError(
            f"{type(_bare(optimizer)).__name__} keeps {', '.join(sums)}, sums of rows and columns: an allocator cannot "
            "make single entries begin again there. Use an optimiser that remembers each entry, such as AdamW"
        )
    return found


def _sums(t: Tensor, p: Tensor) -> bool:
    """Whether t can be one number for each row, or for each column, of the matrix p: Adafactor's second moments."""
    return p.ndim > 1 and t.shape != p.shape and t.numel() > 1 and t.numel() in (p.numel() // n for n in p.shape[-2:])


@torch.no_grad()
def begin_again(optimizer: torch.optim.Optimizer, p: Tensor, entries: Tensor) -> None:
    """Clears what the optimiser remembers of the entries of p where `entries` (broadcast to p) is True."""
    found = moments(optimizer, p)
    for t in found.values():
        t.mul_(~entries)
    if found and counts_steps(optimizer):
        began = _began(optimizer, p, entries)
        began.copy_(torch.where(entries, steps_of(optimizer, p), began))


def forget(optimizer: torch.optim.Optimizer, p: Tensor, rows: Tensor, dim: int) -> None:
    """Clears what the optimiser remembers of the indices `rows` of p along `dim`: they begin again."""
    entries = torch.zeros([n if d == dim else 1 for d, n in enumerate(p.shape)], dtype=torch.bool, device=p.device)
    begin_again(optimizer, p, entries.index_fill_(dim, rows.to(p.device), True))


def stand_still(optimizer: torch.optim.Optimizer, p: Tensor, rows: slice, dim: int) -> None:
    """Says that the indices `rows` of p along `dim` were no part of the step just made."""
    if counts_steps(optimizer) and moments(optimizer, p):
        still = torch.zeros([n if d == dim else 1 for d, n in enumerate(p.shape)], dtype=p.dtype, device=p.device)
        still.movedim(dim, 0)[rows] = 1
        _began(optimizer, p, still).add_(still)


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def counts_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one whose bias correction is known here: Adam or AdamW.  RAdam's and NAdam's stay as they are."""
    return isinstance(_bare(optimizer), torch.optim.Adam)


def steps_of(optimizer: torch.optim.Optimizer, p: Tensor) -> float:
    """Adam's t."""
    return float(optimizer.state[p]["step"])


def _began(optimizer: torch.optim.Optimizer, p: Tensor, like: Tensor) -> Tensor:
    """When the entries of p began, in a shape that `like` fits into."""
    state = optimizer.state[p]
    old = state.get(BEGAN, torch.zeros((1,) * p.ndim, dtype=p.dtype, device=p.device))
    state[BEGAN] = old.expand(torch.broadcast_shapes(old.shape, like.shape)).clone()
    return state[BEGAN]


@torch.no_grad()
def correct_steps(optimizer: torch.optim.Optimizer) -> None:
    """Puts entries that began later than their parameter where a bias correction of their own would have sent them."""
    if not counts_steps(optimizer):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if BEGAN in state and p.grad is not None:
                t = torch.as_tensor(state["step"], dtype=p.dtype, device=p.device)
                began, due = state[BEGAN], _step(state, group, t - state[BEGAN])
                p.add_(torch.where(began > 0, _step(state, group, t) - due, 0))


def _step(state: dict[str, Any], group: dict[str, Any], k: Tensor) -> Tensor:
    """lr times Adam's direction with the bias correction of k steps."""
    b1, b2 = (float(b) for b in group["betas"])
    m, v = state["exp_avg"], state.get("max_exp_avg_sq", state["exp_avg_sq"])
    k = k.clamp_min(1)
    return float(group["lr"]) * (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + group["eps"])


@torch.no_grad()
def finite_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every gradient that the optimiser would follow is finite."""
    return finite(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


@torch.no_grad()
def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers in all of them are; a device is looked at once for each type that they have there."""
    by_place: dict[Any, list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            by_place.setdefault((t.device, t.dtype), []).append(t)
    return all(bool(torch.stack(torch._foreach_norm(those, torch.inf)).isfinite().all()) for those in by_place.values())
