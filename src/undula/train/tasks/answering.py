"""Rows without labels, and what a model says to rows of either kind."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..stages import advanced
from .lending import evaluating
from .limits import Cuts
from .task import WINDOW, Example, Examples, Processor, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Asked(Examples):
    """Rows to answer as examples; what is cut of them is counted."""

    cuts: Cuts

    def __getitem__(self, i: int) -> Example:
        example, lost = self.task.traced(self.rows[i], self.processor)
        for what, (had, kept) in lost.items():
            self.cuts.add(what, had, kept)
        return example


def windows(
    task: Task, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int, **fixed: Any
) -> Iterator[Asked]:
    """Rows to answer, so many at once as `WINDOW` batches take, each with the values `fixed` beside its own; says in
    the end what was cut of them."""
    cuts, left, count = Cuts(), iter(rows), 0
    while window := [{**row, **fixed} for row in itertools.islice(left, WINDOW * batch)]:
        count += len(window)
        yield Asked(task, window, processor, cuts)
    for note in cuts.told(count, "given"):
        logging.getLogger("undula.train").warning(note)


@torch.no_grad()
def outputs(
    model: PreTrainedModel, examples: Examples, batch: int, labels: bool = False
) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor], torch.Tensor]]:
    """(numbers of the rows, inputs, logits) of every batch in evaluation mode, in the order of `Task.batches`.
    `labels`: the model is given those too, from which it makes what its decoder sees."""
    collate = examples.task.collator(examples.processor)
    with evaluating(model):
        for numbers, made in examples.task.batches(examples, batch):
            inputs = {k: v.to(model.device) for k, v in collate(made).items()}
            given = {k: v for k, v in inputs.items() if labels or k != "labels"}
            yield numbers, inputs, model(**given).logits
            advanced(len(numbers))
