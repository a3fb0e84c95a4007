"""One round: a step of each job, whose rows share micro-batches.

A planner packs the rows of all jobs.  A job's loss is that of training it alone, and the adapters share no parameter:
so the gradient of the sum of all losses is each job's own.  A round in which no micro-batch mixes jobs is one step of
`undula train` after the other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ..ranks.memory import finite
from .base import Base, Part
from .course import Course, Row, Step
from .job import is_full
from .planner import Piece
from .view import View

T = TypeVar("T")
Plan = Callable[[Sequence[Piece]], Sequence[Sequence[Piece]]]
Steps = Mapping[str, tuple[Course, Step]]


def one(pieces: Sequence[Piece]) -> Sequence[Sequence[Piece]]:
    """The plan of a single micro-batch."""
    return [pieces]


class Rounds:
    """Takes rounds on a base.  spent: the seconds of the last one, by `clock`."""

    def __init__(self, base: Base, planner: Plan, view: View):
        self.base, self.planner, self.view = base, planner, view
        self.spent, self.clock = 0.0, time.perf_counter
        self._apart = False  # whether jobs do not mix on this model

    def take(self, courses: Sequence[Course]) -> None:
        """One step of each; of a job that fails in it, its end."""
        steps = {c.job.name: (c, step) for c in courses if (step := tried(c, c.next_step)) is not None}
        left = {name: len(step.rows) for name, (_, step) in steps.items()}
        batches = self._planned(steps)
        apart = all(len({piece.job for piece in batch}) == 1 for batch in batches)
        begun, since = self.clock(), time.perf_counter()
        for batch in batches:
            for course, mine, _ in self._computed(_parts(batch, steps), apart):
                name = course.job.name
                left[name] -= len(mine)
                if left[name] or course.ended is not None:
                    continue
                tried(course, functools.partial(course.stepped, steps[name][1]))
                if course.ended is None:
                    self.view.stepped(course.job)
        self.spent = self.clock() - begun
        self._share(steps, time.perf_counter() - since)

    @staticmethod
    def _share(steps: Steps, seconds: float) -> None:
        """Gives each job its part of a round's time, by its tokens."""
        every = sum(row.tokens for _, step in steps.values() for row in step.rows) or 1
        for course, step in steps.values():
            course.seconds += seconds * sum(row.tokens for row in step.rows) / every

    def _planned(self, steps: Steps) -> list[Sequence[Piece]]:
        """The micro-batches of a round: those of jobs that cannot mix by themselves."""
        every = {
            name: [Piece(name, course.job.step, i, row.tokens) for i, row in enumerate(step.rows)]
            for name, (course, step) in steps.items()
        }
        apart = [name for name, (course, _) in steps.items() if course.alone or self._apart]
        groups = [[p for name, own in every.items() if name not in apart for p in own], *(every[n] for n in apart)]
        return [batch for pieces in groups if pieces for batch in self.planner(pieces)]

    def _computed(self, parts: Sequence[Part], apart: bool) -> list[Part]:
        """Computes a micro-batch, and gives each job its gradients.  Where anything goes wrong, each job's rows are
        computed by its own step: only the one whose fault it is ends.  Returns the parts that are done."""
        parts = [part for part in parts if part[0].ended is None]
        if not parts:
            return []
        try:
            found = self.base.gradients(parts, apart)
        except Exception as error:
            if apart or parts[0][0].alone:
                parts[0][0].fail(error)
                return []
            return self._each(parts, error)
        sound = [finite(t.detach() for t in (loss, *grads) if t is not None) for loss, grads in found]
        if not all(sound) and len(parts) > 1:
            return [part for each in parts for part in self._computed([each], True)]
        for (course, _, _), (loss, grads), fine in zip(parts, found, sound, strict=True):
            if fine:
                course.take(loss, grads)
            else:
                course.diverge(float(loss))
        return [part for part, fine in zip(parts, sound, strict=True) if fine]

    def _each(self, parts: Sequence[Part], error: Exception) -> list[Part]:
        """What could not be computed through `rows`, job by job.  What can be so was no fault of a job's."""
        done = [part for each in parts for part in self._computed([each], True)]
        if len(done) == len(parts) and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            if len(parts) == 1:
                parts[0][0].alone = True
            else:
                self._apart = True
                self.view.said(f"jobs do not mix on this model, each has micro-batches of its own: {error}")
        return done


def tried(course: Course, what: Callable[[], T]) -> T | None:
    """what(), or None where it ends its job.  A full disk ends none: OSError."""
    try:
        return what()
    except Exception as error:
        if is_full(error):
            raise
        course.fail(error)
        return None


def _parts(batch: Sequence[Piece], steps: Steps) -> list[Part]:
    """The rows of each job in a micro-batch, in the jobs' order, the longest first."""
    rows: dict[str, list[Row]] = {}
    for name in steps:
        mine = [steps[name][1].rows[piece.index] for piece in batch if piece.job == name]
        if mine:
            rows[name] = sorted(mine, key=lambda row: -row.tokens)
    return [(steps[name][0], mine, steps[name][1].items) for name, mine in rows.items()]
