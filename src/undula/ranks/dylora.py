"""DyLoRA's nested dropout (Valipour et al. 2022, arXiv:2210.07558): every update trains at a rank drawn anew.

b follows (seed, step) alone, so all processes draw the same one; it is one for the whole model.  Ranks that an update
does not train stay exactly as they are: an optimiser would still move them by its momentum and by weight decay, so they
and what it remembers of them are put back after its step.  Between updates the adapter stands at its full rank.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.choice import Choice
from ..core.method import Factors
from ..core.ranges import Inside, Rank, Seed
from ..kernels import frozen
from ..methods import dylora as law
from .allocator import Allocator
from .gates import GateAllocator
from .memory import moments, stand_still
from .procedure import Course, Quality


class Distribution(Choice):
    """Of the rank of an update."""

    @abc.abstractmethod
    def __call__(self, u: float, n: int) -> int:
        """A number in 1 .. n from a uniform u in [0, 1)."""


@Distribution.register
@dataclass(frozen=True)
class Uniform(Distribution):
    """All ranks alike."""

    def __call__(self, u: float, n: int) -> int:
        return 1 + int(u * n)


@Distribution.register
@dataclass(frozen=True)
class Geometric(Distribution):
    """P(b) in proportion to (1 - p)^b: small ranks more often."""

    p: Inside = 0.25

    def __call__(self, u: float, n: int) -> int:
        stay = 1 - self.p
        return min(n, 1 + int(math.log1p(-u * (1 - stay**n)) / math.log(stay)))


@Allocator.register
@dataclass(frozen=True)
class DyLoRA(GateAllocator):
    """A rank between `low` and the adapter's r for every update."""

    works_on = (law.DyLoRA,)
    source = "Valipour et al. 2022, arXiv:2210.07558"

    low: Rank = 1
    distribution: Distribution = Uniform()
    seed: Seed = 0

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> DyLoRACourse:
        return DyLoRACourse(self, model, optimizer, steps)


class DyLoRACourse(Course):
    def __init__(self, how: DyLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how
        self.methods: list[law.DyLoRA] = [p.method.undropped() for p in self.places()]  # type: ignore[misc]
        least = min(m.r for m in self.methods)
        if not 1 <= how.low <= least:
            raise ValueError(f"{how!r}: low lies between 1 and the least rank of the adapter, {least}")
        self.kept: list[tuple[Tensor, Tensor]] = []  # (what an update may not move, a copy of it)
        self.fresh: list[tuple[Tensor, Any]] = []  # (parameter, ranks) of which the optimiser knows nothing yet
        self.still: list[tuple[Tensor, slice, int]] = []  # (parameter, rows, dim) that an update does not train

    @property
    def f(self) -> list[Factors]:
        """The live factors of every site."""
        return [p.f for p in self.places()]

    @property
    def b(self) -> int:
        """The rank of the update that comes; sites of a lower rank use all they have."""
        u = int(frozen.integers(self.how.seed, ("DyLoRA", self.step), (1,), 2**31)) / 2**31
        return self.how.low - 1 + self.how.distribution(u, max(m.r for m in self.methods) - self.how.low + 1)

    @torch.no_grad()
    def on_forward(self) -> None:
        b = self.b
        for m, f in zip(self.methods, self.f, strict=True):
            f["b"].fill_(min(b, m.r))

    @torch.no_grad()
    def on_gradients(self) -> None:
        b = self.b
        self.kept, self.fresh, self.still = [], [], []
        for m, f in zip(self.methods, self.f, strict=True):
            for rows in m.nesting.still(min(b, m.r), m.r):
                if rows.start < rows.stop:
                    self._keep(f["A"], rows, 0)
                    self._keep(f["B"], rows, 1)

    def _keep(self, p: Tensor, rows: slice, dim: int) -> None:
        ranks = (*(slice(None),) * dim, rows)
        memory = moments(self.optimizer, p).values()
        self.kept += [(t[ranks], t[ranks].clone()) for t in (p, *memory)]
        self.still.append((p, rows, dim))
        if not memory:
            self.fresh.append((p, ranks))

    @torch.no_grad()
    def on_update(self) -> None:
        if self.kept:
            now, before = zip(*self.kept, strict=True)
            torch._foreach_copy_(list(now), list(before))
        for p, ranks in self.fresh:
            for t in moments(self.optimizer, p).values():
                t[ranks] = 0
        for p, rows, dim in self.still:
            stand_still(self.optimizer, p, rows, dim)

    @torch.no_grad()
    def on_close(self) -> None:
        self.kept, self.fresh, self.still = [], [], []
        for m, f in zip(self.methods, self.f, strict=True):
            f["b"].fill_(m.r)
