"""The start of LoRA-SB (Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma 2024, arXiv:2411.19557) as a pair.

    s B A = the best rank-r approximation U S V' of -eta sign(G):   B = U sqrt(S / s),   A = sqrt(S / s) V'

G is the gradient dL/dW at the base, so this is the first step of Adam.  LoRA-SB itself freezes U and V, trains an r x r
matrix between them and keeps the step as part of the update.  A pair that trains, and `Centred` around it, which counts
the step out, are after that paper, interpretation: the directions stay, the step does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import Site
from ..core.ranges import Positive
from ..kernels import svd
from .first_step import first_step
from .start import Start, check_alive, check_fits


@Start.register
@dataclass(frozen=True)
class LoRASB(Start):
    """The first Adam step at the learning rate `eta`, at rank r, split evenly; asks the probe for the gradient."""

    eta: Positive = 1e-4

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        check_fits(self, site, r, needs=r, has=min(site.shape))
        U_OR, S_R, V_IR = first_step(site, r, self.eta)
        check_alive(self, site, S_R, S_R[0], "the gradients of the loss")
        return svd.halves(U_OR, S_R / s, V_IR)
