"""Tasks in sequence: the A of each orthogonal to those of the tasks before, as O-LoRA has it (Wang et al. 2023,
arXiv:2310.14152).

    R = sum over layers of |A_before A'|^2,   A_before (R_1 + R_2 + ..., I) the rows of all earlier tasks, A (R, I)

With A_i A' = 0 what a new task adds answers nothing to the inputs that an earlier one looks at: dW_i dW' = 0.  The
paper's equation has squares, its code the sum of absolute values; weight 0.5 is its code's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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
    pulls = True
    source = "Wang et al. 2023, arXiv:2310.14152 (O-LoRA)"

    weight: NotNegative = 0.5
    earlier: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.earlier

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
        """{site: the rows of all the earlier A there}.  Raises as `each` does."""
        rows: dict[str, list[Tensor]] = {}
        for there in self.each(adapter).values():
            for site, A_RI in there.items():
                rows.setdefault(site, []).append(A_RI)
        return {site: torch.cat(those) for site, those in rows.items()}

    def each(self, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        """{directory: {site of this adapter: the rows of A there}}.  Raises ValueError where none is named, or one has
        no layer of this adapter or another size of inputs there."""
        if not self.earlier:
            raise ValueError(f"{self!r} needs the directories of adapters of tasks before: earlier=DIRECTORY")
        here = {site: A_RI.shape[1] for site, _, A_RI in pairs(adapter, self)}
        found: dict[str, dict[str, Tensor]] = {}
        for place in self.earlier:
            rows = {site: A_RI.detach() for site, _, A_RI in pairs(Adapter.load(place), self) if site in here}
            if not rows:
                raise ValueError(f"the adapter in {place} has no layer of this one's: there is nothing to differ from")
            for site, A_RI in rows.items():
                if A_RI.shape[1] != here[site]:
                    raise ValueError(f"{site} takes {here[site]} inputs, and {A_RI.shape[1]} in the adapter in {place}")
            found[place] = rows
        return found

    def tell(self, adapter: Adapter) -> None:
        """Warns of layers that an earlier adapter has not, where nothing keeps this one apart from it.  Raises
        ValueError for an A that does not train, which nothing could draw anywhere."""
        here = {site: A_RI for site, _, A_RI in pairs(adapter, self)}
        for place, rows in self.each(adapter).items():
            if still := [site for site in rows if not here[site].requires_grad]:
                raise ValueError(f"{self!r} draws A, and that of {still[0]} does not train: leave it out, or train A")
            if lacking := [site for site in here if site not in rows]:
                more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
                warnings.warn(
                    f"the adapter in {place} has nothing at {', '.join(lacking[:3])}{more}, {len(lacking)} of these "
                    f"{len(here)} layers: there nothing draws this task away from that one",
                    stacklevel=2,
                )


class EarlierCourse(SmoothCourse):
    how: OrthogonalToEarlier

    def __init__(self, how: OrthogonalToEarlier, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self._before = how.before(self.adapter) if how.active else {}
        if how.active:
            how.tell(self.adapter)

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
