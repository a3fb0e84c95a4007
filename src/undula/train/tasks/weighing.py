"""Weights of classes in the loss of a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import given
from ...core.ranges import Positive

BALANCED = "balanced"
Weights = str | Mapping[str, Positive] | None
SUCH = f'"{BALANCED}", or the weight of a class by its name, such as {{"rare": 4.0}} (others weigh 1)'


def meant(value: Any) -> Any:
    """Class weights as a task holds them; what a weight may be says its type.  Raises ValueError for what is none."""
    if value is None or value == BALANCED:
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"class_weights is {SUCH}; found {value!r:.80}")
    return {str(k): w if given.number(w, float) is None else float(w) for k, w in value.items()}


def check(asked: Any, names: Sequence[str]) -> None:
    """Raises LookupError for weights of classes that are not there."""
    unknown = [name for name in asked if name not in names] if isinstance(asked, Mapping) else []
    if unknown:
        raise LookupError(
            f"class_weights has {', '.join(map(repr, unknown[:5]))}, and no class is called so; there are: "
            f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )


def weights(asked: Any, names: Sequence[str], labels: Sequence[int]) -> list[float] | None:
    """The weight of each class, of mean 1 over the rows with these labels; None where none is asked for.

    "balanced": n / (k n_c) for a class with n_c of n rows, of k classes that have any (as scikit-learn's).  A class
    without a row weighs 1: no loss asks for it.
    """
    if asked is None:
        return None
    rows = Counter(labels)
    if asked == BALANCED:
        raw = [1 / rows[i] if rows[i] else 0.0 for i in range(len(names))]
    else:
        raw = [asked.get(name, 1.0) for name in names]
    mean = sum(raw[i] * n for i, n in rows.items()) / sum(rows.values())
    return [raw[i] / mean if rows[i] else 1.0 for i in range(len(names))]


def weighed(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """(1/N) sum_n w[y_n] cross_entropy_n over the rows of a batch.  Not divided by the weights that the batch happens
    to have: batches add up to what all of their rows are together, accumulated or on several processes."""
    each = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return (each * weight.to(each)[labels]).mean()
