"""Group lasso (Yuan, Lin 2006) over the parts of an adapter, as GS-LoRA has it (Zhao et al. 2024, arXiv:2403.11530).

    R = sum over groups of c_g |x_g|        prox_{l R}(x)_g = x_g max(0, 1 - l c_g / |x_g|)

GS-LoRA's groups are the blocks of a transformer: those that are not needed end at exactly zero, and the model is the
base there.  Its code takes sqrt(sum of squares) into the loss, whose gradient at zero is 0/0 and with Adam is never
exactly zero; here the proximal step, which is safe at zero.  c_g = 1, as there; with `by_size` the square root of how
many numbers a group has, as Yuan and Lin have it: a step then takes weight * rate from the root mean square of a group,
so that a weight means the same whatever the size, and 1 is what AdamW moves a number by at most.

A group lasso draws down what it keeps, too.  With `settle` the choice is made at that share of the updates: what is
zero stays zero, and the others train on without the penalty (interpretation: the relaxed lasso, Meinshausen 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.ranges import NotNegative, PartShare, SomeShare
from ..ranks.procedure import Quality
from .grouped import Grouped
from .groups import Blocks, Groups
from .penalty import Penalty
from .proximal import ProximalCourse, Settling, SettlingCourse


def shrunk(norms: Tensor, steps: Tensor) -> Tensor:
    """max(0, 1 - l / |x_g|), and 0 for |x_g| = 0."""
    return torch.where(norms > steps, 1 - steps / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


@Penalty.register
@dataclass(frozen=True)
class GroupLasso(Settling):
    """The sum of the sizes of groups: `groups` that are not needed end at zero.  It begins after the share `after` of
    the updates, and ends at the share `settle`, from which on zeros stay.  `by_size`: a group weighs by the square root
    of how many numbers it has."""

    source = "Zhao et al. 2024, arXiv:2403.11530 (GS-LoRA)"

    weight: NotNegative = 1e-3
    groups: Groups = Blocks()
    after: PartShare = 0.0
    by_size: bool = False
    settle: SomeShare = 1.0

    @property
    def fixed(self) -> bool:
        return self.settle < 1

    def weights(self, grouped: Grouped) -> Tensor:
        """c."""
        return grouped.sizes.sqrt() if self.by_size else torch.ones_like(grouped.sizes)

    def value(self, grouped: Grouped) -> Tensor:
        return (self.weights(grouped) * grouped.norms()).sum()

    def factors(self, grouped: Grouped, norms: Tensor, step: Tensor) -> Tensor:
        return shrunk(norms, step * self.weights(grouped))

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> ProximalCourse:
        return (LassoCourse if self.fixed else ProximalCourse)(self, model, optimizer, steps)


class LassoCourse(SettlingCourse):
    """What is not zero stays."""

    how: GroupLasso

    def staying(self, grouped: Grouped) -> Tensor:
        return (grouped.norms() > 0).to(grouped.sizes)
