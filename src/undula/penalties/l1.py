"""L1: the sum of all |x|, by soft thresholding (Daubechies, Defrise, De Mol 2004).

prox_l(x) = sign(x) max(0, |x| - l)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ranges import NotNegative
from ..host.host import selected
from ..ranks.procedure import Quality
from .group_lasso import shrunk
from .grouped import Grouped
from .groups import Entries, Groups
from .penalty import Penalty, rates, trained_factors
from .proximal import Proximal, ProximalCourse


@Penalty.register
@dataclass(frozen=True)
class L1(Proximal):
    """The sum of the sizes of all numbers that train in the factors: those that are not needed end at zero."""

    source = "Daubechies, Defrise, De Mol 2004, Comm. Pure Appl. Math. 57"

    weight: NotNegative = 1e-4

    @property
    def grouping(self) -> Groups:
        return Entries()

    def value(self, grouped: Grouped) -> Tensor:
        return sum(
            (part.tensor.detach().abs().sum().to(grouped.sizes) for part in grouped.parts), grouped.sizes.new_zeros(())
        )

    def factors(self, grouped: Grouped, norms: Tensor, step: Tensor) -> Tensor:
        return shrunk(norms, step)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> L1Course:
        return L1Course(self, model, optimizer, steps)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        factors = list({id(t): t for _, _, t in trained_factors(selected(model))}.values())
        zeros = sum(int((t == 0).sum()) for t in factors)
        return {"groups": sum(t.numel() for t in factors), "zero": zeros}


class L1Course(ProximalCourse):
    def stepped(self, grouped: Grouped) -> None:
        found = rates(self.optimizer, [part.tensor for part in grouped.parts], self.name)
        for part in grouped.parts:
            part.tensor.copy_(F.softshrink(part.tensor, found[id(part.tensor)] * self.how.weight))
