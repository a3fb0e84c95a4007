"""A small detector after LION (Liu et al. 2024, arXiv 2407.18232): linear group RNNs over voxels, boxes from above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scan import TokenMixer
from torch import Tensor, nn
from voxels import Grid, SubmanifoldConv, unique_rows
from windows import Groups

CLASSES = ("car", "pedestrian")
FIELDS = 8  # of a box: steps to its middle dx, dy, height z, log of length, width, height, sin and cos of twice its yaw
DIFFUSED = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # where a foreground voxel makes others, in x and y


@dataclass(frozen=True)
class Shape:
    """Of the model: width, heads, (window, group length) of fine and of coarse cells, share of diffused voxels."""

    width: int = 32
    heads: int = 4
    fine: tuple[int, int] = (12, 256)
    coarse: tuple[int, int] = (12, 128)
    generated: float = 0.2
    decay: str = "input"


class GroupLayer(nn.Module):
    """x + mix(x) over groups along x, then along y, each with a small feed-forward part behind it."""

    def __init__(self, shape: Shape, window: int, length: int):
        super().__init__()
        C = shape.width
        self.window, self.length = window, length
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(4))
        self.mixers = nn.ModuleList(TokenMixer(C, shape.heads, shape.decay) for _ in range(2))
        self.feeds = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)) for _ in range(2))

    def forward(self, x_NC: Tensor, grid: Grid) -> Tensor:
        for i, axis in enumerate("xy"):
            groups = Groups(grid.places, (self.window, self.window), self.length, axis)
            mixed = self.mixers[i](groups.split(self.norms[2 * i](x_NC)), groups.there_GT)
            x_NC = x_NC + groups.join(mixed)
            x_NC = x_NC + self.feeds[i](self.norms[2 * i + 1](x_NC))
        return x_NC


class Descriptor(nn.Module):
    """What a sequence loses of the neighbourhood in space: a submanifold convolution, LayerNorm, GELU, added."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = SubmanifoldConv(width, width, bias=False), nn.LayerNorm(width)

    def forward(self, x_NC: Tensor, grid: Grid) -> Tensor:
        return x_NC + F.gelu(self.norm(self.conv(x_NC, grid)))


def generated(x_NC: Tensor, grid: Grid, share: float) -> tuple[Tensor, Grid]:
    """Voxels with more of them around the foreground: of each scene the `share` with the largest mean feature give
    their four diagonal neighbours in x and y, where these are empty, a voxel of zeros.  The recurrence that follows
    fills them from the tokens before them."""
    new = [grid.places]
    for scene in range(int(grid.places[:, 0].max()) + 1):
        rows = (grid.places[:, 0] == scene).nonzero().squeeze(1)
        chosen = rows[x_NC.detach()[rows].mean(1).topk(int(share * len(rows))).indices]
        steps = torch.tensor([(0, a, b, 0) for a, b in DIFFUSED], device=rows.device)
        places = (grid.places[chosen, None] + steps).flatten(0, 1)
        X, Y, _ = grid.size
        within = (places[:, 1] >= 0) & (places[:, 1] < X) & (places[:, 2] >= 0) & (places[:, 2] < Y)
        new.append(places[within])
    wider = Grid(unique_rows(torch.cat(new))[0], grid.size)
    return F.pad(x_NC, (0, 0, 0, 1)).index_select(0, grid.find(wider.places)), wider


class Block(nn.Module):
    """Describe, mix, merge to cells twice as large, describe, mix, and bring it back to the finer ones."""

    def __init__(self, shape: Shape):
        super().__init__()
        C = shape.width
        self.near, self.far = Descriptor(C), Descriptor(C)
        self.fine, self.coarse = GroupLayer(shape, *shape.fine), GroupLayer(shape, *shape.coarse)
        self.merging = nn.LayerNorm(C)

    def forward(self, x_NC: Tensor, grid: Grid) -> Tensor:
        x_NC = self.fine(self.near(x_NC, grid), grid)
        above, parent = grid.coarser
        y = self.merging(grid.merged(x_NC))
        y = self.coarse(self.far(y, above), above)
        return x_NC + y.index_select(0, parent)


class Head(nn.Module):
    """Two convolutions over the view from above; of each cell, whether a middle of each class is there, and the box."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.heat, self.box = nn.Conv2d(width, len(CLASSES), 1), nn.Conv2d(width, FIELDS, 1)
        nn.init.constant_(self.heat.bias, -4.6)  # few cells are middles: it begins at p = 0.01

    def forward(self, above_BCXY: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.second(F.relu(self.first(above_BCXY))))
        return self.heat(y), self.box(y)


class Detector(nn.Module):
    """Voxels of scenes in, (heat (B, classes, X/2, Y/2), boxes (B, FIELDS, X/2, Y/2)) out."""

    def __init__(self, c_in: int, shape: Shape = Shape()):
        super().__init__()
        self.shape = shape
        self.embed = nn.Sequential(nn.Linear(c_in, shape.width), nn.LayerNorm(shape.width), nn.GELU())
        self.first, self.second = Block(shape), Block(shape)
        self.flatten = nn.Linear(shape.width, shape.width)
        self.head = Head(shape.width)

    def forward(self, features_NF: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.first(self.embed(features_NF), grid)
        if self.shape.generated:
            x, grid = generated(x, grid, self.shape.generated)
        x = self.second(x, grid)
        return self.head(from_above(self.flatten(grid.merged(x)), grid.coarser[0]))


def from_above(x_NC: Tensor, grid: Grid) -> Tensor:
    """(B, C, X, Y) sums over the height."""
    scenes, (X, Y, _) = int(grid.places[:, 0].max()) + 1, grid.size
    b, x, y, _ = grid.places.unbind(1)
    flat = x_NC.new_zeros(scenes * X * Y, x_NC.shape[1]).index_add(0, (b * X + x) * Y + y, x_NC)
    return flat.view(scenes, X, Y, -1).permute(0, 3, 1, 2)


def batch(parts: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int, int]) -> tuple[Tensor, Grid]:
    """Scenes as (features, cells) in one grid."""
    places = torch.cat([F.pad(cells, (1, 0), value=i) for i, (_, cells) in enumerate(parts)])
    grid = Grid(places, size)
    return torch.cat([f for f, _ in parts])[grid.order], grid
