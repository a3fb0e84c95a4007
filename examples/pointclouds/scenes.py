"""Streets made up and scanned: boxes on a ground, one ray for each beam and column, the nearest hit alone comes back.

A stated generator in the place of labelled scans, which no package ships.  Lengths in metres, the sensor at the origin,
x ahead, z up.  Cars and pedestrians are what is to be found; walls, poles and bushes hide them and look like them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GROUND = -1.8  # the sensor stands so high
KINDS = {  # name: (length, width, height, their relative spread, how many at least and at most)
    "car": (4.3, 1.8, 1.55, 0.1, 2, 7),
    "pedestrian": (0.6, 0.6, 1.72, 0.12, 2, 7),
    "wall": (7.0, 0.5, 2.4, 0.4, 1, 4),
    "pole": (0.3, 0.3, 3.5, 0.3, 1, 5),
    "bush": (1.4, 1.2, 1.2, 0.4, 1, 6),
}
NAMES = tuple(KINDS)


@dataclass(frozen=True)
class Sensor:
    """Beams at equal steps between two angles of elevation, columns over 90 degrees ahead.  A return from r metres
    comes back with probability 1 / (1 + (r / half)^4), its range is off by N(0, noise)."""

    beams: int
    low: float
    high: float
    columns: int = 256
    half: float = 45.0
    noise: float = 0.02

    def directions(self) -> Array:
        """(R, 3) of unit length."""
        up, across = (
            np.radians(np.linspace(self.low, self.high, self.beams)),
            np.radians(np.linspace(-45, 45, self.columns)),
        )
        e, a = np.meshgrid(up, across, indexing="ij")
        return np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1).reshape(-1, 3)


SENSORS = {64: Sensor(64, -24.8, 2.0), 16: Sensor(16, -15.0, 15.0)}  # spread as an HDL-64's and a VLP-16's beams are


@dataclass(frozen=True)
class Scene:
    """`points` (P, 3), `boxes` (M, 7): middle, length, width, height, yaw; `kinds` (M,) into NAMES; `hits` (M,)."""

    points: Array
    boxes: Array
    kinds: NDArray[np.int64]
    hits: NDArray[np.int64]


def scene(seed: int, sensor: Sensor) -> Scene:
    """The scene of this number as the sensor sees it: other sensors see the same boxes."""
    rng = np.random.default_rng([19, seed])
    boxes, kinds = _placed(rng)
    rays = sensor.directions()
    reach, what = cast(rays, boxes)
    seen = reach < 60
    seen[seen] &= rng.random(seen.sum()) < 1 / (1 + (reach[seen] / sensor.half) ** 4)
    points = rays[seen] * (reach[seen] + sensor.noise * rng.standard_normal(seen.sum()))[:, None]
    hits = np.bincount(what[seen][what[seen] >= 0], minlength=len(boxes))
    return Scene(points, boxes, kinds, hits)


def _placed(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Boxes that do not touch, before the sensor: those that would are left out."""
    boxes: list[Array] = []
    kinds: list[int] = []
    for kind, (*size, spread, least, most) in enumerate(KINDS.values()):
        for _ in range(rng.integers(least, most + 1)):
            dims = np.array(size) * np.exp(spread * rng.uniform(-1, 1, 3))
            reach, angle = rng.uniform(4, 38), np.radians(rng.uniform(-42, 42))
            middle = np.array([reach * np.cos(angle), reach * np.sin(angle), GROUND + dims[2] / 2])
            apart = [np.hypot(*(b[:2] - middle[:2])) - (np.hypot(*b[3:5]) + np.hypot(*dims[:2])) / 2 for b in boxes]
            if min(apart, default=1.0) > 0.2:
                boxes.append(np.array([*middle, *dims, rng.uniform(-np.pi, np.pi)]))
                kinds.append(kind)
    return np.stack(boxes), np.array(kinds)


def cast(rays_R3: Array, boxes_M7: Array) -> tuple[Array, NDArray[np.int64]]:
    """(range (R,) of the nearest hit, inf without one; the box that was hit, -1 for the ground), of rays from 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(rays_R3[:, 2] < 0, GROUND / rays_R3[:, 2], np.inf)
        what = np.full(len(rays_R3), -1)
        for i, box in enumerate(boxes_M7):
            c, s = np.cos(box[6]), np.sin(box[6])
            turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])  # rows times this: into the box's own axes
            origin, way = -box[:3] @ turn, rays_R3 @ turn
            ends = np.stack([(side * box[3:6] / 2 - origin) / way for side in (-1, 1)])
            near, far = ends.min(0).max(1), ends.max(0).min(1)
            hit = (near < far) & (near > 0) & (near < reach)
            reach[hit], what[hit] = near[hit], i
    return reach, what
