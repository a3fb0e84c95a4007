"""One base in memory for many jobs: what opens it, and what a micro-batch of several jobs' rows costs each of them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapter import Live
from ..host.host import adapters, detach, select
from ..host.mixing import rows
from ..train.prepared import Prepared
from ..train.run import Run
from ..train.tasks.lending import still_statistics
from ..train.trainer import nothing_below
from .course import Course, Row
from .planner import Size
from .streams import Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = tuple[Course, Sequence[Row], int]  # rows of a job's step, and the items of the whole step


class Base(abc.ABC):
    """A pretrained model, and the adapters of jobs on it."""

    held: nn.Module  # what the adapters are attached to
    can_select: ClassVar[bool]  # whether a micro-batch of one job can do without `rows`
    size: Size  # what rows fill of a micro-batch

    def __init__(self) -> None:
        self._quiet: set[str] = set()  # jobs in whose micro-batches nothing is drawn
        self._outer = contextlib.ExitStack()  # a `rows` around those of the micro-batches, of the names `_inside`
        self._inside: set[str] = set()

    @abc.abstractmethod
    def prepared(self, run: Run, name: str) -> tuple[Prepared, Live]:
        """A run with its adapter attached and selected, and the adapter with all that it trains."""

    def _open(self, model: PreTrainedModel, run: Run) -> None:
        """Prepares the model that all share."""
        if run.gradient_checkpointing:  # without re-entry: with it no gradient comes to what inputs that need none feed
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            nothing_below(model)

    @abc.abstractmethod
    def losses(self, parts: Sequence[Part], streams: Streams) -> list[Tensor]:
        """The loss of each part: the sum over its rows, by the items of its whole step."""

    @abc.abstractmethod
    def stretches(self, parts: Sequence[Part]) -> Streams:
        """Whose tokens stand where in the batch of these parts."""

    @abc.abstractmethod
    def sample(self, course: Course, tokens: int) -> list[Row]:
        """Rows of so many tokens in all that stand for a job's own."""

    def alone(self, adapter: Live) -> bool:
        """Whether a job's rows cannot go through `rows`."""
        return False

    def placed(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within, all that a job trains is in its place in the model."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def selected(self, course: Course) -> Iterator[None]:
        """Within, the model of a job computes with its adapter alone."""
        self.leave()
        select(self.held, course.job.name)
        try:
            yield
        finally:
            select(self.held, None)

    def forget(self, name: str) -> None:
        """Takes a job's adapter off."""
        self.leave()
        if name in adapters(getattr(self, "held", nn.Module())):
            detach(self.held, name)

    def leave(self) -> None:
        """Nobody is inside `rows`: adapters may come and go."""
        self._outer.close()
        self._inside = set()

    def gradients(self, parts: Sequence[Part]) -> list[tuple[Tensor, list[Tensor | None]]]:
        """(loss, gradients of its parameters) of each part of a micro-batch."""
        names = {course.job.name for course, _, _ in parts}
        self._train(parts)
        streams = self.stretches(parts)
        drawing = contextlib.nullcontext() if names <= self._quiet else streams.drawing()
        parameters = [course.parameters for course, _, _ in parts]
        with self.around(parts), self._through(parts), torch.enable_grad():
            with drawing:
                losses = self.losses(parts, streams)
            every = [p for own in parameters for p in own]
            found = torch.autograd.grad(sum(losses, torch.zeros(())), every, allow_unused=True)
        if not streams.drawn:
            self._quiet |= names
        left = iter(found)
        return [(loss.detach(), [next(left) for _ in own]) for loss, own in zip(losses, parameters, strict=True)]

    def around(self, parts: Sequence[Part]) -> contextlib.AbstractContextManager[Any]:
        """What a forward and its backward of such a batch stand in."""
        return contextlib.nullcontext()

    def _train(self, parts: Sequence[Part]) -> None:
        """Puts the model into training mode."""
        for model in {id(course.ready.model): course.ready.model for course, _, _ in parts}.values():
            if not (model.training and all(part.training for part in self.held.children())):
                still_statistics(model.train().modules())

    def _through(self, parts: Sequence[Part]) -> contextlib.AbstractContextManager[Any]:
        """Within, each row goes through its job's adapter."""
        if parts[0][0].alone:
            return self.selected(parts[0][0])
        new = {name for name in self.names(parts) if name is not None} - self._inside
        if new:
            names = {*self._inside, *new}
            self.leave()
            self._outer.enter_context(rows(self.held, sorted(names)))
            self._inside = names
        return rows(self.held, *self.routes(parts))

    def names(self, parts: Sequence[Part]) -> list[str | None]:
        """The adapter of each part; None where it has none."""
        return [course.job.name for course, _, _ in parts]

    @abc.abstractmethod
    def routes(self, parts: Sequence[Part]) -> tuple[list[str | None], list[int] | None]:
        """What `rows` is told of such a batch."""
