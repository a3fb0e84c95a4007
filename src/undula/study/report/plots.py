"""The figures with a row or a point per arm.  A row has its name at its left: no figure needs a legend of arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..table import Group, Row, Summary
from .svg import (
    WIDE,
    Canvas,
    Scale,
    apart,
    beside,
    labelled,
    labels,
    linear,
    logarithmic,
    with_labels,
)
from .words import look

WIDTH, LEFT, RIGHT, TOP, ROW, LETTERS = 450.0, 166.0, 16.0, 8.0, 22.0, 21
NAMED = 10  # points; of more, those without a verdict that are not on the front stay without a name


@dataclass(frozen=True)
class Figure:
    """Drawings that belong together; `caption` says what they show, `title` which part of the study."""

    name: str  # of its file
    title: str
    caption: str
    panels: tuple[Canvas, ...]
    columns: int = 1  # in its file


def kind(row: Row, summary: Summary) -> str:
    """How a row's points look."""
    return "base" if row.arm == summary.baseline else look(row.against.verdict if row.against else "")


def rows_by_name(names: Sequence[str], scale: Scale, title: str, right: float = RIGHT) -> tuple[Canvas, list[float]]:
    """A canvas with one labelled row per name above a horizontal axis; the rows' heights."""
    short = labels(names, LETTERS)
    bottom = TOP + ROW * len(names)
    canvas = Canvas(WIDTH, bottom + 36)
    heights = [TOP + ROW * (i + 0.5) for i in range(len(names))]
    for tick, label in labelled(scale, 5):
        canvas.line([(scale(tick), TOP), (scale(tick), bottom)], "rule")
        canvas.text(scale(tick), bottom + 14, label, "pale", "middle")
    for name, y in zip(names, heights, strict=True):
        canvas.line([(LEFT, y), (WIDTH - right, y)], "rule")
        canvas.text(LEFT - 8, y + 4, short[name], anchor="end", title=name)
    canvas.line([(LEFT, bottom), (WIDTH - right, bottom)], "axis")
    canvas.text((LEFT + WIDTH - right) / 2, bottom + 30, title, "pale", "middle")
    return canvas, heights


def _interval(canvas: Canvas, scale: Scale, low: float | None, high: float | None, y: float, look: str) -> None:
    """A horizontal bar; where it is cut at the end of the scale, an arrow."""
    if low is None or high is None:
        return
    canvas.line([(scale(low), y), (scale(high), y)], look)
    for x, inwards, cut in ((scale.start, 4, low < scale.low), (scale.end, -4, high > scale.high)):
        if cut:
            canvas.line([(x + inwards, y - 3.5), (x, y), (x + inwards, y + 3.5)], look)


def better(row: Row) -> str:
    """The metric's name with where the better figures are."""
    return f"{row.metric} ({'more' if row.more_is_better else 'less'} is better)"


def seeds(summary: Summary, group: Group) -> Canvas | None:
    """Every seed a dot, the mean, its Student interval; the baseline's mean as a dashed line."""
    rows = [row for row in summary.rows_of(group) if row.quality]
    if not rows:
        return None
    values = {row.arm: [o.test or 0.0 for o in summary.finals(group, row.arm)] for row in rows}
    floor = summary.floors.get(group[1])
    shown = [v for found in values.values() for v in found]
    scale = linear(shown if floor is None else [*shown, floor], LEFT + 6, WIDTH - RIGHT - 6, 0.25)
    canvas, heights = rows_by_name([row.arm for row in rows], scale, f"{better(rows[0])}, {summary.split} rows")
    if floor is not None:
        canvas.line([(scale(floor), TOP), (scale(floor), heights[-1] + ROW / 2)], "axis dots")
    for row, y in zip(rows, heights, strict=True):
        quality, drawn = row.quality, kind(row, summary)
        assert quality is not None
        if row.arm == summary.baseline:
            canvas.line([(scale(quality.mean), TOP), (scale(quality.mean), heights[-1] + ROW / 2)], "axis dash")
        _interval(canvas, scale, quality.low, quality.high, y, f"{drawn} bar")
        for v in values[row.arm]:
            canvas.mark(scale(v), y, f"seed {drawn}", size=3)
        canvas.mark(scale(quality.mean), y, drawn, f"{row.arm}: {quality.mean:.4g}, {quality.n} seeds")
    return canvas


def differences(summary: Summary, group: Group) -> Canvas | None:
    """The mean paired difference to the baseline, its interval and the pairs, beside it the verdict."""
    rows = [row for row in summary.rows_of(group) if row.against]
    if not rows:
        return None
    base = {o.seed: o.test or 0.0 for o in summary.finals(group, summary.baseline)}
    pairs = {
        row.arm: [(o.test or 0.0) - base[o.seed] for o in summary.finals(group, row.arm) if o.seed in base]
        for row in rows
    }
    right = 92.0
    scale = linear([0.0, *(v for found in pairs.values() for v in found)], LEFT + 6, WIDTH - right - 6, 0.25)
    title = f"difference to {summary.baseline} in {better(rows[0])}"
    canvas, heights = rows_by_name([row.arm for row in rows], scale, title, right)
    canvas.line([(scale(0), TOP), (scale(0), heights[-1] + ROW / 2)], "axis")
    for row, y in zip(rows, heights, strict=True):
        against = row.against
        assert against is not None
        drawn = look(against.verdict)
        _interval(canvas, scale, against.low, against.high, y, f"{drawn} bar")
        for v in pairs[row.arm]:
            canvas.mark(scale(v), y, f"seed {drawn}", size=3)
        canvas.mark(scale(against.difference), y, drawn, f"{row.arm}: {against.difference:+.4g}")
        canvas.text(WIDTH - right + 8, y + 4, against.verdict, drawn)
    return canvas


