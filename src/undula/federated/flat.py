"""What trains of an adapter as one vector of float64, in the order of its layers; and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..core.adapter import Adapter


def trained(adapter: Adapter) -> Iterator[tuple[str, str, Tensor]]:
    """(layer, factor, tensor) of what trains, each tensor once, whichever layers share it; parameters in full come
    last, with an empty factor name."""
    seen: set[int] = set()
    for site, name, t in [*adapter.tensors(), *((name, "", t) for name, t in adapter.full.items())]:
        if t.requires_grad and id(t) not in seen:
            seen.add(id(t))
            yield site, name, t


def flat(adapter: Adapter, like: Adapter | None = None) -> Tensor:
    """P (n).  Raises ValueError where nothing trains, or where it is not made as `like` is."""
    parts = list(trained(adapter))
    if not parts:
        raise ValueError("nothing in this adapter trains")
    if like is not None:
        own, theirs = ({(s, n): tuple(t.shape) for s, n, t in trained(a)} for a in (adapter, like))
        for key in [*theirs, *own]:
            if own.get(key) != theirs.get(key):
                raise ValueError(
                    f"{'.'.join(filter(None, key))} is {own.get(key, 'not there')} in a client and "
                    f"{theirs.get(key, 'not there')} in the server's adapter"
                )
        parts = [(s, n, (adapter.factors[s][n] if n else adapter.full[s])) for s, n, _ in trained(like)]
    return torch.cat([t.detach().double().flatten() for _, _, t in parts])


def unflat(adapter: Adapter, P: Tensor) -> Adapter:
    """`adapter` with the numbers of P in the place of what trains; what layers share stays shared."""
    made: dict[int, Tensor] = {}
    first = 0
    for _, _, t in trained(adapter):
        made[id(t)] = P[first : first + t.numel()].view(t.shape).to(t.dtype).clone().requires_grad_()
        first += t.numel()
    factors = {site: {name: made.get(id(t), t) for name, t in f.items()} for site, f in adapter.factors.items()}
    return replace(adapter, factors=factors, full={name: made.get(id(t), t) for name, t in adapter.full.items()})
