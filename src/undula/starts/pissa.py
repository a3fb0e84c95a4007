"""PiSSA (Meng, Wang, Zhang 2024, arXiv:2404.02948, NeurIPS 2024).

    s B A = W_r,   W = U S V':   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r'

The adapter starts as the r largest singular triples of W; the paper trains it over the residual W - W_r.  Here the base
stays what it is: `Centred` counts W_r out.  Both train the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import Site
from ..kernels import svd
from ..kernels.solver import Exact, Solver
from .start import Start, check_alive, check_fits


@Start.register
@dataclass(frozen=True)
class PiSSA(Start):
    """The r largest singular triples of W, found by `solver` (the paper's fast variant: `Randomised`)."""

    solver: Solver = Exact()

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        check_fits(self, site, r, needs=r, has=min(site.shape))
        U_OR, s_R, V_IR = self.solver(site.W, r)
        check_alive(self, site, s_R, s_R[0], "all singular values of W")
        return svd.halves(U_OR, s_R / s, V_IR)
