"""Rows: from a file, a folder, a hub or the bundled sets, to splits with `train` and `validation`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .faults import Faults
from .media import class_folders, holds_classes, holds_files
from .readers import READERS, read_file, readable
from .source import described, source_of
from .splitting import sample, with_validation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["BUNDLED", "load_data", "read_file", "sample", "split_of", "with_validation"]

BUNDLED = "bundled:"
TABLE = "metadata"  # a file that names the images or sounds of its folder
SPLITS = {name: name for name in ("train", "validation", "test")} | dict.fromkeys(("valid", "val", "dev"), "validation")


def load_data(source: str, faults: Faults | None = None) -> DatasetDict:
    """The splits of a data set.  `source`: a file, a folder (saved by `datasets`, of files named after splits, of
    images or sounds in SPLIT/CLASS/ or CLASS/, or with a file metadata.* that names them), `bundled:NAME`, or a name on
    the hub (`NAME:CONFIG`).

    Raises FileNotFoundError for what is not there and ValueError for what cannot be read, both with what exists.  With
    `faults`, what is wrong with rows is added there, see `read_file`.
    """
    from datasets import DatasetDict

    if source.startswith(BUNDLED):
        from ...bundled import dataset

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
    named, table = _by_split(files), _table(files)
    parts = _by_split([p for p in folders if _is_part(p)])
    if "train" in named:
        splits = {split: read_file(p, faults) for split, p in named.items()}
        return DatasetDict(_beside(splits, named["train"], [p.name for p in files if p not in named.values()]))
    if table is not None:  # names, and what belongs to them: as in `datasets`' imagefolder and audiofolder
        return DatasetDict(_beside({"train": read_file(table, faults)}, table, [p.name for p in files if p != table]))
    if "train" in parts:
        splits = {split: _part(p, faults) for split, p in parts.items()}
        return DatasetDict(_beside(splits, parts["train"], [p.name for p in folders if p not in parts.values()]))
    flat = [p.name for p in folders if p.name.lower() in SPLITS and p not in parts.values() and holds_files(p)]
    if len(flat) > 1 or flat and len(flat) == len(folders):
        raise ValueError(
            f"data={path}: {', '.join(flat)} hold files right in them, with nothing that says their class or text: put "
            f"them into folders ({flat[0]}/CLASS/), or name them in {flat[0]}/{TABLE}.csv, in a column file_name"
        )
    if not parts and holds_classes(path):
        return DatasetDict(train=class_folders(path))
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"data={path} is neither a folder saved by `datasets`, nor one with a file train.* or metadata.* "
        f"({', '.join(READERS)}), nor one with images or sounds in train/CLASS/ or CLASS/; it has: {there}"
    )


def _table(files: Sequence[Path]) -> Path | None:
    """The file of a folder that names its images or sounds, see `media.named_files`."""
    return next((p for p in files if p.stem.lower() == TABLE), None)


def _is_part(path: Path) -> bool:
    """Whether a folder named after a split is one: with files right in it and none below, it is a class (a train)."""
    tabled = _table([p for p in path.iterdir() if p.is_file() and readable(p)]) is not None
    return path.name.lower() in SPLITS and (tabled or not holds_files(path) or holds_classes(path))


def _part(path: Path, faults: Faults | None) -> Dataset:
    table = _table([p for p in sorted(path.iterdir()) if p.is_file() and readable(p)])
    return class_folders(path) if table is None else read_file(table, faults)


def _beside(splits: dict[str, Dataset], read: Path, unread: Sequence[str]) -> dict[str, Dataset]:
    """The splits; of files and folders that are not read the first one tells."""
    if unread:
        told = f"beside it, and not read: {', '.join(unread)[:200]}; splits are called {', '.join(SPLITS)}"
        source = source_of(splits["train"])
        described(splits["train"], replace(source, name=source.name or str(read), notes=(*source.notes, told)))
    return splits


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
