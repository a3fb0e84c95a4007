"""Language models: rows of all jobs in one batch, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.adapter import Live
from ..observe.listen import moved
from ..train.base import model_folder, open_model
from ..train.prepared import Prepared, prepare
from ..train.rows import LOG
from ..train.run import Run
from ..train.tasks.labelled import ALL, Head, of_labels_alone
from ..train.tasks.lending import evaluating
from ..train.tasks.limits import vocabulary
from ..train.tasks.packing import Flat, flattens, next_tokens
from ..train.tasks.shown import IGNORED
from ..train.tasks.task import Example, Processor
from .base import READ, Base, Part, Read
from .course import Course, Row
from .planner import flat, padded
from .streams import Draws, Streams, Stretch, generator_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 64  # tokens of a row that stands for others


class Causal(Base):
    """A language model.  Rows of all jobs stand in one flat row, each attending to itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self.size = flat
        self.model: PreTrainedModel | None = None
        self.processors: dict[str, Processor] = {}  # by task: jobs share them, a tokenizer takes 12 MB
        self.seen = False  # how the model takes steps
        self.head: str | None = None  # where it stands; "": nowhere

    @property
    def whole(self) -> Any:
        return self.model

    def prepared(self, run: Run, name: str, read: Read = READ) -> tuple[Prepared, Live]:
        self.close()
        ready = prepare(run, self._opened, name, read)
        if not self.seen:  # whichever job is the first that can begin
            self._see(ready)
            self.seen = True
        adapter = ready.adapter
        assert isinstance(adapter, Live)
        return ready, adapter

    def _see(self, ready: Prepared) -> None:
        """Looks at how the model takes steps: whether rows can stand behind each other, and how its head is asked for
        what is learned.  Raises ValueError where its loss is none of its labels alone."""
        self.step = ready.run.task.step(ready.train, ready.model)
        if self.step.gather is None and not flattens(ready.model):
            self.size = padded
            LOG.warning(self.step.note or "rows of jobs are padded")
        if self.step.head is None:
            rows = [ready.train[i] for i in range(min(3, len(ready.train)))]
            batch = moved(dict(ready.run.task.collator(ready.processor)(rows)), ready.model.device)
            with evaluating(ready.model), torch.no_grad():
                found = ready.model(**batch)
            if not of_labels_alone(found, batch["labels"]):
                raise ValueError(
                    f"{type(ready.model).__name__} trains by more than its labels (a loss of {float(found.loss):.6g}), "
                    "as by a balance of experts: jobs would not get what each gets alone. Train it by itself"
                )

    def _opened(self, run: Run) -> tuple[PreTrainedModel, Processor]:
        if self.model is None:
            self.model, processor = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
            self.held = self.model
            self._open(self.model, run)
            self.processors[repr(run.task)] = processor
        elif repr(run.task) not in self.processors:
            processor = self.processors[repr(run.task)] = run.task.processor(model_folder(run.model))
            run.task.agree(processor, self.model)
        return self.model, self.processors[repr(run.task)]

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

    def flat(self, parts: Sequence[Part]) -> bool:
        return self.size is flat

    def stretches(self, parts: Sequence[Part]) -> Streams:
        assert self.model is not None
        width = max(row.tokens for _, mine, _ in parts for row in mine) if self.size is padded else None
        found, at = [], 0
        for course, mine, _ in parts:
            for row in mine:
                drawn = Draws(course.ready.run.seed, row.number, self.model.device)
                found.append(Stretch(course.job.name, 0 if width else at, row.tokens, drawn))
                at += row.tokens
        return Streams(found, width)

    def losses(self, parts: Sequence[Part]) -> list[Tensor]:
        assert self.model is not None
        every = [row.example for _, mine, _ in parts for row in mine]
        inputs = moved(self._batch(every), self.model.device)
        head = self.step.head or Head(ALL)
        each = (Head(ALL) if self._whole_head(parts) else head).losses(self.model, {**inputs, "use_cache": False})
        counts = [sum(row.items for row in mine) for _, mine, _ in parts]
        if not sum(counts):  # no label counts: there is one loss, of 0
            return [each.sum() for _ in parts]
        return [own.sum() / items for own, (_, _, items) in zip(each.split(counts), parts, strict=True)]

    def _batch(self, every: Sequence[Example]) -> dict[str, Any]:
        if self.step.gather is None:
            return self._padded(every) if self.size is padded else _flat(every)
        assert isinstance(self.step.gather, Flat)
        return {name: value for name, value in self.step.gather.row(every).items() if name != "segments"}

    def _padded(self, every: Sequence[Example]) -> dict[str, Tensor]:
        """Rows that are filled up to the longest on the right."""
        assert self.model is not None
        width, pad = max(len(e["input_ids"]) for e in every), self.model.config.pad_token_id or 0

        def filled(values: Sequence[int], with_what: int) -> list[int]:
            return [*values, *[with_what] * (width - len(values))]

        return {
            "input_ids": torch.tensor([filled(e["input_ids"], pad) for e in every]),
            "attention_mask": torch.tensor([filled([1] * len(e["input_ids"]), 0) for e in every]),
            "labels": torch.tensor([filled(e["labels"], IGNORED) for e in every]),
        }

    def _whole_head(self, parts: Sequence[Part]) -> bool:
        """Whether the head has to see all tokens, since an adapter stands on it."""
        assert self.model is not None
        if self.head is None:
            found = self.model.get_output_embeddings()
            self.head = next((n for n, m in self.model.named_modules() if m is found), "")
        return not self.head or any(self.head in course.adapter.factors for course, _, _ in parts)


def _flat(every: Sequence[Example]) -> dict[str, Tensor]:
    """Rows behind each other in one, in their order."""
    return {
        "input_ids": torch.tensor([[token for e in every for token in e["input_ids"]]]),
        "position_ids": torch.tensor([[at for e in every for at in range(len(e["input_ids"]))]]),
        **next_tokens(every),
    }
