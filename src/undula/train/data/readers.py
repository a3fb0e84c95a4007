"""Files of rows by their suffix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .conll import read_conll
from .faults import Faults
from .jsons import read_json, read_jsonl
from .source import Source, described
from .tables import read_csv, read_tsv

if TYPE_CHECKING:
    from datasets import Dataset


def read_parquet(path: Path, faults: Faults) -> Dataset:
    """A Parquet file.  Raises ValueError for one that is damaged, whatever Arrow calls it."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        table.validate(full=True)  # a text that is not UTF-8 would be found by whoever reads it
        twice = [name for name, count in Counter(table.column_names).items() if count > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} stands {table.column_names.count(twice[0])} times")
        return described(Dataset(table), Source(str(path)))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        faults.add(f"{path} could not be read as Parquet: {error!s:.300}")
        raise faults.error() from None


READERS: dict[str, Callable[[Path, Faults], Dataset]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), read_conll),
}


SHEETS = {".xlsx": "Excel", ".xls": "Excel", ".xlsm": "Excel", ".xlsb": "Excel", ".ods": "LibreOffice"}


def _unreadable(path: Path) -> str:
    known = f"{path}: data files are {', '.join(READERS)}; found '{path.suffix or path.name}'"
    sheet = SHEETS.get(path.suffix.lower())
    clicks = {
        "Excel": "File > Save As > CSV UTF-8 (Comma delimited)",
        "LibreOffice": "File > Save As > Text CSV, character set UTF-8",
    }
    return known if sheet is None else f"{known}. Save the sheet as CSV: in {sheet} {clicks[sheet]}"


def readable(path: Path) -> bool:
    """Whether the name is that of a data file."""
    return path.suffix.lower() in READERS


def read_file(path: Path, faults: Faults | None = None) -> Dataset:
    """The rows of one file; the cells of CSV and TSV are texts, as they were written.

    Raises ValueError for a kind that is not known, for an empty file, and for a malformed one with all its faults; or,
    as far as there is something to return, adds to the `faults`, and leaves the rows out that have one.
    """
    if not readable(path):
        raise ValueError(_unreadable(path))
    found = Faults() if faults is None else faults
    rows = READERS[path.suffix.lower()](path, found)
    if faults is None:
        found.check()
    if not len(rows):  # objects without a key
        found.add(f"{path} has no rows")
        raise found.error()
    return rows
