# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula train` and `undula eval`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..method import Method
from ..options import build, split_pair
from ..ranks import Allocator
from ..schedules import Schedule
from ..train import Run, Task, restored
from ..train.fit import left_behind
from ..train.fit import train as fit
from ..train.run import dtype_called
from ..train.worries import diverged, worries
from . import shell

if TYPE_CHECKING:
    from transformers import TrainerCallback

Many = list[str]
NUMBERS = (
    *("lr", "head_lr", "epochs", "max_steps", "batch", "accumulate", "warmup", "weight_decay", "max_grad_norm"),
    *("seed", "train_rows", "eval_rows", "save_every", "bits", "probe_batches", "skip_faulty"),
)


def train(
    ctx: typer.Context,
    *,
    model: Annotated[str | None, typer.Option(help="A folder, a hub name, or bundled:NAME.")] = None,
    data: Annotated[str | None, typer.Option(help="A file, a folder, a hub name, or bundled:NAME.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, classification, regression or image-classification.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The directory to write: adapter, report, checkpoints.")] = None,
    method: Annotated[str, typer.Option(help="See `undula methods`; none: the task's head alone.")] = "lora",
    options: shell.Set = [],
    allocator: Annotated[str | None, typer.Option(help="Who gets how much rank, when: see `undula methods`.")] = None,
    allocate: Annotated[Many, typer.Option(help="An option of the allocator, as in target=4.")] = [],
    column: Annotated[Many, typer.Option(help="ROLE=COLUMN, as in text=review. Repeatable.")] = [],
    task_set: Annotated[Many, typer.Option(help="An option of the task, as in max_length=64.")] = [],
    where: Annotated[Many, typer.Option(help="Layers: a name, its end, or a glob.")] = ["all-linear"],
    override: Annotated[Many, typer.Option(help="PATTERN=METHOD,NAME=VALUE,...")] = [],
    full: Annotated[Many, typer.Option(help="Parameters to train in full besides the head.")] = [],
    lr: Annotated[float, typer.Option(help="Learning rate.")] = Run.lr,
    head_lr: Annotated[float | None, typer.Option(help="Of a new head. (default: --lr)")] = None,
    epochs: float = Run.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Rows in a batch.")] = Run.batch,
    accumulate: Annotated[int, typer.Option(help="Batches in a step: as one of all their rows.")] = Run.accumulate,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = Run.warmup,
    weight_decay: Annotated[
        float, typer.Option(help="Of all that trains but biases and norms: all factors too.")
    ] = Run.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0: never.")] = 1.0,
    schedule: Annotated[
        str | None, typer.Option(help="linear, cosine, constant, jagged. (default: the allocator's, else linear)")
    ] = None,
    seed: int = Run.seed,
    train_rows: Annotated[int | None, typer.Option(help="So many training rows, sampled.")] = None,
    eval_rows: Annotated[int | None, typer.Option(help="Rows for the metric, sampled.")] = Run.eval_rows,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. (default: a tenth)")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the frozen model.")] = "float32",
    bits: Annotated[int | None, typer.Option(help="4 or 8: quantise the frozen model.")] = None,
    probe_batches: Annotated[int | None, typer.Option(help="For a start from data. (default: 8)")] = None,
    skip_faulty: shell.Skip = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the training in this directory.")] = None,
    to: shell.Json = None,
) -> None:
    """Fine-tune a model with an adapter.  Ctrl-C saves a checkpoint and says how to go on."""
    if resume is not None:
        _check_alone(ctx)
        _fit(Run.load(resume), True, to)
        return
    if allocate and allocator is None:
        raise ValueError("--allocate has the options of an allocator: name one with --allocator")
    if model is None or data is None or task is None or out is None:
        needed = {"--model": model, "--data": data, "--task": task, "--out": out}
        raise ValueError(f"train needs {', '.join(k for k, v in needed.items() if v is None)} (or --resume DIRECTORY)")
    if method.lower() == "none":
        _check_none(ctx)
    kind = _task(task)
    run = Run(
        model=model,
        data=data,
        task=build(Task, task, [*_columns(kind, column), *task_set]),
        method=None if method.lower() == "none" else build(Method, method, options),
        out=out,
        allocator=None if allocator is None else build(Allocator, allocator, allocate),
        where=where[0] if len(where) == 1 else tuple(where),
        overrides=_overrides(override),
        full=tuple(full),
        dtype=dtype_called(dtype),
        schedule=None if schedule is None else build(Schedule, *_named(schedule)),
        **{name: ctx.params[name] for name in NUMBERS},
    )
    _fit(run, False, to)


