"""What a report shows beside metrics: figures of each class, what is taken for what, the rows that are most wrong, what
was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .tasks.heads import Classes
from .tasks.rouge import shortened

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from .tasks.task import Examples

WORST = 10  # rows
WHOLE = 100  # classes: of more, only the most frequent confusions are listed
CHEAP = 1e11  # multiplications that the adapter's spectra may cost


def details(examples: Examples) -> dict[str, Any]:
    """{per_class, confusion, confused, worst} of a classification, {written} of what generates: of what has been
    measured last on these examples."""
    found: dict[str, Any] = {}
    if "logits" in examples.seen and isinstance(examples.task, Classes):
        found |= of_classes(examples.seen["logits"], examples.rows["label"][:], examples.task.names)
        for row in found["worst"]:
            row |= _told(examples, row["row"])
    if "written" in examples.seen:
        found["written"] = examples.seen["written"]
    return found


def of_classes(logits: torch.Tensor, labels: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Of outputs (rows, classes): precision, recall, F1, rows and answers of each class; confusion[i][j], the rows of
    class i that are said to be j (of many classes the most frequent confusions alone); the rows of the highest loss."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    said, numbers = logits.argmax(1).tolist(), range(len(names))
    figures = precision_recall_fscore_support(labels, said, labels=numbers, zero_division=0)
    matrix = confusion_matrix(labels, said, labels=numbers)
    answers = matrix.sum(0).tolist()
    per_class = [
        {
            "class": name,
            "precision": float(p),
            "recall": float(r),
            "f1": float(f),
            "rows": int(n),
            "answers": answers[i],
        }
        for i, (name, p, r, f, n) in enumerate(zip(names, *figures, strict=True))
    ]
    wrong = [(int(matrix[i][j]), names[i], names[j]) for i, j in zip(*matrix.nonzero(), strict=True) if i != j]
    confused = [{"class": a, "said": b, "rows": n} for n, a, b in sorted(wrong, key=lambda w: -w[0])[:50]]
    whole = {"confusion": matrix.tolist()} if len(names) <= WHOLE else {}
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    shares = logits.double().softmax(1)
    order = losses.argsort(descending=True, stable=True)[:WORST].tolist()
    worst = [
        {"row": i, "loss": float(losses[i]), "class": names[labels[i]], "said": names[said[i]],
         "probability": float(shares[i, said[i]])}
        for i in order
    ]  # fmt: skip
    return {"per_class": per_class, **whole, "confused": confused, "worst": worst}


def _told(examples: Examples, i: int) -> dict[str, str]:
    row = examples.rows.select_columns([c for c in ("text", "pair") if c in examples.rows.column_names])
    return {name: shortened(str(value)) for name, value in (row[i] if row.column_names else {}).items() if value}


def diagnosis(adapter: Adapter) -> list[Mapping[str, Any]]:
    """The rows of `diagnose`, where they are cheap: the spectra of plain products of factors, or of small layers."""
    from ..core.method import LowRank
    from ..observe.diagnose import diagnose

    dear = sum(
        float(max(shape)) * min(shape) ** 2
        for site, shape in adapter.shapes.items()
        if not isinstance(adapter.methods[site], LowRank)
    )
    return [] if dear > CHEAP or not adapter.methods else list(diagnose(adapter))
