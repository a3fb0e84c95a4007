"""AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512): the least important singular values go, cubically in time.

    I = |w dL/dw|,  Im <- b1 Im + (1 - b1) I,  U <- b2 U + (1 - b2) |I - Im|,  s(w) = Im U   for every entry w
    S_k = s(E_k) + mean_j s(P_jk) + mean_j s(Q_kj)                                           for every triplet k
    b(t) = b0 until t_i;  b1 + (b0 - b1) (1 - (t - t_i) / (T - t_i - t_f))^3;  b1 from T - t_f on

Every `every` updates the b(t) triplets of highest S in the whole model keep their E_k, the others' are set to zero;
these still get gradients and may come back until T - t_f, when the pattern is settled.  P and Q are drawn towards
orthonormality by a penalty, whose gradient is added here, so that no loss needs to know of it.

The authors' code and PEFT set to zero every E_k whose S_k is at most the k-th smallest score, which prunes all of
several equal ones; here exactly b(t) stay and of equal ones the first.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.ranges import Count, NotNegative, PartShare, Positive
from ..methods import adalora as law
from ..optim.paired import pull
from .allocator import Allocator
from .gates import GateAllocator, GateCourse
from .procedure import Quality


class Orthogonality(Choice):
    """A penalty from the Frobenius norms ||P'P - I|| and ||QQ' - I|| (N) of all P and Q."""

    @abc.abstractmethod
    def value(self, norm_N: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def slope(self, norm_N: Tensor, count: int) -> Tensor:
        """d value / d norm, of some of the `count` norms."""


@Orthogonality.register
@dataclass(frozen=True)
class MeanNorm(Orthogonality):
    """The mean of the norms: what the authors' code and PEFT have."""

    def value(self, norm_N: Tensor) -> Tensor:
        return norm_N.mean()

    def slope(self, norm_N: Tensor, count: int) -> Tensor:
        return torch.full_like(norm_N, 1 / count)


@Orthogonality.register
@dataclass(frozen=True)
class SumOfSquares(Orthogonality):
    """The sum of the squared norms: the paper's equation."""

    def value(self, norm_N: Tensor) -> Tensor:
        return norm_N.square().sum()

    def slope(self, norm_N: Tensor, count: int) -> Tensor:
        return 2 * norm_N


def cubic(t: int, begin: int, end: int, first: int, last: int) -> int:
    """The budget after t updates: `first` until `begin`, `last` from `end` on."""
    if t <= begin:
        return first
    return last if t >= end else int(last + (first - last) * (1 - (t - begin) / (end - begin)) ** 3)


@Allocator.register
@dataclass(frozen=True)
class AdaLoRA(GateAllocator):
    """Leaves `target` ranks per site on average, of all that the adapter has."""

    works_on = (law.AdaLoRA,)
    source = "Zhang et al. 2023, arXiv:2303.10512"

    target: Positive = 8.0  # ranks per site at the end, on average
    warmup: PartShare = 0.1  # t_i as a share of the updates
    settle: PartShare = 0.3  # t_f as a share of the updates
    every: Count = 10  # updates between two maskings
    beta1: PartShare = 0.85
    beta2: PartShare = 0.85
    weight: NotNegative = 0.1  # of the penalty
    orthogonality: Orthogonality = MeanNorm()

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return steps - round(self.settle * steps)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> AdaLoRACourse:
        return AdaLoRACourse(self, model, optimizer, steps)


