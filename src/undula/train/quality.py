"""Rows of the training set by which an allocator tells the quality of what it chooses."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch

from ..observe.listen import moved
from .data.splitting import QUALITY_ROWS, told_quality
from .tasks.lending import evaluating
from .tasks.task import Examples


def set_aside(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """(rows to train on, rows that tell an allocator the quality), which are training rows, since nothing that a result
    is measured on may have a say in it."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = told_quality(len(order))
    rows = [sorted(order[count:]), sorted(order[:count])]
    train, aside = (dataclasses.replace(examples, rows=examples.rows.select(part)) for part in rows)
    return train, aside


def quality_of(model: Any, held: Examples) -> Callable[[], float]:
    """A function that gives the negative loss of the model as it is, on the first held-out examples."""
    collate = held.task.collator(held.processor)
    batch = collate([held[i] for i in range(min(QUALITY_ROWS, len(held)))])

    @torch.no_grad()
    def quality() -> float:
        with evaluating(model):
            return -float(held.task.loss()(model, moved(batch, model.device)))

    return quality
