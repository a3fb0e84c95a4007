"""The verb `train_many`: from jobs to their reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..host.build import assigned, chosen_parameters, outlined
from ..host.where import choose
from ..io.outline import head
from ..io.whole import alone_in
from ..train.activations import saved
from ..train.doubts import finite
from ..train.fit import Interrupted, train
from ..train.measure import PeakMemory, versions
from ..train.recipe import Recipe
from ..train.run import REPORT, RUN, Run, write_json
from .beforehand import Beforehand
from .checks import check, faults_of
from .cost import Memory
from .engine import Engine
from .file import Unfit, read, wrong_name
from .job import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, is_full
from .packing import KNEE, Packing
from .place import SUMMARY, VERSION, as_asked, check_place, told_in
from .view import Silent, View

BESIDE = 1.5  # activations and what a backward computes beside them, of what a forward keeps
SAMPLES = 64, 128  # tokens of the forwards whose activations are counted


def many(
    jobs: str | Path | Mapping[str, Recipe],
    out: str | Path,
    *,
    resume: bool = False,
    budget: int | None = None,
    view: View | None = None,
) -> dict[str, Job]:
    """See `undula.train_many`."""
    runs, out = runs_of(jobs, out, resume, faults_of), Path(out)
    check(runs)
    with alone_in(out):
        try:
            return Many(runs, out, resume, budget, view or Silent()).run()
        except OSError as error:
            if not is_full(error):
                raise
            told = (
                f"{out} is full; the jobs are kept as they were at their last checkpoints: make room, and resume them"
            )
            raise OSError(error.errno, f"{error.strerror}: {told} (--resume)") from error


def runs_of(jobs: str | Path | Mapping[str, Recipe], out: str | Path, resume: bool, unfit: Unfit) -> dict[str, Run]:
    """{name: run in OUT/NAME}.  Raises what `read` raises, or ValueError for recipes whose names or places will not
    do."""
    if not isinstance(jobs, Mapping):
        return read(jobs, out, resume=resume, unfit=unfit)
    runs, wrong, looked = {}, [], Beforehand(resume)
    for name, recipe in jobs.items():
        if why := wrong_name(name):
            wrong.append(why)
            continue
        runs[name] = Run(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}, out=Path(out) / name)
        try:
            check_place(runs[name], resume)
        except (OSError, ValueError, LookupError) as error:
            wrong.append(f"{name}: {error}")
        wrong += [f"{name}: {why}" for _, why in looked.at(runs[name])]
    if wrong:
        raise ValueError("\n".join(wrong))
    return runs


class Many:
    """One call of `train_many`: an engine, its planner, and the jobs that wait for memory."""

    def __init__(self, runs: Mapping[str, Run], out: Path, resume: bool, budget: int | None, view: View):
        self.runs, self.out, self.resume, self.budget, self.view = dict(runs), out, resume, budget, view
        self.told = told_in(out / SUMMARY) if resume else {}
        self.packing = Packing(self.told.get("tokens"), self.told.get("tried") or (), self._write)
        self.memory: Memory | None = None
        self.began = time.perf_counter()

    def run(self) -> dict[str, Job]:
        """See `train_many`."""
        first = {n: r for n, r in self.runs.items() if self._goes_first(r)} or dict([next(iter(self.runs.items()))])
        self.waiting = [name for name in self.runs if name not in first]
        with PeakMemory() as self.peak:
            self.engine = self.packing.engine = Engine(first, planner=self.packing, resume=self.resume, view=self)
            try:
                self.engine.open()
                self._write()
                self.engine.run()
            finally:
                self.peak.read()
                self._write()
        return self.jobs

    @property
    def jobs(self) -> dict[str, Job]:
        """All jobs in their order, those that wait too."""
        known = self.engine.jobs
        return {name: known.get(name) or Job(name, run) for name, run in self.runs.items()}

    def _goes_first(self, run: Run) -> bool:
        """Without a budget all do; else what began before, or has ended."""
        return self.budget is None or (self.resume and (run.out / RUN).is_file())

    # Memory

    def _admit(self) -> None:
        """Lets jobs begin that there is room for; one at least trains, and tells what activations take."""
        if not self.waiting:
            return
        if self.memory is None:
            self.memory = self._measured()
        running = [name for name, job in self.engine.jobs.items() if job.state in (RUNNING, WAITING)]
        if self.memory is None and running:
            return
        model = getattr(self.engine.base, "held", None)
        held = [0 if model is None else job_bytes(model, self.runs[name]) for name in running]
        while self.waiting:
            more = 0 if model is None else job_bytes(model, self.runs[self.waiting[0]])
            if held and not (self.memory is not None and self.memory.fits([*held, more], SAMPLES[0])):
                break
            name = self.waiting.pop(0)
            self.engine.add(name, self.runs[name])
            held.append(more)
        if self.memory is not None:
            self.packing.most = self.memory.tokens(held, self.packing.most or KNEE)

    def _measured(self) -> Memory | None:
        """What base and activations take; None where no job is there to tell."""
        courses = [course for course in self.engine.courses if not course.alone][:1]
        if not courses:
            return None
        base, kept = self.engine.base, []
        for tokens in SAMPLES:
            with saved(base.held) as found:
                base.gradients([(courses[0], base.sample(courses[0], tokens), tokens)])
            kept.append(found["bytes"])
        per_token = BESIDE * max(kept[1] - kept[0], 0) / (SAMPLES[1] - SAMPLES[0])
        weights = {t.data_ptr(): t.nbytes for t in (*base.held.parameters(), *base.held.buffers())}
        own = sum(p.nbytes for course in courses for p in course.parameters)
        return Memory(sum(weights.values()) - own, per_token, self.budget)

    # What the engine tells

    def begun(self, job: Job) -> None:
        self.view.begun(job)
        self._admit()

    def stepped(self, job: Job) -> None:
        self.view.stepped(job)

    def ended(self, job: Job) -> None:
        self.view.ended(job)
        self._admit()
        self._write()

    def said(self, text: str) -> None:
        self.view.said(text)

    def _write(self) -> None:
        self.peak.read()
        summary(self.out, self.jobs, time.perf_counter() - self.began, {
            "tried": list(self.packing.encode()), "tokens": self.packing.most,
            "peak_memory_bytes": self.peak.bytes, "peak_memory_is": self.peak.how,
        })  # fmt: skip


def job_bytes(model: nn.Module, run: Run) -> int:
    """What a job holds beside the base: its factors, and of each number that trains in float32 a gradient and what the
    optimiser remembers of it.  0 where a job cannot be attached, which its start says."""
    try:
        adapter = _outline(model, run)
        tensors = {id(t): t for f in adapter.factors.values() for t in f.values()} if adapter else {}
        held = sum(t.numel() * t.element_size() for t in tensors.values())
        trained = sum(t.numel() for t in tensors.values() if t.requires_grad)
        full = [p.numel() for p in chosen_parameters(model, run.full).values()] if run.full else []
        return held + 4 * sum(full) + 4 * (1 + run.optimiser.remembers) * (trained + sum(full))
    except (LookupError, ValueError, TypeError, RuntimeError, OSError):
        return 0


def _outline(model: nn.Module, run: Run) -> Adapter | None:
    """The adapter that a job will have, without its numbers."""
    if run.begin_from is not None:
        return head(run.begin_from).outline()
    if run.method is None:
        return None
    layers = choose(model, run.where, run.exclude)
    return outlined(layers, assigned(layers, run.method, run.overrides))


def one_by_one(
    jobs: str | Path | Mapping[str, Recipe], out: str | Path, *, resume: bool = False, view: View | None = None
) -> dict[str, Job]:
    """What `train_many` does, one job after the other, each by `undula.train` with a base of its own: to compare with,
    and for jobs that cannot share a step.  Raises and returns what `train_many` does."""
    runs, out = runs_of(jobs, out, resume, lambda _: {}), Path(out)
    with alone_in(out):
        return _one_by_one(runs, out, resume, view or Silent())


def _one_by_one(runs: Mapping[str, Run], out: Path, resume: bool, view: View) -> dict[str, Job]:
    from .following import Following

    made, began = {name: Job(name, run) for name, run in runs.items()}, time.perf_counter()
    for job in made.values():
        if resume and (job.run.out / REPORT).is_file():
            _remember(job)
            continue
        try:
            going_on = resume and (job.run.out / RUN).is_file()
            job.report = train(job.run, resume=going_on, callbacks=[Following(job, view)])
            job.state = STOPPED if job.report["state"] == "stopped" else DONE
        except Interrupted:
            summary(out, made, time.perf_counter() - began, {})
            raise
        except Exception as error:  # what one job does must not stop the others
            job.state, job.error = FAILED, f"{type(error).__name__}: {error}"
            if (job.run.out / REPORT).is_file():
                _remember(job)
        view.ended(job)
        summary(out, made, time.perf_counter() - began, {})
    return made


def _remember(job: Job) -> None:
    from .ending import remembered

    remembered(job)


def summary(out: Path, jobs: Mapping[str, Job], seconds: float, more: Mapping[str, Any]) -> None:
    """Writes OUT/jobs.json."""
    before = told_in(out / SUMMARY).get("jobs", {})  # jobs of another file too, whose words a later resume will want
    told = {name: kept for name, kept in before.items() if name not in jobs and (out / name / RUN).is_file()}
    told |= {name: row(job) for name, job in jobs.items()}
    data = {"version": VERSION, "jobs": told, "seconds": round(seconds, 3), **more, "versions": versions()}
    write_json(out / SUMMARY, finite(data))


def row(job: Job) -> dict[str, Any]:
    """A job in the summary."""
    report = job.report or {}
    metric = report.get("metric")
    figures = {k: (report.get(k) or {}).get(metric) for k in ("before", "after")} if metric else {}
    return {
        "state": job.state, "step": job.step, "steps": job.steps, "loss": job.loss, "tokens": job.tokens,
        "metric": metric, "before": figures.get("before"), "after": figures.get("after"), "error": job.error,
        "run": as_asked(job.run),
    }  # fmt: skip
