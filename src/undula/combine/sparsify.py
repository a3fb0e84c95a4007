"""What is left of one adapter's update before several are added: the first of the two axes of merging.

t = keep * dW, rescaled where the source says so
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.ranges import PartShare, SomeShare
from ..kernels.magnitude import kth_largest

Blocks = Callable[[], Iterable[Tensor]]


class Kept(NamedTuple):
    """Entries from `least` on and below `limit` in magnitude stay."""

    least: float = 0.0
    limit: float = float("inf")

    def of(self, M: Tensor) -> Tensor:
        size = M.abs()
        return M * ((size >= self.least) & (size < self.limit))


class Sparsify(Choice):
    """Which entries of an update stay.  It is asked once about the update as a whole (`measured`), then for every block
    of its rows."""

    @property
    def keeps_all(self) -> bool:
        return False

    def measured(self, blocks: Blocks, numel: int, dtype: torch.dtype) -> Kept:
        """What it has to know of all `numel` entries."""
        return Kept()

    @abc.abstractmethod
    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        """Rows of the update with zeros in the place of what goes; what is drawn is drawn from `generator`."""


@Sparsify.register
@dataclass(frozen=True)
class Everything(Sparsify):
    """All of it."""

    @property
    def keeps_all(self) -> bool:
        return True

    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        return M_KI


@Sparsify.register
@dataclass(frozen=True)
class Magnitude(Sparsify):
    """The share `density` of largest magnitude (the trimming of TIES: Yadav, Tam, Choshen, Raffel, Bansal 2023,
    arXiv:2306.01708).  Entries as large as the smallest that stays stay too."""

    density: SomeShare = 0.2

    @property
    def keeps_all(self) -> bool:
        return self.density == 1

    def measured(self, blocks: Blocks, numel: int, dtype: torch.dtype) -> Kept:
        return Kept(_at(blocks, int(self.density * numel), dtype))

    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        return kept.of(M_KI)


@Sparsify.register
@dataclass(frozen=True)
class DARE(Sparsify):
    """Each entry with the probability `density`, divided by that (Yu, Yu, Yu, Huang, Li 2024, arXiv:2311.03099): the
    mean over seeds is the update."""

    density: SomeShare = 0.5

    @property
    def keeps_all(self) -> bool:
        return self.density == 1

    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        return _drawn(M_KI, torch.full_like(M_KI, self.density), generator)


@Sparsify.register
@dataclass(frozen=True)
class DELLA(Sparsify):
    """MagPrune (Deep, Bhardwaj, Poria 2024, arXiv:2406.11617): each entry with a probability that rises with its rank
    by magnitude in its row, evenly from density - window/2 (the smallest) to density + window/2, divided by that."""

    density: SomeShare = 0.5
    window: PartShare = 0.2

    def __post_init__(self) -> None:
        if not (self.window / 2 < self.density and self.density + self.window / 2 <= 1):
            raise ValueError(
                f"DELLA keeps entries with probabilities from density - window/2 to density + window/2, which lie in "
                f"(0, 1]; found density {self.density:g} and window {self.window:g}"
            )

    @property
    def keeps_all(self) -> bool:
        return self.density == 1

    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        order = M_KI.abs().argsort(dim=1, stable=True)
        places = torch.arange(M_KI.shape[1], device=M_KI.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places)  # half of the time of a second sort
        share = ranks / max(M_KI.shape[1] - 1, 1)
        return _drawn(M_KI, (self.density + self.window * (share - 0.5)).to(M_KI.dtype), generator)


@Sparsify.register
@dataclass(frozen=True)
class Breadcrumbs(Sparsify):
    """Without the share `outliers` of largest magnitude, and of the rest the largest, `density` of all (Davari,
    Belilovsky 2023, arXiv:2312.06795)."""

    density: SomeShare = 0.9
    outliers: PartShare = 0.01

    @property
    def keeps_all(self) -> bool:
        return self.density == 1

    def measured(self, blocks: Blocks, numel: int, dtype: torch.dtype) -> Kept:
        keep = int(self.density * numel)
        top = min(int(self.outliers * numel), numel - keep)
        return Kept(_at(blocks, top + keep, dtype), _at(blocks, top, dtype) if top else float("inf"))

    def __call__(self, M_KI: Tensor, kept: Kept, generator: torch.Generator) -> Tensor:
        return kept.of(M_KI)


def _at(blocks: Blocks, count: int, dtype: torch.dtype) -> float:
    return kth_largest(blocks, max(count, 1), dtype)


def _drawn(M: Tensor, chance: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(M.shape, generator=generator, dtype=torch.float64, device="cpu").to(M.device)
    return M / chance * (drawn < chance)
