"""Rows: from a file, a folder, a hub or the bundled sets, to splits with `train` and `validation`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import class_folders

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUNDLED = "bundled:"
VALIDATION_SHARE, VALIDATION_MOST = 0.1, 2000


def load_data(source: str) -> DatasetDict:
    """The splits of a data set.  `source`: a file, a folder (saved by `datasets`, of files named after splits, or of
    images in SPLIT/CLASS/), `bundled:NAME`, or a name on the hub (`NAME:CONFIG`).

    Raises FileNotFoundError for what is not there and ValueError for what cannot be read, both with what exists.
    """
    from datasets import DatasetDict

    if source.startswith(BUNDLED):
        from ..bundled import dataset

        return dataset(source.removeprefix(BUNDLED))
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return DatasetDict(train=read_file(path))
    if path.suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(_absent(path))
    return _hub(source)


def _absent(path: Path) -> str:
    if not path.parent.is_dir():
        return f"data={path} does not exist: there is no folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in READERS or p.is_dir())
    close = difflib.get_close_matches(path.name, names, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"data={path} does not exist; {path.parent.resolve()} has: {', '.join(names[:8]) or 'no data files'}.{hint}"


def _folder(path: Path) -> DatasetDict:
    from datasets import Dataset, DatasetDict, load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = load_from_disk(str(path))
        return DatasetDict(train=found) if isinstance(found, Dataset) else found
    splits = {p.stem: read_file(p) for p in sorted(path.iterdir()) if p.suffix in READERS and p.stem in SPLITS}
    if "train" not in splits:
        splits = {p.name: class_folders(p) for p in sorted(path.iterdir()) if p.is_dir() and p.name in SPLITS}
    if "train" not in splits:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"data={path} is neither a folder saved by `datasets`, nor one with a file train.* "
            f"({', '.join(READERS)}), nor one with images in train/CLASS/; it has: {there}"
        )
    return DatasetDict(splits)


def _hub(source: str) -> DatasetDict:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None)
    except Exception as error:  # whatever the hub's client raises: offline, unknown, private ...
        raise FileNotFoundError(
            f"data={source!r} is no file or folder here, and the hub gave no data set of that name: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error


def _jsonl(path: Path) -> Dataset:
    from datasets import Dataset

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, line {number} is a {type(rows[-1]).__name__}; every line is an object")
    return Dataset.from_list(rows)


def _json(path: Path) -> Dataset:
    from datasets import Dataset

    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _jsonl(path)
    try:
        return Dataset.from_list(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _separated(separator: str) -> Callable[[Path], Dataset]:
    def read(path: Path) -> Dataset:
        import pyarrow
        from datasets import Dataset
        from pyarrow import csv

        options = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
        try:
            return Dataset(csv.read_csv(path, parse_options=options))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} could not be read: {error}") from None

    return read


def _parquet(path: Path) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    try:
        return Dataset(parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} could not be read: {error}") from None


SPLITS = ("train", "validation", "test")
READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


def read_file(path: Path) -> Dataset:
    """The rows of one file.  Raises ValueError for a kind that is not known, for a malformed or an empty one."""
    if path.suffix not in READERS:
        raise ValueError(f"{path}: data files are {', '.join(READERS)}; found '{path.suffix or path.name}'")
    rows = READERS[path.suffix](path)
    if not len(rows):
        raise ValueError(f"{path} has no rows")
    return rows


def split_of(data: DatasetDict, name: str) -> Dataset:
    """One split.  Raises LookupError that lists the splits."""
    if name not in data:
        sizes = ", ".join(f"{split} ({len(rows)} rows)" for split, rows in data.items())
        raise LookupError(f"the data have no split {name!r}; there are: {sizes}")
    return data[name]


def with_validation(data: DatasetDict, seed: int) -> DatasetDict:
    """The same splits; where there is no validation split, a seeded tenth of train (2000 rows at most) becomes it."""
    from datasets import DatasetDict

    train = split_of(data, "train")
    if "validation" in data:
        return data
    if len(train) < 2:
        raise ValueError(f"{len(train)} row(s) cannot be split into train and validation")
    held = min(max(1, round(VALIDATION_SHARE * len(train))), VALIDATION_MOST)
    mixed = train.shuffle(seed=seed, keep_in_memory=True)
    parts = {"train": mixed.select(range(held, len(train))), "validation": mixed.select(range(held))}
    return DatasetDict({**data, **parts})


def sample(rows: Dataset, most: int | None, seed: int) -> Dataset:
    """`rows`, or a seeded sample of `most` of them where there are more."""
    if most is None or len(rows) <= most:
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(most))


def texts(rows: Dataset, column: str) -> list[str]:
    """A column of texts.  Raises ValueError for anything in it that is not a text, or is blank."""
    values: Sequence[Any] = rows[column][:]
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"column {column!r} holds texts; row {number} has {value!r:.60} ({type(value).__name__})")
    blank = [number for number, value in enumerate(values) if value is None or not value.strip()]
    if blank:
        raise ValueError(
            f"column {column!r} is empty in {len(blank)} of {len(values)} rows, first in row {blank[0]}: "
            "remove these rows"
        )
    return list(values)
