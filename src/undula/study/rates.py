"""Choosing a learning rate: a geometric grid that grows until the best rate does not lie at its edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Rates still to try, or the chosen one.  chosen None with nothing to try: every rate failed."""

    more: tuple[float, ...] = ()
    chosen: float | None = None
    bracketed: bool = False


def decide(
    grid: Sequence[float], scores: Mapping[float, float | None], factor: float, extend: int, more_is_better: bool
) -> Decision:
    """What follows from the scores so far.

    grid: the rates to begin with; scores: {rate: mean validation metric}, None where every run failed or was pruned,
    absent where a run is still to come.  When the best rate is the lowest (highest) tried, the next lower (higher) one
    by `factor` is tried too, at most `extend` times at either end.  Of equal scores the lower rate wins.  The middle of
    the grid comes first: where runs are ended early, it is against a rate that is likely to be good.
    """
    first = sorted(grid)
    tried = list(first)
    for _ in range(extend):  # what lies beyond a gap was tried by an older form of the study
        tried += [lr for lr in (_rounded(min(tried) / factor), _rounded(max(tried) * factor)) if lr in scores]
    tried.sort()
    middle = first[(len(first) - 1) // 2]
    missing = tuple(lr for lr in sorted(tried, key=lambda lr: abs(math.log(lr / middle))) if lr not in scores)
    if missing:
        return Decision(more=missing)
    alive = {lr: s for lr in tried if (s := scores[lr]) is not None}
    sign = 1 if more_is_better else -1
    best = max(alive, key=lambda lr: (sign * alive[lr], -lr)) if alive else tried[0]  # where all diverge: go down
    lower, higher = sum(lr < first[0] for lr in tried), sum(lr > first[-1] for lr in tried)
    if best == tried[0] and lower < extend:
        return Decision(more=(_rounded(tried[0] / factor),))
    if alive and best == tried[-1] and higher < extend:
        return Decision(more=(_rounded(tried[-1] * factor),))
    if not alive:
        return Decision()
    return Decision(chosen=best, bracketed=tried[0] < best < tried[-1])


def _rounded(lr: float) -> float:
    """Three digits: a rate that people can read and type."""
    return float(f"{lr:.3g}")
