"""How what is left of several updates becomes one: the second of the two axes of merging."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice


class Consensus(Choice):
    """Entry by entry, from the terms t_i and their weights w_i."""

    linear: ClassVar[bool] = True  # whether it is a sum of multiples of the terms: factors tell it

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """c_i of every adapter, those included that have nothing at a layer."""
        return list(weights)

    @abc.abstractmethod
    def among(self, terms: Sequence[Tensor], c: Sequence[float], counts: Sequence[Tensor]) -> Tensor:
        """Of those terms that count at an entry."""

    def __call__(self, terms: Sequence[Tensor], c: Sequence[float]) -> Tensor:
        """Of the terms that there are at a layer; `c` are their `coefficients`."""
        return _total([each * t for each, t in zip(c, terms, strict=True)])


@Consensus.register
@dataclass(frozen=True)
class Sum(Consensus):
    """sum_i w_i t_i: task arithmetic (Ilharco et al. 2023, arXiv:2212.04089); a negative weight takes a task away."""

    def among(self, terms: Sequence[Tensor], c: Sequence[float], counts: Sequence[Tensor]) -> Tensor:
        return _total([each * t * own for each, t, own in zip(c, terms, counts, strict=True)])


@Consensus.register
@dataclass(frozen=True)
class Average(Consensus):
    """sum_i w_i t_i / sum_i w_i."""

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        total = math.fsum(weights)
        if abs(total) <= 1e-9 * max(map(abs, weights), default=0.0) or total == 0:
            raise ValueError(f"an average needs weights with a sum; these sum to {total:g}: {list(weights)}")
        return [w / total for w in weights]

    def among(self, terms: Sequence[Tensor], c: Sequence[float], counts: Sequence[Tensor]) -> Tensor:
        weight = _total([abs(each) * own for each, own in zip(c, counts, strict=True)])
        total = Sum().among(terms, c, counts)
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))


@Consensus.register
@dataclass(frozen=True)
class Elect(Consensus):
    """TIES (Yadav et al. 2023, arXiv:2306.01708): the sign of sum_i w_i t_i is elected at each entry, and those terms
    count that have it.  `then` says how: by `Average`, as the paper has it, weights of those that count summing to 1;
    or by `Sum`.  A negative weight is that of the negated term."""

    linear: ClassVar[bool] = False
    then: Consensus = Average()

    def __post_init__(self) -> None:
        if not self.then.linear:
            raise ValueError(f"after the election comes a Sum or an Average, found {self.then!r}")

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        total = math.fsum(map(abs, weights)) if isinstance(self.then, Average) else 1.0
        return [w / (total or 1.0) for w in weights]

    def among(self, terms: Sequence[Tensor], c: Sequence[float], counts: Sequence[Tensor]) -> Tensor:
        signed = [each * t * own for each, t, own in zip(c, terms, counts, strict=True)]
        elected = _total(signed).sign()
        agree = [(t.sign() == elected) & (elected != 0) for t in signed]
        return self.then.among(terms, c, [a.to(t.dtype) for a, t in zip(agree, terms, strict=True)])

    def __call__(self, terms: Sequence[Tensor], c: Sequence[float]) -> Tensor:
        return self.among(terms, c, [torch.ones_like(t) for t in terms])


def _total(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0].clone()
    for t in terms[1:]:
        total += t
    return total
