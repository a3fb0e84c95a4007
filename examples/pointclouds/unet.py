"""A small U-Net of sparse convolutions after SegmentAnyTree (Wielgosz et al. 2024, arXiv 2401.15739), and its loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from forest import NONE, Plot
from torch import Tensor, nn
from voxels import Grid, SubmanifoldConv, means, voxelise

CELL = 0.5  # metres
EMBEDDING = 5
FEATURES = 4  # of a voxel: mean offset of its points, height above the lowest point of the plot in tens of metres
PULL, PUSH = 0.5, 1.5  # margins of the discriminative loss, as PointGroup's and ForAINet's


class Stage(nn.Module):
    """x + conv(GELU(norm(conv(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = SubmanifoldConv(width, width), SubmanifoldConv(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x_NC: Tensor, grid: Grid) -> Tensor:
        y = F.gelu(self.norms[0](self.first(x_NC, grid)))
        return F.gelu(x_NC + self.norms[1](self.second(y, grid)))


class TreeNet(nn.Module):
    """Voxels in; of each, (tree or not (N, 2), step to the tree's middle (N, 3) in metres, embedding (N, 5)) out."""

    def __init__(self, width: int, levels: int = 3):
        super().__init__()
        widths = [width * 2**i for i in range(levels)]
        self.embed = nn.Linear(FEATURES, width)
        self.down = nn.ModuleList(Stage(w) for w in widths)
        self.merge = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.spread = nn.ModuleList(nn.Linear(b, a) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(Stage(w) for w in widths[:-1])
        self.semantic, self.offset, self.embedding = (nn.Linear(width, n) for n in (2, 3, EMBEDDING))

    def forward(self, features_NF: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        x, levels = self.embed(features_NF), []
        for i, stage in enumerate(self.down):
            x = stage(x, grid)
            if i < len(self.merge):
                levels.append((x, grid))
                x, grid = self.merge[i](grid.merged(x)), grid.coarser[0]
        for i in reversed(range(len(levels))):
            beside, grid = levels[i]
            x = self.up[i](beside + self.spread[i](x).index_select(0, grid.coarser[1]), grid)
        return self.semantic(x), self.offset(x), self.embedding(x)


class Cloud:
    """A plot as the model sees it: voxels, the voxel of each point, and what is to be said of each voxel."""

    def __init__(self, plot: Plot):
        points = torch.tensor(plot.points, dtype=torch.float32)
        low = torch.tensor([0.0, 0.0, float(points[:, 2].min())])
        cells, self.row, offset = voxelise(points, low, torch.tensor(CELL))
        self.grid = Grid(F.pad(cells, (1, 0)), tuple(int(n) + 1 for n in cells.amax(0)))
        told = torch.cat([offset, (points[:, 2:] - low[2]) / 10], dim=1)
        self.features = means(told, self.row, len(cells))
        self.middles = means(points, self.row, len(cells))
        self.instance = voted(plot.instance, self.row.numpy(), len(cells))
        tree = self.instance != NONE
        centres = means(
            points[plot.instance != NONE], torch.tensor(plot.instance[plot.instance != NONE]), len(plot.axes)
        )
        centres[:, :2] = torch.tensor(plot.axes, dtype=torch.float32)  # of a crown that is cut off, where the stem is
        self.step = torch.where(tree[:, None], centres[self.instance.clamp(min=0)] - self.middles, 0.0)


def voted(instance: np.ndarray, row: np.ndarray, number: int) -> Tensor:
    """The instance of most points of each voxel; of equally many the first."""
    labels, label = np.unique(instance, return_inverse=True)
    counts = np.bincount(row * len(labels) + label, minlength=number * len(labels))
    return torch.tensor(labels[counts.reshape(number, -1).argmax(1)])


def loss(model: TreeNet, clouds: Sequence[Cloud]) -> Tensor:
    """Cross entropy of tree or not, L1 of steps in metres at trees, and the discriminative loss of embeddings."""
    total = torch.zeros(())
    for c in clouds:
        semantic, step, embedding = model(c.features, c.grid)
        tree = c.instance != NONE
        total = total + F.cross_entropy(semantic, tree.long()) + (step - c.step)[tree].abs().sum(1).mean() / 3
        total = total + 0.5 * discriminative(embedding[tree], c.instance[tree])
    return total / len(clouds)


def discriminative(e_NE: Tensor, instance_N: Tensor) -> Tensor:
    """Over trees the mean of mean (|e - middle| - PULL)+^2, over pairs of trees that of (2 PUSH - |difference of their
    middles|)+^2 (De Brabandere et al. 2017)."""
    labels, row = torch.unique(instance_N, return_inverse=True)
    middle = means(e_NE, row, len(labels))
    away = F.relu((e_NE - middle[row]).norm(dim=1) - PULL) ** 2
    pull = means(away[:, None], row, len(labels)).mean()
    if len(labels) < 2:
        return pull
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    return pull + (F.relu(2 * PUSH - (middle[i] - middle[j]).norm(dim=1)) ** 2).mean()
