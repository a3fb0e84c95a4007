"""What a report consists of, free of HTML, Markdown and LaTeX: all are written from the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Draw = Callable[[], "Drawing"]  # within `drawing.styled`


@dataclass(frozen=True)
class Figure:
    """A drawing, made when a file asks for it; `caption` says what it shows, `title` of which part."""

    name: str  # of its file
    title: str
    caption: str
    draw: Draw
    many: bool = False  # panels, as wide as the page


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


@dataclass(frozen=True)
class Picture:
    """An image (a PNG) and what is to be said of it."""

    png: bytes
    text: str


@dataclass(frozen=True)
class Pictures:
    """Images side by side, on pages alone."""

    items: tuple[Picture, ...]


Block = Text | Bullets | Table | Drawn | Code | Pictures


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]