def _check_alone(ctx: typer.Context) -> None:
    """A resumed training is what it was: options that would change it are refused.  Raises ValueError."""
    names = {p.name: p.opts[0] for p in ctx.command.params if p.name not in ("resume", "to")}
    sources = {name: ctx.get_parameter_source(name) for name in names if name is not None}
    given = [names[n] for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise ValueError(f"--resume takes everything from the run.json that is there: leave out {', '.join(given)}")


def _check_none(ctx: typer.Context) -> None:
    """Without a method nothing is adapted: options of what would be are refused.  Raises ValueError."""
    options = {"options": "--set", "override": "--override", "where": "--where", "probe_batches": "--probe-batches"}
    sources = {name: ctx.get_parameter_source(name) for name in options}
    given = [options[n] for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise ValueError(f"--method none adapts no layers, so these would do nothing: leave out {', '.join(given)}")


def _task(name: str) -> type[Task]:
    try:
        return Task.named(name)
    except LookupError:
        known = sorted(shell.called(kind) for kind in Task.registry.values())
        raise LookupError(f"no task is called {name!r}; there are: {', '.join(known)}") from None


def _columns(task: type[Task], pairs: Many) -> Many:
    unknown = [p for p in pairs if split_pair(p, "a column")[0] not in task.roles]
    if unknown:
        raise LookupError(f"{task.__name__} has no column {', '.join(unknown)}; it has: {', '.join(task.roles)}")
    return pairs


def _named(text: str) -> tuple[str, list[str]]:
    """(name, options) of NAME,OPTION=VALUE,..."""
    name, *pairs = text.split(",")
    return name, pairs


def _overrides(texts: Sequence[str]) -> dict[str, Method]:
    found: dict[str, Method] = {}
    for text in texts:
        pattern, spec = split_pair(text, "an override")
        if pattern in found:
            raise ValueError(f"--override {pattern} is given twice: a pattern has one method")
        name, *pairs = spec.split(",")
        found[pattern] = build(Method, name.strip(), pairs)
    return found


def _fit(run: Run, resume: bool, to: Path | None) -> None:
    from ..train.base import quiet

    try:
        with quiet(), contextlib.ExitStack() as bars:
            report = fit(run, resume=resume, callbacks=_bar(bars))
    except KeyboardInterrupt:
        shell.say(left_behind(run.out), "yellow")
        raise typer.Exit(130) from None
    shell.write(to, report)
    if str(to) != "-":
        before = report["before"]
        shell.show([{"metric": k, "before": before.get(k), "after": v} for k, v in report["after"].items()])
        shell.note(_summary(report))
    for text in worries(report):
        shell.remark(text)
    if diverged(report):
        raise typer.Exit(1)


def _bar(bars: contextlib.ExitStack) -> Iterator[TrainerCallback]:
    """A bar, made when the training begins: faults of data are told before the trainer is imported."""
    from ..train.bar import Bar

    yield bars.enter_context(Bar(shell.err))


def _summary(report: dict[str, Any]) -> str:
    memory, ranks = report["peak_memory_bytes"] / 2**20, report["ranks"]
    told = "" if ranks is None else f"{ranks['total']} ranks ({ranks['least']} to {ranks['most']} at a site), "
    return (
        f"{report['method']}: {report['trainable_parameters']:,} parameters, {told}{report['steps']} steps in "
        f"{report['seconds']:.1f} s, {memory:.0f} MiB at most. Saved in {report['out']}"
    )


def evaluate(
    path: shell.Directory,
    *,
    data: shell.Data = None,
    split: Annotated[str | None, typer.Option(help="(default: the rows of the training's own metric)")] = None,
    rows: Annotated[int | None, typer.Option(help="So many rows at most. (default: as in training)", min=1)] = None,
    skip_faulty: shell.Skip = None,
    model: shell.Base = None,
    to: shell.Json = None,
) -> None:
    """Measure a trained adapter."""
    found = restored(path, model).score(data, split, rows, skip_faulty)
    shell.write(to, found)
    if str(to) != "-":
        shell.show([found])
