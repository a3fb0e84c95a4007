"""Sparse voxels in plain torch: which cells are occupied, who neighbours whom, and convolutions over them."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OFFSETS = tuple(itertools.product((-1, 0, 1), repeat=3))  # 27 places of a 3 x 3 x 3 kernel, as Conv3d orders them


class Grid:
    """The occupied cells of a batch of voxel grids, each once, in the order of their keys.

    `places_N4` are (scene, x, y, z), integers with 0 <= x < size[0] and so on; `size` is the number of cells a side.
    """

    def __init__(self, places_N4: Tensor, size: tuple[int, int, int]):
        self.size = size
        keys = self._keys(places_N4)
        self.keys, order = keys.sort()
        if (self.keys.diff() == 0).any():
            raise ValueError("a cell stands twice among the places of a grid: merge its points first (`voxelise`)")
        self.places = places_N4[order]
        self.order = order  # rows of what was given, in the order of the grid

    def __len__(self) -> int:
        return len(self.keys)

    def _keys(self, places: Tensor) -> Tensor:
        """One integer a cell, with a margin of one cell around each scene, so that no step leaves it into another."""
        X, Y, Z = self.size
        b, x, y, z = places.unbind(-1)
        return ((b * (X + 2) + x + 1) * (Y + 2) + y + 1) * (Z + 2) + z + 1

    def find(self, places: Tensor) -> Tensor:
        """The rows of these cells; len(self) for those that are empty."""
        keys = self._keys(places)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self) - 1)
        return torch.where(self.keys[at] == keys, at, len(self))

    @functools.cached_property
    def neighbours(self) -> Tensor:
        """(N, 27) rows of the 3 x 3 x 3 cells around each, len(self) for empty ones."""
        steps = torch.tensor([(0, *o) for o in OFFSETS], device=self.keys.device)
        return self.find(self.places[:, None] + steps)

    @functools.cached_property
    def coarser(self) -> tuple[Grid, Tensor]:
        """The grid of cells twice as large, and the row there of each cell here."""
        size = tuple((s + 1) // 2 for s in self.size)
        halved = torch.cat([self.places[:, :1], self.places[:, 1:] // 2], dim=1)
        cells, parent = unique_rows(halved)  # in the order of keys
        return Grid(cells, size), parent  # type: ignore[arg-type]

    def merged(self, x_NC: Tensor) -> Tensor:
        """The means of the features of what falls into each coarser cell."""
        grid, parent = self.coarser
        return means(x_NC, parent, len(grid))


def unique_rows(places_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows that there are, in order, the row there of each given): `torch.unique(dim=0)` by one integer a row."""
    low = places_ND.amin(0)
    sides = (places_ND.amax(0) - low + 1).tolist()
    key = torch.zeros_like(places_ND[:, 0])
    for column, side in zip((places_ND - low).unbind(1), sides, strict=True):
        key = key * side + column
    key, row = torch.unique(key, return_inverse=True)
    columns = []
    for side in reversed(sides):
        columns.append(key % side)
        key = key // side
    return torch.stack(columns[::-1], dim=1) + low, row


def means(x_NC: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """(groups, C) means of the rows of each group; zero for an empty one."""
    total = x_NC.new_zeros(groups, x_NC.shape[1]).index_add(0, group_N, x_NC)
    return total / torch.bincount(group_N, minlength=groups).clamp(min=1)[:, None]


def voxelise(points_P3: Tensor, low: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cells (N, 3), row of each point's cell (P,), offsets (P, 3) of points from the middle of theirs, in cells)."""
    scaled = (points_P3 - low) / cell
    cells, row = unique_rows(scaled.floor().long())
    return cells, row, scaled - scaled.floor() - 0.5


class SubmanifoldConv(nn.Module):
    """A 3 x 3 x 3 convolution over occupied cells alone: y_n = W [x of the 27 cells around n] + b, empty ones zero.

    Gather, then one product: the kernel is a linear layer W (C_out, 27 C_in), so that any adapter stands on it as on
    every other.  It equals `nn.Conv3d(..., padding=1)` at the occupied cells (`from_dense` takes its weight).
    """

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__()
        self.kernel = nn.Linear(len(OFFSETS) * c_in, c_out, bias)

    def forward(self, x_NC: Tensor, grid: Grid) -> Tensor:
        padded = F.pad(x_NC, (0, 0, 0, 1))
        near = padded.index_select(0, grid.neighbours.flatten())
        return self.kernel(near.view(len(x_NC), -1))

    @classmethod
    def from_dense(cls, dense: nn.Conv3d) -> SubmanifoldConv:
        conv = cls(dense.in_channels, dense.out_channels, dense.bias is not None).to(dense.weight)
        with torch.no_grad():
            conv.kernel.weight.copy_(dense.weight.permute(0, 2, 3, 4, 1).flatten(1))
            if dense.bias is not None:
                conv.kernel.bias.copy_(dense.bias)
        return conv
