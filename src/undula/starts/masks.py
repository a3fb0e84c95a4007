"""Which entries of W train: the masks of SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175), each of exactly k entries."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Site
from ..core.ranges import Natural, Seed
from ..kernels import frozen


class Mask(Choice):
    """(site, k) -> k different flat indices into W (O, I), rising, int64."""

    seeded: ClassVar[bool] = False  # configuration, name and shape determine the mask: no file holds it

    @abc.abstractmethod
    def __call__(self, site: Site, k: int) -> Tensor: ...


@Mask.register
@dataclass(frozen=True)
class Rand(Mask):
    """Uniform over all sets of k entries; each layer has its own."""

    seeded = True
    seed: Seed = 0

    def __call__(self, site: Site, k: int) -> Tensor:
        if site.device.type == "meta":
            return torch.empty(k, dtype=torch.int64, device="meta")
        return frozen.subset(self.seed, ("SHiRA", site.name), math.prod(site.shape), k)


@Mask.register
@dataclass(frozen=True)
class Struct(Mask):
    """The diagonal (its rank), then whole rows at an even stride as far as k goes (the last one in part).

    Masks of different `shift` begin `shift` columns (diagonal) and rows further on: adapters of several tasks that
    share no row hardly interfere.
    """

    seeded = True
    shift: Natural = 0

    def __call__(self, site: Site, k: int) -> Tensor:
        O, I = site.shape
        if site.device.type == "meta":
            return torch.empty(k, dtype=torch.int64, device="meta")
        if k == O * I:
            return torch.arange(k, device="cpu")
        j = torch.arange(min(O, I), device="cpu")
        diagonal = j * I + (j + self.shift) % I
        count = min(O, -(-max(0, k - len(diagonal)) // max(1, I - 1)))  # a row brings at least I - 1 new entries
        chosen = (torch.arange(count, device="cpu") * O // max(1, count) + self.shift) % O
        full = (chosen[:, None] * I + torch.arange(I, device="cpu")).flatten()
        return torch.cat([diagonal, full[~torch.isin(full, diagonal)]])[:k].sort().values


class _Scored(Mask):
    """The k entries of the largest score."""

    @abc.abstractmethod
    def score(self, site: Site) -> Tensor:
        """(O, I), not negative."""

    def __call__(self, site: Site, k: int) -> Tensor:
        if site.device.type == "meta":
            return torch.empty(k, dtype=torch.int64, device="meta")
        return largest(self.score(site).flatten(), k, site.name)


@Mask.register
@dataclass(frozen=True)
class Magnitude(_Scored):
    """The largest |W| (SHiRA-WM)."""

    def score(self, site: Site) -> Tensor:
        return site.W.abs()


@Mask.register
@dataclass(frozen=True)
class Gradient(_Scored):
    """The largest |dL/dW|, averaged over the batches of a probe (SHiRA-Grad)."""

    def score(self, site: Site) -> Tensor:
        return site.gradient().abs()


@Mask.register
@dataclass(frozen=True)
class SNIP(_Scored):
    """The largest |W dL/dW| (SHiRA-SNIP, after Lee et al. 2019, arXiv:1810.02340)."""

    def score(self, site: Site) -> Tensor:
        return (site.W * site.gradient()).abs()


def largest(score_N: Tensor, k: int, name: str) -> Tensor:
    """Rising indices of the k largest scores; of equal ones the first.  Much cheaper than a stable sort of them all."""
    if score_N.isnan().any():
        raise ValueError(f"{name}: weights or gradients hold NaN, so that no largest entries can be chosen")
    least = torch.topk(score_N, k, sorted=False).values.min()
    above = (score_N > least).nonzero()[:, 0]
    level = (score_N == least).nonzero()[: k - len(above), 0]
    return torch.cat([above, level]).sort().values
