"""SoRA (Ding, Lv, Wang, Chen, Zhou, Liu, Sun 2023, arXiv:2311.11696, EMNLP 2023): a trained gate before every rank.

    W' = W + s B diag(g) A,   s = alpha / r;   A Kaiming-uniform, B = 0, g ~ N(0, 1)

The paper trains g by proximal steps on loss + lambda |g|_1, which put gates to exactly zero:
`undula.ranks.SoRA` takes g over from the optimiser and does that.  Without it g trains like any other factor and no
gate becomes zero.  After `undula.prune` the survivors keep the scale of the r ranks that were there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import Site
from ..core.ranges import Positive, Rank
from ..starts import Kaiming, Start
from .gated import _Gated
from .lora import Classic, Scaling


@dataclass(frozen=True)
class SoRA(_Gated):
    """W' = W + s B diag(g) A, g trained.  At the first step only B has a gradient."""

    formula = "W' = W + s B diag(g) A"
    parameters = "r*(O + I + 1)"
    source = "Ding et al. 2023, arXiv:2311.11696"

    r: Rank = 8
    alpha: Positive = 16.0
    scaling: Scaling = Classic()

    def init(self, site: Site, start: Start = Kaiming()) -> dict[str, Tensor]:
        B_OR, A_RI = start(site, self.r, self.scale)
        f = {"A": A_RI, "B": B_OR, "g": site.normal(self.r, std=1.0)}
        return {k: t.requires_grad_() for k, t in f.items()}
