"""One batch, many adapters: row i through adapter i.

Rows are sorted by adapter once, when the context is entered.  LowRank adapters add B A x to the frozen layer's output
for the rows that are theirs; other methods run on their rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from ..method import Factors, Layer, Method


class Rows:
    """The law of one site in a mixed batch: `laws[name]` is (method, factors), `names[i]` the adapter of row i."""

    def __init__(self, laws: Mapping[str, tuple[Method, Factors]], names: tuple[str | None, ...]):
        self.count = len(names)
        self.members = [
            (method, f, torch.tensor([i for i, n in enumerate(names) if n == name]))
            for name, (method, f) in laws.items()
        ]

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        if x.shape[0] != self.count:
            raise ValueError(f"rows() was given {self.count} names, this layer sees a batch of {x.shape[0]}")
        y = layer(x)
        for method, own, index in self.members:
            y = y.index_copy(0, index, method.forward(x[index], layer, own).to(y.dtype))
        return y
