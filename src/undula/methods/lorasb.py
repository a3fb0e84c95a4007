"""LoRA-SB (Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma 2024, arXiv:2411.19557).

    W' = W + s B R A,   B = U_r, A = V_r', R = diag(S_r) / s at the start, from the SVD of -eta sign(dL/dW);   R trained

-eta sign(dL/dW) is the first step that AdamW would take in full fine-tuning.  Training begins at the best rank-r
approximation of that step, not at the base.  B and A stay orthonormal, so with s = 1 the gradient of R is the best one:
its image s^2 B R' A is the projection of dL/dW.  `eta` is the step's learning rate; the authors' code takes the
learning rate divided by the number of warm-up steps.  B and A are saved: they depend on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Site
from ..core.ranges import Positive, Rank
from ..starts.first_step import first_step
from .loraxs import _Between


@dataclass(frozen=True)
class LoRASB(_Between):
    """W' = W + s B R A, in the subspace of full fine-tuning's first step.  Needs a probe: see `undula.Probe`."""

    formula = "W' = W + s B R A, R trained"
    parameters = "min(r, O, I)**2"
    source = "Ponkshe et al. 2024, arXiv:2411.19557"
    starts_at_base = False

    r: Rank = 32
    alpha: Positive | None = None  # s = alpha / r; None: alpha = r, s = 1
    eta: Positive = 1e-5

    def init(self, site: Site) -> dict[str, Tensor]:
        U_OR, s_R, V_IR = first_step(site, self.r, self.eta)
        R_RR = torch.diag(s_R) / self.scale()
        return {"A": V_IR.T.contiguous(), "B": U_OR, "R": R_RR.requires_grad_()}

    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r
