"""What every verb of the command line needs: errors in one line, tables, JSON files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from ..core.extras import Missing, advice
from ..train.doubts import finite
from .helping import Readable

OURS = str(Path(__file__).parents[1])
# typer's own complaints; the package that they come from depends on its version
USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
MEANT = (LookupError, ValueError, TypeError, OSError, RuntimeError)  # what the library raises of itself
FOR_PROGRAMMERS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning, ResourceWarning)
# Advice of the library, which speaks Python, and what to type instead
PYTHON = (
    (r"[\w.]+\([^()]*\), or (?=--)", ""),  # Classification(text=...), or --column text=...
    (r"\w+=\.\.\., or (?=--)", ""),  # data=..., or --data
    (
        r"(?:Use )?(?:undula\.)?[Cc]ollapse\((?:undula\.)?Truncate\((\w+)\)\)",
        lambda found: f"`undula collapse --how truncate --set r={found[1] if found[1].isdigit() else 'RANK'}`",
    ),
    (r"collapse\(model, LeastSquares\(r, calibration\)\)", "`undula collapse --how least-squares`"),
    (r"LeastSquares\(r, calibration\)", "`undula collapse --how least-squares`"),
    (r"(?<!`)undula\.collapse\b(?!\()", "`undula collapse`"),
    (r"undula\.merge\b(?!\()", "`undula merge`"),
)


def rank() -> int:
    """Of this process among those that a launcher (torchrun) started; the first one speaks, the others are silent."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return int(os.environ.get("RANK", "0")) if several else 0


out = Console(width=None if sys.stdout.isatty() else 120, quiet=rank() > 0, emoji=False)
err = Console(stderr=True, quiet=rank() > 0, emoji=False)  # `a:b:` is a name, and no picture


@dataclass
class Voice:
    """How much a verb says: `quiet` is errors and results alone, `verbose` all that there is."""

    quiet: bool = False
    verbose: bool = False


voice = Voice()
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Say errors and the result alone.")]
VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Say all that there is, other packages' notes in full.")]


