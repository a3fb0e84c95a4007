"""OLoRA (Buyukakyuz 2024, arXiv:2406.01775).

    W = Q R:   B = Q_r, the first r columns of Q,   A = R_r, the first r rows of R;   the base is W - s B A

Q_r depends on the first r columns of W alone and R_r = Q_r' W, so B A is W projected onto the span of those columns,
and the decomposition is that of an O x r matrix: O(O I r) time.  The paper puts s before B A as it is, which makes s
part of the start (s = 1 projects); so does PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Site
from .start import Start, check_fits


@Start.register
@dataclass(frozen=True)
class OLoRA(Start):
    """The first r columns of Q and rows of R in W = Q R."""

    def __call__(self, site: Site, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
        check_fits(self, site, r, needs=r, has=min(site.shape))
        W_OI = site.W
        Q_OR = torch.linalg.qr(W_OI[:, :r]).Q.contiguous()
        return Q_OR, Q_OR.T @ W_OI
