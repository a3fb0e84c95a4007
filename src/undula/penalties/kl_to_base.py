"""The answers stay near those of the base (as in RLHF and in learning without forgetting, Li, Hoiem 2016,
arXiv:1606.09282).

    R = T^2 KL( softmax(z_base / T) || softmax(z / T) ),  mean over the rows, or the tokens that have a label

The base answers without adapter and without dropout, in one more forward pass without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.ranges import NotNegative, Positive
from ..ranks.procedure import Quality
from .answers import AnswersCourse, kl
from .penalty import Penalty


@Penalty.register
@dataclass(frozen=True)
class KLToBase(Penalty):
    """The answers are drawn to the base's: softened by `temperature`, teacher first."""

    answers = True
    compares = True
    source = "Li, Hoiem 2016, arXiv:1606.09282; Hinton, Vinyals, Dean 2015, arXiv:1503.02531"

    weight: NotNegative = 0.1
    temperature: Positive = 1.0

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> KLCourse:
        return KLCourse(self, model, optimizer, steps)


class KLCourse(AnswersCourse):
    how: KLToBase

    def of(self, rows_MV: Tensor, base_MV: Tensor | None) -> Tensor:
        assert base_MV is not None
        return kl(base_MV, rows_MV, self.how.temperature)
