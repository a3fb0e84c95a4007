"""Sequence classification and regression: a text, or a pair of texts, to a class or a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .data import texts
from .task import Example, Examples, Task, outputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextTask(Task):
    """A head over one text or a pair of them.  The head trains in full."""

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

    def labels(self, split: Dataset, column: str) -> list[int] | list[float]:
        """The labels as what the loss takes.  Raises ValueError for values that are none."""
        raise NotImplementedError

    def outputs(self) -> dict[str, Any]:
        """The head in the model's configuration."""
        raise NotImplementedError

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification as Auto

        return Auto.from_pretrained(path, dtype=dtype, ignore_mismatched_sizes=True, **quantised, **self.outputs())

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        return tuple(n for n, _ in model.named_parameters() if not n.startswith(model.base_model_prefix + "."))

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        encoded = tokenizer(row["text"], row.get("pair"), truncation=True, max_length=self.max_length)
        return {**encoded, "labels": row["label"]}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def logits(self, model: PreTrainedModel, examples: Examples, batch: int) -> torch.Tensor:
        """The head's outputs (rows, classes) in float32, on the CPU."""
        found = [(numbers, logits.float().cpu()) for numbers, _, logits in outputs(model, examples, batch)]
        order = torch.tensor([i for numbers, _ in found for i in numbers])
        return torch.cat([logits for _, logits in found])[order.argsort()]


@Task.register
@dataclass(frozen=True)
class Classification(TextTask):
    """Text to one of several classes: accuracy, macro F1, Matthews' correlation, loss.

    Labels are texts, whole numbers or a `ClassLabel`; `names` lists the classes in order (empty: those in the data).
    """

    headline = "accuracy"
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: int = 128
    names: tuple[str, ...] = ()

    def fitted(self, train: Dataset) -> Classification:
        column = self.columns(train.column_names)["label"]
        feature, values = train.features[column], train[column][:]
        declared = tuple(getattr(feature, "names", None) or ())
        _whole(values, column)
        distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        if len(distinct) < 2:
            raise ValueError(f"classification needs two classes or more; column {column!r} holds only {distinct}")
        return self if self.names else replace(self, names=declared or tuple(str(v) for v in distinct))

    def labels(self, split: Dataset, column: str) -> list[int]:
        feature, values = split.features[column], split[column][:]
        _whole(values, column)
        declared = getattr(feature, "names", None)
        number = {name: i for i, name in enumerate(self.names)}
        called = [declared[v] if declared and 0 <= v < len(declared) else str(v) for v in values]
        strange = sorted(set(called) - set(number))
        if strange:
            raise ValueError(
                f"column {column!r} holds classes that are not in the training data: {', '.join(strange[:5])}; "
                f"known are: {', '.join(self.names[:20])}"
            )
        return [number[c] for c in called]

    def outputs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
            "problem_type": "single_label_classification",
        }

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        return self.metrics(self.logits(model, examples, batch), examples.rows["label"][:])

    def metrics(self, logits: torch.Tensor, labels: list[int]) -> dict[str, float]:
        """The metrics of a head's outputs (rows, classes)."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        guesses = logits.argmax(1).tolist()
        return {
            "loss": float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))),
            "accuracy": float(accuracy_score(labels, guesses)),
            "macro_f1": float(f1_score(labels, guesses, average="macro")),
            "mcc": float(matthews_corrcoef(labels, guesses)),
        }


def _whole(values: list[Any], column: str) -> None:
    """Raises ValueError unless every label is a text or a whole number."""
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            hint = "; numbers with a fraction are for --task regression" if isinstance(value, float) else ""
            raise ValueError(
                f"column {column!r} names classes by texts or whole numbers; row {row} has {value!r}{hint}"
            )


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
