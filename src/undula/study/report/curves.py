"""Figures with a small panel per arm: learning rates, and the course of the training.  Panels of a group share their
axes; the baseline stands grey behind."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..outcome import ChosenRate, Outcome
from ..table import Group, Summary
from .svg import (
    Canvas,
    Scale,
    beside,
    labelled,
    labels,
    linear,
    logarithmic,
    with_labels,
)

WIDTH, HEIGHT, RIGHT, TOP, BOTTOM, LETTERS = 212.0, 136.0, 10.0, 21.0, 28.0, 25
TICKS = 4
POINTS = 60  # a longer curve is drawn as the means of so many parts

Line = Sequence[tuple[float, float]]


def rates(summary: Summary, group: Group) -> tuple[Canvas, ...]:
    """Validation metric by learning rate, one panel per arm.

    The worst quarter of the figures would flatten the rest: what lies below is drawn as an open mark at the edge.
    """
    chosen: dict[str, list[ChosenRate]] = {}
    for choice in (c for c in summary.rates if c.group == group):
        chosen.setdefault(choice.arm, []).append(choice)
    every = [c for found in chosen.values() for c in found]
    values = [v for c in every for _, v in _line(c)]
    if not values:
        return ()
    row = next(row for row in summary.rows if row.group == group)
    ys = _most(values, row.more_is_better)
    xs = logarithmic([lr for c in every for lr, _ in c.tried], _left(ys) + 6, WIDTH - RIGHT - 6)
    loose = {arm for arm, found in chosen.items() if not all(c.bracketed for c in found)}
    short, made = labels(list(chosen), LETTERS - 6 if loose else LETTERS), []  # "edge" stands beside it
    for arm in (a for a in summary.arms if a in chosen):
        canvas = _panel(xs, ys, short[arm], arm)
        for base in chosen.get(summary.baseline, ()) if arm != summary.baseline else ():
            canvas.line([(xs(lr), ys(v)) for lr, v in _line(base)], "behind")
        for choice in chosen[arm]:
            _rate(canvas, choice, xs, ys)
        if arm in loose:
            canvas.text(WIDTH - RIGHT, TOP - 7, "edge", "loss", "end", "a best rate lies at an edge of what was tried")
        made.append(canvas)
    return tuple(made)


def _line(choice: ChosenRate) -> list[tuple[float, float]]:
    """(rate, figure) of the rates that have one."""
    return [(lr, v) for lr, v in choice.tried if v is not None and math.isfinite(v)]


def _rate(canvas: Canvas, choice: ChosenRate, xs: Scale, ys: Scale) -> None:
    line = _line(choice)
    canvas.line([(xs(lr), ys(v)) for lr, v in line], "curve base")
    for lr, v in line:
        drawn = "base" if lr == choice.lr else "open-verdict"  # a diamond, or a point
        beyond = "" if ys.low <= v <= ys.high else " open"
        canvas.mark(xs(lr), ys(v), drawn + beyond, f"rate {lr:g}: {v:.4g}", 4.5 if lr == choice.lr else 2.8)
    for lr, found in choice.tried:
        if found is None or not math.isfinite(found):
            canvas.cross(xs(lr), HEIGHT - BOTTOM - 7, "loss")


def _most(values: Sequence[float], more_is_better: bool) -> Scale:
    """A vertical scale from the best value to a bit beyond the best three quarters."""
    good = sorted(values, reverse=more_is_better)
    kept = good[: max(2, math.ceil(0.75 * len(good)))]
    return linear(kept, HEIGHT - BOTTOM, TOP + 2, 0.12)


def course(summary: Summary, group: Group, what: str) -> tuple[Canvas, ...]:
    """`losses` or `curve` of every final run by step, one panel per arm, with the baseline's grey behind."""
    lines = {
        arm: [_short(line) for o in summary.finals(group, arm) if len(line := _points(o, what)) > 1]
        for arm in summary.arms
    }
    points = [p for found in lines.values() for line in found for p in line]
    if not points:
        return ()
    ys = linear([y for _, y in points], HEIGHT - BOTTOM, TOP + 2)
    xs = linear([x for x, _ in points], _left(ys), WIDTH - RIGHT, 0.0)
    short, made = labels(list(lines), LETTERS), []
    for arm in (a for a in lines if lines[a]):
        canvas = _panel(xs, ys, short[arm], arm)
        for line in lines[summary.baseline] if arm != summary.baseline else ():
            canvas.line([(xs(x), ys(y)) for x, y in line], "behind")
        for line in lines[arm]:
            canvas.line([(xs(x), ys(y)) for x, y in line], "curve thin base")
        made.append(canvas)
    return tuple(made)


def _points(run: Outcome, what: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in getattr(run, what) if math.isfinite(y)]


def _short(line: Line) -> list[tuple[float, float]]:
    """At most POINTS points: each the mean of its part of the line."""
    size = math.ceil(len(line) / POINTS)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _left(ys: Scale) -> float:
    """Where a panel's axes begin: behind the labels."""
    return beside(with_labels(ys.ticks(TICKS))) + 9


def _panel(xs: Scale, ys: Scale, short: str, name: str) -> Canvas:
    canvas, bottom, left = Canvas(WIDTH, HEIGHT), HEIGHT - BOTTOM, _left(ys)
    canvas.text(12, TOP - 7, short, "bold", title=name)
    for tick, label in with_labels(ys.ticks(TICKS)):
        canvas.line([(left, ys(tick)), (WIDTH - RIGHT, ys(tick))], "rule")
        canvas.text(left - 5, ys(tick) + 4, label, "pale", "end")
    for tick, label in labelled(xs, TICKS):
        canvas.text(xs(tick), bottom + 14, label, "pale", "middle")
        canvas.line([(xs(tick), bottom), (xs(tick), bottom + 3)], "axis")
    canvas.line([(left, bottom), (WIDTH - RIGHT, bottom)], "axis")
    return canvas
