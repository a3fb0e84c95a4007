"""MiLoRA (Wang, Li, Wang, Chen, Chen 2024, arXiv:2406.09044, NAACL 2025).

    s B A = W_m,   W = U S V':   B = U_m sqrt(S_m / s),   A = sqrt(S_m / s) V_m',   m the r smallest singular triples

PiSSA's other end: what W uses least is trained, what it uses most stays.  A sketch cannot find the smallest triples, so
the decomposition is the full one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import Site
from ..kernels import svd
from .start import Start, check_alive, check_fits


@Start.register
@dataclass(frozen=True)
class MiLoRA(Start):
    """The r smallest singular triples of W, in falling order."""

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        n = min(site.shape)
        check_fits(self, site, r, needs=r, has=n)
        U, sv, V = svd.exact(site.W, n)
        check_alive(self, site, sv[n - r :], sv[0], f"the {r} smallest singular values of W")
        return svd.halves(U[:, n - r :], sv[n - r :] / s, V[:, n - r :])
