"""DiffoRA (Jiang, Wang, Yuan 2025, arXiv:2502.08905): which modules get an adapter at all, found by gradients.

    y = W x + gamma_m s B A x,   gamma_m = sigmoid(theta_m), theta = 0 at the start
    search     alternately an update of A and B, and one of theta by dL/dtheta_m = (1 - gamma_m) <dL/dB_m, B_m>
    discretise the ceil(rho N) sites of highest gamma stay, the others are closed and no longer train

After arXiv:2502.08905, interpretation: its method section could not be read.  Settled here: first order; the batches of
every second update of the search are those of theta; theta steps by lr times its gradient over the root mean square of
all sites' (the scale of a loss does not matter, that of one site against another does); the choice is made over the
whole model; B takes gamma in when gamma becomes 1, so the function of the chosen sites does not jump.  What the
sites that were not chosen get is `rest`: nothing, or (the paper's weight sharing) one pair for all of one shape.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.ranges import Inside, PartShare, Positive, SomeShare
from ..host.host import change
from ..methods.gated import GatedLoRA
from .allocator import Allocator
from .gates import GateAllocator, GateCourse
from .procedure import Quality


class Rest(Choice):
    """What the sites get that were not chosen."""

    @abc.abstractmethod
    def together(self, left: list[int], kinds: list[Any]) -> list[list[int]]:
        """Those of `left` that train as one, group by group; the others are closed.  `kinds` are equal where sites
        could share."""


@Rest.register
@dataclass(frozen=True)
class Dropped(Rest):
    """Nothing: they are closed."""

    def together(self, left: list[int], kinds: list[Any]) -> list[list[int]]:
        return []


@Rest.register
@dataclass(frozen=True)
class Shared(Rest):
    """One pair for all that have one method and one shape."""

    def together(self, left: list[int], kinds: list[Any]) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i in left:
            groups.setdefault(kinds[i], []).append(i)
        return list(groups.values())


@Allocator.register
@dataclass(frozen=True)
class DiffoRA(GateAllocator):
    """Keeps the share `rho` of the sites."""

    works_on = (GatedLoRA,)
    source = "after Jiang et al. 2025, arXiv:2502.08905"
    grade = "interpretation"

    rho: SomeShare = 0.5
    warmup: PartShare = 0.05  # share of the updates before theta moves: while B = 0 it has no gradient
    search: Inside = 0.3  # share of the updates after which the choice is made
    lr: Positive = 0.1  # of theta
    rest: Rest = Dropped()  # what the other sites get

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return 0 if self.rho == 1 else min(steps, round(self.search * steps) + 1)

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
        self.wait, self.end = max(1, round(how.warmup * steps)), round(how.search * steps)
        if not self.wait + 2 <= self.end < steps:
            raise ValueError(f"{how!r}: a search from update {self.wait} to {self.end} does not fit into {steps}")
        self.theta_N = self.gates[0].new_zeros(len(self.sites))
        self.chosen: list[bool] | None = None
        self.shared: list[list[int]] = []  # once the choice is made: the sites that train as one
        self.closed: list[int] = []  # and those that do not train

    @property
    def searching(self) -> bool:
        """Where everything is kept there is nothing to search."""
        return self.step < self.end and self.keep < len(self.sites)

    @property
    def choosing(self) -> bool:
        """Whether the update that comes is one of theta."""
        return self.searching and self.step >= self.wait and (self.step - self.wait) % 2 == 0

    @torch.no_grad()
    def on_forward(self) -> None:
        if self.searching:
            self._relax()
        elif self.chosen is None:
            self._discretise()

    def _relax(self) -> None:
        for g, gamma in zip(self.gates, torch.sigmoid(self.theta_N), strict=True):
            g.copy_((g != 0) * gamma)

    def _choose(self, chosen: list[bool]) -> None:
        methods, shapes = self.adapter.methods, self.adapter.shapes
        kinds = [(methods[s], shapes[s], A.device, A.dtype) for s, A in zip(self.sites, self.A, strict=True)]
        left = [i for i, stays in enumerate(chosen) if not stays]
        self.chosen, self.shared = chosen, self.how.rest.together(left, kinds)
        self.closed = [i for i in left if not any(i in group for group in self.shared)]

    def _discretise(self) -> None:
        best = torch.sort(self.theta_N, descending=True, stable=True).indices[: self.keep].tolist()
        self._choose([i in best for i in range(len(self.sites))])
        for i, g in enumerate(self.gates):
            if self.keep < len(self.sites):
                self.B[i].mul_(torch.sigmoid(self.theta_N[i]))
            g.copy_((g != 0) * (i not in self.closed))
        for p_N in self._as_one():
            mean = torch.stack(p_N).mean(0)
            for p in p_N:
                p.copy_(mean)
                self.optimizer.state.pop(p, None)  # the optimiser moves equals with equal pasts and gradients equally

    def _as_one(self) -> list[list[Tensor]]:
        """The parameters that stand for one."""
        return [[p[i] for i in group] for group in self.shared for p in (self.A, self.B)]

    @torch.no_grad()
    def on_gradients(self) -> None:
        if self.choosing:
            self._descend()
        for i in range(len(self.sites)) if self.choosing else self.closed:
            self.A[i].grad = self.B[i].grad = None  # the optimiser leaves them alone
        for p_N in self._as_one():
            total = sum((p.grad for p in p_N if p.grad is not None), torch.zeros_like(p_N[0]))
            for p in p_N:
                p.grad = total.clone()

    @torch.no_grad()
    def on_end(self) -> None:
        """What stood for one becomes one: only now, since optimisers and DDP know the others.  Where the training ended
        within the search, the choice is made first."""
        if self.chosen is None:
            self._discretise()
        adapter = self.adapter
        for first, *others in ([self.sites[i] for i in group] for group in self.shared):
            for site in others:
                change(self.model, site, adapter.methods[site], adapter.factors[first])

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
        if values["chosen"] is not None:
            self._choose(values["chosen"])
