"""Many trainings at once on one base: jobs that begin, take a step in every round, and end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..train.concluding import Diverged
from ..train.fit import Interrupted
from ..train.measure import PeakMemory
from ..train.run import REPORT, Run
from ..train.stop import Stop, stopping
from ..train.tasks.causal_lm import CausalLM
from . import checkpoint, ending
from .base import Base
from .causal import Causal
from .checks import check
from .course import Course
from .encoders import Encoders
from .job import DIVERGED, DONE, FAILED, RUNNING, STOPPED, WAITING, Job, is_full, told_of
from .kept import Directory, Kept
from .rounds import Plan, Rounds, one, tried
from .view import Silent, View


class Engine:
    """Trains the runs, each into its own directory, which is an ordinary run's then.

        engine = Engine({"a": Run(...), "b": Run(...)})
        reports = engine.run()

    The runs share model, dtype and bits; methods, ranks, data, rates, schedules, lengths and seeds are each one's own.
    `planner` packs a round's rows into micro-batches; None: one micro-batch for all of them.  A job that fails or
    diverges ends with a record of it, and no other one notices.  With `resume`, those that have begun go on from the
    last round at which all were saved: to the bit as without the interruption.  `kept`: of jobs whose place is no
    directory.  Raises ValueError with all that is wrong with the runs, before anything starts.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        *,
        planner: Plan | None = None,
        resume: bool = False,
        view: View | None = None,
        kept: Mapping[str, Kept] | None = None,
    ):
        check(runs)
        self.jobs = {name: Job(name, run, kept=(kept or {}).get(name) or Directory()) for name, run in runs.items()}
        self.resume, self.view = resume, view or Silent()
        self.round = 0  # how many were taken
        first = next(iter(runs.values()))
        self.base: Base = Causal() if isinstance(first.task, CausalLM) else Encoders()
        self.rounds = Rounds(self.base, planner or one, self.view)
        self._begun = time.perf_counter()
        self._saved = 0  # the round of the last checkpoints
        self._asked: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._over = False  # whether nobody will answer any more
        self._opened = False
        self.memory = PeakMemory()

    # What others may call at any time, also from another thread

    def add(self, name: str, run: Run, kept: Kept | None = None) -> None:
        """One more job, from the next round on.  Raises ValueError for one that cannot train beside the others,
        RuntimeError when all have ended."""
        with self._lock:
            if self._over:
                raise RuntimeError(f"the jobs have ended, and {name!r} was not begun: give it to another call")
            if name in self.jobs:
                raise ValueError(f"a job is called {name!r} already; there are: {', '.join(self.jobs)}")
            check({**{n: job.run for n, job in self.jobs.items()}, name: run})
            job = Job(name, run, kept=kept or Directory())
            self.jobs = {**self.jobs, name: job}  # another dict: this one may be walked through meanwhile
            self._asked.append(lambda: self._join(job))

    def stop(self, name: str) -> None:
        """Ends a job before the next round: what it has learned is its result.  Raises LookupError."""
        if name not in self.jobs:
            raise LookupError(f"no job is called {name!r}; there are: {', '.join(self.jobs)}")
        self._ask(lambda: self._stopped(self.jobs[name]))

    def _ask(self, what: Callable[[], None]) -> None:
        with self._lock:
            self._asked.append(what)

    # Running

    def run(self) -> dict[str, dict[str, Any] | None]:
        """Trains until no job is left.  Returns their reports, None of one that failed (see `Job.error`).

        Raises Interrupted after Ctrl-C or SIGTERM: every job is saved then, and `resume` goes on."""
        stop = Stop()
        with stopping(stop):
            return self.train(lambda: stop.asked)

    def train(self, asked: Callable[[], bool] = lambda: False) -> dict[str, dict[str, Any] | None]:
        """As `run`, where someone else hears of signals; `asked` whether to stop."""
        with contextlib.closing(self.base):
            self.open()
            while self._goes_on():
                self._answer()
                self.step()
                if asked() and self.courses:
                    self._save()
                    raise Interrupted(f"stopped at round {self.round}, and {len(self.courses)} jobs are saved")
        return {name: job.report for name, job in self.jobs.items()}

    def _goes_on(self) -> bool:
        with self._lock:
            self._over = not (self.courses or self._asked)
            return not self._over

    @property
    def courses(self) -> list[Course]:
        """The jobs that run, in their order."""
        return [job.course for job in self.jobs.values() if job.course is not None]

    def open(self) -> None:
        """Opens the base and all jobs, and measures what has not been; `run` does it, where nobody has."""
        if self._opened:
            return
        self._opened = True
        self.memory.__enter__()
        outs = {name: job.run.out for name, job in self.jobs.items() if self.resume and not _finished(job)}
        number = checkpoint.common(outs)
        self.round = number or 0
        for job in list(self.jobs.values()):
            self._start(job)
        if self.courses and number is None:
            self._save()

    def _join(self, job: Job) -> None:
        if job.state != WAITING:  # it was added before the others began, with which it did
            return
        self._start(job)
        if job.course is not None:
            self._save()

    def _start(self, job: Job) -> None:
        """Begins a job, or goes on with it.  Of one that cannot it is kept why."""
        if self.resume and _finished(job):
            ending.remembered(job)
            return
        try:
            going_on = job.kept.began(job, self.resume)
            ready, adapter = self.base.prepared(job.run, job.name, job.kept.read)
            with self.base.placed(job.name):
                course = Course(job, ready, adapter)
            course.alone = self.base.alone(adapter)
            with self.base.selected(course):
                job.kept.before(course, going_on)
            if going_on:
                self._restore(course)
        except Exception as error:
            if is_full(error):
                raise
            self._failed(job, error)
            self.base.forget(job.name)
            return
        job.course, job.state = course, RUNNING
        self.view.begun(job)
        if course.ended is not None or job.step >= job.steps:
            self._conclude(course)

    def _restore(self, course: Course) -> None:
        """From the common round; a job that was not at it goes on from its own last one."""
        there = checkpoint.rounds(course.ready.run.out)
        number = self.round if self.round in there else next((n for n in there if n <= self.round), None)
        if number is not None:
            checkpoint.restore(course, *checkpoint.read(course.ready.run.out, number))

    def _answer(self) -> None:
        """Does what others asked for since the last round."""
        with self._lock:
            asked, self._asked = self._asked, []
        for each in asked:
            each()

    def _stopped(self, job: Job) -> None:
        if job.course is not None:
            job.course.ended = STOPPED
            self._end([job.course])
        elif job.state == WAITING:
            job.state = STOPPED

    # A round

    def step(self) -> None:
        """One step of every job that runs."""
        courses = self.courses
        if courses:
            self.rounds.take(courses)
            self.round += 1
            self._after_round(courses)

    def _after_round(self, courses: Sequence[Course]) -> None:
        for course in courses:
            if course.ended is None and course.control.should_evaluate:
                with self.base.selected(course):
                    tried(course, course.evaluate)
            if course.ended is None and (course.job.step >= course.job.steps or course.control.should_training_stop):
                course.ended = DONE
        over = [course for course in courses if course.ended is not None]
        every = min((course.save_every for course in courses), default=1)
        if over:
            self._end(over)
        elif self.round - self._saved >= every:
            self._save()

    # Ends

    def _end(self, over: Sequence[Course]) -> None:
        """All are saved first: a kill meanwhile leaves each where it is."""
        self._save()
        for course in over:
            self._conclude(course)

    def _conclude(self, course: Course) -> None:
        """Measures what was trained, and writes the report."""
        job = course.job
        try:
            if course.ended == FAILED:
                raise RuntimeError(job.error)
            with self.base.selected(course):
                others = [name for name in self.jobs if name != job.name]
                job.report = job.kept.report(course, self._begun, self.memory, others)
            job.state = STOPPED if course.ended == STOPPED else DONE
        except Diverged as error:
            job.state, job.error, job.report = DIVERGED, str(error), ending.written(job)
        except Exception as error:
            if is_full(error):
                raise
            self._failed(job, error, told=job.error)
        job.course = None
        self.base.forget(job.name)
        if job.state != FAILED:
            self.view.ended(job)

    def _failed(self, job: Job, error: Exception, told: str | None = None) -> None:
        job.state, job.error = FAILED, told or told_of(error)
        job.kept.failed(job)
        self.view.ended(job)

    def _save(self) -> None:
        courses = self.courses
        among = [course.job.name for course in courses]
        for course in courses:
            course.job.kept.save(course, self.round, among)
        for course in courses:
            course.job.kept.saved(course)
        self._saved = self.round


def _finished(job: Job) -> bool:
    return (job.run.out / REPORT).is_file()
