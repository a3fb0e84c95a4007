"""Multi-label classification: a text, or a pair of texts, to any number of classes, none included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from ...core.ranges import Count, Inside
from ..data.columns import alike, in_order
from ..data.faults import Faults
from ..data.label_sets import (
    are_vectors,
    bit_columns,
    declared,
    from_bits,
    from_vectors,
    label_sets,
    numbered,
    separator_of,
    undivided,
)
from .classification import TextTask
from .heads import named_outputs
from .outputs import head_of, own_names
from .shown import Piece, pieces
from .task import Example, Examples, Processor, Task, Traced

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOLD = 20  # classes that a sentence names


@Task.register
@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Text to a set of classes: binary cross-entropy for each class; micro and macro F1 over all of them, and the share
    of rows whose set is right to the last label, where a class is given if its probability is `threshold` or more.

    The labels of a row are a list; a text with `separator` between them (None: ; or | or , whichever is met first); a
    vector of 0 and 1 (`vectors`; None: where they look like it); or, where there is no column of labels, a column of 0
    and 1 for each class: those in `names`, or all that hold little else.  A row may have no label.  `names` lists the
    classes in order (empty: those in the data).
    """

    optional = ("pair", "label")
    headline = "micro_f1"
    probable = False

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: Count | None = None
    names: tuple[str, ...] = ()
    separator: str | None = None
    threshold: Inside = 0.5
    vectors: bool | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator is what stands between the labels of a row, such as ; found an empty text")

    def check(self, split: Dataset, faults: Faults) -> None:
        super().check(split, faults)
        columns = self.columns(split.column_names, Faults())
        if "label" not in columns and not self._bits(split):
            faults.missing(
                f"the data have no column for label (looked for {', '.join(self.roles['label'])}), nor two columns or "
                "more that hold 0 and 1, one for each class",
                "Name it: --column label=..., in Python MultiLabel(label=...); or the columns of the classes: "
                "--task-set names=A,B, in Python MultiLabel(names=('A', 'B'))",
            )

    def check_labels(self, split: Dataset, column: str, faults: Faults) -> None:
        sets = self._sets(split, column, faults)
        if not self.names:
            alike(split, column, [label for labels in sets for label in labels], faults, _places(sets))
        if not self.names and not self.separator:
            undivided(split, column, sets, faults)

    def check_fitted(self, split: Dataset, faults: Faults) -> None:
        self._numbers(split, faults)

    def fitted(self, train: Dataset) -> Self:
        column, faults = self.columns(train.column_names).get("label"), Faults()
        if column is None:
            return self if self.names else replace(self, names=self._bits(train))
        vectors = are_vectors(train, column) if self.vectors is None else self.vectors
        task = replace(self, separator=separator_of(train, column, self.separator), vectors=vectors)
        found = {label for labels in task._sets(train, column, faults) for label in labels}
        faults.check()
        names = self.names or declared(train, column) or in_order(sorted(found))
        if vectors and not self.names:
            names = tuple(map(str, range(len(train[0][column]))))
        if not names:
            raise ValueError(f"column {column!r} has no label in any row: there is nothing to learn")
        return replace(task, names=names)

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset, Features, List, Value

        faults, columns = Faults(), self.columns(split.column_names)
        texts = self.texts(split, {r: c for r, c in columns.items() if r != "label"}, faults)
        numbers = self._numbers(split, faults)
        faults.check()
        kinds = {**dict.fromkeys(texts, Value("string")), "label": List(Value("int64"))}
        return Dataset.from_dict({**texts, "label": numbers}, features=Features(kinds))

    def _bits(self, split: Dataset) -> tuple[str, ...]:
        """The columns of the classes, where there is no column of labels."""
        if self.names:
            return self.names if set(self.names) <= set(split.column_names) else ()
        return bit_columns(split, list(self.columns(split.column_names, Faults()).values()))

    def _sets(self, split: Dataset, column: str, faults: Faults) -> list[list[str]]:
        vectors = are_vectors(split, column) if self.vectors is None else self.vectors
        if vectors:
            return from_vectors(split, column, self.names, faults)
        return label_sets(split, column, separator_of(split, column, self.separator), faults)

    def _numbers(self, split: Dataset, faults: Faults) -> list[list[int]]:
        column = self.columns(split.column_names).get("label")
        if column is None:
            return from_bits(split, self._bits(split), faults)
        return numbered(split, column, self._sets(split, column, faults), self.names, faults)

    def notes(self, split: Dataset) -> Iterator[str]:
        columns = self.columns(split.column_names)
        column, bits = columns.get("label"), () if "label" in columns else self._bits(split)
        unused = [c for c in split.column_names if c not in (*columns.values(), *bits)]
        if unused:
            yield f"columns that are not used: {', '.join(map(repr, unused))[:200]}"
        if bits and not self.names:
            yield f"a class is what has a column of 0 and 1: {', '.join(map(repr, bits))[:200]}"
        if column is not None and (self.vectors or self.vectors is None and are_vectors(split, column)):
            yield f"column {column!r}: labels are vectors of 0 and 1 (vectors=False: lists of classes)"
        elif column is not None and self.separator is None:
            mark = separator_of(split, column, None)
            if any(isinstance(value, str) and mark in value for value in split[column][:]):
                yield f"column {column!r}: labels are what stands between {mark!r} (another: separator)"

    def figures(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        """The rows of each class, and those that have none."""
        counted = {part: Counter(n for labels in rows["label"][:] for n in labels) for part, rows in parts.items()}
        return {
            "classes": {part: {name: found[i] for i, name in enumerate(self.names)} for part, found in counted.items()},
            "without_label": {part: sum(not labels for labels in rows["label"][:]) for part, rows in parts.items()},
        }

    def told(self, figures: Mapping[str, Any]) -> Iterator[str]:
        for part, counted in figures["classes"].items():
            none = [name for name, rows in counted.items() if not rows]
            if none:
                yield f"classes without a {part} row: {', '.join(none[:TOLD])}{', ...' if len(none) > TOLD else ''}"
            if figures["without_label"][part]:
                yield f"{figures['without_label'][part]} {part} rows have no label, and count as such"
        by_rows = sorted(figures["classes"]["train"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {rows}" for name, rows in by_rows[:TOLD]) + (", ..." if len(by_rows) > TOLD else "")
        yield f"{len(by_rows)} classes, and how many train rows have them: {shown}"

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        if not head_of(config, "ForSequenceClassification") or config.problem_type != "multi_label_classification":
            return None
        return cls(names=own_names(config) or tuple(map(str, range(int(config.num_labels or 0)))))

    def outputs(self) -> dict[str, Any]:
        return {**named_outputs(self.names), "problem_type": "multi_label_classification"}

    def traced(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Traced:
        example, lost = super().traced(row, tokenizer)
        return {**example, "labels": [float(i in row["label"]) for i in range(len(self.names))]}, lost

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        padded = super().collator(tokenizer)

        def together(examples: list[Example]) -> Mapping[str, torch.Tensor]:
            batch = padded([{k: v for k, v in example.items() if k != "labels"} for example in examples])
            labels = torch.tensor([example["labels"] for example in examples])
            return {**batch, "labels": labels}

        return together

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        return pieces(self.example(row, processor), processor, ", ".join(self.names[i] for i in row["label"]) or "none")

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        from sklearn.metrics import f1_score

        logits = self.logits(model, examples, batch)
        labels = torch.zeros_like(logits)
        for row, numbers in enumerate(examples.rows["label"][:]):
            labels[row, numbers] = 1.0
        found, wanted = self.given(logits).int().numpy(), labels.int().numpy()
        return {
            "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)),
            **{f"{how}_f1": float(f1_score(wanted, found, average=how, zero_division=0)) for how in ("micro", "macro")},
            "subset_accuracy": float((found == wanted).all(1).mean()),
        }

    def no_label(self) -> list[int]:
        return []

    def said(self, logits: torch.Tensor) -> Iterator[dict[str, Any]]:
        """{labels: those that are given, probabilities: {class: p}}, p the sigmoid of the outputs."""
        for row, given in zip(logits.double().sigmoid(), self.given(logits), strict=True):
            found = dict(zip(self.names, row.tolist(), strict=True))
            yield {"labels": [name for name, has in zip(self.names, given, strict=True) if has], "probabilities": found}

    def given(self, logits: torch.Tensor) -> torch.Tensor:
        """Which classes each row is said to have, (rows, classes)."""
        return logits.sigmoid() >= self.threshold


def _places(sets: Sequence[Sequence[str]]) -> list[int]:
    """The row of each label."""
    return [row for row, labels in enumerate(sets) for _ in labels]
