"""Block-LoRA ("One head eight arms", Zhou et al. 2025, arXiv:2501.16720).

    W' = W + s (B_1 + ... + B_n) A,   A ((r/n) x I), B = [B_1 ... B_n] (O x r), s = alpha / r

LoRA's B and A cut into n blocks of rank r / n, with one A for all blocks.  After arXiv:2501.16720, interpretation: of
the paper only the abstract was at hand; n = 8 is read from its title.

What follows from this form.  dW has rank r / n.  The blocks enter as a sum only, so their gradients are identical,
whatever their values: training moves all of them in parallel, and their differences stay what they were.  With SGD it
is a LoRA of rank r / n whose B has n times the learning rate; with Adam its B takes steps n times as long.  So
`merged_up` loses nothing.  Where n does not divide r, blocks have r / n columns rounded up,
the last one what is left, and there may be fewer than n (r=10, n=8: five of two).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ..core.method import Factors, LowRank, Site
from ..core.ranges import Positive, Rank
from ..starts import Kaiming
from .lora import Classic, LoRA, Scaling


@dataclass(frozen=True)
class BlockLoRA(LowRank):
    """W' = W + s (B_1 + ... + B_n) A, one A for n blocks of B."""

    formula = "W' = W + s (B_1 + ... + B_n) A"
    parameters = "-(-r//blocks)*I + r*O"
    source = "after Zhou et al. 2025, arXiv:2501.16720"
    grade = "interpretation"

    r: Rank = 16
    blocks: Annotated[Rank, "blocks=1 is LoRA"] = 8
    alpha: Positive = 16.0
    scaling: Scaling = Classic()

    @property
    def width(self) -> int:
        """Columns of a block, r / n: the rank of dW."""
        return -(-self.r // self.blocks)

    def init(self, site: Site) -> dict[str, Tensor]:
        A_KI = Kaiming()(site, self.width)[1]
        return {"A": A_KI.requires_grad_(), "B": site.zeros(site.shape[0], self.r).requires_grad_()}

    def summed(self, B_OR: Tensor) -> Tensor:
        """B_1 + ... + B_n (O, r / n)."""
        whole = F.pad(B_OR, (0, -self.r % self.width))  # the last block may be narrower
        return whole.unflatten(1, (-1, self.width)).sum(1)

    @property
    def linear_in(self) -> str:
        return "B"

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        return self.scaling(self.r, self.alpha) * self.summed(f["B"]), f["A"]

    def merged_up(self, f: Factors) -> tuple[LoRA, dict[str, Tensor]]:
        """The LoRA of rank r / n that is the same update, and its factors: the blocks of B, summed."""
        plain = LoRA(r=self.width, alpha=self.width * self.scaling(self.r, self.alpha))
        summed = {"A": f["A"].detach().clone(), "B": self.summed(f["B"].detach())}
        return plain, {name: t.requires_grad_() for name, t in summed.items()}
