"""L2-SP (Li, Grandvalet, Davoine 2018, arXiv:1802.01483): what trains is drawn to where its training began.

    loss + weight / 2 sum |w - w_0|^2

over everything that trains, factors and what trains in full.  The paper decays a new head to zero instead; here it is
drawn to its start too.  A LoRA is so drawn to B = 0, the base, where weight decay would take A to zero as well.

The gradient weight (w - w_0) is added before the optimiser's step, so no loss needs to know of it, and adaptive
optimisers scale it as they do the loss's.  Of a parameter without a gradient, which the optimiser passes over, it is
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Method
from ..core.ranges import NotNegative
from ..optim.paired import pull
from .procedure import Course, Procedure, Quality


@Procedure.register
@dataclass(frozen=True)
class L2SP(Procedure):
    """A penalty on the way from the start of the training."""

    works_on = (Method,)
    source = "Li, Grandvalet, Davoine 2018, arXiv:1802.01483"

    weight: NotNegative = 0.01

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> L2SPCourse:
        return L2SPCourse(self, model, optimizer, steps)


class L2SPCourse(Course):
    def __init__(self, how: L2SP, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how
        self.origin: dict[str, Tensor] = {}  # w_0, by the name of the parameter

    def trained(self) -> dict[str, Tensor]:
        """{name: parameter that trains}; of what sites share the first name."""
        named = {f"{site}.{name}": t for site, name, t in self.adapter.tensors() if t.requires_grad}
        first = {id(t): name for name, t in reversed([*named.items()])}
        return {name: t for name, t in named.items() if first[id(t)] == name} | dict(self.adapter.full)

    @torch.no_grad()
    def on_begin(self) -> None:
        self.origin = {name: p.clone() for name, p in self.trained().items()}

    @torch.no_grad()
    def on_gradients(self) -> None:
        moved = [(p, p - self.origin[name]) for name, p in self.trained().items() if p.grad is not None]
        pull(self.optimizer, [p for p, _ in moved], [way * self.how.weight for _, way in moved])

    @torch.no_grad()
    def penalty(self) -> float:
        """weight / 2 sum |w - w_0|^2, as it is now."""
        found = [float((p - self.origin[name]).square().sum()) for name, p in self.trained().items()]
        return self.how.weight / 2 * sum(found)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.origin, super().state()[1]

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        trained = self.trained() if self.begun else {}
        self.origin = {name: tensors[name].to(p) for name, p in trained.items()}
