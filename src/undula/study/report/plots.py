"""The figures with a row or a point per arm.  A row has its name at its left: no figure needs a legend of arms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ...observe import drawing as D
from ...observe.page.content import Draw
from ..statistics import Ranks
from ..table import Group, Row, Summary
from .words import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDTH, RIGHT, TOP, ROW = 450.0, 16.0, 8.0, 22.0
NAMES, LETTERS = 158.0, 60  # pixels of a name's line, and letters of a name
NAMED = 10  # points; of more, those without a verdict that are not on the front stay without a name
MARKS = {"win": "^", "loss": "v", "base": "D", "open-verdict": "o"}
COLOURS = {
    "win": D.LIGHT["win"],
    "loss": D.LIGHT["loss"],
    "base": D.LIGHT["ink"],
    "open-verdict": D.LIGHT["open"],
}


def kind(row: Row, summary: Summary) -> str:
    """How a row's points look."""
    return "base" if row.arm == summary.baseline else look(row.against.verdict if row.against else "")


def better(row: Row) -> str:
    """The metric's name with where the better figures are."""
    return f"{row.metric} ({'more' if row.more_is_better else 'less'} is better)"


def mark(axis: Axes, x: float, y: float, look: str, title: str = "", size: float = 8.0) -> None:
    """A point: triangle up for a win, down for a loss, a diamond for the baseline, a circle otherwise."""
    size *= 0.8 if look == "base" else 0.9 if look == "open-verdict" else 1
    (drawn,) = axis.plot(x, y, MARKS[look], color=COLOURS[look], ms=size * D.POINT, mew=0, clip_on=False, zorder=4)
    if title:
        D.titled(drawn, title)


def rows_by_name(
    names: Sequence[str], ends: tuple[float, float], title: str, right: float = RIGHT
) -> tuple[Drawing, Axes]:
    """Axes with a labelled row per name (row i at y = i) above a horizontal axis."""
    short = [D.wrapped(name, NAMES) for name in D.labels(names, LETTERS).values()]
    left = max(map(D.wide, short)) + 12
    title = D.wrapped(title, WIDTH - 16)
    high = (ROW + 15 * (max(map(D.lines, short)) - 1)) * len(names)
    figure = D.blank(WIDTH, TOP + high + 24 + 15 * D.lines(title))
    axis = D.axes(figure, left, TOP, WIDTH - left - right, high)
    axis.set(xlim=ends, ylim=(len(names) - 0.5, -0.5))
    D.mark_axis(axis, "x", WIDTH - left - right, 5)
    axis.set_yticks(range(len(names)), labels=short)
    axis.tick_params(axis="both", length=0)
    axis.tick_params(axis="y", labelcolor=D.LIGHT["ink"])
    axis.spines["left"].set_visible(False)
    axis.grid()
    figure.text(0.5, 5 / (figure.get_figheight() * D.PIXELS), title, ha="center", va="bottom", color=D.LIGHT["pale"])
    return figure, axis


def _interval(axis: Axes, low: float | None, high: float | None, y: float, look: str) -> None:
    """A horizontal bar; where it is cut at the end of the axis, an arrow."""
    if low is None or high is None:
        return
    least, most = axis.get_xlim()
    axis.plot((max(low, least), min(high, most)), (y, y), color=COLOURS[look], zorder=3)
    for end, arrow, cut in ((least, "<", low < least), (most, ">", high > most)):
        if cut:
            (drawn,) = axis.plot(end, y, arrow, color=COLOURS[look], ms=5, mew=0, clip_on=False, zorder=3)
            D.titled(drawn, f"goes on to {low if arrow == '<' else high:.4g}")


def _seeds(axis: Axes, values: Sequence[float], y: float, look: str) -> None:
    axis.plot(values, [y] * len(values), "o", color=COLOURS[look], alpha=0.45, ms=5 * D.POINT, mew=0, zorder=2)


def seeds(summary: Summary, group: Group) -> Draw | None:
    """Every seed a dot, the mean, its Student interval; the baseline's mean as a dashed line."""
    rows = [row for row in summary.rows_of(group) if row.quality]
    return partial(_draw_seeds, summary, group, rows) if rows else None


