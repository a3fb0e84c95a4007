"""S2-LoRA: sparsely shared LoRA on Whisper (Liu et al. 2023, arXiv:2309.11756, ICASSP 2024).

    W' = W + B diag(e) A,   A (r x I) and B (O x r) shared by all sites of a shape, e (r) each site's own

After arXiv:2309.11756, interpretation: of the paper only the abstract was at hand.  It says that the low-rank factors
are shared globally and that each weight has sparse coefficients of the ranks.  Settled here: one pair for each shape
(O, I); no further scale; A and B normal with standard deviation 0.02, e = 0 (AdaLoRA's convention), so that only e
has a gradient at the first step.

What makes e sparse is a penalty on it or a proximal step, neither of them part of the law: `gate` names the factor.
A penalty on e alone can be evaded, since (c B, e / c) is the same update.  The shared factors get the sum of all
sites' gradients: lower their learning rate accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..core.method import Factors, LowRank, Site
from ..core.ranges import Positive, Rank


@dataclass(frozen=True)
class S2LoRA(LowRank):
    """W' = W + B diag(e) A, A and B shared by all sites of a shape."""

    formula = "W' = W + B diag(e) A, A and B shared"
    parameters = "r*(O + I + 1)"
    source = "after Liu et al. 2023, arXiv:2309.11756"
    grade = "interpretation"
    gate: ClassVar[str] = "e"  # the factor whose zeros switch ranks off

    r: Rank = 8
    std: Annotated[Positive, "else e never learns"] = 0.02

    def init(self, site: Site) -> dict[str, Tensor]:
        O, I = site.shape

        def shared(name: str, *shape: int) -> Tensor:
            return site.once((self, site.shape, name), lambda: site.normal(*shape, std=self.std).requires_grad_())

        return {"A": shared("A", self.r, I), "B": shared("B", O, self.r), "e": site.zeros(self.r).requires_grad_()}

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return f["B"] * f["e"], f["A"]