def average_ranks(summary: Summary) -> Canvas | None:
    """Average ranks over the groups (1 is the best); each vertical line joins arms that Nemenyi's test does not tell
    apart, and a bar shows the critical difference."""
    ranks = summary.ranks
    if ranks is None:
        return None
    right = min(14 + 9.0 * len(ranks.cliques), 120)
    scale = Scale(1.0, float(len(ranks.arms)), LEFT + 8, WIDTH - right - 8)
    title = f"average rank over {ranks.groups} data sets, 1 is the best"
    canvas, heights = rows_by_name(ranks.arms, scale, title, right)
    place = dict(zip(ranks.arms, heights, strict=True))
    verdicts = {each.arm: each.verdict for each in summary.pooled}
    for arm, average in zip(ranks.arms, ranks.average, strict=True):
        drawn = "base" if arm == summary.baseline else look(verdicts.get(arm, ""))
        canvas.mark(scale(average), place[arm], drawn, f"{arm}: {average:.2f}")
    step = (right - 12) / max(len(ranks.cliques), 1)
    for i, clique in enumerate(ranks.cliques):
        x = WIDTH - right + 4 + i * step
        canvas.line([(x, place[clique[0]] - 6), (x, place[clique[-1]] + 6)], "open-verdict bar")
    y = canvas.height + 10
    canvas.height += 22
    length = ranks.critical / (len(ranks.arms) - 1) * (scale.end - scale.start)
    end = min(scale.start + length, WIDTH - 4)
    canvas.line([(scale.start, y - 4), (scale.start, y + 4)], "axis")
    canvas.line([(scale.start, y), (end, y)], "axis")
    if scale.start + length <= WIDTH - 4:
        canvas.line([(end, y - 4), (end, y + 4)], "axis")
    canvas.text(LEFT, y + 4, f"critical: {ranks.critical:.2f}", "pale", "end")
    return canvas


def front(summary: Summary, model: str, data: str) -> Canvas | None:
    """Mean quality against the parameters that train (the head apart), for every budget; the step line is the Pareto
    front.  Names stand in a column at the right, each joined to its point: of few points all, of more than NAMED those
    that say something."""
    rows = [r for r in summary.rows if (r.model, r.data) == (model, data) and r.quality and r.parameters]
    if not rows:
        return None
    several = len({row.budget for row in rows}) > 1
    names = [f"{row.arm} ({row.budget})" if several else row.arm for row in rows]
    told = rows if len(rows) <= NAMED else [*pareto(rows), *(r for r in rows if kind(r, summary) != "open-verdict")]
    short = labels([name for row, name in zip(rows, names, strict=True) if row in told], LETTERS)
    height, right = max(240.0, 16.0 * len(short) + 60), 30 + WIDE * max(map(len, short.values()))
    canvas = Canvas(WIDTH, height)
    bottom, edge = height - 40, WIDTH - right
    ys = linear([row.quality.mean for row in rows if row.quality], bottom, 12)
    upwards = with_labels(ys.ticks(6))
    left = beside(upwards) + 10
    xs = logarithmic([float(row.parameters or 1) for row in rows], left, edge)
    for tick, label in upwards:
        canvas.line([(left, ys(tick)), (edge, ys(tick))], "rule")
        canvas.text(left - 6, ys(tick) + 4, label, "pale", "end")
    for tick, label in labelled(xs, max(2, int((edge - left) / 44))):
        canvas.line([(xs(tick), 12), (xs(tick), bottom)], "rule")
        canvas.text(xs(tick), bottom + 15, label, "pale", "middle")
    canvas.line([(left, bottom), (edge, bottom)], "axis")
    canvas.text(left, height - 8, f"parameters; upwards: {better(rows[0])}", "pale")
    points = [
        (xs(row.parameters or 1), ys(row.quality.mean), row, n)
        for row, n in zip(rows, names, strict=True)
        if row.quality
    ]
    canvas.line(_steps(rows, xs, ys, edge), "front curve dash")
    points.sort(key=lambda p: (p[1], p[3]))
    named = [p for p in points if p[3] in short]
    for (x, y, _, name), at in zip(named, apart([y for _, y, _, _ in named], 15, 14, bottom - 2), strict=True):
        canvas.line([(x, y), (edge + 4, at), (edge + 12, at)], "lead")
        canvas.text(edge + 15, at + 4, short[name], title=name)
    for x, y, row, name in sorted(points, key=lambda p: p[3] in short):  # those with a name last, and so on top
        canvas.mark(x, y, kind(row, summary), f"{name}: {row.parameters:,} parameters")
    return canvas


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats with as few parameters, fewest first."""
    made: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.parameters or 0, -_quality(r), r.arm)):
        if not made or _quality(row) > _quality(made[-1]):
            made.append(row)
    return made


def _quality(row: Row) -> float:
    assert row.quality is not None
    return row.quality.mean if row.more_is_better else -row.quality.mean


def _steps(rows: Sequence[Row], xs: Scale, ys: Scale, edge: float) -> list[tuple[float, float]]:
    """The front's line: quality stays until more parameters buy more of it."""
    line: list[tuple[float, float]] = []
    for row in pareto(rows):
        assert row.quality is not None
        x, y = xs(row.parameters or 1), ys(row.quality.mean)
        line += [(x, line[-1][1]), (x, y)] if line else [(x, y)]
    return [*line, (edge, line[-1][1])]
