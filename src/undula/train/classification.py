"""Sequence classification and regression: a text, or a pair of texts, to a class or a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .data import texts
from .heads import Classes, HeadTask
from .task import Example, Examples, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextTask(HeadTask):
    """A head over one text or a pair of them."""

    roles: ClassVar = {
        "text": ("text", "sentence", "sentence1", "premise"),
        "pair": ("sentence2", "hypothesis"),
        "label": ("label", "labels"),
    }
    optional = ("pair",)
    peft = "SEQ_CLS"
    max_length: int

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        columns = self.columns(split.column_names)
        named = {role: texts(split, column) for role, column in columns.items() if role != "label"}
        return Dataset.from_dict({**named, "label": self.labels(split, columns["label"])})

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification as Auto

        return Auto.from_pretrained(path, dtype=dtype, ignore_mismatched_sizes=True, **quantised, **self.outputs())

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        encoded = tokenizer(row["text"], row.get("pair"), truncation=True, max_length=self.max_length)
        return {**encoded, "labels": row["label"]}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)


@Task.register
@dataclass(frozen=True)
class Classification(Classes, TextTask):
    """Text to one of several classes, see `Classes`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: int = 128
    names: tuple[str, ...] = ()


@Task.register
@dataclass(frozen=True)
class Regression(TextTask):
    """Text to a number: mean squared error, Pearson's and Spearman's correlation."""

    headline = "pearson"
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: int = 128

    def labels(self, split: Dataset, column: str) -> list[float]:
        values = split[column][:]
        for row, value in enumerate(values):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"column {column!r} holds numbers; row {row} has {value!r}")
        return [float(v) for v in values]

    def outputs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        guesses = self.logits(model, examples, batch)[:, 0]
        labels = torch.tensor(examples.rows["label"][:])
        return {
            "mse": float((guesses - labels).square().mean()),
            "pearson": _correlation(guesses, labels),
            "spearman": _correlation(_ranks(guesses), _ranks(labels)),
        }


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, equal values at their mean rank."""
    _, group, size = values.unique(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - (size + 1) / 2)[group]


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = (t.double() - t.double().mean() for t in (a, b))
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0
