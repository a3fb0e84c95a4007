"""One base in memory for many jobs: what opens it, and what a micro-batch of several jobs' rows costs each of them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapter import Live
from ..host.host import adapters, detach, select
from ..host.mixing import rows
from ..train.base import model_folder, open_model
from ..train.fit import Prepared, prepare
from ..train.run import Run
from ..train.tasks.lending import still_statistics
from ..train.tasks.limits import vocabulary
from ..train.tasks.shown import IGNORED
from ..train.tasks.task import Processor
from .course import Course, Row
from .streams import Streams, Stretch, generator_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 64  # tokens of a row that stands for others

Part = tuple[Course, Sequence[Row], int]  # rows of a job's step, and the items of the whole step


class Base(abc.ABC):
    """A pretrained model, and the adapters of jobs on it."""

    held: nn.Module  # what the adapters are attached to
    can_select: ClassVar[bool]  # whether a micro-batch of one job can do without `rows`

    def __init__(self) -> None:
        self._quiet: set[str] = set()  # jobs in whose micro-batches nothing is drawn
        self._outer = contextlib.ExitStack()  # a `rows` around those of the micro-batches, of the names `_inside`
        self._inside: set[str] = set()

    @abc.abstractmethod
    def prepared(self, run: Run, name: str) -> tuple[Prepared, Live]:
        """A run with its adapter attached and selected, and the adapter with all that it trains."""

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
        with self._through(parts), torch.enable_grad():
            with drawing:
                losses = self.losses(parts, streams)
            every = [p for own in parameters for p in own]
            found = torch.autograd.grad(sum(losses, torch.zeros(())), every, allow_unused=True)
        if not streams.drawn:
            self._quiet |= names
        left = iter(found)
        return [(loss.detach(), [next(left) for _ in own]) for loss, own in zip(losses, parameters, strict=True)]

    def _train(self, parts: Sequence[Part]) -> None:
        if not self.held.training:
            still_statistics(self.held.train().modules())

    def _through(self, parts: Sequence[Part]) -> contextlib.AbstractContextManager[Any]:
        """Within, each row goes through its job's adapter."""
        if parts[0][0].alone:
            return self.selected(parts[0][0])
        new = {course.job.name for course, _, _ in parts} - self._inside
        if new:
            names = [*self._inside, *sorted(new)]
            self.leave()
            self._outer.enter_context(rows(self.held, names))
            self._inside = set(names)
        return rows(self.held, *self.routes(parts))

    @abc.abstractmethod
    def routes(self, parts: Sequence[Part]) -> tuple[list[str], list[int] | None]:
        """What `rows` is told of such a batch."""


class Causal(Base):
    """A language model.  Rows of all jobs stand in one flat row, each attending to itself alone."""

    can_select = True

    def __init__(self) -> None:
        super().__init__()
        self.model: PreTrainedModel | None = None

    def prepared(self, run: Run, name: str) -> tuple[Prepared, Live]:
        self.leave()
        ready = prepare(run, self._opened, name)
        adapter = ready.adapter
        assert isinstance(adapter, Live)
        return ready, adapter

    def _opened(self, run: Run) -> tuple[PreTrainedModel, Processor]:
        if self.model is None:
            self.model, processor = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
            self.held = self.model
        else:
            processor = run.task.processor(model_folder(run.model))
            run.task.agree(processor, self.model)
        return self.model, processor

    def alone(self, adapter: Live) -> bool:
        return bool(adapter.full)

    def sample(self, course: Course, tokens: int) -> list[Row]:
        assert self.model is not None
        lengths = [min(LENGTH, tokens - at) for at in range(0, tokens, LENGTH)]
        size = vocabulary(self.model) or 2
        made = []
        for n, length in enumerate(lengths):
            ids = torch.randint(size, (length,), generator=generator_of(n, 0, torch.device("cpu"))).tolist()
            made.append(Row({"input_ids": ids, "labels": ids}, -1 - n, length, length - 1))
        return made

    def routes(self, parts: Sequence[Part]) -> tuple[list[str], list[int] | None]:
        tokens = [sum(row.tokens for row in mine) for _, mine, _ in parts]
        return [course.job.name for course, _, _ in parts], tokens

    def stretches(self, parts: Sequence[Part]) -> Streams:
        assert self.model is not None
        found, at = [], 0
        for course, mine, _ in parts:
            for row in mine:
                draws = generator_of(course.ready.run.seed, row.number, self.model.device)
                found.append(Stretch(course.job.name, at, row.tokens, draws))
                at += row.tokens
        return Streams(found, None)

    def losses(self, parts: Sequence[Part], streams: Streams) -> list[Tensor]:
        assert self.model is not None
        every = [row.example for _, mine, _ in parts for row in mine]
        device = self.model.device
        ids = torch.tensor([[token for e in every for token in e["input_ids"]]], device=device)
        positions = torch.tensor([[at for e in every for at in range(len(e["input_ids"]))]], device=device)
        # the label of a token is what comes after it in its own row
        labels = torch.tensor([label for e in every for label in (*e["labels"][1:], IGNORED)], device=device)
        counted = (labels != IGNORED).nonzero()[:, 0]
        keep = {} if self._whole_head(parts) else {"logits_to_keep": counted}
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **keep).logits[0]
        logits = logits if keep else logits[counted]
        wide = logits if logits.dtype.itemsize > 4 else logits.float()
        each = nn.functional.cross_entropy(wide, labels[counted], reduction="none")
        counts = [sum(row.items for row in mine) for _, mine, _ in parts]
        return [own.sum() / items for own, (_, _, items) in zip(each.split(counts), parts, strict=True)]

    def _whole_head(self, parts: Sequence[Part]) -> bool:
        """Whether the head has to see all tokens: where an adapter stands on it."""
        assert self.model is not None
        head = self.model.get_output_embeddings()
        path = next((n for n, m in self.model.named_modules() if m is head), None)
        return path is None or any(path in course.adapter.factors for course, _, _ in parts)


def base_of(runs: Mapping[str, Run]) -> Base:
    """The base of these runs, which agree; nothing is opened yet."""
    return Causal()
