"""What a report consists of, free of HTML and Markdown: both are written from the same blocks."""

from __future__ import annotations

from dataclasses import dataclass

from .plots import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """A cell that stands out: `kind` is win, loss, open-verdict or base."""

    text: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first column names the row, `words` are the columns that hold no numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | Mark, ...], ...]
    caption: str = ""
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Drawn:
    """Figures side by side."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Code:
    """A text as it is."""

    title: str
    text: str


Block = Text | Bullets | Table | Drawn | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]