class AdaLoRACourse(GateCourse):
    def __init__(self, how: AdaLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how
        # at the first update P and Q have no gradient of the loss: scores would be those of E alone
        self.wait, self.end = max(1, round(how.warmup * steps)), steps - round(how.settle * steps)
        self.first = sum(g.numel() for g in self.gates)
        self.last = round(how.target * len(self.sites))
        if self.wait >= self.end:
            raise ValueError(f"{how!r}: of {steps} updates none is left between t_i={self.wait} and T-t_f={self.end}")
        if not 1 <= self.last <= self.first:
            raise ValueError(f"{how!r} asks for {self.last} ranks in all, the adapter has {self.first}")
        self.A, self.B = self.factor("A"), self.factor("B")
        self.watched = [*self.A, *self.B, *self.gates]
        self.mean = [torch.zeros_like(t) for t in self.watched]
        self.uncertainty = [torch.zeros_like(t) for t in self.watched]
        self.pattern: list[Tensor] | None = None  # which E stay, from `end` on
        self.groups: dict[Any, list[tuple[Tensor, bool]]] = {}  # P' and Q of one shape (R, n) and device
        for p, turned in [*((p, False) for p in self.A), *((p, True) for p in self.B)]:
            shape = p.shape[::-1] if turned else p.shape
            self.groups.setdefault((shape, p.device, p.dtype), []).append((p, turned))

    @property
    def budget(self) -> int:
        """b(t): how many ranks may be left now."""
        return cubic(self.step, self.wait, self.end, self.first, self.last)

    @torch.no_grad()
    def on_gradients(self) -> None:
        if not self.how.weight:
            return
        for members in self.groups.values():
            M_NRI = torch.stack([p.T if turned else p for p, turned in members])
            off_NRR, norm_N = self._off(M_NRI)
            slope_N = self.how.orthogonality.slope(norm_N, 2 * len(self.sites))
            pull_N = 2 * self.how.weight * slope_N / norm_N.clamp_min(torch.finfo(norm_N.dtype).tiny)
            change = ((pull_N[:, None, None] * off_NRR) @ M_NRI).unbind()
            for p, _ in members:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            pieces = [c.T if turned else c for c, (_, turned) in zip(change, members, strict=True)]
            pull(self.optimizer, [p for p, _ in members], pieces)

    @staticmethod
    def _off(M_NRI: Tensor) -> tuple[Tensor, Tensor]:
        """(M M' - 1, its Frobenius norms)."""
        off_NRR = M_NRI @ M_NRI.mT
        off_NRR.diagonal(dim1=1, dim2=2).sub_(1)
        return off_NRR, off_NRR.flatten(1).norm(dim=1)

    @torch.no_grad()
    def penalty(self) -> float:
        """The penalty, without its weight, as it is now."""
        stacks = [torch.stack([p.T if turned else p for p, turned in group]) for group in self.groups.values()]
        return float(self.how.orthogonality.value(torch.cat([self._off(M)[1].cpu() for M in stacks])))

    @torch.no_grad()
    def on_update(self) -> None:
        if self.step < self.end:
            self._watch()
        if self.step > self.end:
            self._apply(self.pattern or [])
        elif self.step == self.end:
            self.pattern = self._keep(self.last)
            self._apply(self.pattern)
        elif self.step > self.wait and self.step % self.how.every == 0:
            self._apply(self._keep(self.budget))

    @torch.no_grad()
    def on_end(self) -> None:
        """A training that ended before T - t_f leaves the target too."""
        if self.pattern is None:
            self.pattern = self._keep(self.last)
            self._apply(self.pattern)

    def _watch(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.watched]
        if self.clipped != 1:  # scores are of the gradients as they were
            grads = torch._foreach_div(grads, self.clipped)  # type: ignore[assignment]
        now = torch._foreach_mul(self.watched, grads)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.mean, now, 1 - self.how.beta1)
        torch._foreach_sub_(now, self.mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.uncertainty, now, 1 - self.how.beta2)

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        """S (R) of every site."""
        s, n = torch._foreach_mul(self.mean, self.uncertainty), len(self.sites)
        triplets = zip(s[:n], s[n : 2 * n], s[2 * n :], strict=True)
        return [e + p.mean(0) + q.mean(1) for q, p, e in triplets]

    def _keep(self, budget: int) -> list[Tensor]:
        """The `budget` triplets of highest score; of equal ones the first."""
        scores = [s.to(self.gates[0].device) for s in self.scores()]
        best = torch.sort(torch.cat(scores), descending=True, stable=True).indices[:budget]
        keep = torch.zeros(self.first, dtype=torch.bool, device=best.device).index_fill_(0, best, True)
        pieces = keep.split([len(s) for s in scores])
        return [k.to(g.device) for k, g in zip(pieces, self.gates, strict=True)]

    def _apply(self, keep: list[Tensor]) -> None:
        for g, k in zip(self.gates, keep, strict=True):
            g.mul_(k)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        names = [f"{site}.{kind}" for kind in ("A", "B", "E") for site in self.sites]
        tensors = {f"{n}.mean": t for n, t in zip(names, self.mean, strict=True)}
        tensors |= {f"{n}.uncertainty": t for n, t in zip(names, self.uncertainty, strict=True)}
        if self.pattern is not None:
            tensors |= {f"{site}.pattern": k for site, k in zip(self.sites, self.pattern, strict=True)}
        return tensors, super().state()[1]

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        for n, t in self.state()[0].items():
            t.copy_(tensors[n])
        if f"{self.sites[0]}.pattern" in tensors:
            patterns = (tensors[f"{site}.pattern"] for site in self.sites)
            self.pattern = [k.to(g.device) for k, g in zip(patterns, self.gates, strict=True)]
