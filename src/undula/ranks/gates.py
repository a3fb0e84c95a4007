"""What the allocators that move gates have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import LowRank, Method
from .allocator import Allocator
from .procedure import Course


def gate_of(method: Method) -> str | None:
    """The name of the factor that gates the ranks of this method; None where it has none."""
    return method.undropped().gate


def live(adapter: Adapter) -> dict[str, int]:
    """{site: number of ranks whose gate is not zero}, of the sites that have a gate."""
    gates = {s: f[name] for s, f in adapter.factors.items() if (name := gate_of(adapter.methods[s])) is not None}
    if not gates:
        return {}
    counts = torch.stack([torch.count_nonzero(g).cpu() for g in gates.values()])
    return dict(zip(gates, counts.tolist(), strict=True))


@torch.no_grad()
def in_use(adapter: Adapter) -> dict[str, int]:
    """{site: its rank}, of the sites on the rung LowRank: ranks whose gate is zero left out, what restarts have left
    behind counted in."""
    pairs = {s: m.pair(adapter.factors[s]) for s, m in adapter.methods.items() if isinstance(m, LowRank)}
    return {s: len(A_RI) for s, (_, A_RI) in pairs.items()} | live(adapter)


def spread(amount: int, room: Sequence[int]) -> list[int]:
    """`amount` dealt out one by one, in order, to places with this much room each: as equally as possible, and no more
    than there is room for."""
    given = [0] * len(room)
    while amount > 0 and any(g < most for g, most in zip(given, room, strict=True)):
        for i, most in enumerate(room):
            if amount > 0 and given[i] < most:
                given[i], amount = given[i] + 1, amount - 1
    return given


class GateAllocator(Allocator):
    """Moves gates; sees the method inside dropout."""

    def serves(self, method: Method) -> bool:
        return isinstance(method.undropped(), self.works_on)


class GateCourse(Course):
    """The sites and their gates in parallel lists.  Shapes stay as they are while it runs."""

    def __init__(self, allocator: Allocator, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(allocator, model, optimizer, steps)
        self.sites = list(self.adapter.factors)
        if not self.sites:
            raise ValueError(f"{allocator!r}: the adapter has no sites")

    @property
    def gates(self) -> list[Tensor]:
        """The live gate of every site."""
        named = ((place, gate_of(place.method)) for place in self.places())
        return [place.f[name] for place, name in named if name is not None]

    def factor(self, name: str) -> list[Tensor]:
        """This factor of every site."""
        return [p.f[name] for p in self.places()]

    def ranks(self) -> dict[str, int]:
        """{site: ranks whose gate is not zero}."""
        return live(self.adapter)


def agreed(t: Tensor, device: torch.device) -> Tensor:
    """`t` as the first process has it: what was measured, and not computed from shared gradients, may differ.  It goes
    by way of `device`, where the adapter is: processes on GPUs exchange nothing that lies elsewhere (nccl)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return t
    there = t.to(device)
    torch.distributed.broadcast(there, 0)
    return there.to(t.device)
