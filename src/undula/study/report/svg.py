"""Drawing: a canvas that is written as SVG, scales with their ticks, and names that fit.  Nothing here knows a study.

Colours are CSS classes, so the same drawing serves light and dark pages, inline or as a file of its own; equal input
gives equal text, byte for byte.  `painting` makes PDF and PNG of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

STYLE = Path(__file__).with_name("drawing.css").read_text(encoding="utf-8")
WIDE = 7.3  # pixels that a letter takes at 12 px, on the safe side


@dataclass(frozen=True)
class Line:
    """From point to point, and back to the first where it is `closed`."""

    points: tuple[tuple[float, float], ...]
    kind: str
    title: str = ""
    closed: bool = False

    @property
    def tag(self) -> str:
        return "polygon" if self.closed else "polyline"

    def svg(self) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        return f'<{self.tag} class="{self.kind}" points="{path}"{_ended(self.tag, self.title)}'


@dataclass(frozen=True)
class Circle:
    x: float
    y: float
    radius: float
    kind: str
    title: str = ""
    tag = "circle"

    def svg(self) -> str:
        at = f'cx="{self.x:.1f}" cy="{self.y:.1f}" r="{self.radius:.1f}"'
        return f'<circle class="{self.kind}" {at}{_ended("circle", self.title)}'


@dataclass(frozen=True)
class Words:
    """A text whose `anchor` (start, middle or end) lies at x, its letters on y."""

    x: float
    y: float
    text: str
    kind: str
    anchor: str
    title: str = ""
    tag = "text"

    def svg(self) -> str:
        hint = f"<title>{escape(self.title)}</title>" if self.title and self.title != self.text else ""
        at = f'x="{self.x:.1f}" y="{self.y:.1f}" class="{self.kind}" text-anchor="{self.anchor}"'
        return f"<text {at}>{escape(self.text)}{hint}</text>"


Shape = Line | Circle | Words


def _ended(tag: str, title: str) -> str:
    return f"><title>{escape(title)}</title></{tag}>" if title else "/>"


@dataclass
class Canvas:
    """A drawing of `width` x `height` pixels."""

    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        self.shapes.append(Line(tuple(points), kind))

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", title: str = "") -> None:
        """Moved as far as it takes to have both of its ends on the canvas; one that is longer is cut, and a title."""
        most = int(self.width / WIDE)
        if len(text) > most:
            text, title = labels([text], most)[text], title or text
        wide = WIDE * len(text)
        before = {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        x = max(min(x, self.width - wide + before), before)
        self.shapes.append(Words(x, y, text, kind, anchor, title))

    def mark(self, x: float, y: float, kind: str, title: str = "", size: float = 4.5) -> None:
        """A point: triangle up for a win, down for a loss, a diamond for the baseline, a circle otherwise."""
        corners = CORNERS.get(kind.partition(" ")[0])
        if corners is None:
            self.shapes.append(Circle(x, y, size * 0.85, kind, title))
        else:
            self.shapes.append(Line(tuple((x + size * a, y + size * b) for a, b in corners), kind, title, closed=True))

    def cross(self, x: float, y: float, kind: str, size: float = 3.5) -> None:
        for s in (1, -1):
            self.line([(x - size, y - s * size), (x + size, y + s * size)], kind)

    def svg(self) -> str:
        """Its shapes."""
        return "".join(shape.svg() for shape in self.shapes)

    def inline(self, label: str) -> str:
        """As a part of a page that has STYLE."""
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" '
            f'width="{self.width:.0f}" height="{self.height:.0f}" role="img" aria-label="{escape(label)}">'
            f"{self.svg()}</svg>"
        )


CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "win": ((0, -1.1), (1, 0.8), (-1, 0.8)),
    "loss": ((0, 1.1), (1, -0.8), (-1, -0.8)),
    "base": ((0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)),
}


@dataclass(frozen=True)
class Grid:
    """Several drawings in rows of `columns`: `places` are their left upper corners."""

    places: tuple[tuple[float, float], ...]
    width: float
    height: float


def grid(panels: Sequence[Canvas], columns: int) -> Grid:
    columns = min(columns, len(panels))
    width = max(p.width for p in panels)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    tops = [0.0]
    for row in rows:
        tops.append(tops[-1] + max(p.height for p in row))
    places = tuple((i * width, top) for top, row in zip(tops, rows, strict=False) for i, _ in enumerate(row))
    return Grid(places, columns * width, tops[-1])


def sheet(panels: Sequence[Canvas], columns: int, label: str) -> str:
    """Several drawings as one file of its own, in a grid."""
    made = grid(panels, columns)
    inner = "".join(
        f'<svg x="{x:.0f}" y="{y:.0f}" width="{p.width:.0f}" height="{p.height:.0f}">{p.svg()}</svg>'
        for (x, y), p in zip(made.places, panels, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {made.width:.0f} {made.height:.0f}" '
        f'width="{made.width:.0f}" height="{made.height:.0f}" role="img" aria-label="{escape(label)}">'
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>{inner}</svg>\n'
    )


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linearly or by logarithms; values beyond the ends stay at the ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(u) if self.log else u for u in (self.low, self.high, value))
        return self.start + (min(max(v, low), high) - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values within, about `most` of them."""
        return _decades(self.low, self.high, most) if self.log else _round(self.low, self.high, most)


