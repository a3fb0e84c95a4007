"""The data-free starts of a pair (B, A)."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from torch import Tensor

from ..choice import Choice
from ..method import Site


class Start(Choice):
    """(site, r) -> (B (O, r), A (r, I)).  A start never touches the base: one with B A != 0 needs `Centred`."""

    @abc.abstractmethod
    def __call__(self, site: Site, r: int) -> tuple[Tensor, Tensor]: ...


@Start.register
@dataclass(frozen=True)
class Kaiming(Start):
    """LoRA's: A uniform within 1/sqrt(I) (He et al. 2015 with a = sqrt 5), B = 0."""

    def __call__(self, site: Site, r: int) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        return site.zeros(O, r), site.uniform(r, I, bound=1 / math.sqrt(I))


@Start.register
@dataclass(frozen=True)
class Gaussian(Start):
    """A with standard deviation 1/sqrt(I), B with `std`: nothing starts at zero, so every activation can learn."""

    std: float = 0.01

    def __call__(self, site: Site, r: int) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        return site.normal(O, r, std=self.std), site.normal(r, I, std=1 / math.sqrt(I))
