"""What a task's training lowers, row by row: the losses that are clipped, and that an attack looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...observe.listen import evaluating, moved
from ...train.tasks.heads import Classes
from ...train.tasks.task import Examples
from .membership import Membership, membership


def by_batch(examples: Examples) -> bool:
    """Whether the losses of rows come out of one pass; of other tasks a row is a batch."""
    return isinstance(examples.task, Classes)


def row_losses(model: Any, examples: Examples, numbers: list[int]) -> Tensor:
    """What a training lowers, of each of these rows alone (n,)."""
    task = examples.task
    collate = task.collator(examples.processor)

    def batch(some: list[int]) -> dict[str, Any]:
        return moved(dict(collate([examples[n] for n in some])), model.device)

    def alone(row: dict[str, Any]) -> Tensor:
        loss = task.loss()(model, row)
        return loss if task.items(row) else loss.nan_to_num()  # of a row of which nothing is learned: 0, not 0 / 0

    if not by_batch(examples):
        return torch.stack([alone(batch([n])) for n in numbers])
    rows = batch(numbers)
    labels = rows.pop("labels")
    return torch.nn.functional.cross_entropy(model(**rows).logits.float(), labels, reduction="none")


def attack(model: Any, members: Examples, others: Examples, batch: int = 64) -> Membership:
    """The loss-threshold attack on a model as it is: `members` are rows that it was trained on, `others` rows of the
    same kind that it was not."""
    with evaluating(model):
        found = [
            torch.cat([row_losses(model, rows, part).cpu() for part in _parts(len(rows), batch)])
            for rows in (members, others)
        ]
    return membership(*found)


def _parts(number: int, size: int) -> list[list[int]]:
    return [list(range(i, min(i + size, number))) for i in range(0, number, size)]
