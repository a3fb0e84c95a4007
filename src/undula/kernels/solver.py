"""How the best rank-r approximation of a whole matrix is found."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from ..core.choice import Choice
from ..core.ranges import Extra, Range, Seed
from . import svd


class Solver(Choice):
    """(M (O, I), r) -> about its first r singular triples (U, s, V)."""

    @abc.abstractmethod
    def __call__(self, M_OI: Tensor, r: int) -> svd.Triple: ...

    def leading(self, M: svd.Blocks, r: int) -> svd.Triple:
        """The same of a matrix that is computed block by block; here it is formed."""
        return self(M.whole(), r)


@Solver.register
@dataclass(frozen=True)
class Exact(Solver):
    """The full decomposition: the smallest error that rank r allows (Eckart, Young 1936).  Slow beyond 2000 x 2000."""

    def __call__(self, M_OI: Tensor, r: int) -> svd.Triple:
        return svd.exact(M_OI, r)


@Solver.register
@dataclass(frozen=True)
class Randomised(Solver):
    """A seeded sketch of r + max(r, oversample) columns, with power iterations (Halko, Martinsson, Tropp 2011): seconds
    at 4096 x 4096.  No bound holds for every matrix: the error was the smallest one times 1.003 on pure noise, the
    hardest case (600 x 600 to 600 x 3000, r from 4 to 100), and times 1.0003 or less where s_i falls as i^-0.3.  On
    small matrices it is `Exact`."""

    oversample: Extra = 16
    iterations: Annotated[int, Range(least=0, most=1000)] = 4
    seed: Seed = 0

    def __call__(self, M_OI: Tensor, r: int) -> svd.Triple:
        return svd.randomised(M_OI, r, self.oversample, self.iterations, self.seed)

    def leading(self, M: svd.Blocks, r: int) -> svd.Triple:
        return M.leading(r, self.oversample, self.iterations, self.seed)
