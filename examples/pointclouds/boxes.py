"""Boxes from above: scans as voxels, what the head should say of them, what it said, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lion import CLASSES, Detector, batch
from scenes import GROUND, NAMES, SENSORS, Scene, scene
from sklearn.metrics import average_precision_score
from torch import Tensor
from voxels import means, voxelise

LOW = (0.0, -20.0, GROUND - 0.5)  # metres, the corner of the grid
CELL = (0.4, 0.4, 0.5)
SIZE = (100, 100, 8)
ABOVE = 2 * CELL[0]  # side of a cell of the head
SPREAD = {"car": 1.2, "pedestrian": 0.7}  # of the heat around a middle, standard deviation in cells
DISTANCES = (0.5, 1.0, 2.0)  # metres between middles within which a box is found; nuScenes has 4.0 too
LEAST = 5  # returns from a box that has to be found


@dataclass(frozen=True)
class Sample:
    """A scan as the model sees it, (N, 6) features of (N, 3) cells, and its boxes (M, 7) of classes (M,)."""

    features: Tensor
    cells: Tensor
    boxes: Tensor
    classes: Tensor


def sample(seed: int, beams: int) -> Sample:
    """The scene of this number as a sensor of 64 or 16 beams sees it, as voxels."""
    return voxels(scene(seed, SENSORS[beams]))


def voxels(found: Scene) -> Sample:
    """Of each cell: mean offset of its points, mean height, distance from the sensor, log of their number.  Boxes of
    the classes that were hit `LEAST` times, with their middles in the grid, are to be found."""
    points = torch.tensor(found.points, dtype=torch.float32)
    low, cell, size = torch.tensor(LOW), torch.tensor(CELL), torch.tensor(SIZE)
    points = points[((points >= low) & (points < low + cell * size)).all(1)]
    cells, row, offset = voxelise(points, low, cell)
    told = torch.cat([offset, points[:, 2:] - GROUND, points[:, :2].norm(dim=1, keepdim=True) / 20], dim=1)
    count = torch.bincount(row, minlength=len(cells)).log()[:, None]
    classes = np.array([CLASSES.index(NAMES[k]) if NAMES[k] in CLASSES else -1 for k in found.kinds])
    kept = (classes >= 0) & (found.hits >= LEAST) & (abs(found.boxes[:, 1]) < -LOW[1]) & (found.boxes[:, 0] < 40)
    boxes = torch.tensor(found.boxes[kept], dtype=torch.float32)
    return Sample(torch.cat([means(told, row, len(cells)), count], dim=1), cells, boxes, torch.tensor(classes[kept]))


def mirrored(s: Sample) -> Sample:
    """The scene with left and right changed."""
    sign = torch.tensor([1.0, -1, 1, 1, 1, 1])
    cells = torch.stack([s.cells[:, 0], SIZE[1] - 1 - s.cells[:, 1], s.cells[:, 2]], dim=1)
    return Sample(s.features * sign, cells, s.boxes * torch.tensor([1.0, -1, 1, 1, 1, 1, -1]), s.classes)


def said(model: Detector, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The model's heat and boxes of several scans."""
    return model(*batch([(s.features, s.cells) for s in samples], SIZE))


def fields(boxes_M7: Tensor) -> tuple[Tensor, Tensor]:
    """(cell of the head (M, 2) that each box's middle is in, what stands there (M, 8), see `lion.FIELDS`)."""
    place = (boxes_M7[:, :2] - boxes_M7.new_tensor(LOW[:2])) / ABOVE
    yaw = 2 * boxes_M7[:, 6:]  # a box turned by half a turn is the same one
    rest = [boxes_M7[:, 2:3], boxes_M7[:, 3:6].log(), yaw.sin(), yaw.cos()]
    return place.floor().long(), torch.cat([place - place.floor() - 0.5, *rest], dim=1)


