"""The frozen layer underneath an adapter, as methods and kernels see it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """The frozen layer underneath, seen as a matrix W (O x I)."""

    @property
    def training(self) -> bool: ...

    @property
    def channel(self) -> int:
        """Where the output keeps its channels: -1 (linear, embedding), -2, -3 or -4 (convolutions)."""

    @property
    def plain(self) -> bool:
        """Whether layer(x) is exactly F.linear(x, weight, bias) on an ordinary dense weight."""

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def weight(self) -> Tensor:
        """W (O, I); a quantised layer dequantises here."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        """M x for any matrix M with I columns, channels last: (..., K)."""


class Outline:
    """A layer that has a shape (O, I) and nothing else."""

    training, channel, plain, bias = False, -1, False, None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        self.weight = torch.empty(shape, dtype=dtype, device="meta")

    def __call__(self, x: Tensor) -> Tensor:
        return self.project(x, self.weight)

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return x @ M_KI.T
