"""`undula tune`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..train import Recipe
from ..train.config import values_in
from ..train.fields import OUTPUT
from . import declared, shell
from .training import COLUMN, CONFIG, USUAL, stages, take_columns, typed_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..train.tuning import Tuned

PLOT = Annotated[
    Path | None, typer.Option("--plot", help="Draw the range test into this file.", rich_help_panel=OUTPUT)
]
JSON = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file too ('-': to the output).", rich_help_panel=OUTPUT),
]
STUDY = Annotated[
    Path | None,
    typer.Option(
        "--study",
        help="Instead: rates for each arm of this study (TOML) to begin with.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
    ),
]
EARLY = ("model", "data", "task", "column", "task_set", "method", "method_set", "config")


def tune(ctx: typer.Context, **typed: Any) -> None:
    """Find a learning rate for a training by a few of its steps, which are taken back.  Nothing is written.  It is a
    first guess, often off by half a decade and more (docs/tune.md): for a LoRA on a small encoder 3e-3 was nearer.

    The options are those of `undula train`, which does the same by itself with --lr auto.
    """
    given = typed_options(ctx)
    if typed["study"] is not None:
        _check_study(given)
        _study(typed["study"], typed["to"])
        return
    said = {} if typed["config"] is None else values_in(typed["config"], Recipe, aside=("out", "lr"))
    if needed := [name for name in ("model", "data", "task") if typed[name] is None and name not in said]:
        raise ValueError(f"tune needs {', '.join(f'--{name}' for name in needed)} (or --config FILE)")
    take_columns(typed, said, given)
    if typed["begin_from"] is not None and "method" not in given:
        typed["method"] = "none"
    made = declared.values(Recipe, typed | {"lr": None}, said, given)
    found = _found(Recipe(**made))
    shell.write(typed["to"], found.encode())
    if typed["plot"] is not None:
        from ..observe.rates import draw

        draw(found.curve, found.before, found.lr, typed["plot"])
    if str(typed["to"]) != "-":
        _show(found)


@needs("train")
def _found(run: Recipe) -> Tuned:
    from ..train.tuning import tune as verb

    with stages():
        return verb(run)


def _show(found: Tuned) -> None:
    rows: list[dict[str, Any]] = [{"rate": None, "loss": found.before, "": "before"}]
    rows += [{"rate": rate, "loss": loss, "": "lowest" if rate == found.lowest else ""} for rate, loss in found.curve]
    shell.out.print(shell.table(rows))
    shell.note(f"--lr {found.lr:g}   ({found.how}; {found.seconds:.1f} s)")
    for note in found.notes:
        shell.remark(note)


def _check_study(given: Mapping[str, str]) -> None:
    """Raises ValueError for options that a study's file says."""
    free = ("study", "to", "quiet", "verbose", "threads")
    if others := [option for name, option in given.items() if name not in free]:
        raise ValueError(f"--study takes everything from its file: leave out {', '.join(others)}")


@needs("study")
def _study(path: Path, to: Path | None) -> None:
    """A line for each arm and place, and the rates that would go into the file."""
    from ..study.guess import guesses
    from ..study.rates import around
    from ..study.read import read

    made = read(path)
    with stages():
        every = list(guesses(made))
    rows = [
        {"method": g.arm, "place": g.place}
        | ({"rate": g.found.lr, "by": g.found.how} if g.found else {"rate": None, "by": g.why})
        for g in every
    ]
    rates = {
        arm: [g.found.lr for g in every if g.arm == arm and g.found] for arm in dict.fromkeys(g.arm for g in every)
    }
    begin = {arm: around(found, made.sweep.factor) for arm, found in rates.items() if found}
    shell.write(to, {"found": rows, "rates": {arm: list(found) for arm, found in begin.items()}})
    if str(to) == "-":
        return
    shell.out.print(shell.table(rows, made.title))
    shell.note("To begin the sweeps there, write under each [[methods]]:")
    for arm, found in begin.items():
        shell.note(f"{arm}: rates = [{', '.join(f'{rate:g}' for rate in found)}]")


def _signature() -> inspect.Signature:
    options = [
        *(p for p in declared.parameters(Recipe, USUAL) if p.name != "lr"),
        declared.option("config", CONFIG),
        declared.option("column", COLUMN, []),
        declared.option("study", STUDY),
        declared.option("plot", PLOT),
        declared.option("to", JSON),
    ]
    return declared.signature(options, EARLY)


tune.__signature__ = _signature()  # type: ignore[attr-defined]