def loss(model: Detector, samples: Sequence[Sample]) -> Tensor:
    """CornerNet's focal loss on the heat, an L1 loss on the boxes at their middles (CenterPoint's, weight 0.25)."""
    heat_BKXY, box_BFXY = said(model, samples)
    wanted = torch.zeros_like(heat_BKXY)
    wrong, number = heat_BKXY.new_zeros(()), sum(len(s.boxes) for s in samples)
    for i, s in enumerate(samples):
        at, values = fields(s.boxes)
        for (x, y), k in zip(at.tolist(), s.classes.tolist(), strict=True):
            wanted[i, k] = torch.maximum(wanted[i, k], _bump(wanted.shape[2:], x, y, SPREAD[CLASSES[k]]))
        wrong = wrong + (box_BFXY[i, :, at[:, 0], at[:, 1]].T - values).abs().sum()
    return (focal(heat_BKXY, wanted) + 0.25 * wrong) / max(number, 1)


def _bump(size: Sequence[int], x: int, y: int, spread: float) -> Tensor:
    a, b = (torch.arange(n) - at for n, at in zip(size, (x, y), strict=True))
    return torch.exp(-(a[:, None] ** 2 + b**2) / (2 * spread**2))


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """- sum over middles of (1-p)^2 log p, - sum over the others of (1-wanted)^4 p^2 log(1-p)."""
    p, middle = logits.sigmoid(), wanted == 1
    there = (1 - p) ** 2 * F.logsigmoid(logits) * middle
    absent = (1 - wanted) ** 4 * p**2 * F.logsigmoid(-logits) * ~middle
    return -(there + absent).sum()


@torch.no_grad()
def found(model: Detector, samples: Sequence[Sample], most: int = 60) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each scan (boxes (K, 7), classes (K,), scores (K,)): the `most` highest peaks of the heat."""
    heat, box = said(model.eval(), samples)
    heat = heat.sigmoid()
    heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    scores, at = heat.flatten(1).topk(most)
    X, Y = heat.shape[2:]
    kind, x, y = at // (X * Y), at % (X * Y) // Y, at % Y
    out = []
    for i in range(len(samples)):
        f = box[i, :, x[i], y[i]].T
        middle = (torch.stack([x[i], y[i]], 1) + 0.5 + f[:, :2]) * ABOVE + f.new_tensor(LOW[:2])
        yaw = torch.atan2(f[:, 6], f[:, 7]) / 2
        out.append((torch.cat([middle, f[:, 2:3], f[:, 3:6].exp(), yaw[:, None]], dim=1), kind[i], scores[i]))
    return out


def matches(answers: Sequence[tuple[Tensor, Tensor]], boxes: Sequence[Tensor], within: float) -> tuple[Tensor, Tensor]:
    """(scores, whether right), highest first, of (middles (K, 2), scores (K,)) in each scene.  An answer is right when
    the nearest box that no higher one has taken is nearer than `within` metres."""
    flat = [(float(score), i, middle) for i, (m, s) in enumerate(answers) for middle, score in zip(m, s, strict=True)]
    free = [torch.ones(len(b), dtype=torch.bool) for b in boxes]
    right = []
    flat.sort(key=lambda answer: -answer[0])
    for _, i, middle in flat:
        away = (boxes[i][:, :2] - middle).norm(dim=1).masked_fill(~free[i], math.inf)
        right.append(bool(len(away)) and float(away.min()) < within)
        if right[-1]:
            free[i][away.argmin()] = False
    return torch.tensor([f[0] for f in flat]), torch.tensor(right)


def average_precision(scores: Tensor, right: Tensor, number: int) -> float:
    """The area under precision over recall, where `number` boxes were to be found: scikit-learn's, whose recall is of
    those that were found, times the share that was found at all."""
    if not right.any():
        return 0.0
    return float(average_precision_score(right.numpy(), scores.numpy())) * int(right.sum()) / number


def measure(model: Detector, samples: Sequence[Sample], at_once: int = 4) -> dict[str, float]:
    """Average precision of each class, the mean over `DISTANCES`, and `AP`, the mean over classes."""
    answers = [a for i in range(0, len(samples), at_once) for a in found(model, samples[i : i + at_once])]
    result = {}
    for k, name in enumerate(CLASSES):
        boxes = [s.boxes[s.classes == k] for s in samples]
        said_of = [(b[kind == k, :2], score[kind == k]) for b, kind, score in answers]
        number = sum(len(b) for b in boxes)
        each = [average_precision(*matches(said_of, boxes, d), number) for d in DISTANCES]
        result[name] = sum(each) / len(each)
    return result | {"AP": sum(result.values()) / len(CLASSES)}
