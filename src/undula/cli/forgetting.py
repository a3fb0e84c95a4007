"""`undula forget`."""

from __future__ import annotations

import contextlib
import csv
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..penalties import GroupLasso
from ..train import Run
from ..train.config import values_in
from ..train.fields import DATA, OUTPUT, TRAINING
from . import declared, shell
from .training import CONFIG, JSON, USUAL, bar, stages, take_columns, typed_options

if TYPE_CHECKING:
    from collections.abc import Mapping

PENALTY = GroupLasso(weight=0.25, after=0.1, by_size=True, settle=0.6)  # where nothing is said: few blocks change
FORGET = Annotated[
    declared.Texts,
    typer.Option(
        "--forget",
        help="Classes to forget together: a request; a name with a comma in quotes. Repeatable, in this order.",
        metavar="CLASS,...",
        rich_help_panel=DATA,
    ),
]
RESUME = Annotated[
    Path | None,
    typer.Option("--resume", help="Go on with the requests in this directory.", metavar="DIR", rich_help_panel=OUTPUT),
]
UNDO = Annotated[
    declared.Texts,
    typer.Option(
        "--undo", help="With --resume: take this request back. Repeatable.", metavar="CLASS,...", rich_help_panel=OUTPUT
    ),
]
OPTIONS: dict[str, Any] = {
    "beta": (float, "What forgetting weighs. (default: 0.5)"),
    "bound": (float, "The loss at which a class counts as forgotten. (default: ln of the number of classes)"),
    "shots": (int, "So many training rows of each class. (default: all)"),
    "near": (float, "Weight of the nearness of kept rows to their class's prototype (GS-LoRA++). (default: 0)"),
    "apart": (float, "Weight of the distance of rows to forget from theirs (GS-LoRA++). (default: 0)"),
    "apart_bound": (float, "Where that distance ends. (default: 10)"),
}


def forget(ctx: typer.Context, **typed: Any) -> None:
    """Have a model forget classes, one request after another, and keep the rest.

    MODEL is a whole model that was trained to classify. Each request is a training, with options as of `undula train`;
    its adapter can be taken back.
    """
    given = typed_options(ctx)
    if typed["resume"] is not None:
        _resumed(typed, given)
        return
    if typed["undo"]:
        raise ValueError("--undo takes a request of a directory back: name that with --resume")
    said = {} if typed["config"] is None else values_in(typed["config"], Run)
    needed = [n for n in ("model", "data", "task", "out") if typed[n] is None and n not in said]
    needed += ["forget"] if not typed["forget"] else []
    if needed:
        raise ValueError(f"forget needs {', '.join(f'--{name}' for name in needed)} (or --resume DIRECTORY)")
    take_columns(typed, said, given)
    made = declared.values(Run, typed, said, given)
    if "penalty" not in given and "penalty" not in said:
        made["penalty"] = PENALTY
    requests = [_classes(text) for text in typed["forget"]]
    _forget(Run(**made), requests, {k: typed[k] for k in OPTIONS if typed[k] is not None}, typed["to"])


def _classes(text: str) -> list[str]:
    """The names in a text such as: shirt, "coat, long"."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True))]


def _signature() -> inspect.Signature:
    column = typer.Option("--column", help="As in text=review. Repeatable.", rich_help_panel=DATA)
    options = [
        *declared.parameters(Run, USUAL),
        declared.option("forget", FORGET, []),
        *(_option(name, *of) for name, of in OPTIONS.items()),
        declared.option("config", CONFIG),
        declared.option("column", Annotated[declared.Texts, column], []),
        declared.option("resume", RESUME),
        declared.option("undo", UNDO, []),
        declared.option("to", JSON),
    ]
    early = ("model", "data", "task", "forget", "column", "task_set", "beta", "bound", "shots", "lr", "out", "resume")
    return declared.signature(options, early)


def _option(name: str, kind: type, help: str) -> inspect.Parameter:
    flag = typer.Option(
        f"--{name.replace('_', '-')}", help=help, metavar={int: "N", float: "X"}[kind], rich_help_panel=TRAINING
    )
    return declared.option(name, Annotated[kind | None, flag])


forget.__signature__ = _signature()  # type: ignore[attr-defined]


def _resumed(typed: Mapping[str, Any], given: Mapping[str, str]) -> None:
    others = [o for name, o in given.items() if name not in ("resume", "undo", "to", "quiet", "verbose", "threads")]
    if others:
        raise ValueError(f"--resume takes everything from what is there: leave out {', '.join(others)}")
    from ..train.forgetting import go_on, undo

    for text in typed["undo"]:
        undo(typed["resume"], _classes(text))
    with stages(), contextlib.ExitStack() as bars:
        report = go_on(typed["resume"], callbacks=bar(bars))
    _show(report, typed["to"])


@needs("train")
def _forget(run: Run, requests: list[list[str]], options: dict[str, Any], to: Path | None) -> None:
    from ..train.forgetting import forget as verb

    try:
        with stages(), contextlib.ExitStack() as bars:
            report = verb(run, requests, callbacks=bar(bars), **options)
    except KeyboardInterrupt:
        shell.say(f"stopped; go on with: undula forget --resume {run.out}", "yellow")
        raise typer.Exit(130) from None
    _show(report, to)


def _show(report: dict[str, Any], to: Path | None) -> None:
    from ..train.forgetting_page import blocks, called, since

    shell.write(to, report)
    if str(to) != "-":
        names = ("forgotten_before", "forgotten", "kept_before", "kept", "h_mean")
        shell.show(
            [
                {"request": called(report, r["request"]), **{n: r[n] for n in names}, "blocks": blocks(r["groups"])}
                for r in report["requests"]
            ]
        )
        kept = report["kept"]
        shell.note(
            f"Of the classes that no request names {kept['before']:.4f} were right before, {kept['after']:.4f} are "
            f"({report['split']} rows). Saved in {report['out']}"
        )
        for said in since(report):
            shell.note(said)
