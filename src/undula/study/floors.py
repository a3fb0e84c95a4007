"""What an answer is worth that never looks at its input: without that line, chance looks like skill."""

from __future__ import annotations

from collections import Counter

import torch

from ..train.tasks.heads import Classes
from .sources import Sources
from .spec import Rows


def floor(rows: Rows, seed: int, sources: Sources) -> float | None:
    """The headline metric on the test rows of always answering the commonest class of the training rows.  None for
    tasks that have no classes, and where the metric would be a matter of how sure the answer is."""
    task, parts = sources.opened(rows, seed)
    if not isinstance(task, Classes):
        return None
    labels = [int(v) for v in parts["test"]["label"][:]]
    commonest = Counter(int(v) for v in parts["train"]["label"][:]).most_common(1)[0][0]
    logits = torch.zeros(len(labels), len(task.names))
    logits[:, commonest] = 1.0
    return task.metrics(logits, labels).get(task.headline) if task.headline != "loss" else None
