"""What a training lowers beside its loss, as values that add up: `GroupLasso(1e-3) + 0.5 * KLToBase()`.

    loss + sum of weight * R(adapter, answers)

A penalty is a `Procedure`, so one loop serves both (see `ranks.procedure`); what looks at the model's answers has one
more line in it:

    course = (GroupLasso(1e-3) + KLToBase(0.1)).start(model, optimizer, steps=1000)
    for batch in data:
        course.before_forward()
        out = model(**batch)
        (out.loss + course.term(batch, out)).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
    course.finish()

How one acts follows from what it is:

    of the answers   in the loss (`term`), batch by batch, as the loss itself
    smooth           its gradient is added before the optimiser's step, once per update: as in the loss, whatever is
                     accumulated, scaled or averaged over processes before, and clipped after
    with a kink      a proximal step x <- prox_{eta weight R}(x) after the optimiser's, eta its learning rate, so what
                     is zero is exactly zero whatever the optimiser's metric; nothing of it is in a gradient

A weight of zero is no penalty: not a bit changes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Method
from ..optim.paired import Paired, pull
from ..ranks.procedure import Course, Procedure, Quality
from ..ranks.together import Together

FILES = (  # one of each
    "ba_lora",
    "group_lasso",
    "kl_to_base",
    "l1",
    "orthogonal",
    "orthogonal_to_earlier",
    "sparse_groups",
    "wgsef",
)


class Penalty(Procedure, Choice):
    """A frozen configuration; `weight` multiplies all of it.  A family of its own: `Penalty.named`."""

    works_on: ClassVar[tuple[type[Method], ...]] = (Method,)
    compares: ClassVar[bool] = False  # with what the base answers
    pulls: ClassVar[bool] = False  # whether it adds a gradient of its own to the factors', see `SmoothCourse`
    weight: float

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The penalty called `name`.  Raises LookupError that lists them."""
        cls.members()
        return super().named(name)

    @classmethod
    def members(cls) -> list[type]:
        """All penalties; each is imported when they are asked for."""
        for name in FILES:
            import_module(f"{__package__}.{name}")
        return super().members()

    @property
    def fixed(self) -> bool:
        """Whether the adapter must keep its shapes."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """The directories of adapters that it looks at."""
        return ()

    @property
    def active(self) -> bool:
        """Whether it does anything."""
        return self.weight != 0

    def __mul__(self, factor: float) -> Self:
        """The same penalty so many times as strong.  Raises ValueError for a factor below zero."""
        return dataclasses.replace(self, weight=self.weight * float(factor))  # type: ignore[type-var]

    __rmul__ = __mul__

    def refusal(self, method: Method | None) -> str:
        what = "no method" if method is None else f"{method!r}, which stands on the rung {method.rung()}"
        return f"{self!r} works on {', '.join(m.__name__ for m in self.works_on)}, not on {what}"

    @abc.abstractmethod
    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> PenaltyCourse: ...

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """What a report says of the result, of the adapter that is selected."""
        return {}


def listed(what: Any) -> tuple[Penalty, ...]:
    """The penalties in one, a sum, or a list of these.  Raises TypeError for anything else."""
    if what is None:
        return ()
    if isinstance(what, Penalty):
        return (what,)
    parts = what.procedures if isinstance(what, Together) else what if isinstance(what, list | tuple) else None
    if parts is None:
        raise TypeError(f"a penalty such as GroupLasso(weight=1e-3), a sum or a list of these, found {what!r:.80}")
    if isinstance(what, Together) and (odd := [p for p in parts if not isinstance(p, Penalty)]):
        raise TypeError(f"{odd[0]!r} is no penalty: it goes into allocator=...")
    return tuple(p for part in parts for p in listed(part))


def together(procedure: Procedure | None, penalties: tuple[Penalty, ...]) -> Procedure | None:
    """An allocator and those of the penalties that do anything, as one; None where nothing is left."""
    own = procedure.procedures if isinstance(procedure, Together) else () if procedure is None else (procedure,)
    parts = (*own, *(p for p in penalties if p.active))
    return (
        None if not parts else procedure if len(parts) == len(own) else parts[0] if len(parts) == 1 else Together(parts)
    )


class PenaltyCourse(Course):
    """A penalty at work."""

    how: Penalty

    def __init__(self, how: Penalty, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how

    @property
    def share(self) -> float:
        """Of the training that is behind."""
        return self.step / max(1, self.steps)


class SmoothCourse(PenaltyCourse):
    """Adds the gradient of `value` before the optimiser's step.  Of a parameter without a gradient, which the
    optimiser passes over, it is left out."""

    def __init__(self, how: Penalty, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        """Raises TypeError for an optimiser that follows the loss's gradients alone."""
        super().__init__(how, model, optimizer, steps)
        bare: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's has it inside
        if how.active and isinstance(bare, Paired) and bare.alone:
            raise TypeError(
                f"{how!r} adds a gradient of its own to the factors', and {bare.called} follows the loss's alone: take "
                "another optimiser, such as AdamW or LoRAPro"
            )

    def value(self) -> Tensor:
        """weight * R, as it is now."""
        raise NotImplementedError

    def on_gradients(self) -> None:
        if not self.how.active:
            return
        trained = [p for p in self.adapter.parameters() if p.grad is not None]
        with torch.enable_grad():
            value = self.value()
            found = torch.autograd.grad(value, trained, allow_unused=True) if value.requires_grad else ()
        own = [(p, g) for p, g in zip(trained, found, strict=False) if g is not None]
        if own:
            pull(self.optimizer, [p for p, _ in own], [g for _, g in own])


def rates(optimizer: torch.optim.Optimizer, trained: list[Tensor], name: str) -> dict[int, float]:
    """{id of a parameter: the rate at which it steps}.  Raises ValueError where a parameter has none."""
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for p in trained:
        if found.get(id(p)) is None:
            why = "the optimiser does not train it" if id(p) not in found else "the optimiser makes its rate itself"
            raise ValueError(
                f"{name} steps at the optimiser's learning rate, and a factor of shape {tuple(p.shape)} has none: {why}"
            )
    return {key: float(rate) for key, rate in found.items() if rate is not None}


def trained_factors(adapter: Adapter) -> Iterator[tuple[str, str, Tensor]]:
    """(site, name, factor) of those that train; what sites share comes with each."""
    return ((site, name, t) for site, name, t in adapter.tensors() if t.requires_grad)
