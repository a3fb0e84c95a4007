"""`undula train` and `undula eval`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..core.options import split_pair
from ..train import Recipe, Run, Task, processes, restored
from ..train.config import values_in
from ..train.fields import DATA, OUTPUT
from ..train.fit import train as fit
from ..train.page import PAGE
from ..train.resume import left_behind
from ..train.worries import diverged, worries
from . import declared, pushing, shell
from . import look as looks

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..train.prepared import Prepared

USUAL = {"method": "lora"}  # what stands where nothing is typed for a field that has no default
EARLY = ("model", "data", "task", "column", "task_set", "lr", "out", "config", "dry_run", "resume")  # in the help
COLUMN = Annotated[
    declared.Texts,
    typer.Option("--column", help="As in text=review. Repeatable.", metavar="ROLE=COLUMN", rich_help_panel=DATA),
]
DRY = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what would be trained, and stop there: write nothing.", rich_help_panel=OUTPUT
    ),
]
CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML or JSON file of these settings, as a run leaves one; options here go first.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
    ),
]
REPORT_TO = Annotated[
    declared.Texts,
    typer.Option(
        "--report-to",
        help="tensorboard (OUT/logs), wandb, mlflow ...: figures while it trains. Repeatable.",
        metavar="NAME",
        rich_help_panel=OUTPUT,
    ),
]
PUSH = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Send the result there in the end, as `undula push` does: USER/NAME.",
        metavar="NAME",
        rich_help_panel=OUTPUT,
    ),
]
RESUME = Annotated[
    Path | None,
    typer.Option("--resume", help="Go on with the training in this directory.", metavar="DIR", rich_help_panel=OUTPUT),
]
JSON = Annotated[
    Path | None,
    typer.Option("--json", help="Write the report to this file too ('-': to the output).", rich_help_panel=OUTPUT),
]


def train(ctx: typer.Context, **typed: Any) -> None:
    """Fine-tune a model with an adapter.  Ctrl-C saves a checkpoint and says how to go on."""
    resume, to, given = typed["resume"], typed["to"], typed_options(ctx)
    if typed["push"] is not None:
        pushing.check_promised(typed["push"])
    if resume is not None:
        _check_alone(given)
        _fit(Run.load(resume), True, to, typed["report_to"], typed["push"])
        return
    said = {} if typed["config"] is None else values_in(typed["config"], Run)
    told = ("model", "data", "task", "out")[: 3 if typed["dry_run"] else 4]  # nothing is written: no place is needed
    needed = [name for name in told if typed[name] is None and name not in said]
    if needed:
        where = "or --resume DIRECTORY, or --config FILE" if not said else f"in {typed['config']} or here"
        raise ValueError(f"train needs {', '.join(f'--{name}' for name in needed)} ({where})")
    take_columns(typed, said, given)
    if typed["begin_from"] is not None and "method" not in given:
        typed["method"] = "none"  # the adapter's
    made = declared.values(Run, typed, said, given)
    if made["method"] is None and made.get("begin_from") is None:
        _check_none(given)
    if typed["dry_run"]:
        _look(Run(**made) if "out" in made else Recipe(**made), to)
    else:
        _fit(Run(**made), False, to, typed["report_to"], typed["push"])


def _signature() -> inspect.Signature:
    """The options of `train`: the fields of a run, and what is no part of one."""
    options = [
        *declared.parameters(Run, USUAL),
        declared.option("config", CONFIG),
        declared.option("column", COLUMN, []),
        declared.option("dry_run", DRY, False),
        declared.option("report_to", REPORT_TO, []),
        declared.option("push", PUSH),
        declared.option("resume", RESUME),
        declared.option("to", JSON),
    ]
    return declared.signature(options, EARLY)


train.__signature__ = _signature()  # type: ignore[attr-defined]


def typed_options(ctx: typer.Context) -> dict[str, str]:
    """{parameter: option} of those that were typed."""
    names = {p.name: p.opts[0] for p in ctx.command.params if p.name is not None}
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return {n: names[n] for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


FREE = ("resume", "to", "push", "report_to", "quiet", "verbose", "threads")  # what changes nothing of a run


def _check_alone(given: Mapping[str, str]) -> None:
    """A resumed training is what it was: options that would change it are refused.  Raises ValueError."""
    others = [option for name, option in given.items() if name not in FREE]
    if others:
        raise ValueError(f"--resume takes everything from the run.json that is there: leave out {', '.join(others)}")


def _check_none(given: Mapping[str, str]) -> None:
    """Without a method nothing is adapted: options of what would be are refused.  Raises ValueError."""
    idle = {f.name for f in declared.offered(Run) if f.metadata["layers"]} | {"method_set"}
    doing_nothing = sorted(option for name, option in given.items() if name in idle)
    if doing_nothing:
        raise ValueError(
            f"--method none adapts no layers, so these would do nothing: leave out {', '.join(doing_nothing)}"
        )


def take_columns(typed: dict[str, Any], said: Mapping[str, Any], given: dict[str, str]) -> None:
    """Makes --column options of the task, that of the file where none was typed.  Raises LookupError."""
    if typed["column"]:
        task = said["task"] if "task" in said and "task" not in given else typed["task"]
        typed["task_set"] = [*_columns(task, typed["column"]), *typed["task_set"]]
        given["task_set"] = "--column"


def _columns(task: str | Task, pairs: list[str]) -> list[str]:
    kind = type(task) if isinstance(task, Task) else declared.member(Task, task.partition(",")[0])
    unknown = [p for p in pairs if split_pair(p, "a column")[0] not in kind.roles]
    if unknown:
        raise LookupError(f"{kind.__name__} has no column {', '.join(unknown)}; it has: {', '.join(kind.roles)}")
    return pairs


@needs("train")
def _fit(run: Run, resume: bool, to: Path | None, report_to: list[str], push: str | None) -> None:
    try:
        with stages(), contextlib.ExitStack() as bars:
            report = fit(run, resume=resume, callbacks=bar(bars), begins=_begins, report_to=report_to)
    except KeyboardInterrupt:
        shell.say(left_behind(run.out), "yellow")
        raise typer.Exit(130) from None
    shell.write(to, report)
    if str(to) != "-":
        before = report["before"]
        shell.show([{"metric": k, "before": before.get(k), "after": v} for k, v in report["after"].items()])
        for line in (*_course(report), _summary(report)):
            shell.note(line)
    for text in worries(report):
        shell.remark(text)
    if diverged(report):
        raise typer.Exit(1)
    if push is not None and processes.is_first():
        pushing.push(run.out, push)


@needs("train")
def _look(run: Recipe, to: Path | None) -> None:
    """The look alone; a place where the training could not begin, where one is named, is refused as it would be."""
    from ..train.look import look
    from ..train.resume import claim

    if isinstance(run, Run):
        claim(run, False)
    with stages():
        found = look(run)
    looks.show(found)
    shell.write(to, found.encode())


@contextlib.contextmanager
def stages() -> Iterator[None]:
    """Within, what is done is said, and transformers' own notes and bars are not, unless all is asked for."""
    from ..train.base import quiet
    from ..train.stages import told_to
    from .stages import Stages

    with contextlib.ExitStack() as within:
        if not shell.voice.verbose:
            within.enter_context(quiet())
        if not shell.voice.quiet:
            within.enter_context(told_to(Stages(shell.err)))
        yield


