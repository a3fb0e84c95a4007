"""Group lasso (Yuan, Lin 2006) over the parts of an adapter, as GS-LoRA has it (Zhao et al. 2024, arXiv:2403.11530).

    R = sum over groups of |x_g|        prox_{l R}(x)_g = x_g max(0, 1 - l / |x_g|)

GS-LoRA's groups are the blocks of a transformer: those that are not needed end at exactly zero, and the model is the
base there.  Its code takes sqrt(sum of squares) into the loss, whose gradient at zero is 0/0 and with Adam is never
exactly zero; here the proximal step, which is safe at zero.  As there, groups weigh alike whatever their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.ranges import NotNegative, PartShare
from .groups import Blocks, Grouped, Groups
from .penalty import Penalty
from .proximal import Proximal


def shrunk(norms: Tensor, steps: Tensor) -> Tensor:
    """max(0, 1 - l / |x_g|), and 0 for |x_g| = 0."""
    return torch.where(norms > steps, 1 - steps / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


@Penalty.register
@dataclass(frozen=True)
class GroupLasso(Proximal):
    """The sum of the sizes of groups: `groups` that are not needed end at zero.  It begins after the share `after` of
    the updates."""

    source = "Zhao et al. 2024, arXiv:2403.11530 (GS-LoRA)"

    weight: NotNegative = 1e-3
    groups: Groups = Blocks()
    after: PartShare = 0.0

    @property
    def grouping(self) -> Groups:
        return self.groups

    def begins(self, steps: int) -> int:
        return round(self.after * steps)

    def value(self, grouped: Grouped) -> Tensor:
        return grouped.norms().sum()

    def factors(self, grouped: Grouped, norms: Tensor, step: Tensor) -> Tensor:
        return shrunk(norms, step)
