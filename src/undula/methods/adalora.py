"""AdaLoRA (Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao 2023, arXiv:2303.10512, ICLR 2023).

    W' = W + s P diag(E) Q,   s = alpha / r;   P, Q ~ N(0, 0.02^2), E = 0

The form of a singular value decomposition: P (here the factor B, O x r) and Q (A, r x I) are drawn towards orthonormal
columns and rows by a penalty, E holds the singular values.  Penalty, scores and shrinking budget are
`undula.ranks.AdaLoRA`; without it this is LoRA with a trained gate.  At the first step only E has a gradient.

The authors' code and PEFT divide by r + 1e-5; here by r.  Both keep the r of the start while ranks go, and so does
`undula.prune`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.method import Site
from ..core.ranges import Positive, Rank
from .gated import _Gated
from .lora import Classic, Scaling


@dataclass(frozen=True)
class AdaLoRA(_Gated):
    """W' = W + s P diag(E) Q."""

    formula = "W' = W + s P diag(E) Q"
    parameters = "r*(O + I + 1)"
    source = "Zhang et al. 2023, arXiv:2303.10512"
    gate: ClassVar[str] = "E"

    r: Rank = 12
    alpha: Positive = 16.0
    scaling: Scaling = Classic()

    def init(self, site: Site) -> dict[str, Tensor]:
        O, I = site.shape
        f = {"A": site.normal(self.r, I, std=0.02), "B": site.normal(O, self.r, std=0.02), "E": site.zeros(self.r)}
        return {k: t.requires_grad_() for k, t in f.items()}
