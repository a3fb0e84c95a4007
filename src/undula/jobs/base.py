"""One base in memory for many jobs: what opens it, and what a micro-batch of several jobs' rows costs each of them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Live
from ..host.host import adapters, detach, select
from ..host.mixing import rows
from ..train.prepared import Prepared
from ..train.rows import RunRows, rows_of
from ..train.run import Run
from ..train.tasks.lending import still_statistics
from ..train.tasks.segments import segments
from ..train.tasks.step import Step
from ..train.trainer import nothing_below
from .course import Course, Row
from .planner import Size, padded
from .streams import Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[Run], RunRows]
READ: Read = rows_of  # of the run's own data
Part = tuple[Course, Sequence[Row], int]  # rows of a job's step, and the items of the whole step


class Base(abc.ABC):
    """A pretrained model, and the adapters of jobs on it.

    A micro-batch is computed in one of two ways: rows of several jobs through their adapters (`rows`), or those of one
    job with its adapter selected, which is the very step of `undula train`.
    """

    held: nn.Module  # what the adapters are attached to

    def __init__(self) -> None:
        self.size: Size = padded  # what rows fill of a micro-batch
        self.step = Step()  # how a job's own step is taken
        self._quiet: set[str] = set()  # jobs in whose micro-batches nothing is drawn
        self._outer = contextlib.ExitStack()  # a `rows` around those of the micro-batches
        self._inside: set[str] = set()  # the names of that `rows`
        self._own: str | None = None  # the job whose adapter is selected from one of its steps to the next
        self._placing = contextlib.ExitStack()  # what that job trains, in its place
        self._around = contextlib.ExitStack()  # what the model stands in while it takes steps
        self._stepping = False

    @abc.abstractmethod
    def prepared(self, run: Run, name: str, read: Read = READ) -> tuple[Prepared, Live]:
        """A run with its adapter attached and selected, and the adapter with all that it trains; `read` gives its
        rows."""

    def _open(self, model: PreTrainedModel, run: Run) -> None:
        """Prepares the model that all share."""
        if run.gradient_checkpointing:  # without re-entry: with it no gradient comes to what inputs that need none feed
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            nothing_below(model)

    @property
    @abc.abstractmethod
    def whole(self) -> Any:
        """The model that steps are taken with."""

    @abc.abstractmethod
    def losses(self, parts: Sequence[Part]) -> list[Tensor]:
        """The loss of each part: the sum over its rows, by the items of its whole step."""

    @abc.abstractmethod
    def flat(self, parts: Sequence[Part]) -> bool:
        """Whether these rows stand behind each other in one."""

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

    def draws(self, name: str) -> bool:
        """Whether random numbers were drawn in the steps of a job."""
        return name not in self._quiet

    def by_itself(self, ready: Prepared) -> Prepared:
        """A job whose adapter is selected, as one that nobody shares a model with: it may be merged."""
        return ready

    @contextlib.contextmanager
    def selected(self, course: Course) -> Iterator[None]:
        """Within, the model of a job computes with its adapter alone."""
        self.close()
        self._take(course.job.name)
        try:
            yield
        finally:
            self.leave()

    def selects(self, name: str) -> str | None:
        """The adapter of a job; None where it has none."""
        return name

    def forget(self, name: str) -> None:
        """Takes a job's adapter off."""
        self.close()
        if name in adapters(getattr(self, "held", nn.Module())):
            detach(self.held, name)

    def leave(self) -> None:
        """Nobody is inside `rows`, nothing is selected: adapters may come and go."""
        self._outer.close()
        self._placing.close()
        if self._own is not None:
            select(self.held, None)
        self._inside, self._own = set(), None

    def _take(self, name: str) -> None:
        """Selects the adapter of a job, in the place of another job's or of a `rows`."""
        if self._own == name:
            return
        if self._own is None:
            self.leave()
        self._placing.close()
        self._own = name
        select(self.held, self.selects(name))
        self._placing.enter_context(self.placed(name))

    def close(self) -> None:
        """The model is what it was between steps."""
        self.leave()
        self._around.close()
        self._stepping = False

    def gradients(self, parts: Sequence[Part], apart: bool = False) -> list[tuple[Tensor, list[Tensor | None]]]:
        """(loss, gradients of its parameters) of each part of a micro-batch.  `apart`: one part, by its own step."""
        names = {course.job.name for course, _, _ in parts}
        self._train(parts)
        if not self._stepping:
            self._around.enter_context(self.step.around(self.whole))
            self._stepping = True
        parameters = [course.parameters for course, _, _ in parts]
        with self._through(parts, apart):
            streams = self.stretches(parts)
            drawing = contextlib.nullcontext() if names <= self._quiet else streams.drawing()
            lengths = [row.tokens for _, mine, _ in parts for row in mine]
            kept_apart = self.step.gather is not None and self.flat(parts)
            with segments(lengths if kept_apart else None), torch.enable_grad():
                with drawing:
                    losses = self.losses(parts)
                every = [p for own in parameters for p in own]
                found = torch.autograd.grad(sum(losses, torch.zeros(())), every, allow_unused=True)
        if not streams.drawn:
            self._quiet |= names
        left = iter(found)
        return [(loss.detach(), [next(left) for _ in own]) for loss, own in zip(losses, parameters, strict=True)]

    def _train(self, parts: Sequence[Part]) -> None:
        """Puts the model into training mode."""
        for model in {id(course.ready.model): course.ready.model for course, _, _ in parts}.values():
            if not (model.training and all(part.training for part in self.held.children())):
                still_statistics(model.train().modules())

    def _through(self, parts: Sequence[Part], apart: bool) -> contextlib.AbstractContextManager[None]:
        """Within, each row goes through its job's adapter."""
        course = parts[0][0]
        if apart or course.alone:
            self._take(course.job.name)
            return contextlib.nullcontext()
        new = {name for name in self.names(parts) if name is not None} - self._inside
        if new or self._own is not None:
            names = {*self._inside, *new}
            self.leave()
            self._outer.enter_context(rows(self.held, sorted(names)))
            self._inside = names
        return rows(self.held, *self.routes(parts))

    def names(self, parts: Sequence[Part]) -> list[str | None]:
        """The adapter of each part; None where it has none."""
        return [course.job.name for course, _, _ in parts]

    def routes(self, parts: Sequence[Part]) -> tuple[list[str | None], list[int] | None]:
        """What `rows` is told of such a batch."""
        named = list(zip(self.names(parts), (mine for _, mine, _ in parts), strict=True))
        if self.flat(parts):
            return [name for name, _ in named], [sum(row.tokens for row in mine) for _, mine in named]
        return [name for name, mine in named for _ in mine], None