def _begins(ready: Prepared) -> None:
    if shell.voice.quiet:
        return
    from ..train.look import looked

    looks.show(looked(ready))


def bar(bars: contextlib.ExitStack) -> Iterator[TrainerCallback]:
    """A bar, made when the training begins: faults of data are told before the trainer is imported."""
    from ..train.bar import Bar

    if not shell.voice.quiet:
        yield bars.enter_context(Bar(shell.err, shell.voice.verbose))


def _course(report: dict[str, Any]) -> Iterator[str]:
    """What the evaluations while it trained led to."""
    best, early = report["best"], report.get("ended_early")
    if early:
        yield f"The training {early}"
    if tuned := report.get("tuned"):
        yield f"The rate {tuned['lr']:g} was found in {tuned['seconds']:.1f} s: {tuned['how']}"
    if best is not None and best["of"] > 1:
        kept = "kept" if best["kept"] else "not kept"
        which = f"step {best['step']}, {best['metric']} {shell.shown(best['value'])}"
        yield f"The best of {best['of']} evaluations is {kept}: {which}"
    if text := report.get("optimism"):
        yield text
    if (page := Path(report["out"]) / PAGE).is_file():
        yield f"To look at: {page}"


def _summary(report: dict[str, Any]) -> str:
    memory, ranks = report["peak_memory_bytes"] / 2**20, report["ranks"]
    told = "" if ranks is None else f"{ranks['total']} ranks ({ranks['least']} to {ranks['most']} at a site), "
    several = (
        f" of {report['rows_in_a_step']} rows on {report['processes']} processes" if report["processes"] > 1 else ""
    )
    return (
        f"{report['method']}: {report['trainable_parameters']:,} parameters, {told}{report['steps']} steps{several} in "
        f"{report['seconds']:.1f} s, {memory:.0f} MiB at most. Saved in {report['out']}"
    )


def evaluate(
    path: shell.Directory,
    *,
    data: shell.Data = None,
    split: Annotated[str | None, typer.Option(help="(default: the rows of the training's own metric)")] = None,
    rows: Annotated[int | None, typer.Option(help="So many rows at most. (default: as in training)", min=1)] = None,
    skip_faulty: shell.Skip = None,
    column: COLUMN = [],  # noqa: B006 (typer's)
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Measure a trained adapter."""
    columns = dict(split_pair(pair, "a column") for pair in column)
    found = restored(path, model).reading(columns).score(data, split, rows, skip_faulty)
    shell.write(to, found)
    if str(to) != "-":
        shell.show([found])
