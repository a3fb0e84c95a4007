"""Train, validation and test rows of a study: the same for every run, whatever its seed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..train.data.faults import Faults
from ..train.data.images import fingerprint
from ..train.data.load import load_data, sample, split_of, with_validation
from ..train.tasks.task import Task
from .spec import Rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PARTS = ("train", "validation", "test")


def opened(rows: Rows, seed: int) -> tuple[Task, DatasetDict]:
    """(the task, fitted; the three parts) of a data set.  Where it brings no test or no validation split, a seeded
    tenth of train (2000 rows at most) becomes it.  Read anew each time: see `Sources`.

    Raises what `load_data` and the task raise for data that are missing or malformed.
    """
    return read(rows, seed)[:2]


def read(rows: Rows, seed: int) -> tuple[Task, DatasetDict, list[str]]:
    """The same, and sentences on rows that are left out for their faults."""
    from datasets import DatasetDict

    faults = Faults(rows.skip_faulty)
    data = load_data(rows.source, faults)
    named = {part: rows.splits.get(part, part) for part in PARTS}
    there = {p: split_of(data, n) for p, n in named.items() if p == "train" or p in rows.splits or n in data}
    if "validation" in there and named["test"] == named["validation"]:
        del there["validation"]  # the data's one labelled held-out split serves as the test
    task, parts = rows.task.read(DatasetDict(there), *PARTS, faults=faults)
    if "test" not in parts:
        held = with_validation(DatasetDict(train=parts["train"]), seed)
        parts = DatasetDict({**parts, "train": held["train"], "test": held["validation"]})
    parts = with_validation(parts, seed + 1)
    most = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    made = DatasetDict({part: sample(parts[part], most[part], seed) for part in PARTS})
    return task, made, list(faults.told())


def digest(rows: Rows, seed: int) -> str:
    """A hash of the rows of the three parts: it changes with any text, label, number or pixel, and with their order."""
    return digest_of(opened(rows, seed)[1])


def digest_of(parts: DatasetDict) -> str:
    """The same of rows that are open."""
    made = hashlib.sha256()
    for part, held in parts.items():
        for column in sorted(held.column_names):
            values = [fingerprint(v) for v in held[column]] if column == "image" else held[column][:]
            made.update(json.dumps([part, column, values]).encode())
    return made.hexdigest()[:24]


def place(source: str) -> str:
    """One name of a source, however it is spelled: the path where it lies, else the name itself."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def leaks(parts: DatasetDict) -> Iterator[str]:
    """Sentences on inputs that stand in two parts: what was learned by heart would be measured as skill."""
    inputs = {part: Counter(_inputs(parts[part])) for part in PARTS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = sum(n for row, n in inputs[b].items() if row in inputs[a])
        if both:
            yield f"{both} of {len(parts[b])} {b} rows stand in {a} too"


def _inputs(rows: Dataset) -> Iterator[tuple[str, ...]]:
    """Of each row what stands for its input: its texts, or a hash of its image's pixels."""
    columns = [rows[c][:] for c in rows.column_names if c in ("text", "pair", "prompt")]
    if "messages" in rows.column_names:
        columns.append([json.dumps(messages) for messages in rows["messages"]])
    if "image" in rows.column_names:
        columns.append([fingerprint(image) for image in rows["image"]])
    return zip(*columns, strict=True)