def speaking(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with --quiet and --verbose."""

    @functools.wraps(verb)
    def spoken(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        if quiet and verbose:
            raise ValueError("--quiet and --verbose are opposites: leave one of them out")
        before = voice.quiet, voice.verbose
        voice.quiet, voice.verbose = quiet, verbose
        try:
            with contextlib.nullcontext() if verbose else calm():
                verb(*args, **options)
        finally:
            voice.quiet, voice.verbose = before

    signature, only = inspect.signature(verb, eval_str=True), inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter("quiet", only, default=False, annotation=QUIET),
           inspect.Parameter("verbose", only, default=False, annotation=VERBOSE)]  # fmt: skip
    spoken.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    return spoken


class Verbs(Readable, TyperGroup):
    """Errors end in one clear line: exit code 2 for ours, 1 for another's, 130 for a training that was stopped."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with notes(bool(ctx.params.get("debug"))):
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors that are none
            raise
        except USAGE:  # a verb or an option that does not exist: typer says it
            raise
        except BrokenPipeError as error:  # `| head` has read enough: typer ends in silence
            if _read_no_more():
                raise
            raise typer.Exit(explain(error)) from None
        except Exception as error:  # whatever it is: a line, and the traceback where it is asked for
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(explain(error)) from None


@contextlib.contextmanager
def notes(every: bool) -> Iterator[None]:
    """Within, warnings and log messages of the library are lines "Note: ...", once each; another package's are named
    after it, in one line, and those for its programmers left out unless `every` is asked for."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        ours = filename.startswith(OURS)
        if not ours and issubclass(category, FOR_PROGRAMMERS) and not every and not voice.verbose:
            return
        whole = str(message).strip() if voice.verbose else str(message).strip().partition("\n")[0]
        text = spoken(str(message)) if ours else f"({_package(filename)}) {whole}"
        if text not in said:
            said.add(text)
            remark(text)

    heard, logger = logging.Handler(logging.WARNING), logging.getLogger("undula")
    heard.emit = lambda record: show(record.getMessage(), UserWarning, OURS)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        logger.addHandler(heard)
        try:
            yield
        finally:
            logger.removeHandler(heard)


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Within, loggers of packages that speak to those who built them alone are heard from errors on: torchao, which
    transformers imports, tells at each start what it was not compiled for, and torch what torchao registers."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_no_more() -> bool:
    """Whether nobody reads the output or the error stream any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            return True
    return False


def check_alone(verb: str | None) -> None:
    """Ends verbs that are no work for several processes: each would do the same, and write the same files."""
    if verb not in (None, "train") and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        say(f"undula {verb} is one process's work, and torchrun started several: start it without torchrun", "red")
        raise typer.Exit(2)


def _package(filename: str) -> str:
    """The package that a file belongs to."""
    parts = Path(filename).parts
    at = next((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), None)
    return Path(filename).stem if at is None or at + 1 == len(parts) else Path(parts[at + 1]).stem


def explain(error: Exception) -> int:
    """Prints what went wrong.  Returns the exit code."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if type(error).__name__ == "Interrupted":  # importing the class would import all of the training
        say(text, "yellow")
        return 130
    if rank() and type(error).__name__ in ("Elsewhere", "Diverged"):  # what the first process says
        return 2
    if rank():
        print(f"process {rank()}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, ImportError):
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        say(advice(missing) if missing and not isinstance(error, Missing) else text.strip().split("\n")[0], "red")
        return 2
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename.startswith(OURS) and isinstance(error, MEANT):
        say(spoken(text), "red")
        return 2
    say(f"{type(error).__name__}: {text} (`undula --debug ...` shows where)", "red")
    return 1


def spoken(text: str) -> str:
    """A message of the library with the advice of its Python as the options and verbs that do the same here."""
    for pattern, words in PYTHON:
        text = re.sub(pattern, words, text)
    return text


def called(kind: type) -> str:
    """The name of a choice as a command line writes it: CausalLM is causal-lm, AdamW adamw, LoRAPro lora-pro."""
    return re.sub(r"(?<=[a-z])(?=[A-Z]\w)", "-", kind.__name__.replace("LoRA", "Lora")).lower()


def say(text: str, colour: str) -> None:
    """A line of the program's own, on the error stream, not folded."""
    err.print(f"[{colour}]{escape(visible(text))}[/]", soft_wrap=True, highlight=False)


def remark(text: str) -> None:
    """What should make the user look twice."""
    if voice.quiet:
        return
    say(f"Note: {text}", "yellow")


def note(text: str) -> None:
    """A line of the result, not folded."""
    out.print(visible(text), soft_wrap=True, highlight=False, markup=False)


def visible(text: str) -> str:
    """A text in which a terminal finds no commands: control characters (escapes, marks that turn the direction, halves
    of characters) as Python writes them.  Names come from files, which anybody may have made."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def write(path: Path | None, data: Any) -> None:
    """Writes JSON where the user asked for it; `-` is the output.  NaN and infinity, which JSON does not have, are
    null."""
    if path is None or rank():
        return
    data = finite(data)
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if visible(text) != text:
        text = json.dumps(data, indent=2) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def show(rows: list[dict[str, Any]], to: Path | None = None, title: str | None = None) -> None:
    """Rows of one shape as a table, and as JSON where `to` says; with `-` as JSON alone."""
    write(to, rows)
    if str(to) != "-":
        out.print(table(rows, title))


def table(rows: list[dict[str, Any]], title: str | None = None) -> Table:
    """Rows of one shape as a table."""
    made = Table(
        title=title, title_justify="left", show_lines=any("\n" in str(v) for row in rows for v in row.values())
    )
    crowded = len(rows[0]) > 6 if rows else False
    for i, name in enumerate(rows[0] if rows else ()):
        numbers = all(isinstance(row[name], int | float) and not isinstance(row[name], bool) for row in rows)
        made.add_column(
            visible(name.replace("_", " ")),
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=i == 0 and not crowded,
        )
    for row in rows:
        made.add_row(*(escape(shown(v)) for v in row.values()))
    return made


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else visible(str(value))


def fresh(path: Path) -> None:
    """Refuses a directory that holds something.  Raises FileExistsError."""
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: name another directory")


def adapter_place(path: Path) -> Path:
    """What a path to an adapter means; see `undula.io.places.place`."""
    from ..io.places import place

    return place(path)


Directory = Annotated[Path, typer.Argument(help="The directory of an adapter, or its file.", callback=adapter_place)]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file too ('-': to the output).")]
Out = Annotated[Path, typer.Option("--out", help="The directory to write.")]
Base = Annotated[str | None, typer.Option("--model", help="The base model, where the adapter does not say it.")]
Set = Annotated[list[str], typer.Option("--set", help="An option NAME=VALUE; nested: activation.a=1e-3. Repeatable.")]
Data = Annotated[str | None, typer.Option("--data", help="Other data than the training's.")]
Skip = Annotated[
    float | None,
    typer.Option("--skip-faulty", help="Leave out rows with faults: this share of a file at most, as in 0.1."),
]
