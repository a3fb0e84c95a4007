"""The look at a training before it starts, for people: on the error stream, so that the output stays the result's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import shell

if TYPE_CHECKING:
    from ..train.look import Look

CLASSES = 20  # that are listed


def show(look: Look) -> None:
    """Prints it."""
    told = Table.grid(padding=(0, 2))
    for name, value in _lines(look):
        told.add_row(f"[bold]{name}[/]", escape(value))
    shell.err.print(told)
    for number, example in enumerate(look.examples, 1):
        text = Text(f"example {number}  ", style="bold")
        for piece, learned in example:  # brackets and colour: what is learned is to be seen without colours too
            text.append(f"⟦{piece}⟧" if learned else piece, style="green" if learned else "dim")
        shell.err.print(text, highlight=False)
    if look.examples:
        shell.err.print("[dim]green, in ⟦ ⟧: what is learned[/]", highlight=False)


def _lines(look: Look) -> list[tuple[str, str]]:
    made = [("rows", ", ".join(f"{n:,} {part}" for part, n in look.rows.items()))]
    if look.form:
        made.append(("form", f"{look.form} (another: --column, --task-set)"))
    for part, counted in look.classes.items():
        shown = sorted(counted.items(), key=lambda item: -item[1])
        more = f", ... {len(shown) - CLASSES} more" if len(shown) > CLASSES else ""
        made.append((f"{part} classes", ", ".join(f"{name} {n:,}" for name, n in shown[:CLASSES]) + more))
    if look.majority is not None:
        made.append(("majority", f"always answering the most frequent class: {100 * look.majority:.1f} % right"))
    for part, found in look.lengths.items():
        cuts = f", {found.cut:,} cut" + (f", {found.lost_ends:,} without their end token" if found.lost_ends else "")
        made.append(
            (f"{part} tokens", f"median {found.median:g}, longest {found.longest:,}{cuts if found.cut else ''}")
        )
    share = 100 * look.trainable_parameters / max(look.parameters, 1)
    made.append(("parameters", f"{look.trainable_parameters:,} of {look.parameters:,} train ({share:.2f} %)"))
    several = f", {look.processes} processes" if look.processes > 1 else ""
    made.append(("device", f"{look.device}{several}, {look.rows_in_a_step} rows in a step"))
    made.append(("steps", f"{look.steps:,}, about {spoken(look.seconds)} (estimated by one batch; without evaluation)"))
    return made


def spoken(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
