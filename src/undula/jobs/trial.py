"""Which plan of a round is the quickest here: seen by taking a few rounds by each.

What mixing jobs gains depends on the machine, the model and the rows, and nothing tells it as well as the rounds
themselves, which are not lost: every one of them is a step of every job.  One job after the other is always among what
is tried, by the very step of `undula train`; so a training of some length is never much slower than without sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cost import USUAL
from .planner import Batch, Piece, Size, apart, seconds, together, wholes

Way = str  # how a round is packed, and into what part of the budget a micro-batch
HOW = {"together": together, "wholes": wholes, "apart": apart}
PARTS = (1, 2, 4)
APART: Way = "apart/1"
MIXED = tuple(f"{how}/{n}" for n in PARTS for how in ("wholes", "together"))
PROPOSED = 2  # of the mixed ones are tried, those that the usual costs favour
CLOSE = 1.25  # times the best: what takes longer than that is not tried again
LEAST = 64  # tokens: smaller micro-batches are not made of a larger budget
Shape = tuple[int, int]  # of a round: bits of the number of jobs, and of the tokens of each


@dataclass
class Taken:
    """A round that was taken to try a way; seconds: of each token, None where it did not come to an end."""

    way: Way
    round: int
    seconds: float | None = None


@dataclass
class Trial:
    """What was tried of one shape."""

    ways: list[Way]
    taken: list[Taken] = field(default_factory=list)

    def next(self) -> Way | None:
        """The way to be tried next, each twice in a row: its first round opens what it needs.  None: all were."""
        best = min((t.seconds for t in self.taken if t.seconds is not None), default=float("inf"))
        for way in self.ways:
            found = self._found(way)
            if not found or (len(found) == 1 and (way == self.ways[0] or found[0] <= CLOSE * best)):
                return way
        return None

    def best(self) -> Way:
        return min(self.ways, key=lambda way: min(self._found(way), default=float("inf")))

    def _found(self, way: Way) -> list[float]:
        return [t.seconds for t in self.taken if t.way == way and t.seconds is not None]


class Tried:
    """A planner.  most: the tokens of a micro-batch; spent() are the seconds of the last round, at() its number;
    changed() is called where a round is about to try something, so that it can be written down (`encode`): a training
    that goes on from a checkpoint packs its rows as it did.  long() False: nothing is tried, the usual costs decide.
    """

    def __init__(
        self,
        most: int,
        size: Size,
        spent: Callable[[], float],
        at: Callable[[], int],
        long: Callable[[], bool] = lambda: True,
        changed: Callable[[], None] = lambda: None,
    ):
        self.most, self.size, self.spent, self.at, self.long, self.changed = most, size, spent, at, long, changed
        self.trials: dict[Shape, Trial] = {}
        self._open: tuple[Taken, int] | None = None  # what the last round tried, and its tokens

    def __call__(self, pieces: Sequence[Piece]) -> list[Batch]:
        """The micro-batches in the order in which they are computed."""
        self._note()
        jobs = len({piece.job for piece in pieces})
        if jobs == 1:
            return apart(pieces, self.most, self.size)
        tokens = sum(piece.tokens for piece in pieces)
        shape = jobs.bit_length(), (tokens // jobs).bit_length()
        trial = self.trials.get(shape)
        if trial is None:
            ways = self._proposed(pieces)
            if not self.long():
                return self._plan(ways[0], pieces)
            trial = self.trials[shape] = Trial(sorted(ways, key=lambda way: way == APART))
        before = next((t for t in trial.taken if t.round == self.at()), None)
        way = trial.next() if before is None else before.way
        if way is None:
            return self._plan(trial.best(), pieces)
        if before is None:
            before = Taken(way, self.at())
            trial.taken.append(before)
            self.changed()
        self._open = (before, tokens) if before.seconds is None else None
        return self._plan(way, pieces)

    def _note(self) -> None:
        """What the round before this one took."""
        if self._open is not None:
            taken, tokens = self._open
            if taken.round == self.at() - 1:
                taken.seconds = self.spent() / tokens
            self._open = None

    def _proposed(self, pieces: Sequence[Piece]) -> list[Way]:
        """Apart, and the best of the plans that mix jobs, by the usual costs."""
        plans: dict[Way, list[Batch]] = {}
        for way in (APART, *MIXED):
            plan = self._plan(way, pieces)
            if plan not in plans.values():
                plans[way] = plan
        ranked = sorted(plans, key=lambda way: seconds(plans[way], USUAL, self.size))
        mixed = [way for way in ranked if way != APART][:PROPOSED]
        return [way for way in ranked if way == APART or way in mixed]

    def _plan(self, way: Way, pieces: Sequence[Piece]) -> list[Batch]:
        how, _, parts = way.partition("/")
        return HOW[how](pieces, max(min(LEAST, self.most), self.most // int(parts)), self.size)

    def encode(self) -> list[dict[str, Any]]:
        """As JSON values."""
        return [
            {"shape": list(shape), "ways": trial.ways, "taken": [[t.way, t.round, t.seconds] for t in trial.taken]}
            for shape, trial in self.trials.items()
        ]

    def decode(self, data: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what was written down."""
        for each in data:
            shape = int(each["shape"][0]), int(each["shape"][1])
            taken = [Taken(str(way), int(at), None if s is None else float(s)) for way, at, s in each["taken"]]
            self.trials[shape] = Trial([str(way) for way in each["ways"]], taken)
