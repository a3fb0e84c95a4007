"""The trainer of forgetting: as many rows to forget as to keep, and the prototypes of the base.

Imported only when a training begins: it pulls in transformers.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from ...host.reference import alone
from ...observe.listen import moved
from ..adapter_trainer import AdapterTrainer
from .lending import evaluating
from .outputs import with_embeddings
from .task import Examples


class ForgettingTrainer(AdapterTrainer):
    """Its loss is the task's, with the prototypes that it needs."""

    def __init__(self, *, train_dataset: Examples, **given: Any) -> None:
        task: Any = train_dataset.task  # `forgetting.Forgets`
        self.task, self.prototypes = task, None
        few = chosen(train_dataset, task, given["args"].seed)
        if task.near or task.apart:
            self.prototypes = prototypes(given["model"], few, task, given["args"].per_device_train_batch_size)
        super().__init__(train_dataset=balanced(few, task), **given)

    def _loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        loss = self.task.lost(model, inputs, self.prototypes) * (1.0 if self.batches == 1 else self._share(inputs))
        return (loss, {}) if return_outputs else loss


def chosen(examples: Examples, task: Any, seed: int) -> Examples:
    """The rows that count: of each class `shots` at most, drawn by the seed, of those forgotten earlier none."""
    labels = examples.rows["label"][:]
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    earlier, count = set(task.numbers(task.earlier)), dict[int, int]()
    kept = []
    for i in order:
        count[labels[i]] = count.get(labels[i], 0) + 1
        if labels[i] not in earlier and (task.shots is None or count[labels[i]] <= task.shots):
            kept.append(i)
    return dataclasses.replace(examples, rows=examples.rows.select(sorted(kept)))


def balanced(examples: Examples, task: Any) -> Examples:
    """The rows with those of the fewer kind repeated until there are as many of both."""
    kinds = task.kinds(examples.rows["label"][:])
    most = max(map(len, kinds))
    numbers = [i for rows in kinds for i in (rows * (most // len(rows) + 1))[:most]]
    return dataclasses.replace(examples, rows=examples.rows.select(numbers))


@torch.no_grad()
def prototypes(model: Any, examples: Examples, task: Any, batch: int) -> Tensor:
    """(classes, d): the mean of what the base gives to its head, over the rows of each class; zeros for one without."""
    collate = task.collator(examples.processor)
    sums: Tensor | None = None
    counts = torch.zeros(len(task.names))
    with alone(model), evaluating(model):
        for _, rows in task.batches(examples, batch):
            inputs = moved(collate(rows), model.device)
            labels = inputs.pop("labels")
            _, embedded = with_embeddings(model, len(task.names), inputs)
            if sums is None:
                sums = embedded.new_zeros(len(task.names), embedded.shape[1], dtype=torch.float32)
                counts = counts.to(sums)
            sums.index_add_(0, labels, embedded.float())
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    assert sums is not None
    return sums / counts.clamp_min(1)[:, None]
