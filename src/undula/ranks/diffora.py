"""DiffoRA (Jiang, Wang, Yuan 2025, arXiv:2502.08905): which modules get an adapter at all, found by gradients.

    y = W x + gamma_m s B A x,   gamma_m = sigmoid(theta_m), theta = 0 at the start
    search     alternately an update of A and B, and one of theta by dL/dtheta_m = (1 - gamma_m) <dL/dB_m, B_m>
    discretise the ceil(rho N) sites of highest gamma stay, the others are closed and no longer train

After arXiv:2502.08905, interpretation: its method section could not be read.  Settled here: first order; the batches of
every second update of the search are those of theta; theta steps by lr times its gradient over the root mean square of
all sites' (the scale of a loss does not matter, that of one site against another does); the choice is made over the
whole model; B takes gamma in when gamma becomes 1, so the function of the chosen sites does not jump.  The paper's
sharing of one pair among the sites that were not chosen is not there: they get nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.gated import GatedLoRA
from .allocator import Allocator, Quality
from .gates import GateAllocator, GateCourse


@Allocator.register
@dataclass(frozen=True)
class DiffoRA(GateAllocator):
    """Keeps the share `rho` of the sites."""

    works_on = (GatedLoRA,)
    source = "after Jiang et al. 2025, arXiv:2502.08905"
    grade = "interpretation"

    rho: float = 0.5
    warmup: float = 0.05  # share of the updates before theta moves: while B = 0 it has no gradient
    search: float = 0.3  # share of the updates after which the choice is made
    lr: float = 0.1  # of theta

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1 or self.lr <= 0:
            raise ValueError(f"0 < rho <= 1 and lr > 0 are needed, found {self!r}")

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> DiffoRACourse:
        return DiffoRACourse(self, model, optimizer, steps)


class DiffoRACourse(GateCourse):
    def __init__(self, how: DiffoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how
        self.A, self.B = self.factor("A"), self.factor("B")
        self.keep = math.ceil(how.rho * len(self.sites))
        self.begin, self.end = max(1, round(how.warmup * steps)), round(how.search * steps)
        if not self.begin + 2 <= self.end < steps:
            raise ValueError(f"{how!r}: a search from update {self.begin} to {self.end} does not fit into {steps}")
        self.theta_N = self.gates[0].new_zeros(len(self.sites))
        self.chosen: list[bool] | None = None

    @property
    def searching(self) -> bool:
        """Where everything is kept there is nothing to search."""
        return self.step < self.end and self.keep < len(self.sites)

    @property
    def choosing(self) -> bool:
        """Whether the update that comes is one of theta."""
        return self.searching and self.step >= self.begin and (self.step - self.begin) % 2 == 0

    @torch.no_grad()
    def before_forward(self) -> None:
        if self.searching:
            self._relax()
        elif self.chosen is None:
            self._discretise()

    def _relax(self) -> None:
        for g, gamma in zip(self.gates, torch.sigmoid(self.theta_N), strict=True):
            g.copy_((g != 0) * gamma)

    def _discretise(self) -> None:
        best = torch.sort(self.theta_N, descending=True, stable=True).indices[: self.keep].tolist()
        self.chosen = [i in best for i in range(len(self.sites))]
        for i, g in enumerate(self.gates):
            if self.keep < len(self.sites):
                self.B[i].mul_(torch.sigmoid(self.theta_N[i]))
            g.copy_((g != 0) * self.chosen[i])

    @torch.no_grad()
    def before_update(self) -> None:
        if self.choosing:
            self._descend()
            still = range(len(self.sites))
        else:
            still = [i for i, chosen in enumerate(self.chosen or []) if not chosen]  # type: ignore[assignment]
        for i in still:
            self.A[i].grad = self.B[i].grad = None  # the optimiser leaves them alone

    def _descend(self) -> None:
        grads = [torch.zeros_like(B) if B.grad is None else B.grad for B in self.B]
        along_N = torch.stack([p.sum().to(self.theta_N) for p in torch._foreach_mul(grads, self.B)])
        grad_N = (1 - torch.sigmoid(self.theta_N)) * along_N
        rms = grad_N.square().mean().sqrt().clamp_min(torch.finfo(grad_N.dtype).tiny)
        self.theta_N -= self.how.lr * grad_N / rms

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"theta": self.theta_N}, {**super().state()[1], "chosen": self.chosen}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        self.theta_N.copy_(tensors["theta"])
        self.chosen = values["chosen"]
