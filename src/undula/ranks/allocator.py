"""Who gets how much rank, when.

An Allocator is a configuration; `start` begins a Course, which changes the factors of a live adapter while it trains.
In a loop of one's own:

    course = undula.ranks.AdaLoRA(target=4).start(model, optimizer, steps=1000)
    for batch in data:
        course.before_forward()
        model(**batch).loss.backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
    course.finish()

With a gradient scaler, unscale before `before_update`.  An update whose gradients are not all finite is one that the
scaler will skip: for the course it has not been.

Under `transformers.Trainer` the same calls come from a callback (`undula.allocating`).  Draws follow (seed, step) alone
and decisions follow gradients that all processes share: under DDP every process makes the same ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import Factors, Method
from ..host.host import selected
from ..host.sharded import check_whole
from ..host.where import inner
from ..optim.schedules import Schedule
from .memory import correct_steps, finite_gradients

Quality = Callable[[], float]  # of the model as it is, on fixed data, in evaluation mode: higher is better


@dataclass(frozen=True)
class Place:
    """One site of the live adapter."""

    site: str
    method: Method
    f: Factors


def places_of(adapter: Adapter) -> Iterator[Place]:
    """The sites of an adapter."""
    for site, f in adapter.factors.items():
        yield Place(site, adapter.methods[site], f)


class Allocator(Choice):
    """A frozen configuration, and the methods that it can work on."""

    works_on: ClassVar[tuple[type[Method], ...]]
    source: ClassVar[str] = ""
    grade: ClassVar[str] = "exact"
    needs_quality: ClassVar[bool] = False

    def serves(self, method: Method) -> bool:
        """Whether it can work at a site of this method."""
        return isinstance(method, self.works_on)

    def refusal(self, method: Method | None) -> str:
        """What to say of a method that it does not serve."""
        return f"{self!r} works on {', '.join(m.__name__ for m in self.works_on)}, not on {method!r}"

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        """The number of updates, of `steps`, from which on what is measured is this allocator's result: its budget is
        reached, its choice made, its last restart under way.  Evaluations before that measure another adapter.

        Where it depends on the adapter's rank and no adapter is given, the latest that any rank has.
        """
        return 0

    def schedule(self) -> Schedule | None:
        """The learning rate's schedule that belongs to it, used where a training names none."""
        return None

    @abc.abstractmethod
    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> Course:
        """A course over `steps` updates of the selected adapter of `model`, whose factors `optimizer` trains.

        Raises TypeError for an adapter of other methods, ValueError for a schedule that does not fit into `steps`.
        """


class Course:
    """An allocator at work.  A subclass overrides `before_forward`, `on_gradients`, `on_update`, `on_end` as it needs.

    `clipped` is what a clipping after `before_update` has multiplied the gradients by.
    """

    clipped: float = 1.0
    skipped = False  # whether the update under way is one that a gradient scaler will skip
    finished = False

    def __init__(self, allocator: Allocator, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        self.model, self.optimizer, self.steps = inner(model), optimizer, steps
        self.step = 0  # updates done
        check_whole(selected(model).parameters(), type(allocator).__name__)
        odd = {s: m for s, m in selected(model).methods.items() if not allocator.serves(m)}
        if odd:
            site, method = next(iter(odd.items()))
            raise TypeError(f"{allocator.refusal(method)} ({site} and {len(odd) - 1} other sites)")

    @property
    def adapter(self) -> Adapter:
        """The live adapter."""
        return selected(self.model)

    def places(self) -> Iterator[Place]:
        """The sites of the adapter, with the parameters that train."""
        return places_of(self.adapter)

    def before_forward(self) -> None:
        """Before the first forward pass of an update."""

    def before_update(self) -> None:
        """After the backward pass (all of an update's), before the optimiser's step: gradients are there, unscaled."""
        self.skipped, self.clipped = not finite_gradients(self.optimizer), 1.0
        if not self.skipped:
            self.on_gradients()

    def after_update(self) -> None:
        """After the optimiser's step, before gradients are cleared."""
        if not self.skipped:
            self.step += 1
            correct_steps(self.optimizer)
            self.on_update()

    def finish(self) -> None:
        """After the last update, whichever it was: what the allocator promises of the result holds from here on."""
        if not self.finished:
            self.finished = True
            self.on_end()

    def on_gradients(self) -> None:
        """What the course does at `before_update`."""

    def on_update(self) -> None:
        """What the course does at `after_update`; `step` has counted the update."""

    def on_end(self) -> None:
        """What the course does at `finish`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) that a checkpoint must hold besides the adapter and the optimiser's state."""
        return {}, {"step": self.step, "finished": self.finished}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step, self.finished = values["step"], values.get("finished", False)
