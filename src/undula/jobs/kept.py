"""What there is of a job beside its steps: where its rows come from, what is measured meanwhile, and what is left."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..train.evaluating import Evaluations, same_draws
from ..train.fit import measured_before
from ..train.measure import PeakMemory
from ..train.resume import claim
from ..train.rows import RunRows, rows_of
from ..train.run import RUN, Run, write_json
from . import checkpoint, ending
from .job import Job

if TYPE_CHECKING:
    from ..core.adapter import Live
    from .course import Course


class Kept(abc.ABC):
    """Whatever is told of a `course`, its adapter is selected then."""

    def read(self, run: Run) -> RunRows:
        """The rows of a job."""
        return rows_of(run)

    @abc.abstractmethod
    def began(self, job: Job, resume: bool) -> bool:
        """Takes the place of a job that is about to begin.  Whether it goes on with what lies there."""

    @abc.abstractmethod
    def before(self, course: Course, going_on: bool) -> None:
        """Measures what is there before the first step."""

    @abc.abstractmethod
    def listening(self, course: Course) -> Any:
        """What hears of the job's steps as a Trainer's callback does, and asks for evaluations."""

    @abc.abstractmethod
    def measure(self, course: Course) -> None:
        """An evaluation while it trains."""

    @abc.abstractmethod
    def save(self, course: Course, round: int, among: Sequence[str]) -> None:
        """Keeps a job as it is at a round, with these others (nothing is selected)."""

    @abc.abstractmethod
    def saved(self, course: Course) -> None:
        """All jobs are kept at one round now."""

    @abc.abstractmethod
    def report(self, course: Course, begun: float, memory: PeakMemory, among: Sequence[str]) -> dict[str, Any]:
        """What a job came to.  Raises what `concluded` raises."""

    @abc.abstractmethod
    def failed(self, job: Job) -> None:
        """A job has ended without a report."""


class Directory(Kept):
    """An ordinary run's, as `undula train` has it."""

    def began(self, job: Job, resume: bool) -> bool:
        going_on = resume and (job.run.out / RUN).is_file()
        claim(job.run, going_on)
        return going_on

    def before(self, course: Course, going_on: bool) -> None:
        course.before = measured_before(course.ready, going_on)

    def listening(self, course: Course) -> Any:
        return Best(course)

    def measure(self, course: Course) -> None:
        run = course.ready.run
        with same_draws():
            found = run.task.watched(course.ready.model, course.ready.held, run.batch)
        course.points.append({"step": course.job.step, **found})
        metrics = {f"eval_{k}": v for k, v in found.items()}
        course.evaluations.on_evaluate(None, course.state, course.control, metrics=metrics, model=course.ready.model)

    def save(self, course: Course, round: int, among: Sequence[str]) -> None:
        checkpoint.save(course, round, list(among))

    def saved(self, course: Course) -> None:
        checkpoint.rotate(course)
        course.evaluations.on_save(None, course.state, course.control)

    def report(self, course: Course, begun: float, memory: PeakMemory, among: Sequence[str]) -> dict[str, Any]:
        return ending.report(course, begun, memory, list(among))

    def failed(self, job: Job) -> None:
        if job.run.out.is_dir():
            write_json(job.run.out / ending.FAILURE, {"error": job.error, "step": job.step, "steps": job.steps})


class Best(Evaluations):
    """Evaluations of a job: what is kept of the best is its own adapter."""

    def __init__(self, course: Course):
        super().__init__(course.job.run, len(course.ready.held))
        self.course = course

    def adapter(self, model: Any) -> Live:
        return self.course.adapter
