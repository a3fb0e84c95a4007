"""Splits that data do not bring, and samples: seeded, every class in both parts, equal inputs in one."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .media import MEDIA, encoded

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

VALIDATION_SHARE, VALIDATION_MOST = 0.1, 2000
# the columns that a task's rows have beside what is learned
INPUTS = (
    *("text", "pair", "prompt", "messages", "image", "audio", "tokens", "source"),
    *("sentence1", "sentence2", "anchor"),
)


def with_validation(data: DatasetDict, seed: int, by_chance: bool = False) -> DatasetDict:
    """The same splits; where there is no validation split, a seeded tenth of train (2000 rows at most) becomes it.

    Rows with equal inputs (columns `INPUTS`, else all) stay in one part, and of every class (where `label` names
    classes) that has two inputs or more there is one in both, in the proportions of the whole as far as that goes.
    Where there is one input alone, or one in each class, rows are divided whatever their inputs.
    `by_chance`: without regard to either, which is how runs were split before 0.2.
    Raises LookupError without a train split, ValueError where there is nothing to divide.
    """
    from datasets import DatasetDict

    if "train" not in data:
        raise LookupError(f"the data have no split 'train'; there are: {', '.join(data)}")
    if "validation" in data:
        return data
    train = data["train"]
    if len(train) < 2:
        raise ValueError(f"{len(train)} row(s) cannot be split into train and validation")
    size = min(max(1, round(VALIDATION_SHARE * len(train))), VALIDATION_MOST)
    if by_chance:
        mixed = train.shuffle(seed=seed, keep_in_memory=True)
        parts = {"train": mixed.select(range(size, len(train))), "validation": mixed.select(range(size))}
        return DatasetDict({**data, **parts})
    held = _held(list(inputs(train)), _classes(train), size, seed)
    kept = sorted(set(range(len(train))) - set(held))
    return DatasetDict({**data, "train": train.select(kept), "validation": train.select(held)})


def _held(keys: Sequence[bytes], classes: Sequence[Any], size: int, seed: int) -> list[int]:
    """The rows of the validation part, mixed."""
    groups: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len({classes[group[0]] for group in groups.values()}) == len(groups):  # else a class would be in one part alone
        groups = {row.to_bytes(8): [row] for row in range(len(keys))}
    draw = random.Random(seed)
    of_class: dict[Any, list[list[int]]] = {}
    for group in groups.values():
        of_class.setdefault(classes[group[0]], []).append(group)
    held: list[int] = []
    for name, quota in _quotas({name: sum(map(len, found)) for name, found in of_class.items()}, size).items():
        found = of_class[name]
        if len(found) > 1:
            held += _chosen(found, max(1, quota), draw)
    draw.shuffle(held)
    return held


def _quotas(sizes: dict[Any, int], whole: int) -> dict[Any, int]:
    """`whole` rows shared out in proportion to the sizes, by the largest remainders."""
    total = sum(sizes.values())
    exact = {name: whole * n / total for name, n in sizes.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: quotas[name] - exact[name])  # stable: in doubt the class met first
    for name in by_rest[: whole - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _chosen(groups: list[list[int]], quota: int, draw: random.Random) -> list[int]:
    """Rows of some of the groups, `quota` of them as nearly as whole groups allow; one group at least stays out."""
    order = draw.sample(groups, len(groups))
    found: list[int] = []
    left = len(order)
    for group in order:
        if len(found) + len(group) <= quota and left > 1:
            found += group
            left -= 1
    return found or sorted(order, key=len)[0]


def _classes(rows: Dataset) -> Sequence[Any]:
    """The class of each row, or one for all where labels are no classes."""
    kind = getattr(rows.features.get("label"), "dtype", None)  # of a list of labels there is none
    if kind is None or kind.startswith("float"):
        return [0] * len(rows)
    return rows["label"][:]


def inputs(rows: Dataset) -> Iterator[bytes]:
    """Of each row a hash of its input: its texts, or its image or sound as it is stored."""
    names = [c for c in INPUTS if c in rows.column_names] or rows.column_names
    if medium := next((m for m in MEDIA.values() if m.column in names), None):
        lazy, kind = rows.select_columns([medium.column]), encoded(medium)
        lazy = lazy if lazy.features[medium.column] == kind else lazy.cast_column(medium.column, kind)
        for i in range(len(lazy)):
            value = lazy[i][medium.column]
            yield hashlib.sha256(value["bytes"] or Path(value["path"]).read_bytes()).digest()
        return
    for row in zip(*(rows[c][:] for c in names), strict=True):
        yield hashlib.sha256(json.dumps(row, default=str).encode()).digest()


def repeated(rows: Dataset) -> int:
    """How many rows have the input of an earlier one."""
    return len(rows) - len(set(inputs(rows)))


def contradicted(rows: Dataset) -> int:
    """How many rows have an input that stands with more than one label (a class, or a number): no model learns both."""
    if "label" not in rows.column_names:
        return 0
    keys, found = list(inputs(rows)), dict[bytes, set[Any]]()
    for key, label in zip(keys, rows["label"][:], strict=True):
        found.setdefault(key, set()).add(tuple(label) if isinstance(label, list) else label)
    return sum(len(found[key]) > 1 for key in keys)


def shared(parts: DatasetDict) -> int:
    """How many validation rows have the input of a training row: what was learned by heart is measured as skill."""
    known = set(inputs(parts["train"]))
    return sum(key in known for key in inputs(parts["validation"]))


def sample(rows: Dataset, most: int | None, seed: int) -> Dataset:
    """`rows`, or a seeded sample of `most` of them where there are more."""
    if most is None or len(rows) <= most:
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(most))


def counts(rows: Dataset, names: Sequence[str]) -> dict[str, int]:
    """{class: rows}, in the order of the classes."""
    found = Counter(rows["label"][:])
    return {name: found[i] for i, name in enumerate(names)}


QUALITY_ROWS = 32  # what an allocator that asks for the quality measures it on


def told_quality(rows: int) -> int:
    """How many of so many training rows tell an allocator the quality instead: a tenth at most."""
    return min(QUALITY_ROWS, max(1, rows // 10))
