"""Choosing a learning rate: a geometric grid that grows until the best rate does not lie at its edge."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """Rates still to try, or the chosen one.  chosen None with nothing to try: every rate failed."""

    more: tuple[float, ...] = ()
    chosen: float | None = None
    bracketed: bool = False
    asked: tuple[float, ...] = field(default=(), compare=False)  # every rate so far, in the order in which it is due


def decide(
    grid: Sequence[float], scores: Mapping[float, float | None], factor: float, extend: int, more_is_better: bool
) -> Decision:
    """What follows from the scores so far.

    grid: the rates to begin with; scores: {rate: mean validation metric}, None where every run failed or was pruned,
    absent where a run is still to come.  When the best rate is the lowest (highest) tried, the next lower (higher) one
    by `factor` is tried too, at most `extend` times at either end.  Of equal scores the lower rate wins.  The middle of
    the grid comes first: where runs are ended early, it is against a rate that is likely to be good.
    """
    tried, lower, higher = sorted(grid), 0, 0
    middle = tried[(len(tried) - 1) // 2]
    asked = sorted(tried, key=lambda lr: abs(math.log(lr / middle)))
    sign = 1 if more_is_better else -1
    while True:  # step by step, as if nothing had been tried: scores beyond are of an older form of the study
        missing = tuple(lr for lr in asked if lr not in scores)
        if missing:
            return Decision(more=missing, asked=tuple(asked))
        alive = {lr: s for lr in tried if (s := scores[lr]) is not None}
        best = max(alive, key=lambda lr: (sign * alive[lr], -lr)) if alive else tried[0]  # where all diverge: go down
        if best == tried[0] and lower < extend:
            tried, lower = [_rounded(tried[0] / factor), *tried], lower + 1
            asked.append(tried[0])
        elif alive and best == tried[-1] and higher < extend:
            tried, higher = [*tried, _rounded(tried[-1] * factor)], higher + 1
            asked.append(tried[-1])
        elif not alive:
            return Decision(asked=tuple(asked))
        else:
            return Decision(chosen=best, bracketed=tried[0] < best < tried[-1], asked=tuple(asked))


def around(rates: Sequence[float], factor: float) -> tuple[float, float, float]:
    """Three rates to begin a sweep with, a `factor` apart: around the median of those that were found, in log rate."""
    middle = math.exp(statistics.median(math.log(rate) for rate in rates))
    lower, centre, higher = (float(f"{middle * factor**i:.2g}") for i in (-1, 0, 1))
    return lower, centre, higher


def reachable(grid: Sequence[float], factor: float, extend: int) -> list[float]:
    """Every rate that `decide` could come to, lowest first."""
    found, low, high = set(grid), min(grid), max(grid)
    for _ in range(extend):
        low, high = _rounded(low / factor), _rounded(high * factor)
        found |= {low, high}
    return sorted(found)


def _rounded(lr: float) -> float:
    """Three digits: a rate that people can read and type."""
    return float(f"{lr:.3g}")
