# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula predict`: rows without labels in, the same rows with answers out."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from ..core.options import split_pair
from . import answers_out, shell
from .several import Several

if TYPE_CHECKING:
    from ..train.asking import Question
    from ..train.restored import Restored
    from ..train.run import Run

Saved = Annotated[Path, typer.Argument(help="What a training, an export or a merge left.")]
Column = Annotated[list[str], typer.Option("--column", help="ROLE=COLUMN, as in text=review. Repeatable.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="The file to write: .csv, .tsv or .jsonl. (default: shown)")
]
Form = Annotated[answers_out.As | None, typer.Option("--as", help="csv, tsv or jsonl, where no file says it.")]
Split = Annotated[str | None, typer.Option(help="Of data with several splits, the one to answer.")]


def predict(
    path: Saved,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR...] [FILE|TEXT...]",
            help="More adapters of the same base; then a file or "
            "folder as `train` reads it, labels not needed; a text file, a row a line; images; or "
            "texts. (default: the lines of the input)",
        ),
    ] = None,
    *,
    out: OutFile = None,
    form: Form = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="That of every class too.")] = False,
    column: Column = [],
    split: Split = None,
    skip_faulty: shell.Skip = None,
    batch: Annotated[int, typer.Option(help="Rows at once; the answers do not depend on it.", min=1)] = 32,
    model: shell.Base = None,
) -> None:
    """Answer new rows: every row with its label and probability (a number, a text), as CSV or JSON lines.

    Several adapters of one base answer side by side, in columns called NAME.label ...; with weights, as in A:0.5 B:0.5,
    their sum does."""
    several, given = Several.of(path, given or [])
    shape = answers_out.form_of(out, form, answers_out.As.csv, given)
    knowns = several.known(model)
    if len(knowns) > 1 and not given:
        given = [Typed(line) for line in _lines()]
    every = [rows_asked(run, roles, given, column, split, skip_faulty) for run, roles in knowns]
    asked = every[0]  # what is wrong with rows is said at once
    if several.beside:
        return _side_by_side(several, every, out, shape, probabilities, batch, model)
    opened = several.opened(model)[0]
    with answers_out.opened(out) as to, bar(len(asked.rows), out) as counted:
        answers = counted(opened.answers(asked, batch))
        names = answers_out.write(to, shape, asked.rows, answers, probabilities)
    told(out, len(asked.rows), names)


def _side_by_side(
    several: Several,
    every: Sequence[Question],
    out: Path | None,
    shape: answers_out.As,
    probabilities: bool,
    batch: int,
    model: str | None,
) -> None:
    """The answers of each adapter in columns of its own."""
    rows = every[0].rows
    if any(len(asked.rows) != len(rows) for asked in every):
        raise ValueError("the adapters take different rows of these: mend them, or answer with each by itself")
    opened = several.opened(model)
    with answers_out.opened(out) as to, bar(len(rows) * len(every), out) as counted:
        found = counted(itertools.chain(*(o.answers(asked, batch) for o, asked in zip(opened, every, strict=True))))
        columns = [list(itertools.islice(found, len(rows))) for _ in every]
        names = answers_out.write(to, shape, rows, several.merged(columns), probabilities)
    told(out, len(rows), names)


def told(out: Path | None, rows: int, names: dict[str, str]) -> None:
    """Says what was written where, and which columns got other names."""
    for name, new in names.items():
        shell.remark(f"the rows have a column {name!r} already: the answers' is called {new!r}")
    if out is not None:
        shell.note(f"{rows} rows answered. Saved in {out}")


@needs("train")
def open_saved(path: Path, model: str | None) -> Restored:
    """See `undula.load`; without transformers' bars and notes."""
    from ..train import load
    from ..train.base import quiet

    with quiet():
        return load(path if path.exists() else str(path), model)


def rows_asked(
    run: Run, roles: Collection[str], given: list[str], column: list[str], split: str | None, skip_faulty: float | None
) -> Question:
    """The rows that are meant: of one file or folder, texts or images from the command line, or lines of the input.
    Their notes are said."""
    from ..train.asking import columns_named, question, read_path
    from ..train.data.faults import Faults
    from ..train.data.source import source_of

    columns = dict(split_pair(pair, "a column") for pair in column)
    task, faults = columns_named(run.task, columns), Faults(checked_share(skip_faulty), run.encoding)
    places = [Path(one) for one in given if not isinstance(one, Typed) and is_place(one)]
    if places and len(given) > 1:
        check_media(given, places)
    if places and len(given) == 1:
        rows: Any = read_path(given[0], task, faults, split)
    else:
        if split is not None:
            raise ValueError("--split is of a file or folder of rows, and none is named")
        rows = [str(text) for text in given] or _lines()
    asked = question(task, rows, roles, faults)
    notes = [*faults.told(), *(f"{s.name}: {note}" for s in [source_of(asked.rows)] for note in s.notes)]
    for note in notes:
        shell.remark(note)
    return asked


def check_media(given: Sequence[str], places: Sequence[Path]) -> None:
    """Raises ValueError for several arguments with a file among them, unless all are images or sounds: a table would be
    taken for a text, a directory that is no adapter too."""
    from ..train.data.media import medium_of

    if len(places) == len(given) and all(medium_of(path) is not None and path.is_file() for path in places):
        return
    odd = next((one for one in given if not is_place(one)), None)
    there = (
        f"{places[0]} is a file or folder" if odd is None else f"{places[0]} is a file or folder, and {odd!r} is none"
    )
    raise ValueError(
        f"{there}: name one file or folder, several images, or texts alone; before them come directories of adapters"
    )


def checked_share(share: float | None) -> float | None:
    """Raises ValueError for what is no share."""
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"--skip-faulty is a share from 0 to below 1, found {share:g}")
    return share


def is_place(text: str) -> bool:
    """Whether an argument names a file or folder: one that is there, or that has such a name."""
    from ..train.asking import FILES
    from ..train.data.media import medium_of

    if len(text) > 4000 or "\n" in text:
        return False
    path = Path(text)
    named = path.suffix.lower() in FILES or medium_of(path) is not None
    return (named and " " not in text) or path.exists() or text.startswith("bundled:")


class Typed(str):
    """A line of the input: no file is meant, whatever it says."""


def _lines() -> list[str]:
    return [line.rstrip("\r\n") for line in _input() if line.strip()]


def _input() -> Iterator[str]:
    if sys.stdin.isatty():
        raise ValueError("nothing to answer: name a file, give texts, or send lines into the input")
    yield from sys.stdin


@contextlib.contextmanager
def bar(total: int, out: Path | None) -> Iterator[Any]:
    """A function that counts what goes through it in a bar on the error stream, where that is a terminal and the
    answers do not go to one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not shell.err.is_terminal or (out is None and sys.stdout.isatty())
    with Progress(*columns, console=shell.err, disable=hidden, transient=True) as progress:
        yield lambda items: progress.track(items, total=total)
