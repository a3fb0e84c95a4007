"""Rows: from a file, a folder, a hub or the bundled sets, to splits with `train` and `validation`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .faults import Faults
from .images import class_folders
from .readers import READERS, read_file, readable
from .source import described, source_of
from .splitting import sample, with_validation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["BUNDLED", "load_data", "read_file", "sample", "split_of", "with_validation"]

BUNDLED = "bundled:"
SPLITS = {name: name for name in ("train", "validation", "test")} | dict.fromkeys(("valid", "val", "dev"), "validation")


def load_data(source: str, faults: Faults | None = None) -> DatasetDict:
    """The splits of a data set.  `source`: a file, a folder (saved by `datasets`, of files named after splits, or of
    images in SPLIT/CLASS/), `bundled:NAME`, or a name on the hub (`NAME:CONFIG`).

    Raises FileNotFoundError for what is not there and ValueError for what cannot be read, both with what exists.  With
    `faults`, what is wrong with rows is added there, see `read_file`.
    """
    from datasets import DatasetDict

    if source.startswith(BUNDLED):
        from ..bundled import dataset

        return dataset(source.removeprefix(BUNDLED))
    path = Path(source)
    if path.is_dir():
        return _folder(path, faults)
    if path.is_file():
        return DatasetDict(train=read_file(path, faults))
    if readable(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(_absent(path))
    return _hub(source)


def _absent(path: Path) -> str:
    if not path.parent.is_dir():
        return f"data={path} does not exist: there is no folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if readable(p) or p.is_dir())
    close = difflib.get_close_matches(path.name, names, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"data={path} does not exist; {path.parent.resolve()} has: {', '.join(names[:8]) or 'no data files'}.{hint}"


def _folder(path: Path, faults: Faults | None) -> DatasetDict:
    from datasets import DatasetDict

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path)
    files = [p for p in sorted(path.iterdir()) if p.is_file() and readable(p)]
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    named = _by_split(files)
    splits = {split: read_file(p, faults) for split, p in named.items()} if "train" in named else {}
    unread = [p.name for p in files if p not in named.values()]
    if splits and unread:
        told = f"beside it, and not read: {', '.join(unread)[:200]}; splits are called {', '.join(SPLITS)}"
        source = source_of(splits["train"])
        described(
            splits["train"], replace(source, name=source.name or str(named["train"]), notes=(*source.notes, told))
        )
    splits = splits or {split: class_folders(p) for split, p in _by_split(folders).items()}
    if "train" not in splits:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"data={path} is neither a folder saved by `datasets`, nor one with a file train.* "
            f"({', '.join(READERS)}), nor one with images in train/CLASS/; it has: {there}"
        )
    return DatasetDict(splits)


def _saved(path: Path) -> DatasetDict:
    """A folder that `datasets` wrote.  Raises ValueError for one that is damaged, whatever is raised for it."""
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"data={path} was saved by `datasets` and could not be read: {error!s:.300}") from error
    return DatasetDict(train=found) if isinstance(found, Dataset) else found


def _by_split(paths: Sequence[Path]) -> dict[str, Path]:
    """{split: path}, by the names.  Raises ValueError where two are the same split."""
    found: dict[str, Path] = {}
    for path in paths:
        split = SPLITS.get(path.name.lower() if path.is_dir() else path.stem.lower())
        if split in found:
            raise ValueError(f"{found[split]} and {path} are both the split {split!r}: leave one of them there")
        if split is not None:
            found[split] = path
    return found


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


def split_of(data: DatasetDict, name: str) -> Dataset:
    """One split.  Raises LookupError that lists the splits."""
    if name not in data:
        sizes = ", ".join(f"{split} ({len(rows)} rows)" for split, rows in data.items())
        raise LookupError(f"the data have no split {name!r}; there are: {sizes}")
    return data[name]
