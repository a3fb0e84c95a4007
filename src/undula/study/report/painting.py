"""PDF and PNG of the drawings, by matplotlib: the same shapes, in the light colours of drawing.css."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.extras import told
from ...io import files
from .svg import (
    STYLE,
    Canvas,
    Circle,
    Shape,
    Words,
    grid,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

PIXEL = 0.75  # points; a CSS pixel is 1/96 inch
SHARP = 150  # pixels an inch of a PNG
LETTERS = 12.0  # pixels, as in drawing.css
NO_DATE: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
DASHES = {"3 3": (0, (3, 3)), "1 3": (0, (1, 3))}


@told
def paint(panels: Sequence[Canvas], columns: int, path: Path) -> None:
    """Writes PATH with .pdf and with .png in its end's place: `panels` in rows of `columns`.  Equal input gives equal
    files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = grid(panels, columns)
    figure = Figure(figsize=(made.width / 96, made.height / 96), facecolor=_colour("var(--paper)"))
    FigureCanvasAgg(figure)
    for (left, top), panel in zip(made.places, panels, strict=True):
        for shape in panel.shapes:
            figure.add_artist(_artist(shape, left, made.height - top, figure))
    for end, metadata in NO_DATE.items():
        files.atomic(
            path.with_suffix(f".{end}"),
            lambda at, end=end, metadata=metadata: figure.savefig(at, format=end, dpi=SHARP, metadata=metadata),  # type: ignore[misc]
        )


def _artist(shape: Shape, left: float, top: float, figure: Figure) -> Artist:
    from matplotlib import patches
    from matplotlib.path import Path as Outline
    from matplotlib.text import Text
    from matplotlib.transforms import Affine2D

    inches = Affine2D().scale(1 / 96) + figure.dpi_scale_trans
    look = _look(shape.tag, shape.kind)
    weight = "bold" if "font-weight" in look else "normal"
    if isinstance(shape, Words):
        return Text(
            left + shape.x, top - shape.y, shape.text,
            color=_colour(look["fill"]), fontsize=LETTERS * PIXEL, fontweight=weight,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor], va="baseline",
            parse_math=False, transform=inches,
        )  # fmt: skip
    drawn: dict[str, Any] = {
        "facecolor": _colour(look.get("fill", "none")),
        "edgecolor": _colour(look.get("stroke", "none")),
        "linewidth": float(look.get("stroke-width", 1)) * PIXEL,
        "linestyle": DASHES.get(look.get("stroke-dasharray", ""), "solid"),
        "alpha": float(look.get("opacity", 1)),
        "transform": inches,
    }
    if isinstance(shape, Circle):
        return patches.Circle((left + shape.x, top - shape.y), shape.radius, **drawn)
    points = [(left + x, top - y) for x, y in shape.points]
    return patches.PathPatch(Outline([*points, points[0]] if shape.closed else points, closed=shape.closed), **drawn)


@cache
def _rules() -> tuple[tuple[str, str, dict[str, str]], ...]:
    """(tag, class, properties) of drawing.css, in order; "" stands for any."""
    made = []
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE.split("@media")[1].partition("svg {")[2]):
        found = dict(re.findall(r"([\w-]+):\s*([^;]+);", body))
        for selector in selectors.split(","):
            tag, _, kind = selector.strip().removeprefix("svg ").partition(".")
            made.append((tag, kind, found))
    return tuple(made)


def _look(tag: str, kind: str) -> dict[str, str]:
    """The properties of a shape: rules of a tag and a class beat those of a class, those beat a tag's; then the later
    one."""
    classes = set(kind.split())
    fits = [(t, k, p) for t, k, p in _rules() if t in ("", tag) and (not k or k in classes)]
    made: dict[str, str] = {}
    for _, _, found in sorted(fits, key=lambda rule: (bool(rule[1]), bool(rule[0]))):
        made |= found
    return made


def _colour(value: str) -> str:
    """A colour of the light theme."""
    name = re.fullmatch(r"var\((--\w+)\)", value)
    return _light()[name[1]] if name else value


@cache
def _light() -> dict[str, str]:
    return dict(re.findall(r"(--\w+):\s*(#\w+)", STYLE.split("@media")[0]))
