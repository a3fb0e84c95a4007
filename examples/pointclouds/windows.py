"""Voxels in groups of one size, window by window along an axis: the sequences that a linear recurrence reads."""

from __future__ import annotations

import torch
from torch import Tensor


class Groups:
    """Rows of a grid in sequences of `length`, each of one scene.

    Along "x" windows are in the order of x, then y, and so are the cells within each (last z); along "y" of y, then x.
    The last group of a scene may be shorter: `there_GT` is False behind its end.
    """

    def __init__(self, places_N4: Tensor, window: tuple[int, int], length: int, axis: str):
        first, second = {"x": (1, 2), "y": (2, 1)}[axis]
        scene, z = places_N4[:, 0], places_N4[:, 3]
        a, b = places_N4[:, first], places_N4[:, second]
        size = {"x": window, "y": window[::-1]}[axis]
        columns = (scene, a // size[0], b // size[1], a % size[0], b % size[1], z)
        order = _sorted_by(columns)
        counts = torch.bincount(scene)
        room = (counts + length - 1) // length * length
        start, padded = (torch.cat([c.new_zeros(1), c.cumsum(0)]) for c in (counts, room))
        ordered = scene[order]
        slot = padded[ordered] + torch.arange(len(order), device=order.device) - start[ordered]
        self.slots = torch.empty_like(order)
        self.slots[order] = slot  # where each row of the grid stands
        self.length, self.room = length, int(padded[-1])
        there = torch.zeros(self.room, dtype=torch.bool, device=order.device)
        there[slot] = True
        self.there_GT = there.view(-1, length)

    def split(self, x_NC: Tensor) -> Tensor:
        """(G, T, C), zero at padding."""
        flat = x_NC.new_zeros(self.room, x_NC.shape[1]).index_copy(0, self.slots, x_NC)
        return flat.view(-1, self.length, x_NC.shape[1])

    def join(self, y_GTC: Tensor) -> Tensor:
        """(N, C), in the order of the grid."""
        return y_GTC.flatten(0, 1).index_select(0, self.slots)


def _sorted_by(columns: tuple[Tensor, ...]) -> Tensor:
    """The order by the first column, then the second, and so on; all >= 0."""
    key = torch.zeros_like(columns[0])
    for column in columns:
        key = key * (int(column.max()) + 1) + column
    return key.argsort()
