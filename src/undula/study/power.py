"""What so many seeds could decide, before anything has run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import statistics as S
from .plan import Plan


@dataclass(frozen=True)
class Power:
    """How many of the planned comparisons with the baseline some outcome could call a win or a loss."""

    seeds: int
    single: int  # comparisons within a group
    single_decidable: int
    pooled: int  # over all groups together
    pooled_decidable: int
    seeds_for_pooled: int  # the fewest with which all of them could be decided
    seeds_for_every: int

    @property
    def words(self) -> str:
        """A sentence for the plan."""
        parts = [f"{self.single_decidable} of {self.single} comparisons within a group"]
        if self.pooled:
            parts.append(f"{self.pooled_decidable} of {self.pooled} over all groups together")
        told = f"{self.seeds} seeds could decide {' and '.join(parts)}, however large the differences"
        needed = {"those over all groups": self.seeds_for_pooled if self.pooled else 0, "all": self.seeds_for_every}
        more = [f"{n} seeds for {what}" for what, n in needed.items() if n > self.seeds]
        return told + (f"; it takes {', '.join(more)}" if more else "")


def power(plan: Plan, rule: S.Rule = S.Rule()) -> Power:
    """What the study's seeds can decide by the exact test, corrected for all its comparisons."""
    seeds = len(plan.study.seeds)
    counts = list(_groups(plan))
    single = sum(counts)
    pooled = [n for n in counts if n > 1]
    pairs = [seeds] * single + [seeds * n for n in pooled]
    found = S.decidable([S.smallest_p(n, rule) for n in pairs], rule.alpha)
    return Power(
        *(seeds, single, sum(found[:single]), len(pooled), sum(found[single:])),
        seeds_for_pooled=S.seeds_for(len(pooled), rule.alpha, min(pooled)) if pooled else 0,
        seeds_for_every=S.seeds_for(len(pairs), rule.alpha) if pairs else 0,
    )


def _groups(plan: Plan) -> Iterator[int]:
    """In how many groups each arm is compared with the baseline.  One run of an untrained model is no comparison."""
    for arm in plan.study.arms:
        groups = sum(c.arm == arm and not c.untrained for c in plan.cells)
        if groups and arm.name != plan.study.baseline:
            yield groups
