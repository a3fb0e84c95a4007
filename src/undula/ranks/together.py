"""Several procedures over one training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method
from ..optim.schedules import Schedule
from .allocator import Allocator
from .procedure import Course, Procedure, Quality

MOMENTS = ("begin", "before_forward", "before_update", "after_update", "finish")


@Procedure.register
@dataclass(frozen=True)
class Together(Procedure):
    """All of `procedures`, such as an allocator and a penalty: each moment is that of each, in this order, an
    allocator's last, which has the last word on gradients.

    Raises ValueError for two allocators, which would change the ranks of the same sites.
    """

    works_on = (Method,)

    procedures: tuple[Procedure, ...]

    def __post_init__(self) -> None:
        if not self.procedures:
            raise ValueError("Together needs procedures: Together((ReLoRA(), L2SP()))")
        if any(isinstance(p, Together) for p in self.procedures):
            raise ValueError("Together stands in no other: name all procedures in one")
        allocators = [type(p).__name__ for p in self.procedures if isinstance(p, Allocator)]
        if len(allocators) > 1:
            raise ValueError(
                f"{' and '.join(allocators)} change the ranks of the same sites: a training has one allocator"
            )

    @property
    def needs_quality(self) -> bool:
        return any(p.needs_quality for p in self.procedures)

    @property
    def answers(self) -> bool:  # type: ignore[override]
        return any(p.answers for p in self.procedures)

    @property
    def entrywise(self) -> bool:
        return any(p.entrywise for p in self.procedures)

    def serves(self, method: Method) -> bool:
        return all(p.serves(method) for p in self.procedures)

    def refusal(self, method: Method | None) -> str:
        return next(p.refusal(method) for p in self.procedures if method is None or not p.serves(method))

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return max(p.counts_from(steps, adapter) for p in self.procedures)

    def schedule(self) -> Schedule | None:
        return next((found for p in self.procedures if (found := p.schedule()) is not None), None)

    def __mul__(self, factor: float) -> Together:
        """All so many times as strong.  Raises TypeError where one of them has no strength."""
        if odd := [p for p in self.procedures if not hasattr(p, "__mul__")]:
            raise TypeError(f"{odd[0]!r} has no weight that could be multiplied")
        parts: tuple[Any, ...] = self.procedures
        return Together(tuple(p * factor for p in parts))

    __rmul__ = __mul__

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> TogetherCourse:
        return TogetherCourse(self, model, optimizer, steps, quality)


class TogetherCourse(Course):
    """`courses` stand as their procedures do; this one keeps count for all.  Raises TypeError for one that overrides a
    moment, which would not be called."""

    def __init__(
        self,
        how: Together,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        quality: Quality | None,
    ):
        super().__init__(how, model, optimizer, steps)
        self.courses = [p.start(model, optimizer, steps, quality) for p in how.procedures]
        for c in self.courses:
            if own := [m for m in MOMENTS if getattr(type(c), m) is not getattr(Course, m)]:
                raise TypeError(f"the course of {c.name} overrides {own[0]}: in Together it overrides on_... instead")
        allocates = [isinstance(p, Allocator) for p in how.procedures]
        self.turns = [c for last in (False, True) for c, a in zip(self.courses, allocates, strict=True) if a is last]

    def _each(self) -> Iterator[Course]:
        """The courses in their turns, told of the update under way."""
        for c in self.turns:
            c.step, c.skipped, c.clipped = self.step, self.skipped, self.clipped
            yield c

    def on_begin(self) -> None:
        for c in self._each():
            c.begin()

    def on_forward(self) -> None:
        for c in self._each():
            c.on_forward()

    def term(self, inputs: Any, outputs: Any) -> Tensor | float:
        return sum((c.term(inputs, outputs) for c in self._each()), 0.0)

    def on_backward(self) -> None:
        for c in self._each():
            c.on_backward()

    def on_gradients(self) -> None:
        for c in self._each():
            c.on_gradients()

    def on_update(self) -> None:
        for c in self._each():
            c.on_update()

    def on_close(self) -> None:
        for c in self._each():
            c.on_close()

    def on_end(self) -> None:
        for c in self._each():
            c.finish()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        states = [c.state() for c in self.courses]
        tensors = {f"{i}.{name}": t for i, (found, _) in enumerate(states) for name, t in found.items()}
        return tensors, {**super().state()[1], "courses": [values for _, values in states]}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        states = values.get("courses", [])
        if len(states) != len(self.courses):
            raise ValueError(f"this is the state of {len(states)} courses together, not of {len(self.courses)}")
        for i, (c, own) in enumerate(zip(self.courses, states, strict=True)):
            start = f"{i}."
            c.restore({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}, own)
