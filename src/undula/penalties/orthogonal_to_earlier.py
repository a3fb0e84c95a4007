"""Tasks in sequence: the A of each orthogonal to those of the tasks before, as O-LoRA has it (Wang et al. 2023,
arXiv:2310.14152).

    R = sum over layers of |A_before A'|^2,   A_before (R_1 + R_2 + ..., I) the rows of all earlier tasks, A (R, I)

With A_i A' = 0 what a new task adds answers nothing to the inputs that an earlier one looks at: dW_i dW' = 0.  The
paper's equation has squares, its code the sum of absolute values; weight 0.5 is its code's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import LowRank, Method
from ..core.ranges import NotNegative
from ..host.host import selected
from ..ranks.procedure import Quality
from .groups import pairs
from .penalty import Penalty, SmoothCourse


@Penalty.register
@dataclass(frozen=True)
class OrthogonalToEarlier(Penalty):
    """The rows of A are drawn to be orthogonal to those of the adapters in the directories `earlier`."""

    works_on = (LowRank,)
    source = "Wang et al. 2023, arXiv:2310.14152 (O-LoRA)"

    weight: NotNegative = 0.5
    earlier: tuple[str, ...] = ()

    def serves(self, method: Method) -> bool:
        return isinstance(method, LowRank) and method.plain() is not None

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> EarlierCourse:
        return EarlierCourse(self, model, optimizer, steps)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        adapter = selected(model)
        return {"value": self.weight * float(overlap(adapter, self.before(adapter)).detach())}

    def before(self, adapter: Adapter) -> dict[str, Tensor]:
        """{site: the rows of the earlier A there}.  Raises ValueError where none is named, or one has no layer of this
        adapter or another size of inputs there."""
        if not self.earlier:
            raise ValueError(f"{self!r} needs the directories of adapters of tasks before: earlier=(...,)")
        here = {site: A_RI.shape[1] for site, _, A_RI in pairs(adapter, self)}
        rows: dict[str, list[Tensor]] = {}
        for place in self.earlier:
            found = [(site, A_RI) for site, A_RI in _rows(place, self) if site in here]
            if not found:
                raise ValueError(f"the adapter in {place} has no layer of this one's: there is nothing to differ from")
            for site, A_RI in found:
                if A_RI.shape[1] != here[site]:
                    raise ValueError(f"{site} takes {here[site]} inputs, and {A_RI.shape[1]} in the adapter in {place}")
                rows.setdefault(site, []).append(A_RI)
        return {site: torch.cat(those) for site, those in rows.items()}


def _rows(place: str, what: Penalty) -> Iterator[tuple[str, Tensor]]:
    for site, _, A_RI in pairs(Adapter.load(place), what):
        yield site, A_RI.detach()


class EarlierCourse(SmoothCourse):
    how: OrthogonalToEarlier

    def __init__(self, how: OrthogonalToEarlier, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self._before = how.before(self.adapter) if how.active else {}

    def value(self) -> Tensor:
        return self.how.weight * overlap(self.adapter, self._before)


def overlap(adapter: Adapter, before: Mapping[str, Tensor]) -> Tensor:
    """R; a factor that sites share counts at each, since what was there before differs."""
    found = [
        (before[site].to(A_RI) @ A_RI.T).square().sum()
        for site, _, A_RI in pairs(adapter, OrthogonalToEarlier())
        if site in before
    ]
    return torch.stack(found).sum()
