"""Penalties with a kink at zero, by proximal steps: after the optimiser's step,

    x <- prox_{eta lam R}(x) = argmin over z of |z - x|^2 / 2 + eta lam R(z)

with eta the learning rate of that step.  Under SGD this is the proximal gradient method; of an optimiser that scales
gradients it keeps the rate alone, so zeros stay exact.  Groups at zero may come back.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method
from ..host.host import selected
from ..host.masters import wide
from ..ranks.procedure import Quality
from .grouped import Grouped
from .groups import Groups
from .penalty import Penalty, PenaltyCourse, rates
from .zero import zero_is_base

TOLD = 64  # groups whose names a report tells


class Proximal(Penalty):
    """A penalty of the sizes of groups that draws them to zero.  Works wherever trained factors of zero are the
    base."""

    @property
    @abc.abstractmethod
    def grouping(self) -> Groups:
        """Its groups."""

    @abc.abstractmethod
    def value(self, grouped: Grouped) -> Tensor:
        """R of an adapter's groups."""

    @abc.abstractmethod
    def factors(self, grouped: Grouped, norms: Tensor, step: Tensor) -> Tensor:
        """What each group is multiplied by in a proximal step of that length (one for each group): of norms |x_g|."""

    def begins(self, steps: int) -> int:
        """After how many updates it begins."""
        return 0

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> ProximalCourse:
        return ProximalCourse(self, model, optimizer, steps)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        grouped = self.grouping.of(model, selected(model))
        stays = grouped.norms() > 0
        found: dict[str, Any] = {
            "groups": grouped.count,
            "zero": int((~stays).sum()),
            "value": self.weight * float(self.value(grouped)),
        }
        if len(grouped.names) == grouped.count <= TOLD:
            found["in_use"] = [name for name, stay in zip(grouped.names, stays.tolist(), strict=True) if stay]
        return found


class Settling(Proximal):
    """One of `groups` that begins after the share `after` of the updates; where it is `fixed` it is settled at the
    share `settle` which groups stay."""

    groups: Groups
    after: float
    settle: float

    def __post_init__(self) -> None:
        if self.after >= self.settle:
            raise ValueError(f"{self!r}: it begins after {self.after:g} and settles at {self.settle:g} of the updates")

    @property
    def grouping(self) -> Groups:
        return self.groups

    def begins(self, steps: int) -> int:
        return round(self.after * steps)

    def settled(self, steps: int) -> int:
        """The update at which it is settled."""
        return max(1, round(self.settle * steps))

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return self.settled(steps) if self.active and self.fixed else 0


class ProximalCourse(PenaltyCourse):
    how: Proximal

    def __init__(self, how: Proximal, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self._known: tuple[Any, Grouped] | None = None
        if how.active:
            self._check()

    def _check(self) -> None:
        """Raises TypeError where zero is not the base, ValueError where groups have no rate."""
        adapter = self.adapter
        seen: set[Method] = set()
        for site, method in adapter.methods.items():
            if method in seen:
                continue
            seen.add(method)
            if not zero_is_base(method, adapter.factors[site], adapter.shapes[site]):
                raise TypeError(
                    f"{self.how!r} draws trained factors to zero, and {method!r} at {site} (rung {method.rung()}) is "
                    "not the base there: take a method whose factors of zero change nothing, such as LoRA"
                )
        grouped = self.grouped()
        self._rates(grouped)
        if narrow := {t.dtype for t in (part.tensor for part in grouped.parts) if t.dtype != wide(t.dtype)}:
            least = max(torch.finfo(kind).eps for kind in narrow)
            kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in narrow))
            warnings.warn(
                f"{self.how!r} takes steps of its weight times the rate, and {kinds} loses those below {least / 2:.1g} "
                "of a number: keep the factors in float32 (change the model's type before attach)",
                stacklevel=2,
            )

    def grouped(self) -> Grouped:
        """The groups of the adapter as it is now: an allocator may have changed its factors."""
        key = tuple((id(t), t.shape) for _, _, t in self.adapter.tensors())
        if self._known is None or self._known[0] != key:
            self._known = key, self.how.grouping.of(self.model, self.adapter)
        return self._known[1]

    def _rates(self, grouped: Grouped) -> Tensor:
        """The rate of each group."""
        found = rates(self.optimizer, [part.tensor for part in grouped.parts], self.name)
        own = {found[id(part.tensor)] for part in grouped.parts}
        return torch.full_like(grouped.sizes, own.pop()) if len(own) == 1 else grouped.spread(found)

    @torch.no_grad()
    def on_update(self) -> None:
        if self.how.active and self.step > self.how.begins(self.steps):
            grouped = self.grouped()
            self.stepped(grouped)

    def stepped(self, grouped: Grouped) -> None:
        """The proximal step."""
        lengths = self._rates(grouped) * self.how.weight
        grouped.scale(self.how.factors(grouped, grouped.norms(), lengths))


class SettlingCourse(ProximalCourse):
    """From one update on it is settled which groups stay: the others are zero, and what stays trains on without the
    penalty.  `stays`: 1 for each group that stays, 0 for the others; None before."""

    how: Settling
    stays: Tensor | None = None

    def staying(self, grouped: Grouped) -> Tensor:
        """`stays`, from what the groups are now."""
        raise NotImplementedError

    def stepped(self, grouped: Grouped) -> None:
        if self.stays is None:
            super().stepped(grouped)
            if self.step >= self.how.settled(self.steps):
                self._settle(grouped)
        elif len(self.stays) != grouped.count:
            raise RuntimeError(
                f"{self.how!r} has settled which of {len(self.stays)} groups stay, and there are {grouped.count} now: "
                "no allocator goes with it"
            )
        else:
            grouped.scale(self.stays)

    def on_end(self) -> None:
        """A training that ended before it was settled is settled now."""
        if self.how.active and self.stays is None:
            self._settle(self.grouped())

    @torch.no_grad()
    def _settle(self, grouped: Grouped) -> None:
        self.stays = self.staying(grouped)
        grouped.scale(self.stays)
        if not self.stays.any():
            warnings.warn(
                f"{self.how!r} has settled that none of {grouped.count} groups stays: the adapter is zero, and stays "
                "so. Lower its weight",
                stacklevel=2,
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {} if self.stays is None else {"stays": self.stays}, super().state()[1]

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        self.stays = tensors["stays"].to(self.grouped().sizes) if "stays" in tensors else None
