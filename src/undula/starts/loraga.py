"""LoRA-GA (Wang, Yu, Li 2024, arXiv:2407.05000, NeurIPS 2024).

    G = U S V' the gradient dL/dW at the base:   A = z V_a',   B = z U_b,   a = 1 .. r,   b = r+1 .. 2r

The first step of gradient descent on (B, A) then moves the update along the best rank-2r approximation of G:
-mu (s z)^2 G_2r to first order, mu the learning rate.  z = O^(1/4) / sqrt(gamma) keeps outputs at one scale where
s = alpha / sqrt(r) (`RankStabilised`, the paper's).  The paper subtracts s B A from W; here `Centred` counts it out.

Which directions and which z are choices, as in the authors' code (`stable`, `unit`, `gd`, `weightS` there).  Its
`norm_clip`, which guards the rounding of the changed base, has no object here: the base does not change.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from ..core.choice import Choice
from ..core.method import Site
from ..core.ranges import Positive, Seed
from ..kernels import frozen
from ..kernels.solver import Randomised, Solver
from .start import Start, check_fits

Indices = list[int]


class Directions(Choice):
    """Which of the first 2r singular directions of the gradient go to B, and which to A."""

    @abc.abstractmethod
    def __call__(self, r: int, name: str) -> tuple[Indices, Indices]:
        """(indices for B, indices for A), at the site called `name`."""


@Directions.register
@dataclass(frozen=True)
class ArB2r(Directions):
    """A the first r, B the next r."""

    def __call__(self, r: int, name: str) -> tuple[Indices, Indices]:
        return list(range(r, 2 * r)), list(range(r))


@Directions.register
@dataclass(frozen=True)
class A2rBr(Directions):
    """B the first r, A the next r."""

    def __call__(self, r: int, name: str) -> tuple[Indices, Indices]:
        return list(range(r)), list(range(r, 2 * r))


@Directions.register
@dataclass(frozen=True)
class ArBr(Directions):
    """By turns: B the 1st, 3rd ..., A the 2nd, 4th ..."""

    def __call__(self, r: int, name: str) -> tuple[Indices, Indices]:
        return list(range(0, 2 * r, 2)), list(range(1, 2 * r, 2))


@Directions.register
@dataclass(frozen=True)
class Shuffled(Directions):
    """A random half each; `random` in the authors' code.  The seed and the site's name determine it."""

    seed: Seed = 0

    def __call__(self, r: int, name: str) -> tuple[Indices, Indices]:
        order: Indices = frozen.permutation(self.seed, ("LoRAGA", name), 2 * r).tolist()
        return order[r:], order[:r]


class Magnitude(Choice):
    """The factor z on both B and A, whose columns and rows are of norm 1 before."""

    @abc.abstractmethod
    def __call__(self, site: Site, r: int, s: float) -> float | Tensor: ...


@Magnitude.register
@dataclass(frozen=True)
class Stable(Magnitude):
    """z = O^(1/4) / sqrt(gamma)."""

    gamma: Positive = 16.0

    def __call__(self, site: Site, r: int, s: float) -> float | Tensor:
        return site.shape[0] ** 0.25 / self.gamma**0.5


@Magnitude.register
@dataclass(frozen=True)
class Unit(Magnitude):
    """z = 1."""

    def __call__(self, site: Site, r: int, s: float) -> float | Tensor:
        return 1.0


@Magnitude.register
@dataclass(frozen=True)
class FullStep(Magnitude):
    """z = 1 / s, so that the first step is -mu G_2r: full fine-tuning's, cut to rank 2r.  `gd` in the authors' code."""

    def __call__(self, site: Site, r: int, s: float) -> float | Tensor:
        return 1 / s


@Magnitude.register
@dataclass(frozen=True)
class OfWeight(Magnitude):
    """z = the mean of sqrt(S_i / s) over the first r singular values of W.  `weightS` in the authors' code."""

    solver: Solver = Randomised()

    def __call__(self, site: Site, r: int, s: float) -> float | Tensor:
        return (self.solver(site.W, r)[1] / s).sqrt().mean()


@Start.register
@dataclass(frozen=True)
class LoRAGA(Start):
    """Singular directions of the gradient; asks the probe for it."""

    directions: Directions = ArB2r()
    magnitude: Magnitude = Stable()
    solver: Solver = Randomised()

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        check_fits(self, site, r, needs=2 * r, has=min(site.shape))
        U, _, V = self.solver(site.gradient(), 2 * r)
        b, a = self.directions(r, site.name)
        z = self.magnitude(site, r, s)
        return (U[:, b] * z).contiguous(), (V[:, a].T * z).contiguous()
