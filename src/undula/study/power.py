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
    seeds_for_pooled: int | None  # the fewest with which all of them could be decided; None: more than S.EXACT
    seeds_for_every: int | None

    @property
    def words(self) -> str:
        """A sentence for the plan."""
        parts = [f"{self.single_decidable} of {self.single} comparisons within a group"]
        if self.pooled:
            parts.append(f"{self.pooled_decidable} of {self.pooled} over all groups together")
        needed = {"those over all groups": self.seeds_for_pooled if self.pooled else None, "all": self.seeds_for_every}
        more = [f"{n} seeds for {what}" for what, n in needed.items() if n is not None and n > self.seeds]
        told = f"{self.seeds} seeds could decide {' and '.join(parts)}, however large the differences"
        return told + (f"; it takes {', '.join(more)}" if more else "")


def power(plan: Plan, rule: S.Rule = S.Rule()) -> Power:
    """What the study's seeds can decide by the exact test, corrected for all its comparisons."""
    seeds = len(plan.study.seeds)
    single, pooled = _decidable(plan, seeds, rule)
    needed = {n: _decidable(plan, n, rule) for n in range(1, S.EXACT + 1)}
    return Power(
        *(seeds, len(single), sum(single), len(pooled), sum(pooled)),
        seeds_for_pooled=next((n for n, (_, over) in needed.items() if all(over)), None),
        seeds_for_every=next((n for n, (each, over) in needed.items() if all(each) and all(over)), None),
    )


def _decidable(plan: Plan, seeds: int, rule: S.Rule) -> tuple[list[bool], list[bool]]:
    """(within a group, over all groups): which comparisons so many seeds could decide."""
    groups = {(c.base, c.rows.label, c.budget) for c in plan.cells}
    pairs = list(_pairs(plan, seeds))
    within = [n for counts in pairs for n in counts]
    over = [sum(counts) for counts in pairs] if len(groups) > 1 else []
    found = S.decidable([S.smallest_p(n, rule) for n in within + over], rule.alpha)
    return found[: len(within)], found[len(within) :]


def _pairs(plan: Plan, seeds: int) -> Iterator[list[int]]:
    """Of each arm beside the baseline its pairs in each group.  One run of an untrained model makes no comparison."""
    for arm in plan.study.arms:
        pairs = [seeds for c in plan.cells if c.arm == arm and not c.untrained]
        if pairs and arm.name != plan.study.baseline:
            yield pairs
