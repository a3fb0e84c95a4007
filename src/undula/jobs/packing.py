"""How the rounds of an engine are packed: by what was tried in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .planner import Batch, Piece
from .trial import APART, Tried

if TYPE_CHECKING:
    from .engine import Engine

KNEE = 256  # tokens of a micro-batch above which more gain nothing: what one job's batches need is the bound then
FRUGAL = 128  # of one where no budget bounds memory: eight jobs take at most 1.3 of what one takes then (docs/jobs.md)
LONG = 12  # steps: in shorter trainings there is no time to try plans


class Packing:
    """A planner of `engine`, which is said before the first round.  most: tokens of a micro-batch; None: FRUGAL, or
    what the largest batch of one job has.  told: what was tried before (`encode`); changed: see `Tried`."""

    engine: Engine

    def __init__(
        self,
        most: int | None = None,
        told: Sequence[Mapping[str, Any]] = (),
        changed: Callable[[], None] = lambda: None,
    ):
        self.most, self._told, self._changed = most, told, changed
        self.tried: Tried | None = None

    def __call__(self, pieces: Sequence[Piece]) -> list[Batch]:
        """The micro-batches of a round."""
        engine = self.engine
        if self.most is None:
            longest: dict[str, int] = {}
            for p in pieces:
                longest[p.job] = max(p.tokens, longest.get(p.job, 0))
            self.most = max(FRUGAL, *(n * engine.jobs[job].run.batch for job, n in longest.items()))
        if self.tried is None:
            self.tried = Tried(
                self.most, engine.base.size, lambda: engine.rounds.spent, lambda: engine.round,
                lambda: max(job.steps for job in engine.jobs.values()) >= LONG, self._changed,
            )  # fmt: skip
            self.tried.decode(self._told)
        self.tried.most = self.most
        return self.tried(pieces)

    def encode(self) -> Sequence[Mapping[str, Any]]:
        """What was tried, as JSON values."""
        return self._told if self.tried is None else self.tried.encode()

    @property
    def loses(self) -> bool:
        """Whether wherever ways were tried to their end, one job after the other was the quickest."""
        over = [t for t in (self.tried.trials.values() if self.tried else ()) if t.next() is None]
        return bool(over) and all(t.best() == APART for t in over)