def _draw_seeds(summary: Summary, group: Group, rows: Sequence[Row]) -> Drawing:
    values = {row.arm: [o.test or 0.0 for o in summary.finals(group, row.arm)] for row in rows}
    floor = summary.floors.get(group[1])
    shown = [v for found in values.values() for v in found]
    ends = D.limits(shown if floor is None else [*shown, floor], 0.25)
    figure, axis = rows_by_name([row.arm for row in rows], ends, f"{better(rows[0])}, {summary.split} rows")
    if floor is not None:
        D.titled(axis.axvline(floor, color=D.LIGHT["pale"], ls=":", lw=1), "the commonest class")
    for y, row in enumerate(rows):
        quality, drawn = row.quality, kind(row, summary)
        assert quality is not None
        if row.arm == summary.baseline:
            axis.axvline(quality.mean, color=D.LIGHT["pale"], ls="--", lw=D.POINT)
        _interval(axis, quality.low, quality.high, y, drawn)
        _seeds(axis, values[row.arm], y, drawn)
        mark(axis, quality.mean, y, drawn, f"{row.arm}: {quality.mean:.4g}, {quality.n} seeds")
    return figure


def differences(summary: Summary, group: Group) -> Draw | None:
    """The mean paired difference to the baseline, its interval and the pairs, beside it the verdict."""
    rows = [row for row in summary.rows_of(group) if row.against]
    return partial(_draw_differences, summary, group, rows) if rows else None


def _draw_differences(summary: Summary, group: Group, rows: Sequence[Row]) -> Drawing:
    base = {o.seed: o.test or 0.0 for o in summary.finals(group, summary.baseline)}
    pairs = {
        row.arm: [(o.test or 0.0) - base[o.seed] for o in summary.finals(group, row.arm) if o.seed in base]
        for row in rows
    }
    right = max(D.wide(row.against.verdict) for row in rows if row.against) + 16
    ends = D.limits([0.0, *(v for found in pairs.values() for v in found)], 0.25)
    title = f"difference to {summary.baseline} in {better(rows[0])}"
    figure, axis = rows_by_name([row.arm for row in rows], ends, title, right)
    axis.axvline(0, color=D.LIGHT["pale"], lw=D.POINT)
    for y, row in enumerate(rows):
        against = row.against
        assert against is not None
        drawn = look(against.verdict)
        _interval(axis, against.low, against.high, y, drawn)
        _seeds(axis, pairs[row.arm], y, drawn)
        mark(axis, against.difference, y, drawn, f"{row.arm}: {against.difference:+.4g}")
        beside(axis, against.verdict, y, COLOURS[drawn] if drawn != "open-verdict" else D.LIGHT["pale"])
    return figure


def beside(axis: Axes, text: str, y: float, colour: str) -> None:
    """A text at the right of a row."""
    axis.annotate(
        text, (1, y), (8 * D.POINT, 0), axis.get_yaxis_transform(), "offset points", va="center", color=colour,
        annotation_clip=False,
    )  # fmt: skip


def average_ranks(summary: Summary) -> Draw | None:
    """Average ranks over the groups (1 is the best); each vertical line joins arms that Nemenyi's test does not tell
    apart, and a bar shows the critical difference."""
    return None if summary.ranks is None else partial(_draw_ranks, summary, summary.ranks)


def _draw_ranks(summary: Summary, ranks: Ranks) -> Drawing:
    right = min(14 + 9.0 * len(ranks.cliques), 120)
    room = 0.03 * (len(ranks.arms) - 1)
    ends = 1 - room, len(ranks.arms) + room
    title = f"average rank over {ranks.groups} data sets, 1 is the best"
    figure, axis = rows_by_name([*ranks.arms, f"critical: {ranks.critical:.2f}"], ends, title, right)
    verdicts = {each.arm: each.verdict for each in summary.pooled}
    for y, (arm, average) in enumerate(zip(ranks.arms, ranks.average, strict=True)):
        drawn = "base" if arm == summary.baseline else look(verdicts.get(arm, ""))
        mark(axis, average, y, drawn, f"{arm}: {average:.2f}")
    step = (right - 12) / max(len(ranks.cliques), 1)
    wide = axis.get_position().width * WIDTH
    for i, clique in enumerate(ranks.cliques):
        x, first, last = 1 + (4 + i * step) / wide, ranks.arms.index(clique[0]), ranks.arms.index(clique[-1])
        axis.plot(
            (x, x),
            (first - 0.25, last + 0.25),
            color=D.LIGHT["open"],
            clip_on=False,
            transform=axis.get_yaxis_transform(),
        )
    _interval(axis, 1.0, 1 + ranks.critical, len(ranks.arms), "open-verdict")
    return figure


