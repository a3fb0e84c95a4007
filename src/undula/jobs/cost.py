"""What a micro-batch costs: seconds by tokens and jobs, about, and bytes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds of a micro-batch, forwards and backwards: by its tokens between the `points` (tokens, seconds), and
    `further` for each job beyond the first."""

    points: tuple[tuple[int, float], ...]
    further: float = 0.0

    def __post_init__(self) -> None:
        tokens = [t for t, _ in self.points]
        if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 1:
            raise ValueError(
                f"a cost model is of points (tokens, seconds) by growing tokens, found {self.points!r:.80}"
            )

    def seconds(self, tokens: int, jobs: int = 1) -> float:
        """Between the points and beyond them along straight lines."""
        ends = self.points
        if len(ends) == 1:
            alone = ends[0][1] * max(1.0, tokens / ends[0][0])
        else:
            at = min(max(bisect.bisect_left([t for t, _ in ends], tokens), 1), len(ends) - 1)
            (t0, s0), (t1, s1) = ends[at - 1], ends[at]
            alone = max(s0 + (s1 - s0) * (tokens - t0) / (t1 - t0), 0.0)
        return alone + self.further * (jobs - 1)


# In proportion, by which plans are proposed, and chosen where none is timed: fitted to four jobs packed against
# apart on two AVX2 cores with 576 to 1024 columns (1.65 times as fast at 16 tokens a job, 1.26 at 64)
USUAL = Cost(((16, 0.79), (64, 1.39), (256, 3.9), (1024, 13.8)), further=0.175)


@dataclass(frozen=True)
class Memory:
    """Bytes: of the frozen base, of a job's share beside it, of a token's activations.  `budget` None: no bound."""

    base: int
    per_token: float
    budget: int | None = None

    def fits(self, jobs: Sequence[int], longest: int) -> bool:
        """Whether jobs of so many bytes can train at once, in micro-batches of `longest` tokens, a row's, at least."""
        return self.budget is None or self.base + sum(jobs) + self.per_token * longest <= self.budget

    def tokens(self, jobs: Sequence[int], most: int) -> int:
        """How many tokens a micro-batch may have beside jobs of so many bytes, at most `most`."""
        if self.budget is None or not self.per_token:
            return most
        return max(1, min(most, int((self.budget - self.base - sum(jobs)) / self.per_token)))
