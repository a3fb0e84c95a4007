"""What a start is, and the two that look at neither the matrix nor data."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Site
from ..core.ranges import Positive


class Start(Choice):
    """(site, r) -> (B (O, r), A (r, I)).  A start never touches the base: one with B A != 0 needs `Centred`."""

    at_base: ClassVar[bool] = False  # whether B = 0

    @abc.abstractmethod
    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        """`s` is what the method puts before B A: starts that aim at a matrix M make s B A = M."""


def check_fits(start: Start, site: Site, r: int, needs: int, has: int) -> None:
    """Raises ValueError where a start needs more singular directions than the matrix has."""
    if needs <= has:
        return
    O, I = site.shape
    most = r * has // needs
    remedy = f"Give it a rank of {most} or less (see `overrides` of attach)" if most else "Leave it out of `where`"
    raise ValueError(
        f"{start!r} at rank {r} needs {needs} directions at {site.name}, which is {O} x {I} and has {has}. {remedy}"
    )


def check_alive(start: Start, site: Site, s_R: Tensor, largest: Tensor, what: str) -> None:
    """Raises ValueError where all singular values that a start uses are zero up to rounding: B = A = 0 never learns."""
    if s_R.device.type == "meta" or s_R[0] > largest * max(site.shape) * torch.finfo(s_R.dtype).eps:
        return
    raise ValueError(
        f"{start!r} would give B = A = 0 at {site.name}, which never learns: {what} are zero. Use another start here"
    )


@Start.register
@dataclass(frozen=True)
class Kaiming(Start):
    """LoRA's: A uniform within 1/sqrt(I) (He et al. 2015 with a = sqrt 5), B = 0."""

    at_base = True

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        return site.zeros(O, r), site.uniform(r, I, bound=1 / math.sqrt(I))


@Start.register
@dataclass(frozen=True)
class Gaussian(Start):
    """A with standard deviation 1/sqrt(I), B with `std`: nothing starts at zero, so every activation can learn."""

    std: Annotated[Positive, "0 is Kaiming()"] = 0.01

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        O, I = site.shape
        return site.normal(O, r, std=self.std), site.normal(r, I, std=1 / math.sqrt(I))
