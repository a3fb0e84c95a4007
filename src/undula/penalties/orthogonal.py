"""Ranks that are orthogonal to each other.

    R = 1/2 sum over sites of ( |off(A A')|^2 + |off(B' B)|^2 ),   off: without the diagonal

The regulariser of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) with the lengths left free: |A A' - I|^2 would draw B
away from zero, where a LoRA starts, so this is an interpretation.  With orthogonal ranks the size of each is what it
adds to dW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import LowRank, Method
from ..core.ranges import NotNegative
from ..host.host import selected
from ..ranks.procedure import Quality
from .groups import pairs
from .penalty import Penalty, SmoothCourse


@Penalty.register
@dataclass(frozen=True)
class Orthogonal(Penalty):
    """The rows of A, and the columns of B, are drawn to be orthogonal to each other."""

    works_on = (LowRank,)
    pulls = True
    source = "after Zhang et al. 2023, arXiv:2303.10512"
    grade = "interpretation"

    weight: NotNegative = 1e-2

    def serves(self, method: Method) -> bool:
        return isinstance(method, LowRank) and method.plain() is not None

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> OrthogonalCourse:
        return OrthogonalCourse(self, model, optimizer, steps)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        return {"value": self.weight * float(overlap(selected(model)).detach())}


class OrthogonalCourse(SmoothCourse):
    def value(self) -> Tensor:
        return self.how.weight * overlap(self.adapter)


def overlap(adapter: Adapter) -> Tensor:
    """R; a factor that sites share counts once."""
    seen: dict[int, Tensor] = {}
    for _, B_OR, A_RI in pairs(adapter, Orthogonal()):
        seen |= {id(B_OR): B_OR.T, id(A_RI): A_RI}
    return sum((_off(t) for t in seen.values()), torch.zeros(()))


def _off(M_RN: Tensor) -> Tensor:
    gram = M_RN @ M_RN.T
    return (gram - gram.diag().diag()).square().sum() / 2
