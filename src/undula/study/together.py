"""Runs of a study that share a model, several at a time: one base in memory, and their rows in the same micro-batches.

A run's figures are those that it has by itself, within rounding: a job's weights do not depend on who trains beside it
(`undula.jobs`).  Where random numbers are drawn while a run trains (dropout), they are others among others than alone:
such runs, and those that can share no step, are made one after the other.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..jobs.checks import ALONE, HEADS, drops, unfit, wishes
from ..jobs.engine import Engine
from ..jobs.job import Job
from ..jobs.kept import Kept
from ..jobs.packing import Packing
from ..jobs.view import Silent
from ..train.base import quiet
from ..train.checkpoints import restore
from ..train.evaluating import same_draws
from ..train.measure import PeakMemory
from ..train.recipe import Recipe
from ..train.rows import RunRows
from ..train.run import Run
from ..train.tasks.task import Examples
from .orders import Ended, Order, ordered, record
from .sources import Sources
from .store import Record, Store
from .trial import Diverged, Trial, about, begin, came_to, rows_of, tested
from .watch import Watch

if TYPE_CHECKING:
    from ..jobs.course import Course
    from .plan import Plan
    from .view import View


class Alone:
    """Why a run is made by itself; None for one that may be made together with others.  Rates and seeds do not matter:
    each configuration is looked at once."""

    def __init__(self) -> None:
        self.seen: dict[str, str | None] = {}

    def __call__(self, trial: Trial) -> str | None:
        run = dataclasses.replace(trial.run, lr=Recipe.lr, seed=Recipe.seed)
        if (key := repr(run)) not in self.seen:
            self.seen[key] = _alone(run)
        return self.seen[key]


def _alone(run: Recipe) -> str | None:
    if run.method is None and (run.full or not run.task.has_head):
        return "it trains the whole model, or nothing"
    if why := next(unfit(_own(run)), None):
        return why.removesuffix(f". {ALONE}")
    found = [*drops(_own(run), () if run.task.has_head else HEADS)]
    return f"dropout draws other numbers among others: {', '.join(found)}" if found else None


def check_together(plan: Plan, most: int) -> None:
    """Raises ValueError where the runs of a study cannot be made together, so many at a time."""
    if most < 2:
        raise ValueError(f"together is how many runs train at once, 2 at least; found {most}")
    alone = Alone()
    reasons = {alone(trial) for trial in (*plan.trials().values(), *(c.asker for c in plan.cells if c.auto))}
    if None not in reasons:
        raise ValueError(f"no runs of this study can be made together: {'; '.join(sorted(map(str, reasons))[:3])}")


def _own(run: Recipe) -> Run:
    return Run.of(run, Path())


class Drawn(Exception):
    """A run has drawn random numbers while it trained."""


class Figures(Kept):
    """What a study keeps of a run: its figures.  `ended`: what it came to, when it has."""

    def __init__(self, order: Order, sources: Sources):
        self.order, self.sources = order, sources
        self.watch = Watch(halving=order.halving, rivals=order.rivals)
        self.ended: Ended | None = None
        self.began_at = time.perf_counter()
        self.opening = 0.0  # seconds
        self.base: Any = None  # of the engine

    def read(self, run: Run) -> RunRows:
        task, self.parts = rows_of(self.order.trial, self.sources)
        return RunRows(task, self.parts["train"], self.parts["validation"], {}, ())

    def began(self, job: Job, resume: bool) -> bool:
        self.began_at = time.perf_counter()
        return False

    def before(self, course: Course, going_on: bool) -> None:
        ready = dataclasses.replace(course.ready, adapter=course.adapter)
        begin(self.order.trial, ready, self.watch, self.parts)
        self.opening = time.perf_counter() - self.began_at

    def listening(self, course: Course) -> Any:
        return Listening(self.watch)

    def measure(self, course: Course) -> None:
        with same_draws():
            self.watch.measure(course.state, course.control)

    def save(self, course: Course, round: int, among: Sequence[str]) -> None: ...

    def saved(self, course: Course) -> None: ...

    def failed(self, job: Job) -> None: ...

    def report(self, course: Course, begun: float, memory: PeakMemory, among: Sequence[str]) -> dict[str, Any]:
        try:
            result = self._figures(course)
        except Diverged as error:
            self.ended = Ended(self.order, None, f"{type(error).__name__}: {error}")
            return {}
        self.ended = Ended(self.order, result, None)
        return result

    def _figures(self, course: Course) -> dict[str, Any]:
        """The fields of `trial.perform`.  Seconds are the run's share of the steps, by tokens; what the process took
        of the processor and of memory is no run's own."""
        since, trial, watch = time.perf_counter(), self.order.trial, self.watch
        losses = [
            (int(step), loss) for step, loss in course.losses if step % course.log_every == 0 or not math.isfinite(loss)
        ]
        found = came_to(watch.ready, watch, losses, course.job.step)
        found |= {"seconds": round(course.seconds, 3)} | about(trial, watch.ready, watch, self.sources)
        found["made"] |= {"together": True}
        if trial.tested:
            assert watch.kept is not None
            restore(course.adapter, watch.kept)
            ready = self.base.by_itself(watch.ready)
            found |= tested(ready, Examples(ready.run.task, self.parts["test"], ready.processor))
        measured = self.opening + watch.spent.wall + time.perf_counter() - since
        return found | {"wall_seconds": round(course.seconds + measured, 3)}


