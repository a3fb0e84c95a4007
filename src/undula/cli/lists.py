# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula methods` and `undula assets`: what there is."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer

import undula

from ..core.wrapper import Wrapper
from ..penalties import Penalty
from ..ranks import Procedure
from ..starts import Start
from . import shell


def methods(to: shell.Json = None) -> None:
    """The methods (rung, law, cost, source), the allocators and other procedures, the penalties, the starts."""
    rows = [*_methods(), *_allocators(), *_penalties(), *_starts()]
    shell.write(to, rows)
    if str(to) != "-":
        shell.out.print(shell.table([_brief(row) for row in rows if row["kind"] == "method"]))
        for kind in ("allocator", "penalty", "start"):
            shell.out.print(shell.table([_aside(row) for row in rows if row["kind"] == kind]))


def _methods() -> list[dict[str, str]]:
    return [
        {
            "kind": "method",
            "name": name,
            "rung": "as inner" if issubclass(m, Wrapper) else m.rung(),
            "formula": m.formula,
            "parameters": m.parameters,
            "options": _options(m),
            "source": m.source,
            "grade": m.grade,
        }
        for name, m in undula.methods().items()
    ]


def _allocators() -> list[dict[str, str]]:
    return [_procedure("allocator", a) for a in sorted(Procedure.registry.values(), key=lambda a: a.__name__.lower())]


def _penalties() -> list[dict[str, str]]:
    return [_procedure("penalty", p) for p in sorted(Penalty.members(), key=lambda p: p.__name__.lower())]


def _procedure(kind: str, a: type[Procedure]) -> dict[str, str]:
    return {
        "kind": kind,
        "name": a.__name__,
        "works on": ", ".join(m.__name__ for m in a.works_on),
        "what": _first_sentence(a),
        "options": _options(a),
        "source": a.source,
        "grade": a.grade,
    }


def _starts() -> list[dict[str, str]]:
    return [
        {"kind": "start", "name": s.__name__, "what": _first_sentence(s), "options": _options(s)}
        for s in sorted(Start.registry.values(), key=lambda s: s.__name__.lower())
    ]


def _options(choice: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(choice))


def _first_sentence(choice: type) -> str:
    text = " ".join((choice.__doc__ or "").split())
    return re.split(r"\.\s+(?=[A-Z])", text)[0].rstrip(".")


def _aside(row: dict[str, str]) -> dict[str, str]:
    """An allocator or a start in two columns."""
    told = [row["what"], f"works on: {row['works on']}" if "works on" in row else "",
            f"options: {row['options']}" if row["options"] else "", _cited(row) if "source" in row else ""]  # fmt: skip
    return {row["kind"]: row["name"], "what, options, source": "\n".join(line for line in told if line)}


def _cited(row: dict[str, str]) -> str:
    return row["source"] + ("" if row["grade"] == "exact" else f" ({row['grade']})")


def _brief(row: dict[str, str]) -> dict[str, str]:
    """A method in three columns, for eighty characters."""
    lines = [row["formula"], f"parameters: {row['parameters']}", f"options: {row['options']}", _cited(row)]
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
