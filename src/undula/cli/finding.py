"""`undula find`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from . import shell
from .progress import counting

if TYPE_CHECKING:
    from ..retrieve import Found, Index

MOST_WRONG = 20  # lines of what could not be read; --json has all
LONGEST = 60  # characters of a text in the table


def find(
    words: Annotated[
        str | None, typer.Argument(metavar="DESCRIPTION", help="What the task is, in a sentence.", show_default=False)
    ] = None,
    *,
    folder: Annotated[Path, typer.Option("--in", help="The folder of adapters, at any depth.")],
    rows: Annotated[
        str | None, typer.Option(help="Rows of the task, as for `undula train --data`; 64 of them are read.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many to show.", min=1)] = 10,
    by: Annotated[str, typer.Option(help="What is compared: text, weights, or both.")] = "both",
    encoder: Annotated[
        Path | None, typer.Option(help="An encoder of weights, which --learn has trained.", show_default=False)
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(help="Train an encoder of weights on the adapters and texts of this folder, into this file."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="The file of the index. (default: .undula-index.safetensors in the folder)")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Adapters of this base alone.")] = None,
    to: shell.Json = None,
) -> None:
    """Find adapters of a folder by what they are for: by a description, by rows of the task, or both.

    The folder's index is brought up to date first: only adapters that are new or changed are read.  Those that cannot
    be read are named, and the exit code is 1.
    """
    if words is None and rows is None and learn is None:
        raise ValueError("say what the task is, or give rows of it (--rows FILE)")
    if encoder is not None and learn is not None:
        raise ValueError("--encoder names one that is there, --learn trains one: give one of them")
    made, found = _found(words, folder, rows, top, by, encoder, learn, index, model)
    skipped = made.skipped
    shell.write(to, _told(made, found, learn))
    if str(to) != "-":
        _show(made, found, learn, model)
    for name, why in list(skipped.items())[:MOST_WRONG]:
        shell.remark(f"{name} is left out: {why}")
    if skipped:
        more = f", {MOST_WRONG} of them named here" if len(skipped) > MOST_WRONG else ""
        shell.remark(f"{len(skipped)} of {len(made.entries)} could not be read{more}")
        raise typer.Exit(1)


@needs("train")
def _found(
    words: str | None,
    folder: Path,
    rows: str | None,
    top: int,
    by: str,
    encoder: Path | None,
    learn: Path | None,
    index: Path | None,
    model: str | None,
) -> tuple[Index, list[Found] | None]:
    from ..retrieve import Encoder, learned, question, ranked, update
    from ..retrieve.encoder import check_place
    from ..retrieve.finding import check_by

    check_by(by, encoder is not None or learn is not None)
    if learn is not None:
        check_place(learn)
    known = None if encoder is None else Encoder.load(encoder)
    asked = None if words is None and rows is None else question(words, rows)
    with counting("reading adapters") as seen:
        made = update(folder, index, seen=seen)
    if learn is not None:
        known = learned(made)
        known.save(learn)
    return made, None if asked is None else ranked(made, asked, known, by=by, base=model, top=top)


def _told(made: Index, found: list[Found] | None, learn: Path | None) -> dict[str, Any]:
    return {
        "folder": str(made.folder), "adapters": len(made.entries), "read": made.read, "skipped": made.skipped,
        "without weights": {e.name: e.silent for e in made.entries if e.silent},
        "encoder": None if learn is None else str(learn),
        "found": None if found is None else [f.encode() for f in found],
    }  # fmt: skip


def _show(made: Index, found: list[Found] | None, learn: Path | None, model: str | None) -> None:
    shell.note(f"{len(made.usable):,} adapters in {made.folder}; {made.read:,} were new or changed and have been read")
    if silent := sum(bool(e.silent) for e in made.entries):
        shell.note(f"{silent:,} of them have no encoding of their weights: they are found by their text alone")
    if learn is not None:
        shell.note(f"An encoder of weights is saved in {learn}: --encoder {learn}")
    if found is None:
        return
    if not found:
        bases = sorted({made.entries[i].base or "no base that is said" for i in made.usable})
        of = (
            f"; --model {model} asks for one base, and these are for: {', '.join(bases[:5])}" if model and bases else ""
        )
        shell.note(f"Nothing was found: no adapter here has what was asked for{of}")
        return
    weighed = any(f.weights is not None for f in found)
    rows: list[dict[str, Any]] = [
        {"adapter": f.name, "score": f.score}
        | ({"text": f.text, "weights": f.weights} if weighed else {})
        | {"what it says": f"{f.entry.text[:LONGEST]}{'...' if len(f.entry.text) > LONGEST else ''}"}
        | {"method": f.entry.method}
        for f in found
    ]
    shell.out.print(shell.table(rows))