def front(summary: Summary, model: str, data: str) -> Draw | None:
    """Mean quality against the parameters that train (the head apart), for every budget; the step line is the Pareto
    front.  Names stand in a column at the right, each joined to its point: of few points all, of more than NAMED those
    that say something."""
    rows = [r for r in summary.rows if (r.model, r.data) == (model, data) and r.quality and r.parameters]
    return partial(_draw_front, summary, rows) if rows else None


def _draw_front(summary: Summary, rows: Sequence[Row]) -> Drawing:
    several = len({row.budget for row in rows}) > 1
    names = [f"{row.arm} ({row.budget})" if several else row.arm for row in rows]
    told = rows if len(rows) <= NAMED else [*pareto(rows), *(r for r in rows if kind(r, summary) != "open-verdict")]
    short = D.labels([name for row, name in zip(rows, names, strict=True) if row in told], 26)
    points = [(float(r.parameters or 1), mean(r), r, name) for r, name in zip(rows, names, strict=True)]
    ys, xs = D.limits([y for _, y, _, _ in points]), D.log_limits([x for x, _, _, _ in points])
    upwards, sideways = D.wrapped(better(rows[0]), WIDTH - 16), "parameters"
    left = max(D.wide(label) for _, label in D.ticks(*ys, 6)) + 12
    right = 30 + max(map(D.wide, short.values()))
    top, high = 12.0 + 15 * D.lines(upwards), max(190.0, 16.0 * len(short))
    figure = D.blank(WIDTH, top + high + 44)
    axis = D.axes(figure, left, top, WIDTH - left - right, high)
    axis.set(xscale="log", xlim=xs, ylim=ys)
    D.mark_axis(axis, "x", WIDTH - left - right, 9, log=True)
    D.mark_axis(axis, "y", high, 6)
    axis.spines["left"].set_visible(False)
    axis.grid()
    axis.set_xlabel(sideways)
    figure.text(8 / WIDTH, 1 - 6 / (figure.get_figheight() * D.PIXELS), upwards, va="top", color=D.LIGHT["pale"])
    line = _steps(rows, xs[1])
    axis.plot([x for x, _ in line], [y for _, y in line], color=D.LIGHT["pale"], ls="--", lw=1, zorder=2)
    points.sort(key=lambda p: (p[1], p[3]))
    named = [p for p in points if p[3] in short]
    shares = D.apart([(p[1] - ys[0]) / (ys[1] - ys[0]) for p in named], 15 / high, 0.02, 1)
    for (x, y, _, name), at in zip(named, shares, strict=True):
        _name(axis, (x, y), (1 + 15 / (WIDTH - left - right), at), short[name])
    for x, y, row, name in sorted(points, key=lambda p: p[3] in short):  # those with a name last, and so on top
        mark(axis, x, y, kind(row, summary), f"{name}: {row.parameters:,} parameters")
    return figure


def _name(axis: Axes, point: tuple[float, float], at: tuple[float, float], name: str) -> None:
    """A name, joined to its point."""
    lead = {"arrowstyle": "-", "color": D.LIGHT["back"], "lw": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
    axis.annotate(name, point, at, "data", "axes fraction", lead, va="center", zorder=1, annotation_clip=False)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats with as few parameters, fewest first."""
    made: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.parameters or 0, -_quality(r), r.arm)):
        if not made or _quality(row) > _quality(made[-1]):
            made.append(row)
    return made


def mean(row: Row) -> float:
    assert row.quality is not None
    return row.quality.mean


def _quality(row: Row) -> float:
    return mean(row) if row.more_is_better else -mean(row)


def _steps(rows: Sequence[Row], end: float) -> list[tuple[float, float]]:
    """The front's line: quality stays until more parameters buy more of it."""
    line: list[tuple[float, float]] = []
    for row in pareto(rows):
        x, y = float(row.parameters or 1), mean(row)
        line += [(x, line[-1][1]), (x, y)] if line else [(x, y)]
    return [*line, (end, line[-1][1])]
