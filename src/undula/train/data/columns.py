"""The values of columns, checked: texts, numbers, names of classes.  Faults go into a collection."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .faults import Faults
from .source import source_of

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
COMMA = re.compile(r"[+-]?\d+,\d+")
TOLD_CLASSES = 20


def spot(rows: Dataset, column: str, what: str) -> str:
    """A kind of fault of a column, with the file where there is one."""
    name = source_of(rows).name
    return f"{name + ', ' if name else ''}column {column!r} {what}"


def named_columns(there: Iterable[str]) -> str:
    """Names of columns as a message lists them; in quotes where a name would not show what it is."""
    return ", ".join(name if name and name == " ".join(name.split()) else repr(name) for name in there)


def texts(rows: Dataset, column: str, faults: Faults, blank: bool = False) -> list[str]:
    """A column of texts; `blank`: they may be blank or missing, and are "" then."""
    source, found = source_of(rows), []
    for row, value in enumerate(rows[column][:]):
        if value is not None and not isinstance(value, str):
            kind = f"{source.place(row)} has {value!r:.60} ({type(value).__name__})"
            faults.add(spot(rows, column, "holds what is no text"), kind, "Texts are strings", source.key(row))
        elif not blank and (value is None or not value.strip()):
            faults.add(spot(rows, column, "is empty"), source.place(row), "Fill or remove these rows", source.key(row))
        found.append(value if isinstance(value, str) else "")
    return found


def numbers(rows: Dataset, column: str, faults: Faults) -> list[float]:
    """A column of finite numbers, or of texts that are such."""
    source, found = source_of(rows), []
    for row, value in enumerate(rows[column][:]):
        number = _number(value)
        if number is None:
            empty = value is None or isinstance(value, str) and not value.strip()
            what = "is empty" if empty else "holds what is no number"
            shown = source.place(row) if empty else f"{source.place(row)} has {value!r:.60}"
            comma = isinstance(value, str) and COMMA.fullmatch(value.strip())
            advice = "Labels of a regression are finite numbers such as 3, -0.5 or 1e-3" + (
                "; a decimal comma is written as a point (3,5 as 3.5): replace it in that column" if comma else ""
            )
            faults.add(spot(rows, column, what), shown, advice, source.key(row))
        found.append(0.0 if number is None else number)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = float(value) if NUMBER.fullmatch(value.strip()) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def classes(rows: Dataset, column: str, faults: Faults) -> list[str]:
    """The name of the class of each row: texts as they are written, whole numbers, or a `ClassLabel`."""
    source, declared, found = source_of(rows), getattr(rows.features[column], "names", None), []
    for row, value in enumerate(rows[column][:]):
        place = source.place(row)
        empty = value is None or isinstance(value, str) and not value.strip() or declared and value == -1
        if empty:
            faults.add(spot(rows, column, "is empty"), place, "Fill or remove these rows", source.key(row))
        elif not isinstance(value, str | int):
            hint = "; numbers with a fraction are for --task regression" if isinstance(value, float) else ""
            what = spot(rows, column, f"names classes by texts or whole numbers{hint}")
            faults.add(what, f"{place} has {value!r:.80}", row=source.key(row))
        if empty:
            found.append("")
        elif declared and isinstance(value, int) and 0 <= value < len(declared):
            found.append(declared[value])
        else:
            found.append(str(value))
    return found


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes in order: whole numbers by their size, else by the alphabet."""
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def alike(
    rows: Dataset, column: str, found: Sequence[str], faults: Faults, places: Sequence[int] | None = None
) -> None:
    """Adds a fault for names of classes that differ by case, white space or the normal form of Unicode alone.
    `places`: the row of each name (None: one in a row)."""
    at = range(len(found)) if places is None else places
    counted, groups = Counter(filter(None, found)), dict[str, list[str]]()
    for name in counted:
        groups.setdefault(plain(name), []).append(name)
    for group in (g for g in groups.values() if len(g) > 1):
        source = source_of(rows)
        shown = ", ".join(f"{n!r} ({counted[n]} rows, first {source.place(at[found.index(n)])})" for n in group)
        what = spot(rows, column, "names classes that differ by case, white space or Unicode's normal form alone")
        faults.add(
            what,
            shown,
            "Write them alike; or, if they are meant to be several classes, list all: --task-set "
            "names=A,B, in Python names=('A', 'B')",
        )


def plain(name: str) -> str:
    """A name without what people do not see or do not mean by it."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def known(
    rows: Dataset,
    column: str,
    found: Sequence[str],
    names: Sequence[str],
    faults: Faults,
    places: Sequence[int] | None = None,
) -> list[int]:
    """The number of each name's class.  `places`: the row of each (None: one in a row)."""
    number, source = {name: i for i, name in enumerate(names)}, source_of(rows)
    advice = f"The classes are: {', '.join(names[:TOLD_CLASSES])}{', ...' if len(names) > TOLD_CLASSES else ''}"
    for row, name in zip(range(len(found)) if places is None else places, found, strict=True):
        if name not in number:
            what = spot(rows, column, "holds classes that are not known")
            faults.add(what, f"{source.place(row)} has {name!r:.60}", advice, source.key(row))
    return [number.get(name, 0) for name in found]
