"""LoRA-XS (Bałazy, Banaei, Aberer, Tabor 2024, arXiv:2405.17604).

    W' = W + s B R A,   B = U_r, A = S_r V_r' from the truncated SVD of W, frozen;   R (r x r) trained,   s = alpha / r

The singular values stand on A, as in the authors' code.  R starts normal with standard deviation 1e-5: near the base,
not at it.  B and A are saved: an SVD that is computed again may have other signs, and R would mean nothing there.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Factors, Layer, LowRank, Site
from ..core.ranges import NotNegative, Positive, Rank
from ..kernels.bottleneck import bottleneck
from ..starts.first_step import leading
from .lora import Classic, Scaling


class _Between(LowRank):
    """W' = W + s B R A with R between two frozen factors."""

    @abc.abstractmethod
    def scale(self) -> float:
        """s."""

    @property
    def linear_in(self) -> str:
        return "R"

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return f["B"] @ (self.scale() * f["R"]), f["A"]

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        """As the pair's product, with R on the activations: A and B are frozen and need no gradient."""
        R_RR = self.scale() * f["R"]
        return bottleneck(x, layer, f["A"], f["B"], lambda z: torch.nn.functional.linear(z, R_RR))


@dataclass(frozen=True)
class LoRAXS(_Between):
    """W' = W + s U R S V': a trained core between the leading singular vectors of W."""

    formula = "W' = W + s U_r R S_r V_r', R trained"
    parameters = "min(r, O, I)**2"
    source = "Bałazy et al. 2024, arXiv:2405.17604"
    starts_at_base = False

    r: Rank = 32
    alpha: Positive = 64.0
    std: NotNegative = 1e-5  # of R at the start; 0 starts at the base, and learns
    scaling: Scaling = Classic()

    def init(self, site: Site) -> dict[str, Tensor]:
        U_OR, s_R, V_IR = leading(site, site.W, self.r)
        R_RR = site.normal(len(s_R), len(s_R), std=self.std)
        return {"A": (V_IR * s_R).T.contiguous(), "B": U_OR, "R": R_RR.requires_grad_()}

    def scale(self) -> float:
        return self.scaling(self.r, self.alpha)
