"""Budget: ranks that were decided before training, from a table or from a total."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.ranges import Count
from ..host.where import matches
from ..methods.gated import GatedLoRA
from .allocator import Allocator
from .gates import GateAllocator, GateCourse, spread
from .procedure import Quality


@Allocator.register
@dataclass(frozen=True)
class Budget(GateAllocator):
    """Opens `ranks` of the sites that match, or `total` ranks spread over all sites as equally as possible.

    ranks=("*.q_proj=4", "*.v_proj=0"): the first pattern that matches counts; other sites stay as they are.  Of a total
    the remainder goes to the first sites.
    """

    works_on = (GatedLoRA,)

    ranks: tuple[str, ...] = ()
    total: Count | None = None

    def __post_init__(self) -> None:
        if bool(self.ranks) == (self.total is not None):
            raise ValueError(f"either ranks=('pattern=rank', ...) or total=n is needed, found {self!r}")
        for line in self.ranks:
            if not line.rpartition("=")[0] or not line.rpartition("=")[2].isdecimal():
                raise ValueError(f"a rank is written pattern=rank, as in '*.q_proj=4'; found {line!r}")

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> BudgetCourse:
        return BudgetCourse(self, model, optimizer, steps)

    def table(self, room: dict[str, int]) -> dict[str, int]:
        """{site: rank} for sites with these capacities.  Raises LookupError, ValueError."""
        if self.total is not None:
            if not 1 <= self.total <= sum(room.values()):
                raise ValueError(f"{self!r}: the adapter has room for 1 to {sum(room.values())} ranks")
            return dict(zip(room, spread(self.total, list(room.values())), strict=True))
        pairs = [(p, int(r)) for p, _, r in (line.rpartition("=") for line in self.ranks)]
        for pattern, _ in pairs:
            if not any(matches(site, pattern) for site in room):
                raise LookupError(f"{pattern!r} matches none of the adapter's sites: {', '.join(room)}")
        found = {s: next((r for p, r in pairs if matches(s, p)), None) for s in room}
        table = {s: r for s, r in found.items() if r is not None}
        over = {s: r for s, r in table.items() if r > room[s]}
        if over:
            raise ValueError(
                f"{self!r}: there is room for fewer ranks at {', '.join(f'{s} ({room[s]})' for s in over)}"
            )
        return table


class BudgetCourse(GateCourse):
    """Everything happens when it begins.  At the first ranks of a site, which are all alike then."""

    def __init__(self, how: Budget, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.table = how.table({s: len(g) for s, g in zip(self.sites, self.gates, strict=True)})

    @torch.no_grad()
    def on_begin(self) -> None:
        for site, gate in zip(self.sites, self.gates, strict=True):
            if site in self.table:
                gate.zero_()[: self.table[site]] = 1
