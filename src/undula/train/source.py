"""Where rows come from: which file, and which line of it, so that a message can say so."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

ATTRIBUTE = "_undula_source"


def Lines() -> array[int]:
    """Numbers of lines, 8 bytes each."""
    return array("Q")


@dataclass(frozen=True)
class Source:
    """A file, the line at which each row begins (empty: its rows are numbered from 1), and what was assumed of it."""

    name: str
    lines: array[int] = field(default_factory=Lines, repr=False)
    unit: str = "row"
    notes: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        return f"{self.unit} {self.lines[row] if self.lines else row + 1}"


def described(rows: Dataset, source: Source) -> Dataset:
    """The rows, with where they come from; operations that change which rows there are lose it."""
    setattr(rows, ATTRIBUTE, source)
    return rows


def source_of(rows: Dataset) -> Source:
    """Where rows come from; of rows that no file of ours holds: nowhere, and they are numbered from 1."""
    found = getattr(rows, ATTRIBUTE, None)
    return found if found is not None and (not found.lines or len(found.lines) == len(rows)) else Source("")
