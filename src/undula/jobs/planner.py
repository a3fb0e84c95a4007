"""Which rows of which jobs are computed together: micro-batches under a budget of tokens.

A job's optimiser step is a set of rows, whose gradients add up in any order: so its rows may lie in several
micro-batches and those of other jobs beside them.  Two steps of one job never meet, because the second needs the
weights that the first leaves.  That is bin packing with an order among the bins of a job (LoRAFusion, arXiv 2510.00206;
on one machine there is no pipeline whose bubbles would ask for more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .cost import Cost


@dataclass(frozen=True)
class Piece:
    """A row of an optimiser step: `index` is its number in the step, `tokens` its length."""

    job: str
    step: int
    index: int
    tokens: int


Batch = list[Piece]
Size = Callable[[int, int, int], int]  # what so many rows, the longest of so many tokens, all of so many, fill


def flat(rows: int, longest: int, tokens: int) -> int:
    """Rows that lie one behind the other."""
    return tokens


def padded(rows: int, longest: int, tokens: int) -> int:
    """Rows that are filled up to the longest."""
    return rows * longest


def together(pieces: Iterable[Piece], budget: int, size: Size = flat) -> list[Batch]:
    """First-fit decreasing over the rows of all jobs, in the order in which they are computed.

    Rows of one step each need at most 11/9 OPT + 6/9 micro-batches, OPT being the fewest that are possible (Dosa 2007),
    rows as long as in `flat`.  Later steps of a job fill what earlier micro-batches leave free, but only behind those
    that hold the step before.  A row above the budget is alone in its micro-batch.
    """
    return _fitted([[piece] for piece in pieces], budget, size)


def wholes(pieces: Iterable[Piece], budget: int, size: Size = flat) -> list[Batch]:
    """As `together`, but what one job has room for in a micro-batch stays in one: fewer jobs share each, which is less
    where a further job costs; more may stay free (below half of each micro-batch but one)."""
    return _fitted(apart(pieces, budget, size), budget, size)


def apart(pieces: Iterable[Piece], budget: int, size: Size = flat) -> list[Batch]:
    """Jobs one after the other: a micro-batch has rows of one step of one job."""
    found: list[Batch] = []
    for _, step in groupby(_ordered([[p] for p in pieces]), key=lambda item: (item[0].job, item[0].step)):
        found += _fitted(list(step), budget, size)
    return found


def _ordered(items: Sequence[Batch]) -> list[Batch]:
    return sorted(items, key=lambda item: (item[0].job, item[0].step, item[0].index))


@dataclass
class _Bin:
    held: Batch = field(default_factory=list)
    longest: int = 0
    tokens: int = 0

    def filled(self, item: Batch, size: Size) -> int:
        """What it would hold with `item`."""
        longest = max(self.longest, *(p.tokens for p in item))
        return size(len(self.held) + len(item), longest, self.tokens + _tokens(item))

    def put(self, item: Batch) -> None:
        self.held += item
        self.longest = max(self.longest, *(p.tokens for p in item))
        self.tokens += _tokens(item)


def _tokens(item: Iterable[Piece]) -> int:
    return sum(piece.tokens for piece in item)


def _fitted(items: Sequence[Batch], budget: int, size: Size) -> list[Batch]:
    """First-fit decreasing of parts of steps, step after step of each job."""
    if budget < 1:
        raise ValueError(f"a micro-batch has a budget of 1 token or more, found {budget}")
    rounds: dict[str, list[int]] = {}  # the steps of each job, in their order
    for item in items:
        rounds.setdefault(item[0].job, []).append(item[0].step)
    place = {job: {step: i for i, step in enumerate(sorted(set(steps)))} for job, steps in rounds.items()}
    bins: list[_Bin] = []
    last: dict[tuple[str, int], int] = {}  # the last bin of each job's step, by its place among those here
    for item in sorted(_ordered(items), key=lambda item: (place[item[0].job][item[0].step], -_tokens(item))):
        which = item[0].job, place[item[0].job][item[0].step]
        first = last.get((which[0], which[1] - 1), -1) + 1
        at = next((i for i in range(first, len(bins)) if bins[i].filled(item, size) <= budget), len(bins))
        if at == len(bins):
            bins.append(_Bin())
        bins[at].put(item)
        last[which] = max(at, last.get(which, -1))
    return [_ordered_batch(b.held) for b in bins]


def _ordered_batch(held: Batch) -> Batch:
    """By jobs, whose rows then lie beside one another."""
    return sorted(held, key=lambda p: (p.job, p.step, p.index))


def seconds(batches: Iterable[Batch], cost: Cost, size: Size = flat) -> float:
    """What the cost model says of a plan."""
    found = 0.0
    for batch in batches:
        filled = size(len(batch), max(p.tokens for p in batch), _tokens(batch))
        found += cost.seconds(filled, len({p.job for p in batch}))
    return found
