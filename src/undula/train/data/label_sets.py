"""Sets of labels, as people write them: lists, texts with something between the labels, vectors of 0 and 1, or a column
of 0 and 1 for each class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .columns import known, spot
from .faults import Faults
from .source import source_of

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATORS = (";", "|", ",")  # the first that stands in any text, where none is named
BITS = {0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}  # how a column of its own says whether a row has a class
ADVICE = (
    "Labels of a row are a list of texts or whole numbers, a text with something between them (see separator), or "
    "numbers 0 and 1 in a column for each class (names)"
)
Sets = list[list[str]]


def separator_of(rows: Dataset, column: str, said: str | None) -> str:
    """What stands between the labels in a text: what is said, else the first of `SEPARATORS` that is met."""
    if said:
        return said
    texts = [v for v in rows[column][:] if isinstance(v, str) and not _listed(v)]
    return next((s for s in SEPARATORS if any(s in text for text in texts)), SEPARATORS[0])


def undivided(rows: Dataset, column: str, sets: Sets, faults: Faults) -> None:
    """Adds a fault for labels that hold another separator between names of other labels: a file with two."""
    source, every = source_of(rows), {label for labels in sets for label in labels}
    held = {name: [part.strip() for s in SEPARATORS if s in name for part in name.split(s)] for name in every}
    joined = {name for name, parts in held.items() if any(part in every and part != name for part in parts)}
    for row, labels in enumerate(sets):
        for name in joined.intersection(labels):
            what = spot(rows, column, "has another separator between labels than other rows")
            advice = (
                "Write one separator everywhere; or say which it is: --task-set separator=..., in Python separator="
            )
            faults.add(what, f"{source.place(row)} has {name!r:.60}", advice, source.key(row))


def are_vectors(rows: Dataset, column: str) -> bool:
    """Whether the labels are vectors of 0 and 1, by the look of all of them: lists of one length of nothing else, which
    are no lists of the classes 0 and 1, since one has a number twice, or they are written as fractions (0.0, 1.0)."""
    values = rows[column][:]
    sizes = {len(v) if isinstance(v, list) else -1 for v in values}
    if len(sizes) != 1 or min(sizes) < 1 or declared(rows, column):
        return False
    if any(type(bit) not in (int, float) or bit not in (0, 1) for v in values for bit in v):
        return False
    return any(isinstance(bit, float) for v in values for bit in v) or any(len(set(v)) < len(v) for v in values)


def declared(rows: Dataset, column: str) -> tuple[str, ...]:
    """The names of the `ClassLabel`s in the lists of a column; none where they hold something else."""
    kind = rows.features[column]
    return tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())


def label_sets(rows: Dataset, column: str, separator: str, faults: Faults) -> Sets:
    """The names of the classes that each row has, each once."""
    names = declared(rows, column)
    return _each(rows, column, faults, ADVICE, lambda value: list(dict.fromkeys(_labels(value, separator, names))))


def from_vectors(rows: Dataset, column: str, names: Sequence[str], faults: Faults) -> Sets:
    """The same of a column of vectors, with a number for each name (none: as many as the first has, named by their
    places)."""
    values = rows[column][:]
    size = len(names) or (len(values[0]) if values and isinstance(values[0], list) else 0)

    def of(value: Any) -> list[str]:
        if not isinstance(value, list) or len(value) != size or any(bit not in (0, 1) for bit in value):
            raise ValueError(f"{value!r:.80}")
        return [names[i] if names else str(i) for i, bit in enumerate(value) if bit]

    return _each(rows, column, faults, f"Vectors hold {size} numbers 0 and 1, one for each class", of)


def _each(rows: Dataset, column: str, faults: Faults, advice: str, of: Callable[[Any], list[str]]) -> Sets:
    source, found = source_of(rows), list[list[str]]()
    for row, value in enumerate(rows[column][:]):
        try:
            found.append(of(value))
        except ValueError as error:
            place = f"{source.place(row)} has {error}"
            faults.add(spot(rows, column, "holds what is no set of labels"), place, advice, source.key(row))
            found.append([])
    return found


def _labels(value: Any, separator: str, names: Sequence[str]) -> Iterator[str]:
    """The labels of one row.  Raises ValueError for what is none."""
    if value is None:
        return
    if isinstance(value, str):
        listed = _listed(value)
        value = [part.strip() for part in value.split(separator)] if listed is None else listed
        value = [part for part in value if part != ""]
    for label in value if isinstance(value, list) else [value]:
        if isinstance(label, bool) or not isinstance(label, str | int) or isinstance(label, str) and not label.strip():
            raise ValueError(f"{value!r:.80}")
        if names and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ValueError(f"{label}, of {len(names)} classes")
            yield names[label]
        else:
            yield str(label)


def _listed(text: str) -> list[Any] | None:
    """The list that a text is in JSON; None where it is none."""
    if not text.strip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def bit_columns(rows: Dataset, others: Sequence[str]) -> tuple[str, ...]:
    """The columns, but the `others`, most of whose values are 0 or 1: one for each class, where they are two or
    more."""
    found = [c for c in rows.column_names if c not in others and _mostly_bits(rows[c][:])]
    return tuple(found) if len(found) > 1 else ()


def _mostly_bits(values: Sequence[Any]) -> bool:
    return 2 * sum(_bit(value) is not None for value in values) > len(values)


def _bit(value: Any) -> int | None:
    if isinstance(value, str):
        value = value.strip().lower()
    return BITS.get(value) if isinstance(value, str | int | float) else None


def from_bits(rows: Dataset, names: Sequence[str], faults: Faults) -> list[list[int]]:
    """The numbers of the classes that each row has, of a column for each class."""
    source, found = source_of(rows), [list[int]() for _ in range(len(rows))]
    for number, name in enumerate(names):
        for row, value in enumerate(rows[name][:]):
            bit = _bit(value)
            if bit is None:
                what = spot(rows, name, "of a class holds something else than 0 and 1")
                advice = "If it is no class, list those that are: --task-set names=A,B, in Python names=('A', 'B')"
                faults.add(what, f"{source.place(row)} has {value!r:.60}", advice, source.key(row))
            elif bit:
                found[row].append(number)
    return found


def numbered(rows: Dataset, column: str, sets: Sets, names: Sequence[str], faults: Faults) -> list[list[int]]:
    """The numbers of the classes of each row; those that are not known are faults."""
    places = [row for row, labels in enumerate(sets) for _ in labels]
    flat = [label for labels in sets for label in labels]
    numbers = known(rows, column, flat, names, faults, places)
    found = [list[int]() for _ in sets]
    for row, number in zip(places, numbers, strict=True):
        found[row].append(number)
    return [sorted(each) for each in found]
