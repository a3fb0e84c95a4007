"""What tasks with a new head have in common, and the part of it that classifications share, whatever they classify."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from .task import Examples, Task, outputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class HeadTask(Task):
    """A head over the model's body.  The head trains in full."""

    def labels(self, split: Dataset, column: str) -> list[int] | list[float]:
        """The labels as what the loss takes.  Raises ValueError for values that are none."""
        raise NotImplementedError

    def outputs(self) -> dict[str, Any]:
        """The head in the model's configuration."""
        raise NotImplementedError

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        return tuple(n for n, _ in model.named_parameters() if not n.startswith(model.base_model_prefix + "."))

    def logits(self, model: PreTrainedModel, examples: Examples, batch: int) -> torch.Tensor:
        """The head's outputs (rows, classes) in float32, on the CPU."""
        found = [(numbers, logits.float().cpu()) for numbers, _, logits in outputs(model, examples, batch)]
        order = torch.tensor([i for numbers, _ in found for i in numbers])
        return torch.cat([logits for _, logits in found])[order.argsort()]


class Classes(HeadTask):
    """To one of several classes: accuracy, macro F1, Matthews' correlation, loss.

    Labels are texts, whole numbers or a `ClassLabel`; `names` lists the classes in order (empty: those in the data).
    """

    headline = "accuracy"
    label: str | None
    names: tuple[str, ...]

    def fitted(self, train: Dataset) -> Self:
        column = self.columns(train.column_names)["label"]
        feature, values = train.features[column], train[column][:]
        declared = tuple(getattr(feature, "names", None) or ())
        _whole(values, column)
        distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        if len(distinct) < 2:
            raise ValueError(f"classification needs two classes or more; column {column!r} holds only {distinct}")
        if self.names:
            return self
        return replace(self, names=declared or tuple(str(v) for v in distinct))  # type: ignore[type-var]

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
                f"column {column!r} names classes by texts or whole numbers; row {row} has {value!r:.80}{hint}"
            )
