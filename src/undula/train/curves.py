"""The drawings of a training's page: its course, and what is taken for what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..observe import drawing as D
from ..observe.page.content import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 470.0, 230.0, 30.0, 42.0, 14.0
MOST = 20  # classes in a picture
CELL, NAMES = 30.0, 150.0
Line = Sequence[tuple[float, float]]


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The losses by step; the headline metric, where it is another."""
    trained = _finite(report["losses"])
    points = [_point(0, report["before"] or {}), *report.get("evaluations", [])]
    losses = _finite((p["step"], p.get("loss")) for p in points)
    if trained or len(losses) > 1:
        caption = "Grey: each entry of the training's log; blue: its running mean"
        caption += "; orange: on the validation rows" if len(losses) > 1 else ""
        yield Figure("loss", "Loss by step", caption, partial(_losses, trained, losses if len(losses) > 1 else []))
    metric = report["metric"]
    found = _finite((p["step"], p.get(metric)) for p in points)
    best = (report.get("best") or {}).get("step")
    if metric != "loss" and len(found) > 1:
        told = "On the validation rows" + ("; diamond: the best" if best is not None else "")
        yield Figure("metric", f"{metric} by step", told, partial(_metric, found, metric, best))


def _point(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step, **metrics}


def _finite(pairs: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in pairs if y is not None and math.isfinite(y)]


def smooth(line: Line) -> list[tuple[float, float]]:
    """Running means over about a twentieth of the line, at least three points of it."""
    half = max(1, len(line) // 40)
    parts = [line[max(0, i - half) : i + half + 1] for i in range(len(line))]
    return [(x, sum(y for _, y in part) / len(part)) for (x, _), part in zip(line, parts, strict=True)]


def framed(lines: Sequence[Line], title: str) -> tuple[Drawing, Axes]:
    """A drawing for lines by step."""
    xs, ys = [x for line in lines for x, _ in line], D.limits([y for line in lines for _, y in line])
    left = max(D.wide(label) for _, label in D.ticks(*ys, 6)) + 14
    figure = D.blank(WIDTH, TOP + HEIGHT + BOTTOM)
    axis = D.axes(figure, left, TOP, WIDTH - left - RIGHT, HEIGHT)
    axis.set(xlim=(min(0.0, *xs), max(xs) or 1.0), ylim=ys)
    D.mark_axis(axis, "x", WIDTH - left - RIGHT, 6)
    D.mark_axis(axis, "y", HEIGHT, 6)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y")
    axis.set_xlabel("step")
    axis.annotate(title, (0, 1), (0, 8), "axes fraction", "offset points", color=D.LIGHT["pale"])
    return figure, axis


def drawn(axis: Axes, line: Line, colour: str, mark: str = "", width: float = 1.6) -> None:
    """A line in it."""
    x, y = zip(*line, strict=True)
    axis.plot(x, y, color=colour, lw=width * D.POINT, marker=mark, ms=4.5, mew=0, clip_on=False)


def _losses(trained: Line, measured: Line) -> Drawing:
    figure, axis = framed([line for line in (trained, measured) if line], "loss")
    if trained:
        drawn(axis, trained, D.LIGHT["back"], width=0.9)
        drawn(axis, smooth(trained), D.LIGHT["win"])
    if measured:
        drawn(axis, measured, D.LIGHT["loss"], "o")
    return figure


def _metric(line: Line, name: str, best: int | None) -> Drawing:
    figure, axis = framed([line], name)
    drawn(axis, line, D.LIGHT["loss"], "o")
    for step, value in line:
        if step == best:
            (point,) = axis.plot(step, value, "D", color=D.LIGHT["ink"], ms=6, mew=0, clip_on=False, zorder=4)
            D.titled(point, f"step {step:g}: {value:.4g}")
    return figure


def confusion(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Rows of each class by what they are said to be; of many classes those that are confused most."""
    names, matrix = [c["class"] for c in report["per_class"]], report.get("confusion")
    if not matrix or not any(map(sum, matrix)):
        return
    wrong = [sum(row) + sum(other[i] for other in matrix) - 2 * row[i] for i, row in enumerate(matrix)]
    shown = sorted(sorted(range(len(names)), key=lambda i: -wrong[i])[:MOST])
    part = [[matrix[i][j] for j in shown] for i in shown]
    more = f"; the {MOST} of {len(names)} classes that are confused most" if len(names) > MOST else ""
    caption = f"A row for each class, a column for each answer; the fuller the colour, the larger the share{more}"
    totals = [sum(matrix[i]) for i in shown]
    draw = partial(_confusion, [names[i] for i in shown], part, totals)
    yield Figure("confusion", "What is taken for what", caption, draw, many=len(shown) > 8)


def _confusion(names: Sequence[str], matrix: Sequence[Sequence[int]], totals: Sequence[int]) -> Drawing:
    from matplotlib.patches import Rectangle

    short = list(D.labels(names, 24).values())
    left, number = max(map(D.wide, short)) + 14, len(names)
    cell = max(CELL, *(D.wide(f"{n:,}") + 10 for row in matrix for n in row))
    top = left  # names stand upright above the columns
    figure = D.blank(left + cell * number + 10, top + CELL * number + 10)
    axis = D.axes(figure, left, top, cell * number, CELL * number)
    axis.set(xlim=(0, number), ylim=(number, 0))
    for i, row in enumerate(matrix):
        for j, n in enumerate(row):
            share = n / totals[i] if totals[i] else 0.0
            colour = D.LIGHT["win"] if i == j else D.LIGHT["loss"]
            axis.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, color=colour, alpha=0.75 * share, lw=0))
            if n:
                said = axis.text(j + 0.5, i + 0.5, f"{n:,}", ha="center", va="center")
                D.titled(said, f"{names[i]} said to be {names[j]}: {n}")
    axis.set_yticks([i + 0.5 for i in range(number)], labels=short)
    axis.set_xticks([i + 0.5 for i in range(number)], labels=short, rotation=90)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelcolor=D.LIGHT["ink"])
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure
