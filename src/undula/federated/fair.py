"""LoRA-FAIR (Bian, Wang, Zhang, Xu 2025, arXiv:2411.14961): FedIT's average with a small correction of B.

    dB = argmin S(D, (B + dB) A) + lam |dB|^2,   D = sum_k p_k dW_k, A and B the averages

With S = |D - (B + dB) A|^2 (an interpretation: the closed form)   dB = (D - B A) A' (A A' + lam I)^-1; with S the
cosine dissimilarity 1 - <D, (B + dB) A> / (|D| |(B + dB) A|), the paper's choice, by descent.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, Method
from ..core.ranges import Natural, NotNegative, Positive
from .aggregation import Aggregation, Client
from .fedit import FedIT
from .pairs import Pairs, pairs_of


class Discrepancy(Choice):
    """S: how far the corrected product is from the mean of the updates."""

    @abc.abstractmethod
    def correction(self, pairs: Pairs, B_OR: Tensor, A_RI: Tensor, lam: float) -> Tensor:
        """dB (O, R), of the averages B and A."""


@Discrepancy.register
@dataclass(frozen=True)
class Frobenius(Discrepancy):
    """|D - (B + dB) A|^2: solved at once.  The residual never rises, and falls as lam does."""

    def correction(self, pairs: Pairs, B_OR: Tensor, A_RI: Tensor, lam: float) -> Tensor:
        gram_RR = A_RI @ A_RI.T
        towards_OR = target_times(pairs, A_RI.T) - B_OR @ gram_RR  # (D - B A) A'
        values, vectors = torch.linalg.eigh(gram_RR)
        floor = values[-1] * torch.finfo(values.dtype).eps * len(values)
        inverse = torch.where(values > floor, 1 / (values.clamp_min(floor) + lam), torch.zeros_like(values))
        return (towards_OR @ vectors) * inverse @ vectors.T


@Discrepancy.register
@dataclass(frozen=True)
class Cosine(Discrepancy):
    """1 - <D, W> / (|D| |W|), W = (B + dB) A: by `steps` steps of gradient descent from dB = 0, none of which is kept
    that raises the objective: the step halves until one lowers it."""

    steps: Natural = 200
    lr: Positive = 0.1

    def correction(self, pairs: Pairs, B_OR: Tensor, A_RI: Tensor, lam: float) -> Tensor:
        gram_RR, DA_OR = A_RI @ A_RI.T, target_times(pairs, A_RI.T)
        size = target_square(pairs).sqrt()
        dB = torch.zeros_like(B_OR)
        if not size > 0 or not (B_OR @ gram_RR * B_OR).sum() > 0:
            return dB  # no direction to turn to, or none to turn

        def value(dB: Tensor) -> tuple[Tensor, Tensor]:
            W = B_OR + dB
            WG = W @ gram_RR
            inner, length = (DA_OR * W).sum(), (WG * W).sum().clamp_min(0).sqrt()
            if not length > 0:
                return dB.new_tensor(torch.inf), dB
            slope = -(DA_OR / (size * length) - inner * WG / (size * length**3)) + 2 * lam * dB
            return 1 - inner / (size * length) + lam * dB.square().sum(), slope

        step, (best, slope) = self.lr, value(dB)
        for _ in range(self.steps):
            found, next_slope = value(dB - step * slope)
            if found < best:
                dB, best, slope, step = dB - step * slope, found, next_slope, 2 * step
            else:
                step /= 2
        return dB


@Aggregation.register
@dataclass(frozen=True)
class FAIR(Aggregation):
    """FedIT with a residual correction of B that keeps near the average; clients may have different ranks.  `lam` is
    the weight of |dB|^2: large is FedIT, 0 the least squares.  Raises TypeError for a method that is no pair."""

    source = "Bian et al. 2025, arXiv:2411.14961"
    needs_each = True

    lam: NotNegative = 0.01
    discrepancy: Discrepancy = Frobenius()

    def at(self, site: str, clients: Sequence[Client], before: Factors | None) -> tuple[Method, Factors]:
        pairs = pairs_of(site, clients, "FAIR")
        method, averages = FedIT().at(site, clients, before)
        mean = pairs_of(site, [Client(0, 1.0, method, averages)], "FAIR")
        (B_OR,), (A_RI,) = mean.B, mean.A
        return method, pairs.factors(B_OR + self.discrepancy.correction(pairs, B_OR, A_RI, self.lam), A_RI)


def target_times(pairs: Pairs, X_IK: Tensor) -> Tensor:
    """D X (O, K), D / scale = sum_k p_k B_k A_k, which is not formed."""
    return torch.stack([p * (B @ (A @ X_IK)) for p, B, A in zip(pairs.shares, pairs.B, pairs.A, strict=True)]).sum(0)


def target_square(pairs: Pairs) -> Tensor:
    """|D|^2 / scale^2."""
    B = torch.cat([p * B for p, B in zip(pairs.shares, pairs.B, strict=True)], 1)
    A = torch.cat(pairs.A)
    return ((B.T @ B) * (A @ A.T)).sum()
