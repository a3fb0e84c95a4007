"""Where rows come from: which file, and which line of it, so that a message can say so."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from .faults import Faults, Row

ATTRIBUTE = "_undula_source"


def Lines() -> array[int]:
    """Numbers of lines, 8 bytes each."""
    return array("Q")


@dataclass(frozen=True)
class Source:
    """A file, the line at which each row begins (empty: its rows are numbered from 1), and what was assumed of it.
    Where rows have been left out, `order` tells the others by what they were counted as."""

    name: str
    lines: array[int] = field(default_factory=Lines, repr=False)
    unit: str = "row"
    notes: tuple[str, ...] = ()
    order: array[int] = field(default_factory=Lines, repr=False)  # of each row its number from 0; empty: all are there

    def number(self, row: int) -> int:
        return self.lines[row] if self.lines else row + 1

    def place(self, row: int) -> str:
        return f"{self.unit} {self.number(row)}"

    def key(self, row: int) -> Row:
        """What tells this row from all others, see `Faults.add`."""
        return self.name, self.order[row] if self.order else row


def described(rows: Dataset, source: Source) -> Dataset:
    """The rows, with where they come from; operations that change which rows there are lose it."""
    setattr(rows, ATTRIBUTE, source)
    return rows


def source_of(rows: Dataset) -> Source:
    """Where rows come from; of rows that no file of ours holds: nowhere, and they are numbered from 1."""
    found = getattr(rows, ATTRIBUTE, None)
    return found if found is not None and (not found.lines or len(found.lines) == len(rows)) else Source("")


def named(rows: Dataset, split: str) -> Dataset:
    """The rows; where no file of ours holds them, as those of that split."""
    source = source_of(rows)
    return rows if source.name else described(rows, replace(source, name=f"split {split!r}"))


def sound(rows: Dataset, faults: Faults) -> Dataset:
    """The rows that have no fault; they keep their places."""
    source = source_of(rows)
    bad = faults.bad.get(source.name, ())
    kept = [row for row in range(len(rows)) if source.key(row)[1] not in bad] if bad else range(len(rows))
    if len(kept) == len(rows):
        return rows
    lines, order = (array("Q", map(of, kept)) for of in (source.number, lambda row: source.key(row)[1]))
    return described(rows.select(kept), replace(source, lines=lines, order=order))


def nameable(path: Path, names: Collection[str], faults: Faults) -> list[str]:
    """The names that a column can have; Arrow's end at a character 0, and others are a fault of the file."""
    for name in names:
        if "\0" in name:
            faults.add(f"{path}: the name of column {name!r} has a character 0", advice="Name it otherwise")
    return [name for name in names if "\0" not in name]


def nothing_left(path: Path, count: int, lines: Sized, faults: Faults) -> None:
    """Says how many rows a file has.  Raises ValueError where none of them could be read."""
    faults.of(str(path), count)
    if not count:
        faults.add(f"{path} has no rows")
    if not lines:
        raise faults.error()
