"""`undula show --norms`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..observe.regime import PARTS, norms
from ..train import restored
from . import shell

ROWS = 16  # that go through the model where nobody says how many


def show(path: Path, model: str | None, data: str | None, rows: int | None, to: Path | None) -> None:
    """Runs rows through the model once and tells the norms of its attention, the largest head of each layer."""
    opened = restored(path, model)
    found = norms(opened.model, opened.batches(opened.examples(data, None, rows or ROWS)))
    shell.write(to, found)
    if str(to) == "-":
        return
    *heads, whole = found
    names = list(dict.fromkeys(row["layer"] for row in heads))
    lines = [_line(name, [row for row in heads if row["layer"] == name]) for name in names]
    shell.out.print(shell.table([*lines, _line("all", heads)]))
    shell.note(
        f"max |X W| / sqrt(ln L) with the adapter, in brackets what the adapter adds by itself; L = {whole['tokens']} "
        "tokens. raised: by how much the adapter raised q k, in the head where it is most. A trend, not a regime: see "
        "docs/tune.md"
    )


def _line(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest of each figure among heads."""
    parts = {p: f"{max(r[p] for r in rows):.3g} ({max(r[f'{p}_change'] for r in rows):.2g})" for p in PARTS}
    raised = [row["raised"] for row in rows if row["raised"] is not None]
    return {"layer": name, "heads": len(rows), **parts, "raised": f"{100 * max(raised):+.1f} %" if raised else None}
