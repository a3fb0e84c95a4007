"""What should make the owner of a training look twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

RISEN = 1.5  # by this factor, and by MARGIN: the losses of steps scatter
MARGIN = 0.1


def doubts(
    held: Dataset,
    before: Mapping[str, float],
    after: Mapping[str, float],
    losses: Sequence[Sequence[float]],
    names: Sequence[str] = (),
) -> list[str]:
    """Plain sentences on a training that ended and yet may have failed.  `names` are those of the classes."""
    found: list[str] = []
    values = [loss for _, loss in losses]
    part = max(1, len(values) // 10)
    if len(values) > 1:
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        if last > RISEN * first + MARGIN:
            found.append(f"the training loss rose from {first:.3g} to {last:.3g}: lower the rate")
    for name in ("loss", "mse"):
        if name in before and name in after and after[name] > RISEN * before[name] + MARGIN:
            found.append(
                f"on the validation rows the {name} is {after[name]:.3g}; before the training it was {before[name]:.3g}"
            )
    guessed = one_class(held, after)
    if guessed is not None:
        called = f"{names[guessed]!r}" if guessed < len(names) else f"number {guessed}"
        found.append(f"every validation row is said to be of one class, {called}, though they are of several")
    return found


def closed(report: Mapping[str, Any]) -> list[str]:
    """Sentences on penalties that have drawn all that they look at to zero."""
    return [
        f"{p['is']} with weight {p['weight']:g} has drawn all of its {p['result']['groups']} groups to zero: the "
        "adapted layers answer as the base's do. Lower its weight"
        for p in report.get("penalties", ())
        if p["result"].get("groups") and p["result"].get("zero") == p["result"]["groups"]
    ]


def one_class(held: Dataset, after: Mapping[str, float]) -> int | None:
    """The class that every row is said to be of, told by the metrics: then the accuracy is that class's share p, and
    macro F1 is 2 p / (1 + p) over the number of classes.  None where there are several, or it is no classification."""
    if not {"accuracy", "macro_f1", "mcc"} <= set(after) or after["mcc"] != 0.0:
        return None
    labels = Counter(held["label"][:])
    for guess, count in labels.items():
        p = count / len(held)
        if (
            len(labels) > 1
            and math.isclose(after["accuracy"], p)
            and math.isclose(after["macro_f1"], 2 * p / (1 + p) / len(labels))
        ):
            return int(guess)
    return None


def finite(value: Any) -> Any:
    """A value without NaN and infinity, which JSON does not have: None in their place."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