class Listening(TrainerCallback):
    """Asks for the evaluations of a study."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = self.watch.stepped(state.global_step, state.max_steps)


class Together(Silent):
    """Makes runs of a study, at most so many at a time.  mine: the keys of what this process has in hand."""

    def __init__(self, plan: Plan, store: Store, view: View, mine: set[str], most: int):
        self.plan, self.store, self.view, self.mine, self.most = plan, store, view, mine, most
        self.running: dict[str, Figures] = {}
        self.why: dict[str, str | None] = {}  # {key of a run: why it is made by itself}
        self.apart: set[Any] = set()  # what runs wish for that gain nothing by sharing steps, or must not
        self.told: set[str] = set()
        self.alone = Alone()

    def make(self, due: Sequence[Trial], known: Mapping[str, Record]) -> bool:
        """Makes those that are due and may be made together, and what becomes due meanwhile.  False: there are not two,
        or others have them."""
        first = next((t for t in due if self._may(t)), None)
        mates = [] if first is None else self._mates(due, first)
        if len(mates) < 2:
            return False
        self.wishes = wishes(_own(mates[0].run))
        with tempfile.TemporaryDirectory() as scratch, quiet():
            self.scratch = Path(scratch)
            taken = self._taken(mates, known, self.most)
            if not taken:
                return False
            packing = self.packing = Packing()
            self.engine = packing.engine = Engine(
                {key: self._run(key) for key in taken}, planner=packing, view=self, kept=taken
            )
            for each in taken.values():
                each.base = self.engine.base
            try:
                self.engine.train()
            except Drawn as error:
                self._give_up(str(error))
        if packing.loses and self.wishes not in self.apart:
            self._part("sharing steps gains nothing here: the runs that are left are made one after the other")
        return True

    def _may(self, trial: Trial) -> bool:
        if trial.key not in self.why:
            self.why[trial.key] = why = self.alone(trial)
            if why is not None:
                self._say(f"made one after the other: {why}")
        return self.why[trial.key] is None and wishes(_own(trial.run)) not in self.apart

    def _mates(self, due: Iterable[Trial], first: Trial) -> list[Trial]:
        shared = wishes(_own(first.run))
        return [trial for trial in due if self._may(trial) and wishes(_own(trial.run)) == shared]

    def _taken(self, mates: Iterable[Trial], known: Mapping[str, Record], room: int) -> dict[str, Figures]:
        """Claims runs for this process, as many as there is room for."""
        taken: dict[str, Figures] = {}
        for trial in mates:
            if len(taken) >= room:
                break
            self.mine.add(trial.key)  # first, so that no interruption leaves a claim behind
            if self.store.claim(trial):
                taken[trial.key] = Figures(ordered(self.plan, trial, known), self.plan.sources)
                self.running[trial.key] = taken[trial.key]
                self.view.begun(trial)
            else:
                self.mine.remove(trial.key)
        return taken

    def _run(self, key: str) -> Run:
        return Run.of(self.running[key].order.trial.run, self.scratch / key)

    # What the engine tells

    def stepped(self, job: Job) -> None:
        if job.step == 1 and self.engine.base.draws(job.name):
            raise Drawn("random numbers are drawn while this model trains, which would be others among others")
        jobs = [self.engine.jobs[key] for key in self.running if key in self.engine.jobs]
        self.view.step(sum(j.step for j in jobs), sum(j.steps for j in jobs))

    def ended(self, job: Job) -> None:
        """Keeps what a run came to.  One that could not be made among others is made by itself, where whatever is
        wrong with it is its own."""
        found = self.running.pop(job.name)
        if found.ended is None:
            self.store.release([job.name])
            self.why[job.name] = "it failed among others"
            self._say(f"{found.order.trial.label}, made by itself: {job.error}")
        else:
            self.view.ended(record(self.plan, self.store, found.ended))
        self.mine.discard(job.name)
        job.kept = job.report = None  # with all that it has in memory
        self._more()

    def said(self, text: str) -> None:
        self.view.said(text)

    def _more(self) -> None:
        """Lets runs join that have become due."""
        known = self.plan.known(self.store)
        self.view.counts(self.plan.counts(known))
        room = self.most - len(self.running)
        if self.packing.loses or room < 1:
            return
        due = self.plan.due(known)
        mates = [t for t in due if t.key not in self.running and self._may(t)]
        mates = [t for t in mates if wishes(_own(t.run)) == self.wishes]
        for key, each in self._taken(mates, known, room).items():
            each.base = self.engine.base
            self.engine.add(key, self._run(key), each)

    # Runs that go their own ways

    def _give_up(self, why: str) -> None:
        self._part(f"made one after the other: {why}")
        self.store.release(list(self.running))
        self.mine.difference_update(self.running)
        self.running.clear()

    def _part(self, why: str) -> None:
        self.apart.add(self.wishes)
        self._say(why)

    def _say(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.view.said(text)
