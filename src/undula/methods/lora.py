"""LoRA (Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv:2106.09685).

W' = W + s B A,   A (r x I), B (O x r), s = alpha / r  (or alpha / sqrt r: rsLoRA)
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, LowRank, Site
from ..core.ranges import NotZero, Positive, Rank
from ..starts import Kaiming, Start


class Scaling(Choice):
    """The factor s before B A, from rank and alpha."""

    @abc.abstractmethod
    def __call__(self, r: int, alpha: float) -> float: ...


@Scaling.register
@dataclass(frozen=True)
class Classic(Scaling):
    """s = alpha / r (Hu et al. 2021)."""

    def __call__(self, r: int, alpha: float) -> float:
        return alpha / r


@Scaling.register
@dataclass(frozen=True)
class RankStabilised(Scaling):
    """s = alpha / sqrt(r): rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""

    def __call__(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r)


@Scaling.register
@dataclass(frozen=True)
class Fixed(Scaling):
    """s itself: what rank and alpha gave when the adapter was made.  A change of rank does not rescale what stays."""

    s: NotZero

    def __call__(self, r: int, alpha: float) -> float:
        return self.s


@dataclass(frozen=True)
class LoRA(LowRank):
    """W' = W + s B A.  Starts at the base (B = 0; A = 0 on an embedding) unless `Centred` gives it another start."""

    formula = "W' = W + s B A"
    parameters = "r*(O + I)"
    source = "Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732"

    r: Rank = 8
    alpha: Positive = 16.0
    scaling: Scaling = Classic()

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        if site.looks_up and start == Kaiming():
            # A x is a column of A: within 1/sqrt(I), I the size of the vocabulary, it would give B next to no gradient.
            # As loralib and PEFT have it, the other way round.
            B_OR, A_RI = site.normal(site.shape[0], self.r, std=1.0), site.zeros(self.r, site.shape[1])
        else:
            B_OR, A_RI = start(site, self.r, self.scaling(self.r, self.alpha))
        return {"A": A_RI.requires_grad_(), "B": B_OR.requires_grad_()}

    @property
    def linear_in(self) -> str:
        return "B"

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return self.scaling(self.r, self.alpha) * f["B"], f["A"]

    def plain(self) -> tuple[float, str, str]:
        return self.scaling(self.r, self.alpha), "B", "A"
