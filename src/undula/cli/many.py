"""`undula train-many`: many trainings on one base at once."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from ..core.extras import needs
from ..train import Interrupted
from . import shell
from .sizes import bytes_of

if TYPE_CHECKING:
    from ..jobs.job import Job

TENTHS = 10  # lines of a job's course where there is no terminal
EVERY = 4.0  # times in a second that the table is drawn
WORKERS = 2  # where nobody says how many


class Executor(StrEnum):
    """Where jobs are trained."""

    HERE = "here"
    RAY = "ray"


def train_many(
    path: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="The jobs: a TOML file (docs/jobs.md).")],
    *,
    out: Annotated[Path, typer.Option(help="The directory to write: OUT/NAME for each job, OUT/jobs.json.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the jobs in OUT; those that have ended are left as they are.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory for base, jobs and activations, as in 4GB; jobs that do not fit wait.", metavar="SIZE"
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="One job after the other, each by `undula train`: to compare with.")
    ] = False,
    executor: Annotated[
        Executor, typer.Option(help="Where: in this process, or spread over the workers of Ray, each with its share.")
    ] = Executor.HERE,
    workers: Annotated[int | None, typer.Option(min=1, help="How many workers share the jobs; 2 by default.")] = None,
    to: shell.Json = None,
) -> None:
    """Train many adapters on one base at once, each as if alone.  Ctrl-C saves all jobs and says how to go on."""
    bytes_ = None if budget is None else bytes_of(budget, "--budget")
    _check_together(plain, budget, executor, workers)
    try:
        if executor is Executor.RAY:
            found = _spread(path, out, resume, bytes_, workers or WORKERS)
        else:
            found = _run(path, out, resume, bytes_, plain)
    except Interrupted:
        more = " --plain" if plain else f" --budget {shlex.quote(budget)}" if budget else ""
        more += "" if executor is Executor.HERE else f" --executor {executor} --workers {workers or WORKERS}"
        raise Interrupted(
            f"stopped, with all jobs saved; go on with: undula train-many {shlex.quote(str(path))} "
            f"--out {shlex.quote(str(out))} --resume{more}"
        ) from None
    told = list(_rows(found))
    shell.write(to, told)
    if str(to) != "-":
        shell.out.print(shell.table(told))
        done = sum(job.state in ("done", "stopped") for job in found.values())
        shell.note(f"{done} of {len(found)} jobs are trained. Saved in {out}/NAME; {out}/jobs.json has them all")
    for name, job in found.items():
        if job.error:
            shell.remark(f"{name} {job.state}: {job.error}")
    if any(job.state in ("failed", "diverged") for job in found.values()):
        raise typer.Exit(1)


@needs("train")
def _run(path: Path, out: Path, resume: bool, budget: int | None, plain: bool) -> Mapping[str, Job]:
    from ..jobs.many import many, one_by_one
    from ..train.base import quiet

    with quiet(), Watching() as view:
        if plain:
            return one_by_one(path, out, resume=resume, view=view)
        return many(path, out, resume=resume, budget=budget, view=view)


def _spread(path: Path, out: Path, resume: bool, budget: int | None, workers: int) -> Mapping[str, Job]:
    from ..jobs.spread import train_spread
    from ..train.base import quiet

    with quiet(), Watching() as view:
        return train_spread(path, out, workers=workers, resume=resume, budget=budget, view=view)


def _check_together(plain: bool, budget: str | None, executor: Executor, workers: int | None) -> None:
    """Refuses options that would do nothing beside the others.  Raises ValueError."""
    if workers is not None and executor is Executor.HERE:
        raise ValueError("--workers would do nothing without --executor ray: jobs share this process")
    if plain and executor is Executor.RAY:
        raise ValueError("--plain trains one job after the other here: leave out --executor ray, or --plain")
    if plain and budget is not None:
        raise ValueError("--budget would do nothing beside --plain: one job at a time is in memory")


def _rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from ..jobs.many import row

    for name, job in found.items():
        told = row(job)
        yield {
            "job": name, "state": told["state"], "steps": f"{told['step']} of {told['steps']}", "loss": told["loss"],
            "metric": told["metric"], "before": told["before"], "after": told["after"],
        }  # fmt: skip


class Watching:
    """A table of jobs that lives; without a terminal a line for each tenth of a job; nothing with --quiet."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}
        self.since: dict[str, tuple[float, int, int]] = {}  # (clock, step, tokens) where a job began or went on
        self.line: dict[str, int] = {}  # the step of its next line
        self.live = Live(
            console=shell.err,
            refresh_per_second=EVERY,
            transient=True,
            get_renderable=self.table,
            redirect_stdout=False,
        )
        self.draws = shell.err.is_terminal and not shell.voice.quiet

    def __enter__(self) -> Watching:
        if self.draws:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.draws:
            self.live.stop()

    def begun(self, job: Any) -> None:
        self.jobs[job.name] = job
        self.since[job.name] = time.perf_counter(), job.step, job.tokens
        self.line[job.name] = job.step + 1
        if not self.draws:
            self._print(
                f"{job.name}: begins, {job.steps} steps" if not job.step else f"{job.name}: goes on, {_at(job)}"
            )

    def stepped(self, job: Any) -> None:
        if not self.draws and job.step >= self.line.get(job.name, 0):
            self._print(f"{job.name}: {_at(job)}{_loss(job)}, {self._speed(job)}")
            self.line[job.name] = job.step + max(1, job.steps // TENTHS)

    def ended(self, job: Any) -> None:
        self.jobs[job.name] = job
        self._print(f"{job.name}: {job.state}, {_at(job)}{_loss(job)}" + (f": {job.error}" if job.error else ""))

    def said(self, text: str) -> None:
        self._print(text)

    def table(self) -> Table:
        made = Table("job", "step", "loss", "tokens/s", "left", box=None)
        for job in [job for job in self.jobs.values() if job.state == "running"][: max(shell.err.height - 4, 1)]:
            speed, left = self._pace(job)
            loss = "" if job.loss is None else f"{job.loss:.4g}"
            made.add_row(job.name, f"{job.step}/{job.steps}", loss, f"{speed:,.0f}" if speed else "", left)
        return made

    def _pace(self, job: Any) -> tuple[float, str]:
        """(tokens in a second, the time that is left) since the job began here."""
        began, step, tokens = self.since.get(job.name, (time.perf_counter(), job.step, job.tokens))
        seconds, steps = time.perf_counter() - began, job.step - step
        if steps < 1 or seconds <= 0:
            return 0.0, ""
        return (job.tokens - tokens) / seconds, _time((job.steps - job.step) * seconds / steps)

    def _speed(self, job: Any) -> str:
        speed, left = self._pace(job)
        return ", ".join(([f"{speed:,.0f} tokens/s"] if speed else []) + ([f"{left} left"] if left else []))

    def _print(self, text: str) -> None:
        if not shell.voice.quiet:
            shell.err.print(text, soft_wrap=True, highlight=False, markup=False)


def _at(job: Any) -> str:
    return f"step {job.step} of {job.steps}"


def _loss(job: Any) -> str:
    return "" if job.loss is None else f", loss {job.loss:.4g}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
