"""What so many seeds could decide, before anything has run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import statistics as S
from .plan import Cell, Plan
from .splits import place


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
    shared: bool = False  # one sweep for all seeds: nothing will be called

    @property
    def words(self) -> str:
        """A sentence for the plan."""
        if self.shared:
            return (
                "no comparison will be called a win or a loss: [sweep] seeds lets all seeds of an arm share one choice "
                "of a rate, and its luck with it; without that line each seed sweeps for itself"
            )
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
    arms = list(_compared(plan))
    single = sum(map(len, arms))
    pooled = [len({(place(c.base.source), place(c.rows.source)) for c in cells}) for cells in arms if len(cells) > 1]
    pairs = [seeds] * single + [seeds * n for n in pooled]
    found = S.decidable([S.smallest_p(n, rule) for n in pairs], rule.alpha)
    shared = bool(plan.study.sweep.seeds) and any(s.seeds for s in plan.searches)
    found = [False] * len(found) if shared else found
    return Power(
        *(seeds, single, sum(found[:single]), len(pooled), sum(found[single:])),
        seeds_for_pooled=S.seeds_for(len(pooled), rule.alpha, min(pooled)) if pooled else 0,
        seeds_for_every=S.seeds_for(len(pairs), rule.alpha) if pairs else 0,
        shared=shared,
    )


def _compared(plan: Plan) -> Iterator[list[Cell]]:
    """The cells of each arm that are compared with the baseline.  One run of an untrained model is no comparison."""
    trained = [c for c in plan.cells if not c.untrained]
    there = {(c.base, c.rows.label, c.budget) for c in trained if c.arm.name == plan.study.baseline}
    for arm in plan.study.arms:
        cells = [c for c in trained if c.arm == arm and (c.base, c.rows.label, c.budget) in there]
        if cells and arm.name != plan.study.baseline:
            yield cells
