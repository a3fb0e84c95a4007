"""Plots of a forest made up: stems, crowns, ground and undergrowth as points, seen from above.

A stated generator in the place of labelled scans, which no package ships.  Lengths in metres, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIDE = 12.0  # of a plot
DENSEST = 1000  # points per m2 of a plot before it is thinned
REACH = 8.0  # metres of canopy above a point that leave it exp(-1) of the returns
NONE = -1  # the instance of ground and undergrowth


@dataclass(frozen=True)
class Plot:
    """`points` (P, 3); `instance` (P,), the tree of each point or NONE; `axes` (T, 2), where the stems stand."""

    points: Array
    instance: NDArray[np.int64]
    axes: Array


def plot(seed: int, density: float = DENSEST) -> Plot:
    """The plot of this number with so many points per m2."""
    rng = np.random.default_rng([20, seed])
    axes, heights = _stand(rng)
    parts = [(_ground(rng, int(0.5 * DENSEST * SIDE**2)), NONE), (_undergrowth(rng), NONE)]
    for i, (axis, height) in enumerate(zip(axes, heights, strict=True)):
        parts.append((_tree(rng, axis, height), i))
    points = np.concatenate([p for p, _ in parts])
    instance = np.concatenate([np.full(len(p), i) for p, i in parts])
    within = ((points[:, :2] >= 0) & (points[:, :2] < SIDE)).all(1)
    points, instance = points[within], instance[within]
    number = int(DENSEST * SIDE**2)
    chosen = rng.choice(len(points), min(number, len(points)), replace=False, p=_seen(points))
    return thinned(Plot(points[chosen], instance[chosen], axes), density, rng)


def thinned(whole: Plot, density: float, rng: np.random.Generator) -> Plot:
    """A plot of which points were taken away at random until so many per m2 are left, as a coarser sensor leaves them;
    each keeps its tree."""
    number = min(round(density * SIDE**2), len(whole.points))
    kept = rng.choice(len(whole.points), number, replace=False)
    return Plot(whole.points[kept], whole.instance[kept], whole.axes)


def _stand(rng: np.random.Generator) -> tuple[Array, Array]:
    """Stems at least 1.8 m apart, and heights from 5 to 13 m."""
    axes: list[Array] = []
    for at in rng.uniform(0.5, SIDE - 0.5, (rng.integers(10, 22), 2)):
        if all(np.hypot(*(at - other)) > 1.8 for other in axes):
            axes.append(at)
    return np.stack(axes), rng.uniform(5, 13, len(axes))


def _height(xy: Array) -> Array:
    """Of the ground."""
    return 0.4 * np.sin(xy[:, 0] / 3.1) + 0.3 * np.cos(xy[:, 1] / 2.3)


def _ground(rng: np.random.Generator, number: int) -> Array:
    xy = rng.uniform(0, SIDE, (number, 2))
    return np.column_stack([xy, _height(xy) + 0.04 * rng.standard_normal(number)])


def _undergrowth(rng: np.random.Generator) -> Array:
    clumps = rng.integers(4, 12)
    middles, sizes = rng.uniform(0, SIDE, (clumps, 2)), rng.uniform(0.3, 1.0, clumps)
    which = rng.integers(clumps, size=clumps * 1500)
    around = rng.standard_normal((len(which), 3)) * sizes[which, None] * (0.4, 0.4, 0.35)
    xy = middles[which] + around[:, :2]
    return np.column_stack([xy, _height(xy) + abs(around[:, 2]) + 0.1])


def _tree(rng: np.random.Generator, axis: Array, height: float) -> Array:
    """A stem, and a crown that is a cone (conifers) or an ellipsoid, denser towards its surface."""
    foot, base = _height(axis[None])[0], rng.uniform(0.3, 0.5) * height
    radius = height * rng.uniform(0.12, 0.18)
    stem = int(150 * height)
    turn = rng.uniform(0, 2 * np.pi, stem)
    around = (0.05 + 0.012 * height) * np.column_stack([np.cos(turn), np.sin(turn)])
    up = rng.uniform(0, 0.9 * height, stem)
    crown = int(2500 * radius * (height - base) / 3)
    part = rng.uniform(0, 1, crown)  # from the crown's base to the top
    wide = 1 - part if rng.random() < 0.5 else np.sqrt(1 - (2 * part - 1) ** 2)
    turn = rng.uniform(0, 2 * np.pi, crown)
    out = radius * wide * rng.uniform(0, 1, crown) ** 0.25 * (1 + 0.15 * np.sin(3 * turn + rng.uniform(0, 6)))
    lean = 0.03 * rng.standard_normal(2)
    xy = np.concatenate([around, out[:, None] * np.column_stack([np.cos(turn), np.sin(turn)])])
    z = np.concatenate([up, base + part * (height - base)])
    points = np.column_stack([axis + xy + lean * z[:, None], foot + z])
    return points + 0.03 * rng.standard_normal(points.shape)


def _seen(points: Array) -> Array:
    """The share of returns of each point from above: exp(-depth below the canopy / REACH), over columns of 0.5 m."""
    column = (points[:, :2] / 0.5).astype(int) @ [10_000, 1]
    _, row = np.unique(column, return_inverse=True)
    top = np.full(row.max() + 1, -np.inf)
    np.maximum.at(top, row, points[:, 2])
    weight = np.exp(-(top[row] - points[:, 2]) / REACH)
    return weight / weight.sum()
