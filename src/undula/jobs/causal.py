"""Language models: rows of all jobs in one batch, each attending to itself alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.adapter import Live
from ..train.base import model_folder, open_model
from ..train.fit import Prepared, prepare
from ..train.rows import LOG
from ..train.run import Run
from ..train.tasks.limits import vocabulary
from ..train.tasks.packing import check_apart
from ..train.tasks.shown import IGNORED
from ..train.tasks.task import Example, Processor
from .base import Base, Part
from .course import Course, Row
from .planner import flat, padded
from .streams import Streams, Stretch, generator_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 64  # tokens of a row that stands for others


class Causal(Base):
    """A language model.  Rows of all jobs stand in one flat row, each attending to itself alone."""

    can_select = True

    def __init__(self) -> None:
        super().__init__()
        self.size = flat
        self.model: PreTrainedModel | None = None

    def prepared(self, run: Run, name: str) -> tuple[Prepared, Live]:
        self.leave()
        first = self.model is None
        ready = prepare(run, self._opened, name)
        if first:
            self._see(ready)
        adapter = ready.adapter
        assert isinstance(adapter, Live)
        return ready, adapter

    def _see(self, ready: Prepared) -> None:
        """Whether rows can stand behind each other; they are padded where they would see each other then."""
        try:
            rows = [ready.train[i] for i in range(min(3, len(ready.train)))]
            check_apart(ready.model, ready.processor.pad_token_id, rows)
        except ValueError as error:
            self.size = padded
            LOG.warning(f"rows of jobs are padded: {error}")

    def _opened(self, run: Run) -> tuple[PreTrainedModel, Processor]:
        if self.model is None:
            self.model, processor = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
            self.held = self.model
            self._open(self.model, run)
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

    def routes(self, parts: Sequence[Part]) -> tuple[list[str | None], list[int] | None]:
        if self.size is padded:
            return [course.job.name for course, mine, _ in parts for _ in mine], None
        return self.names(parts), [sum(row.tokens for row in mine) for _, mine, _ in parts]

    def stretches(self, parts: Sequence[Part]) -> Streams:
        assert self.model is not None
        width = max(row.tokens for _, mine, _ in parts for row in mine) if self.size is padded else None
        found, at = [], 0
        for course, mine, _ in parts:
            for row in mine:
                draws = generator_of(course.ready.run.seed, row.number, self.model.device)
                found.append(Stretch(course.job.name, 0 if width else at, row.tokens, draws))
                at += row.tokens
        return Streams(found, width)

    def losses(self, parts: Sequence[Part], streams: Streams) -> list[Tensor]:
        every = [row.example for _, mine, _ in parts for row in mine]
        # the label of a token is what comes after it in its own row
        labels = [[*e["labels"][1:], IGNORED] for e in every]
        logits, targets = self._padded(every, labels) if self.size is padded else self._flat(parts, every, labels)
        wide = logits if logits.dtype.itemsize > 4 else logits.float()
        each = nn.functional.cross_entropy(wide, targets, reduction="none")
        counts = [sum(row.items for row in mine) for _, mine, _ in parts]
        return [own.sum() / items for own, (_, _, items) in zip(each.split(counts), parts, strict=True)]

    def _flat(
        self, parts: Sequence[Part], every: Sequence[Example], labels: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """(logits, labels) of all tokens whose label counts, in their order; rows stand behind each other."""
        assert self.model is not None
        device = self.model.device
        ids = torch.tensor([[token for e in every for token in e["input_ids"]]], device=device)
        positions = torch.tensor([[at for e in every for at in range(len(e["input_ids"]))]], device=device)
        flat = [label for own in labels for label in own]
        counted = torch.tensor([at for at, label in enumerate(flat) if label != IGNORED], device=device).long()
        targets = torch.tensor([label for label in flat if label != IGNORED], device=device).long()
        keep = {} if self._whole_head(parts) else {"logits_to_keep": counted}
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **keep).logits[0]
        return (logits if keep else logits[counted]), targets

    def _padded(self, every: Sequence[Example], labels: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """As `_flat`, of rows that are filled up to the longest on the right."""
        assert self.model is not None
        device, width = self.model.device, max(len(own) for own in labels)
        pad = self.model.config.pad_token_id or 0
        ids = [[*e["input_ids"], *[pad] * (width - len(e["input_ids"]))] for e in every]
        seen = [[1] * len(own) + [0] * (width - len(own)) for own in labels]
        given = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(seen, device=device)}
        logits = self.model(**given, use_cache=False).logits
        told = torch.tensor([[*own, *[IGNORED] * (width - len(own))] for own in labels], device=device)
        return logits[told != IGNORED], told[told != IGNORED]

    def _whole_head(self, parts: Sequence[Part]) -> bool:
        """Whether the head has to see all tokens: where an adapter stands on it, or it cannot be asked for some."""
        assert self.model is not None
        if "logits_to_keep" not in inspect.signature(type(self.model).forward).parameters:
            return True
        head = self.model.get_output_embeddings()
        path = next((n for n, m in self.model.named_modules() if m is head), None)
        return path is None or any(path in course.adapter.factors for course, _, _ in parts)
