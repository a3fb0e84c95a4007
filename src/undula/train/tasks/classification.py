"""Sequence classification and regression: a text, or a pair of texts, to a class or a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.ranges import Count
from ..data.columns import numbers, texts
from ..data.faults import Faults
from .heads import Classes, HeadTask
from .outputs import head_of, own_names, with_head
from .packing import Flat, beginnings, cut, longest
from .step import Step, apart_with_firsts, packed
from .task import Example, Examples, Task, Traced
from .weighing import Weights

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


LENGTH = 512  # tokens of a row, special ones included, where a task does not say: longer texts are cut


class TextTask(HeadTask):
    """A head over one text or a pair of them, of `max_length` tokens at most, special ones included (None: 512, or
    what the model has positions for)."""

    roles: ClassVar = {
        "text": ("text", "sentence", "sentence1", "premise"),
        "pair": ("sentence2", "hypothesis"),
        "label": ("label", "labels"),
    }
    optional: ClassVar[tuple[str, ...]] = ("pair",)
    peft: ClassVar[str | None] = "SEQ_CLS"
    pipeline = "text-classification"
    max_length: Count | None

    def check(self, split: Dataset, faults: Faults) -> None:
        for role, column in self.columns(split.column_names, faults).items():
            if role == "label":
                self.check_labels(split, column, faults)
            else:
                texts(split, column, faults)

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        faults = Faults()
        columns = self.columns(split.column_names)
        named = self.texts(split, {r: c for r, c in columns.items() if r != "label"}, faults)
        labels = self.labels(split, columns["label"], faults)
        faults.check()
        return Dataset.from_dict({**named, "label": labels})

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({
            role: texts(split, column, faults) for role, column in self.inputs(split.column_names, faults).items()
        })  # fmt: skip

    def texts(self, split: Dataset, columns: Mapping[str, str], faults: Faults) -> dict[str, list[str]]:
        """{role: texts} of the columns of these roles."""
        return {role: texts(split, column, faults) for role, column in columns.items()}

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification as Auto

        return with_head(Auto, path, getattr(self, "names", ()), dtype=dtype, **quantised, **self.outputs())

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        return self.traced(row, tokenizer)[0]

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        limit = self.max_length or min(LENGTH, tokenizer.model_max_length)
        texts = (row["text"], row["pair"]) if row.get("pair") is not None else (row["text"],)
        encoded = tokenizer(*texts, verbose=False)
        had, lost = len(encoded["input_ids"]), {}
        if had > limit:
            encoded = tokenizer(*texts, truncation=True, max_length=limit)
            lost["the text is cut at its end" if len(texts) == 1 else "the texts are cut at their ends"] = had, limit
        return {**encoded, "labels": row["label"]}, lost

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        padded = self.collator(examples.processor)
        flats = [Flat(lambda rows: {"labels": padded(rows)["labels"]}, begin) for begin in beginnings(model)]
        rows = cut(longest(examples))
        return packed(model, flats, padded, apart_with_firsts, [*rows, rows[0]])


@Task.register
@dataclass(frozen=True)
class Classification(Classes, TextTask):
    """Text to one of several classes, see `Classes`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: Count | None = None
    names: tuple[str, ...] = ()
    class_weights: Weights = None

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        several = head_of(config, "ForSequenceClassification") and int(config.num_labels or 0) > 1
        if not several or config.problem_type not in (None, "single_label_classification"):
            return None
        return cls(names=own_names(config) or tuple(map(str, range(int(config.num_labels or 0)))))


@Task.register
@dataclass(frozen=True)
class Regression(TextTask):
    """Text to a number: mean squared error, Pearson's and Spearman's correlation."""

    headline = "pearson"
    probable = False
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: Count | None = None

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        one = head_of(config, "ForSequenceClassification") and config.num_labels == 1
        return cls() if one and config.problem_type in (None, "regression") else None

    def labels(self, split: Dataset, column: str, faults: Faults) -> list[float]:
        return numbers(split, column, faults)

    def outputs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def said(self, logits: torch.Tensor) -> Iterator[dict[str, Any]]:
        """{value}."""
        for row in logits[:, 0].tolist():
            yield {"value": row}

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        guesses = self.logits(model, examples, batch)[:, 0]
        labels = torch.tensor(examples.rows["label"][:])
        return {
            "mse": float((guesses - labels).square().mean()),
            **correlations(guesses, labels),
        }


def correlations(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant."""
    from scipy import stats

    a, b = a.double(), b.double()
    if (a == a[0]).all() or (b == b[0]).all():
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(stats.pearsonr(a, b).statistic), "spearman": float(stats.spearmanr(a, b).statistic)}
