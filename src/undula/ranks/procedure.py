"""What accompanies a training: allocators of ranks, restarts, penalties.

A Procedure is a configuration.  `start` makes a Course of it and changes nothing: neither the model nor its adapter nor
the optimiser.  A course begins at its first `before_forward`, unless `restore` has given it the state of one that has
begun.  In a loop of one's own:

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
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice, plain
from ..core.method import Factors, Method
from ..host.host import selected
from ..host.sharded import check_whole
from ..host.where import inner
from ..optim.schedules import Schedule
from .memory import correct_steps, finite_gradients

# Those that need more of a model than layers, by the modules that are imported when they are asked for.
LATER = {"loraprune": ("loraprune", "LoRAPrune")}
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


class Procedure(Choice):
    """A frozen configuration, and the methods that it can work on."""

    works_on: ClassVar[tuple[type[Method], ...]]
    source: ClassVar[str] = ""
    grade: ClassVar[str] = "exact"
    answers: ClassVar[bool] = False  # whether it looks at what the model answers, see `Course.term`

    def __add__(self, other: Procedure) -> Procedure:
        """Both in one training: `Together`.  Raises ValueError for two allocators."""
        if not isinstance(other, Procedure):
            return NotImplemented
        parts = [getattr(p, "procedures", (p,)) for p in (self, other)]  # of those that are several already
        together: Any = Procedure.named("Together")
        return together((*parts[0], *parts[1]))

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The procedure called `name`, those in `LATER` included.  Raises LookupError."""
        if (later := LATER.get(plain(name))) is not None:
            found: type[Self] = getattr(importlib.import_module(f"{__package__}.{later[0]}"), later[1])
            return found
        return super().named(name)

    @property
    def needs_quality(self) -> bool:
        """Whether `start` has to be given the quality of the model."""
        return False

    @property
    def entrywise(self) -> bool:
        """Whether single entries of a factor begin again in the optimiser's memory."""
        return False

    def serves(self, method: Method) -> bool:
        """Whether it can work at a site of this method."""
        return isinstance(method, self.works_on)

    def refusal(self, method: Method | None) -> str:
        """What to say of a method that it does not serve."""
        return f"{self!r} works on {', '.join(m.__name__ for m in self.works_on)}, not on {method!r}"

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        """The number of updates, of `steps`, from which on what is measured is this procedure's result: its budget is
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
        """A course over `steps` updates of the selected adapter of `model`, whose factors `optimizer` trains.  Changes
        nothing; the course begins with its first update.

        Raises TypeError for an adapter of other methods, ValueError for a schedule that does not fit into `steps`.
        """


class Course:
    """A procedure at work.

    A training calls the moments (`before_forward`, `before_update`, `after_update`, `finish`); they keep count and call
    what a subclass overrides (`on_...`), in this order:

        on_begin       once, before the first forward pass of a fresh run; a resumed run has had it
        on_forward     before the first forward pass of an update
        on_backward    gradients are there; also in an update that a gradient scaler will skip
        on_gradients   gradients are there, unscaled and finite; what is added to them the optimiser follows
        on_update      after the optimiser's step; `step` has counted the update
        on_close       at the end of an update, skipped ones too
        on_end         once, after the last update

    The constructor reads and changes nothing.  `clipped` is what a clipping after `before_update` has multiplied the
    gradients by.
    """

    clipped: float = 1.0
    skipped = False  # whether the update under way is one that a gradient scaler will skip
    begun = False
    finished = False

    def __init__(self, procedure: Procedure, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        self.name = type(procedure).__name__
        self.model, self.optimizer, self.steps = inner(model), optimizer, steps
        self.step = 0  # updates done
        check_whole(selected(model).parameters(), self.name)
        odd = {s: m for s, m in selected(model).methods.items() if not procedure.serves(m)}
        if odd:
            site, method = next(iter(odd.items()))
            raise TypeError(f"{procedure.refusal(method)} ({site} and {len(odd) - 1} other sites)")

    @property
    def adapter(self) -> Adapter:
        """The live adapter."""
        return selected(self.model)

    def places(self) -> Iterator[Place]:
        """The sites of the adapter, with the parameters that train."""
        return places_of(self.adapter)

    def begin(self) -> None:
        """What the procedure changes before the first update.  The first `before_forward` calls it; a course that has
        begun, or was given the state of one that had, does nothing here."""
        if not self.begun:
            self.begun = True
            self.on_begin()

    def before_forward(self) -> None:
        """Before the first forward pass of an update."""
        self.begin()
        self.on_forward()

    def term(self, inputs: Any, outputs: Any) -> Tensor | float:
        """What a penalty of the answers adds to the loss of a batch: of the model's inputs (what it is called with) and
        its outputs, after the forward pass."""
        return 0.0

    def before_update(self) -> None:
        """After the backward pass (all of an update's), before the optimiser's step: gradients are there, unscaled.
        Raises RuntimeError where the course should have begun before the forward pass."""
        self._check_begun()
        self.skipped, self.clipped = not finite_gradients(self.optimizer), 1.0
        self.on_backward()
        if not self.skipped:
            self.on_gradients()

    def after_update(self) -> None:
        """After the optimiser's step, before gradients are cleared.  Raises RuntimeError as `before_update` does."""
        self._check_begun()
        if not self.skipped:
            self.step += 1
            correct_steps(self.optimizer)
            self.on_update()
        self.on_close()

    def _check_begun(self) -> None:
        """Raises RuntimeError where it is too late for `on_begin`: this update's gradients are of what was before."""
        if not self.begun and type(self).on_begin is not Course.on_begin:
            raise RuntimeError(
                f"the course of {self.name} has not begun: call before_forward() before the forward pass of each "
                "update, or begin() once before the first"
            )
        self.begun = True

    def finish(self) -> None:
        """After the last update, whichever it was: what the procedure promises of the result holds from here on."""
        self.begin()
        if not self.finished:
            self.finished = True
            self.on_end()

    def on_begin(self) -> None: ...

    def on_forward(self) -> None: ...

    def on_backward(self) -> None: ...

    def on_gradients(self) -> None: ...

    def on_update(self) -> None: ...

    def on_close(self) -> None: ...

    def on_end(self) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) that a checkpoint must hold besides the adapter and the optimiser's state."""
        return {}, {"of": self.name, "step": self.step, "begun": self.begun, "finished": self.finished}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`, on a model that has the adapter of then.  Raises ValueError for the state of another
        procedure."""
        if values.get("of", self.name) != self.name:  # states of earlier versions do not say
            raise ValueError(f"this is the state of a course of {values['of']}, not of {self.name}")
        self.step, self.finished = values["step"], values.get("finished", False)
        self.begun = values.get("begun", True)
