"""ReLoRA (Lialin, Muckatira, Shivagunde, Rumshisky 2023, arXiv:2307.05695): high rank through low-rank updates.

    W <- W + s B A;  A anew, B = 0;  99 % of the optimiser's moments pruned;  learning rate from 0 again

in equal cycles.  The rank of the sum grows by up to r with each.  The paper pretrains, after a phase in full rank that
is no part of this.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.method import LowRank
from ..core.ranges import Count, Few, Seed, Share
from ..optim.schedules import Schedule
from .allocator import Allocator
from .procedure import Course, Quality
from .restart import (
    Cycles,
    Moments,
    Pruned,
    check_cycles,
    ends,
    last_begins,
)


@Allocator.register
@dataclass(frozen=True)
class ReLoRA(Allocator):
    """Restarts every site at the end of each cycle: `every` updates, or `cycles` equal parts (4 where neither is
    given).  Its learning rate is `Jagged`."""

    works_on = (LowRank,)
    source = "Lialin et al. 2023, arXiv:2307.05695"

    cycles: Few | None = None
    every: Count | None = None
    moments: Moments = Pruned(0.99)
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_cycles(self.cycles, self.every)

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return last_begins(steps, self.cycles, self.every)

    def schedule(self) -> Schedule:
        return Jagged(self.cycles, self.every)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> Course:
        return _ReLoRA(self, model, optimizer, steps)


class _ReLoRA(Cycles):
    def __init__(self, allocator: ReLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(allocator, model, optimizer, steps, allocator.cycles, allocator.every)
        self.allocator = allocator

    def turn(self, cycle: int) -> None:
        self.restart(self.places(), self.allocator.seed, cycle, self.allocator.moments)


def jagged(
    steps: int, cycles: int | None = None, warmup: int = 0, *, every: int | None = None, floor: float = 0.0
) -> Callable[[int], float]:
    """ReLoRA's jagged cosine, for `torch.optim.lr_scheduler.LambdaLR`: a cosine over all `steps` from 1 to `floor`,
    times a linear ramp from 0 over the first `warmup` updates of every cycle (divided as in `ReLoRA`)."""
    check_cycles(cycles, every)
    starts = [0, *ends(steps, cycles, every)[:-1]]

    def multiplier(step: int) -> float:
        since = step - starts[bisect.bisect_right(starts, step) - 1]
        through = min(max(step - warmup, 0) / max(steps - warmup, 1), 1.0)
        ramp = min(since / warmup, 1.0) if warmup else 1.0
        return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * through)))

    return multiplier


@Schedule.register
@dataclass(frozen=True)
class Jagged(Schedule):
    """ReLoRA's (see `jagged`): a cosine to `floor`, ramped up anew over the share of each cycle that the warm-up is of
    all updates."""

    cycles: Few | None = None
    every: Count | None = None
    floor: Share = 0.0

    def __post_init__(self) -> None:
        check_cycles(self.cycles, self.every)

    def multiplier(self, steps: int, warmup: int) -> Callable[[int], float]:
        each = math.ceil(warmup / len(ends(steps, self.cycles, self.every)))
        cycles = 4 if self.cycles is None and self.every is None else self.cycles
        return jagged(steps, cycles, each, every=self.every, floor=self.floor)
