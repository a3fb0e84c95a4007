# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula study`: an honest comparison of methods."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..core.options import split_pair
from ..train.measure import versions
from . import shell

ALONE = (
    "a study starts no processes any more; begin the same command several times, those with one --out share its runs "
    "(docs/study.md)"
)


def study(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="The study: a TOML file (docs/study.md).")],
    *,
    out: Annotated[Path | None, typer.Option(help="Runs and report. (default: NAME-study)")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the time it takes; run a pilot alone.")
    ] = False,
    pilot: Annotated[bool, typer.Option(help="With --dry-run: time a few steps to estimate the whole.")] = True,
    report_only: Annotated[
        bool, typer.Option("--report", help="Write the report of what there is; run nothing.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make failed runs again.")] = False,
    together: Annotated[
        int | None,
        typer.Option(min=2, help="Train so many runs of one model at once, their rows in the same steps.", metavar="N"),
    ] = None,
    replace: Annotated[list[str], typer.Option(help="SOURCE=OTHER: other models or data. Repeatable.")] = [],
    executor: Annotated[str | None, typer.Option(hidden=True)] = None,
    workers: Annotated[int | None, typer.Option(hidden=True)] = None,
    to: shell.Json = None,
) -> None:
    """Compare methods honestly: sweep each one's rate, run fresh seeds, report.  Stop it when you like: the same
    command goes on."""
    from ..study.drive import report, run
    from ..study.read import read

    if executor is not None or workers is not None:
        raise ValueError(f"--{'workers' if executor is None else 'executor'} is gone: {ALONE}")
    _check_together(ctx, dry_run, report_only)
    made = read(path, dict(split_pair(pair, "a replacement") for pair in replace))
    out = Path(f"{path.stem}-study") if out is None else out
    if dry_run:
        _dry(made, out, pilot, to)
        return
    about = _about(path)
    if report_only:
        found = report(made, out, about)
    else:
        with _View() as view:
            found = run(made, out, view=view, about=about, retry_failed=retry_failed, together=together)
    failed = sum(o.error is not None for o in found.outcomes)
    shell.write(to, {"report": str(found.report), "runs": len(found.outcomes), "failed": failed})
    if str(to) != "-":
        shell.note(f"{len(found.outcomes)} runs have ended, {failed} of them failed. Report: {found.report}")


def _check_together(ctx: typer.Context, dry_run: bool, report_only: bool) -> None:
    """Refuses options that would do nothing beside the others.  Raises ValueError."""
    runs_nothing = "--dry-run" if dry_run else "--report" if report_only else None
    idle = {
        "pilot": None if dry_run else "it goes with --dry-run",
        "report_only": "--dry-run writes no report" if dry_run else None,
        "retry_failed": f"{runs_nothing} runs nothing" if runs_nothing else None,
        "together": f"{runs_nothing} runs nothing" if runs_nothing else None,
    }
    for name, why in idle.items():
        source = ctx.get_parameter_source(name)
        if why and source is not None and source.name == "COMMANDLINE":
            option = {"pilot": "pilot/--no-pilot", "report_only": "report"}.get(name, name.replace("_", "-"))
            raise ValueError(f"--{option} would do nothing here: {why}")


