"""BA-LoRA (Chang et al. 2024, arXiv:2408.04556): three penalties of the answers Z against what a base brings along.

    loss + weight (c CR + d DR + s SVDR)

                      NLU: Z (rows, classes)                     NLG: Z (tokens with a label, vocabulary)
    CR consistency    T^2 KL( p_base || p ), mean                the same, of each token
    DR diversity      1/D sum over i != j of C_ij^2,             - mean entropy of softmax over the top K
                      C the covariance of Z's columns
    SVDR spectrum     - sum of the k largest sigma / all sigma   - sum of the k largest sigma / |Z|_F

c falls as a cosine to `least` of itself; d and s begin after the share `after` of the updates and rise over `ramp`, as
the authors' code has it.  Settled here: their NLU form gives no temperature (1), of a batch with one row there is no
covariance (0), and beyond 4,096 columns the largest sigma are those of Q' Z with Q an orthonormal basis of Z's range
found by two power iterations, through which no gradient passes.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.choice import Choice
from ..core.ranges import Count, NotNegative, PartShare, Positive, Share
from ..ranks.procedure import Quality
from .answers import AnswersCourse, kl, writes
from .penalty import Penalty

WIDE = 4096  # columns from which on singular values are those of a range of k + 5


class Form(Choice):
    """What the three are, and how they weigh."""

    consistency: NotNegative
    diversity: NotNegative
    spectrum: NotNegative
    k: Count
    temperature: Positive

    @abc.abstractmethod
    def diverse(self, Z: Tensor) -> Tensor:
        """DR."""

    @abc.abstractmethod
    def spectral(self, Z: Tensor, seed: int = 0) -> Tensor:
        """SVDR; the seed is of the random range."""


@Form.register
@dataclass(frozen=True)
class NLU(Form):
    """Of classes: answers of a batch that are not alike, and few directions in them."""

    consistency: NotNegative = 0.15
    diversity: NotNegative = 0.03
    spectrum: NotNegative = 0.03
    k: Count = 5
    temperature: Positive = 1.0

    def diverse(self, Z: Tensor) -> Tensor:
        if len(Z) < 2:
            return Z.sum() * 0.0
        centred = Z - Z.mean(0)
        C = centred.T @ centred / (len(Z) - 1)
        return (C - C.diag().diag()).square().sum() / Z.shape[1]

    def spectral(self, Z: Tensor, seed: int = 0) -> Tensor:
        sigma = torch.linalg.svdvals(Z)
        return -sigma[: self.k].sum() / sigma.sum().clamp_min(torch.finfo(Z.dtype).tiny)


@Form.register
@dataclass(frozen=True)
class NLG(Form):
    """Of tokens: entropy among the `top` likeliest, and few directions."""

    consistency: NotNegative = 0.025
    diversity: NotNegative = 0.005
    spectrum: NotNegative = 0.005
    k: Count = 10
    temperature: Positive = 2.0
    top: Count = 20

    def diverse(self, Z: Tensor) -> Tensor:
        log_p = Z.topk(min(self.top, Z.shape[1]), -1).values.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1).mean()

    def spectral(self, Z: Tensor, seed: int = 0) -> Tensor:
        narrow = Z if Z.shape[1] <= WIDE or min(Z.shape) <= self.k + 5 else _ranged(Z, self.k + 5, seed)
        largest = torch.linalg.svdvals(narrow)[: self.k]
        return -largest.sum() / Z.norm().clamp_min(torch.finfo(Z.dtype).tiny)


@torch.no_grad()
def _basis(Z: Tensor, q: int, seed: int) -> Tensor:
    """Q (M, q), orthonormal, of the range of Z (Halko, Martinsson, Tropp 2011, arXiv:0909.4061)."""
    drawn = torch.randn(Z.shape[1], q, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    Q = torch.linalg.qr(Z @ drawn.to(Z)).Q
    for _ in range(2):
        Q = torch.linalg.qr(Z @ torch.linalg.qr(Z.T @ Q).Q).Q
    return Q


def _ranged(Z: Tensor, q: int, seed: int) -> Tensor:
    return _basis(Z, q, seed).T @ Z


@Penalty.register
@dataclass(frozen=True)
class BALoRA(Penalty):
    """Consistency with the base, diversity and spectrum of the answers, by `form`: classes (NLU) or tokens (NLG)."""

    answers = True
    source = "Chang et al. 2024, arXiv:2408.04556 (ICLR 2026 form)"

    weight: NotNegative = 1.0
    form: Form = NLU()
    least: Share = 0.1
    after: PartShare = 0.2
    ramp: Share = 0.05

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return self.form.consistency > 0

    def weights(self, share: float) -> tuple[float, float]:
        """(what the consistency, what the others are multiplied by) after this share of the updates."""
        falling = self.least + (1 - self.least) * (1 + math.cos(math.pi * share)) / 2
        rising = min(1.0, (share - self.after) / self.ramp) if self.ramp else 1.0
        return falling, max(0.0, rising) if share >= self.after else 0.0

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> BACourse:
        return BACourse(self, model, optimizer, steps)


class BACourse(AnswersCourse):
    how: BALoRA

    def __init__(self, how: BALoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        """Raises ValueError for the form of classes where a model answers tokens."""
        super().__init__(how, model, optimizer, steps)
        if how.active and isinstance(how.form, NLU) and writes(self.model):
            raise ValueError(
                f"{how!r}: NLU() is the form of classes, and {type(self.model).__name__} answers tokens: take "
                "form=NLG() (--penalty ba-lora,form=nlg)"
            )

    def of(self, rows_MV: Tensor, base_MV: Tensor | None) -> Tensor:
        form, (falling, rising) = self.how.form, self.how.weights(self.share)
        found = rows_MV.sum() * 0.0
        if base_MV is not None:
            found = found + falling * form.consistency * kl(base_MV, rows_MV, form.temperature)
        if rising:
            found = found + rising * form.diversity * form.diverse(rows_MV)
            found = found + rising * form.spectrum * form.spectral(rows_MV, self.step)
        return found