def linear(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """A scale that shows all of the values; differences of rounding alone are not made to look like some."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    room = (high - low) * margin if high - low > 1e-9 * size else size * 0.05 or 1.0
    return Scale(low - room, high + room, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """The same for positive values that span decades."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.07, 1.15)
    return Scale(low / room, high * room, start, end, log=True)


def _round(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**p for p in powers for m in parts if low <= m * 10.0**p <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def number(value: float, digits: int = 4) -> str:
    """A tick's label: 0.65, 1e-4, 38k, 1.2M."""
    if not value:
        return "0"
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 3}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.{digits - 1}g}{name}"
    return f"{value:.{digits}g}"


def with_labels(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """(tick, its label), with as many digits as it takes to tell them apart."""
    for digits in range(4, 17):
        found = [number(t, digits) for t in ticks]
        if len(set(found)) == len(found):
            break
    return list(zip(ticks, found, strict=True))


def labelled(scale: Scale, most: int) -> list[tuple[float, str]]:
    """Ticks whose labels do not run together: fewer, where `most` would."""
    for count in range(most, 0, -1):
        ticks = with_labels(scale.ticks(count))
        rooms = [(scale(t), WIDE * len(label) / 2) for t, label in ticks]
        if all(b - a >= u + v + 2 for (a, u), (b, v) in pairwise(rooms)):
            return ticks
    return ticks[:1]


def beside(ticks: Sequence[tuple[float, str]]) -> float:
    """Pixels that the widest of their labels takes."""
    return WIDE * max((len(label) for _, label in ticks), default=0)


def labels(names: Sequence[str], most: int) -> dict[str, str]:
    """{name: what of it fits into `most` letters}; names that would become the same are numbered."""
    made: dict[str, str] = {}
    for name in names:
        short = name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"
        count = 2
        while short in made.values():
            end = f"…#{count}"
            short, count = name[: most - len(end)] + end, count + 1
        made[name] = short
    return made


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to the wanted ones (sorted) that are `gap` apart (less where that does not fit), within
    low ... high: isotonic regression by pooling neighbours."""
    last = len(wanted) - 1
    gap = min(gap, (high - low) / max(last, 1))
    blocks: list[tuple[float, int]] = []  # (sum, count) of wanted positions that are pushed together
    for i, w in enumerate(wanted):
        blocks.append((w - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            (a, m), (b, n) = blocks.pop(), blocks.pop()
            blocks.append((a + b, m + n))
    means = [total / count for total, count in blocks for _ in range(count)]
    return [min(max(m, low), high - last * gap) + i * gap for i, m in enumerate(means)]
