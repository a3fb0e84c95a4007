# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula methods` and `undula assets`: what there is."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

import undula

from ..method import Wrapper
from . import shell


def methods(to: shell.Json = None) -> None:
    """The methods: what each can do (its rung), its law, what it costs, where it comes from."""
    rows = [
        {
            "name": name,
            "rung": "as inner" if issubclass(m, Wrapper) else m.rung(),
            "formula": m.formula,
            "parameters": m.parameters,
            "options": ", ".join(f.name for f in dataclasses.fields(m)),  # type: ignore[arg-type]
            "source": m.source,
            "grade": m.grade,
        }
        for name, m in undula.methods().items()  # type: ignore[operator]
    ]
    shell.write(to, rows)
    if str(to) != "-":
        shell.out.print(shell.table([_brief(row) for row in rows]))


def _brief(row: dict[str, str]) -> dict[str, str]:
    """A method in three columns, for eighty characters."""
    grade = "" if row["grade"] == "exact" else f" ({row['grade']})"
    source = row["source"] + grade
    lines = [row["formula"], f"parameters: {row['parameters']}", f"options: {row['options']}", source]
    law = "\n".join(line for line in lines if line)
    return {"method": row["name"], "rung": row["rung"], "law, parameters of a matrix, options, source": law}


def assets(
    fetch: Annotated[list[str], typer.Option(help="Fetch this one now ('all': every one). Repeatable.")] = [],
    to: shell.Json = None,
) -> None:
    """The models and data sets that `bundled:NAME` means, and their licences."""
    from ..bundled import ASSETS, table
    from ..bundled import fetch as get

    for name in list(ASSETS) if "all" in fetch else fetch:
        get(name, lambda text: shell.err.print(text, highlight=False, soft_wrap=True))
    shell.show(table(), to)
