"""What tasks with a new head have in common, and the part of it that classifications share, whatever they classify."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from ..base import lacking
from ..data.columns import alike, classes, in_order, known
from ..data.faults import Faults
from ..data.splitting import counts
from . import weighing
from .answering import outputs, windows
from .shown import Piece, pieces
from .task import Examples, Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class HeadTask(Task):
    """A head over the model's body.  The head trains in full."""

    def labels(self, split: Dataset, column: str, faults: Faults) -> list[int] | list[float]:
        """The labels as what the loss takes; values that are none are added to the faults."""
        raise NotImplementedError

    def check_labels(self, split: Dataset, column: str, faults: Faults) -> None:
        """Adds what is wrong with labels, before the task is fitted."""
        self.labels(split, column, faults)

    def outputs(self) -> dict[str, Any]:
        """The head in the model's configuration."""
        raise NotImplementedError

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        """What stands outside the body, and what of the body the model's files lack (a pooler, where the model was
        saved without one): it would be other random numbers wherever the adapter is opened."""
        new = lacking(model)
        outside = model.base_model_prefix + "."
        return tuple(n for n, _ in model.named_parameters() if not n.startswith(outside) or n in new)

    def logits(self, model: PreTrainedModel, examples: Examples, batch: int) -> torch.Tensor:
        """The head's outputs (rows, classes) in float32, on the CPU."""
        found = [(numbers, logits.float().cpu()) for numbers, _, logits in outputs(model, examples, batch)]
        order = torch.tensor([i for numbers, _ in found for i in numbers])
        return torch.cat([logits for _, logits in found])[order.argsort()]

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        count = 0
        for window in windows(self, rows, processor, batch, label=self.no_label()):
            logits = self.logits(model, window, batch)
            if not (finite := logits.isfinite().flatten(1).all(1)).all():
                raise ValueError(
                    f"the model's output for row {count + int(finite.int().argmin()) + 1} is not finite (NaN or "
                    "infinite), so there is no answer: open the base in float32, or train the adapter again"
                )
            yield from self.said(logits)
            count += len(window)

    def no_label(self) -> Any:
        """What stands for the label of a row that has none."""
        return 0

    def said(self, logits: torch.Tensor) -> Iterator[dict[str, Any]]:
        """What outputs (rows, classes) of the head mean."""
        raise NotImplementedError


def named_outputs(names: Sequence[str]) -> dict[str, Any]:
    """An output for each name, in the model's configuration."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


class Classes(HeadTask):
    """To one of several classes: accuracy, macro F1, Matthews' correlation, loss.

    Labels are texts, whole numbers or a `ClassLabel`; `names` lists the classes in order (empty: those in the data, in
    the order of the base's own head where it has one for them).  Macro F1 is the mean over all classes, also those that
    are neither met nor guessed.

    class_weights: "balanced", or {class: weight} (others weigh 1): what the loss of a row counts while it trains,
    brought to a mean of 1 over the training rows, see `weighing.weights`.  Metrics are unweighted.
    """

    headline = "accuracy"
    label: str | None
    names: tuple[str, ...]
    class_weights: weighing.Weights

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `given.Checked`.  Raises ValueError for weights that are none."""
        return weighing.meant(value) if name == "class_weights" else value

    def encode(self) -> dict[str, Any]:
        """As JSON values; the weights only where there are some."""
        return {k: v for k, v in super().encode().items() if k != "class_weights" or v is not None}

    def weights(self, train: Dataset) -> list[float] | None:
        return weighing.weights(self.class_weights, self.names, train["label"][:])

    def check_labels(self, split: Dataset, column: str, faults: Faults) -> None:
        found = classes(split, column, faults)
        if not self.names and not getattr(split.features[column], "names", None):  # else they are meant as they are
            alike(split, column, found, faults)

    def check_fitted(self, split: Dataset, faults: Faults) -> None:
        column = self.columns(split.column_names)["label"]
        known(split, column, classes(split, column, faults), self.names, faults)

    def fitted(self, train: Dataset) -> Self:
        faults = Faults()
        column = self.columns(train.column_names)["label"]
        found = classes(train, column, faults)
        faults.check()
        distinct = in_order(sorted(set(found)))
        if len(distinct) < 2:
            raise ValueError(f"classification needs two classes or more; column {column!r} holds only {list(distinct)}")
        names = self.names or tuple(getattr(train.features[column], "names", None) or ()) or distinct
        weighing.check(self.class_weights, names)
        return self if self.names else replace(self, names=names)  # type: ignore[type-var]

    def labels(self, split: Dataset, column: str, faults: Faults) -> list[int]:
        return known(split, column, classes(split, column, faults), self.names, faults)

    def figures(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        """The rows of each class, and the share of the validation rows that the most frequent one of train has: the
        accuracy of who always answers it."""
        counted = {part: counts(rows, self.names) for part, rows in parts.items()}
        most = max(self.names, key=lambda name: counted["train"][name])
        weights = self.weights(parts["train"])
        return {
            "classes": counted,
            "majority": counted["validation"][most] / max(len(parts["validation"]), 1),
            **({} if weights is None else {"class_weights": dict(zip(self.names, weights, strict=True))}),
        }

    def outputs(self) -> dict[str, Any]:
        return {**named_outputs(self.names), "problem_type": "single_label_classification"}

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        return pieces(self.example(row, processor), processor, self.names[row["label"]])

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        logits = examples.seen["logits"] = self.logits(model, examples, batch)
        return self.metrics(logits, examples.rows["label"][:])

    def said(self, logits: torch.Tensor) -> Iterator[dict[str, Any]]:
        """{label, probability, probabilities: {class: p}}, p the softmax of the outputs."""
        for row in logits.double().softmax(1):
            found = dict(zip(self.names, row.tolist(), strict=True))
            label = max(found, key=lambda name: found[name])
            yield {"label": label, "probability": found[label], "probabilities": found}

    def metrics(self, logits: torch.Tensor, labels: list[int]) -> dict[str, float]:
        """The metrics of a head's outputs (rows, classes)."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        guesses = logits.argmax(1).tolist()
        return {
            "loss": float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))),
            "accuracy": float(accuracy_score(labels, guesses)),
            "macro_f1": float(
                f1_score(labels, guesses, labels=range(len(self.names)), average="macro", zero_division=0)
            ),
            "mcc": float(matthews_corrcoef(labels, guesses)) if len({*labels, *guesses}) > 1 else 0.0,
        }
