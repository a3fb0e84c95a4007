"""Rows with what a model says to them, as a table or as JSON lines, while they come."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from ..io.draft import Draft, clean


class As(StrEnum):
    """How answers are written."""

    csv = "csv"
    tsv = "tsv"
    jsonl = "jsonl"


def form_of(out: Path | None, form: As | None, otherwise: As, given: Collection[str]) -> As:
    """What is asked for, else what the name of the file says.  Raises ValueError for a name that says another form, or
    none, and for the file that the rows come from."""
    if out is None:
        return form or otherwise
    if any(len(g) < 4000 and "\0" not in g and Path(g).resolve() == out.resolve() for g in given):
        raise ValueError(f"--out {out} is the file that the rows are in: name another")
    said = out.suffix.lower().removeprefix(".")
    if said not in As.__members__ or (form is not None and form.value != said):
        asked = "" if form is None else f", and --as says {form.value}"
        raise ValueError(f"--out {out}: answers are written as {', '.join('.' + a for a in As)}{asked}")
    return As(said)


@contextlib.contextmanager
def opened(out: Path | None) -> Iterator[TextIO]:
    """The output, or a file that is there in the end with all that was written, or as it was before."""
    if out is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    clean(out)
    with Draft(out) as draft:
        text = io.TextIOWrapper(draft.file, encoding="utf-8", newline="", write_through=True)
        try:
            yield text
            text.flush()
            draft.flush()
            draft.place()
        finally:
            text.detach()


def renamed(answers: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """{part of an answer: the column that it gets}: "predicted_" before it where the rows have a column of its name."""
    found: dict[str, str] = {}
    for name in answers:
        column = name
        while column in taken:
            column = f"predicted_{column}"
        found[name] = column
    return found


def write(
    to: TextIO, form: As, rows: Iterable[Mapping[str, Any]], answers: Iterator[Mapping[str, Any]], probabilities: bool
) -> dict[str, str]:
    """Writes each row with its answer.  Returns {part of an answer: column} of those that are renamed."""
    names: dict[str, str] = {}
    table = None
    for row, answer in zip(rows, answers, strict=True):
        given, said = dict(_kept(row)), dict(_said(answer, form, probabilities))
        names = names or renamed(said, given)
        whole = given | {names.get(k, k): v for k, v in said.items()}
        if form is As.jsonl:
            to.write(json.dumps(whole, ensure_ascii=False, default=str) + "\n")
            continue
        if table is None:
            table = csv.DictWriter(to, list(whole), delimiter="," if form is As.csv else "\t", lineterminator="\n")
            table.writeheader()
        table.writerow({k: _cell(v) for k, v in whole.items()})
    return {name: column for name, column in names.items() if name != column}


def _kept(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A row without the bytes of images and sounds; where they came from a file its name stays."""
    for name, value in row.items():
        if isinstance(value, Mapping) and {"bytes", "path"} >= set(value) and value:
            if value.get("path") and "file" not in row:
                yield name, value["path"]
        elif not isinstance(value, bytes):
            yield name, value


def _said(answer: Mapping[str, Any], form: As, probabilities: bool) -> Iterator[tuple[str, Any]]:
    for name, value in answer.items():
        whose, dot, what = name.rpartition(".")  # of several adapters: see `several`
        if what != "probabilities" or probabilities and form is As.jsonl:
            yield name, value
        elif probabilities:
            yield from ((f"{whose}{dot}probability of {label}", p) for label, p in value.items())


def _cell(value: Any) -> Any:
    """A value in a table: what is no text or number is written as JSON."""
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value