def _dry(made: Any, out: Path, pilot: bool, to: Path | None) -> None:
    """The plan in numbers."""
    from ..study.drive import counted, estimate, foreseen, warnings
    from ..study.power import power

    plan = foreseen(made, out)
    decidable = power(plan)
    rows = [
        {
            "method": c.arm.name,
            "model": c.base.label,
            "data": c.rows.label,
            "budget": c.budget.label,
            "configuration": repr(c.method) if c.method else c.arm.name,
            "rates": c.told_rates,
        }
        for c in plan.cells
    ]
    warned = warnings(made, out)
    found = estimate(made, out, shell.note if str(to) != "-" else lambda _: None) if pilot else None
    counts = found.counts if found else counted(plan, out)
    searches = [len(cell.searches) for cell in plan.cells if any(s.seeds for s in cell.searches)]
    sweeps = {"sweeps": sum(searches), "shared": decidable.shared}
    told = {
        "cells": rows,
        "runs": dict(counts),
        **sweeps,
        "decidable": dataclasses.asdict(decidable),
        "warnings": warned,
    }
    if found:
        told["hours"] = {"least": found.seconds_least / 3600, "most": found.seconds_most / 3600, "from": found.based_on}
    shell.write(to, told)
    if str(to) == "-":
        return
    shell.out.print(shell.table(rows, made.title))
    for text in warned:
        shell.remark(text)
    shell.note(
        f"{len(rows)} cells; {counts['ended']} runs have ended, {counts['least']} are to come, "
        f"at most {counts['most']} if every grid of rates grows to its bound"
    )
    shell.note(_cost(sweeps, len(made.seeds)))
    if missing := sum(c.auto and not c.grid for c in plan.cells):
        shell.note(f"rates to find first, to sweep around: {missing}, each by about forty batches")
    shell.note(decidable.words)
    if found:
        least, most = _lasting(found.seconds_least), _lasting(found.seconds_most)
        shell.note(f"about {least}, at most {most}, by {found.based_on}, one run at a time")


def _cost(sweeps: Mapping[str, int], seeds: int) -> str:
    """What the sweeps are, and what they are paid for."""
    if not sweeps["sweeps"]:
        return "no rate is searched for: every arm has one"
    if sweeps["shared"]:
        return f"{sweeps['sweeps']} sweeps: one for all seeds of an arm, so what is found holds at the chosen rates"
    return (
        f"{sweeps['sweeps']} sweeps: each of the {seeds} seeds has its own, about {seeds} times the runs of one for "
        "all; that is what a win or a loss of a method takes"
    )


def _lasting(seconds: float) -> str:
    """A time that a person can plan with."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{math.ceil(seconds / 60)} minutes"


def _about(path: Path) -> dict[str, str]:
    """What the report tells about how it was made."""
    from ..study.read import text_of

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    return {
        "command": shlex.join(["undula", *(a for a in sys.argv[1:] if a != "--report")]),
        "date": datetime.date.today().isoformat(),
        "machine that wrote this report": machine,
        "versions that wrote this report": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "study file": text_of(path),
    }


class _View:
    """A bar for the study and one for the run; without a terminal a line for every run."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = shell.err
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.whole: TaskID | None = None
        self.one: TaskID | None = None
        self.told: Mapping[str, int] = {}

    def __enter__(self) -> _View:
        self.progress.start()
        self.whole = self.progress.add_task("runs", total=None)
        self.one = self.progress.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def counts(self, counts: Mapping[str, int]) -> None:
        self.told = counts
        if self.whole is not None:
            self.progress.update(self.whole, completed=counts["ended"], total=counts["ended"] + counts["least"])

    def step(self, step: int, steps: int) -> None:
        if self.one is not None:
            self.progress.update(self.one, completed=step, total=steps)

    def said(self, text: str) -> None:
        shell.remark(text)

    def begun(self, trial: Any) -> None:
        if self.one is not None:
            run = trial.run
            described = f"{trial.label}, lr {run.lr}, seed {run.seed}"
            self.progress.update(self.one, description=described, completed=0)

    def ended(self, ended: Any) -> None:
        trial, told = ended.order.trial, self.told
        came = f"failed: {ended.error}" if ended.error else _figures(ended.result)
        count = f"[{told.get('ended', 0) + 1} of {told.get('ended', 0) + told.get('least', 0)}]"
        self.console.print(
            f"{count} {trial.label}, lr {trial.run.lr}, seed {trial.run.seed}: {came}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _figures(result: Mapping[str, Any]) -> str:
    test = f", test {result['test']:.4f}" if "test" in result else ""
    return f"validation {result['validation']:.4f}{test}, {result['wall_seconds']:.0f} s"
