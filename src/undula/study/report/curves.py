"""Figures with a small panel per arm: learning rates, and the course of the training.  Panels of a group share their
axes; the baseline stands grey behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ...observe import drawing as D
from ...observe.page.content import Draw
from ..outcome import ChosenRate, Outcome
from ..table import Group, Summary
from .plots import COLOURS, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDTH, HEIGHT, GAP, BOTTOM, COLUMNS, LETTERS = 190.0, 92.0, 22.0, 22.0, 4, 60
TICKS = 4
POINTS = 60  # a longer curve is drawn as the means of so many parts

Line = Sequence[tuple[float, float]]
Ends = tuple[float, float]


def rates(summary: Summary, group: Group) -> Draw | None:
    """Validation metric by learning rate, one panel per arm.

    The worst quarter of the figures would flatten the rest: what lies below is drawn as an open mark at the edge.
    """
    chosen: dict[str, list[ChosenRate]] = {}
    for choice in (c for c in summary.rates if c.group == group):
        chosen.setdefault(choice.arm, []).append(choice)
    if not any(_line(c) for found in chosen.values() for c in found):
        return None
    return partial(_draw_rates, summary, group, chosen)


def _draw_rates(summary: Summary, group: Group, chosen: Mapping[str, Sequence[ChosenRate]]) -> Drawing:
    every = [c for found in chosen.values() for c in found]
    row = next(row for row in summary.rows if row.group == group)
    ys = _most([v for c in every for _, v in _line(c)], row.more_is_better)
    xs = D.log_limits([lr for c in every for lr, _ in c.tried])
    loose = {arm for arm, found in chosen.items() if not all(c.bracketed for c in found)}
    arms = [a for a in summary.arms if a in chosen]
    figure, panels = _panels(arms, xs, ys, log=True, loose=loose)
    for arm, axis in zip(arms, panels, strict=True):
        for base in chosen.get(summary.baseline, ()) if arm != summary.baseline else ():
            _curve(axis, _line(base), D.LIGHT["back"], 0.9)
        for choice in chosen[arm]:
            _rate(axis, choice, ys)
    return figure


def _line(choice: ChosenRate) -> list[tuple[float, float]]:
    """(rate, figure) of the rates that have one."""
    return [(lr, v) for lr, v in choice.tried if v is not None and math.isfinite(v)]


def _curve(axis: Axes, line: Line, colour: str, width: float, alpha: float = 1.0) -> None:
    axis.plot([x for x, _ in line], [y for _, y in line], color=colour, lw=width * D.POINT, alpha=alpha)


def _rate(axis: Axes, choice: ChosenRate, ys: Ends) -> None:
    line = _line(choice)
    _curve(axis, line, COLOURS["base"], 1.6)
    for lr, v in line:
        best, title = lr == choice.lr, f"rate {lr:g}: {v:.4g}"
        if ys[0] <= v <= ys[1]:
            mark(axis, lr, v, "base" if best else "open-verdict", title, 8 if best else 5.5)
        else:
            look: dict[str, Any] = {
                "color": COLOURS["base" if best else "open-verdict"],
                "mfc": D.LIGHT["paper"],
                "clip_on": False,
            }
            (drawn,) = axis.plot(lr, min(max(v, ys[0]), ys[1]), "D" if best else "o", ms=4, zorder=4, **look)
            D.titled(drawn, title)
    for lr, found in choice.tried:
        if found is None or not math.isfinite(found):
            (drawn,) = axis.plot(lr, ys[0] + 0.07 * (ys[1] - ys[0]), "x", color=COLOURS["loss"], ms=5)
            D.titled(drawn, f"rate {lr:g}: no run gave a figure")


def _most(values: Sequence[float], more_is_better: bool) -> Ends:
    """Vertical limits from the best value to a bit beyond the best three quarters."""
    good = sorted(values, reverse=more_is_better)
    return D.limits(good[: max(2, math.ceil(0.75 * len(good)))], 0.12)


def course(summary: Summary, group: Group, what: str) -> Draw | None:
    """`losses` or `curve` of every final run by step, one panel per arm, with the baseline's grey behind."""
    lines = {
        arm: [_short(line) for o in summary.finals(group, arm) if len(line := _points(o, what)) > 1]
        for arm in summary.arms
    }
    lines = {arm: found for arm, found in lines.items() if found}
    return partial(_draw_course, summary.baseline, lines) if lines else None


def _draw_course(baseline: str, lines: Mapping[str, Sequence[Line]]) -> Drawing:
    points = [p for found in lines.values() for line in found for p in line]
    steps = [x for x, _ in points]
    figure, panels = _panels(list(lines), (min(steps), max(steps)), D.limits([y for _, y in points]))
    for (arm, own), axis in zip(lines.items(), panels, strict=True):
        for line in lines.get(baseline, ()) if arm != baseline else ():
            _curve(axis, line, D.LIGHT["back"], 0.9)
        for line in own:
            _curve(axis, line, COLOURS["base"], 1.0, 0.75)
    return figure


def _points(run: Outcome, what: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in getattr(run, what) if math.isfinite(y)]


def _short(line: Line) -> list[tuple[float, float]]:
    """At most POINTS points: each the mean of its part of the line."""
    size = math.ceil(len(line) / POINTS)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _panels(
    names: Sequence[str], xs: Ends, ys: Ends, log: bool = False, loose: frozenset[str] | set[str] = frozenset()
) -> tuple[Drawing, list[Axes]]:
    """A panel per name, in rows of COLUMNS; `loose` ones say "edge" (a best rate lies at an edge of what was tried)."""
    edge = D.wide("edge", bold=True)
    cut = D.labels(names, LETTERS)
    heads = {n: D.wrapped(cut[n], WIDTH - (edge + 6) * (n in loose), bold=True) for n in names}
    head = 8 + 15 * max(map(D.lines, heads.values()))
    left = max(D.wide(label) for _, label in D.ticks(*ys, TICKS)) + 10
    columns, rows = min(COLUMNS, len(names)), math.ceil(len(names) / COLUMNS)
    figure = D.blank(left + columns * (WIDTH + GAP), rows * (head + HEIGHT + BOTTOM))
    made = []
    for i, name in enumerate(names):
        row, column = divmod(i, COLUMNS)
        axis = D.axes(figure, left + column * (WIDTH + GAP), row * (head + HEIGHT + BOTTOM) + head, WIDTH, HEIGHT)
        axis.set(xscale="log" if log else "linear", xlim=xs, ylim=ys)
        D.mark_axis(axis, "x", WIDTH, TICKS, log)
        D.mark_axis(axis, "y", HEIGHT, TICKS)
        if column:
            axis.set_yticklabels([])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y")
        place: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "va": "bottom",
            "fontweight": "bold",
        }
        axis.annotate(heads[name], (0, 1), (0, 4), **place)
        if name in loose:
            axis.annotate("edge", (1, 1), (0, 4), ha="right", color=D.LIGHT["loss"], **place)
        made.append(axis)
    return figure, made
