"""CSV and TSV files as rows of texts: every cell is the text that was written there."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import assumed, encoding_of, opened
from .faults import Faults
from .source import Lines, Source, described

if TYPE_CHECKING:
    from datasets import Dataset

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SNIFFED = 100  # records that tell what separates the fields
CHUNK_ROWS, CHUNK_CHARACTERS = 10_000, 1 << 26  # in memory as Python's texts; what is full goes to Arrow
SEPARATOR = re.compile('"?sep=([^\r\n])"?')  # a first line by which spreadsheets are told what separates the fields
QUOTED = re.compile(r'"(?:(?:[^"]|"")*""(?:[^"]|"")*)?"')  # as csv.writer writes a field for its quotes
Records = Iterator[tuple[int, list[str] | csv.Error]]


def read_csv(path: Path) -> Dataset:
    """Comma-separated values, or what a first line `sep=;` says, or the first records show, to be between the fields.
    Raises ValueError."""
    encoding = encoding_of(path)
    with _wide_fields():
        said = _said(path, encoding)
        delimiter = said or _delimiter(path, encoding)
        told = () if delimiter == "," else (f"the fields are separated by {_called(delimiter)}",)
        return _read(path, encoding, delimiter, csv.QUOTE_MINIMAL, told, begin=1 if said else 0)


def read_tsv(path: Path) -> Dataset:
    """Tab-separated values.  Quotes are characters like any other (as in GLUE's files) unless the header is quoted, or
    the rows are of one width only when they are read as `csv` writes them.  Raises ValueError."""
    encoding = encoding_of(path)
    with _wide_fields():
        quoting = _tsv_quoting(path, encoding)
        if quoting is None:
            return _read(path, encoding, "\t", csv.QUOTE_NONE, ())
        read = quoting == csv.QUOTE_MINIMAL
        meant = "fields in quotes are read as spreadsheets write them" if read else "quotes are text like any other"
        return _read(path, encoding, "\t", quoting, (meant,))


@contextmanager
def _wide_fields() -> Iterator[None]:
    """For the time of a reading, fields of any length: the limit of `csv`, 131,072 characters, is short for a text."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _called(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


def _said(path: Path, encoding: str) -> str | None:
    """What separates the fields by a first line such as `sep=;`, which is no header; None where there is none."""
    with opened(path, encoding) as file:
        found = SEPARATOR.fullmatch(file.readline(16).rstrip("\r\n"))
    return None if found is None else found[1]


def _records(path: Path, encoding: str, delimiter: str, quoting: int, begin: int = 0) -> Records:
    """(line where it begins, fields or what is wrong) of every record that is not a blank line, after `begin` lines."""
    with opened(path, encoding) as file:
        for _ in range(begin):
            file.readline()
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        while True:
            line = begin + reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, error
                continue
            if fields:
                yield line, fields


def _delimiter(path: Path, encoding: str) -> str:
    """What separates the fields: that by which the first records are of one width, the header's; commas in doubt."""
    wide = []
    for delimiter in DELIMITERS:
        records = [fields for _, fields in islice(_records(path, encoding, delimiter, csv.QUOTE_MINIMAL), SNIFFED)]
        if not records or isinstance(records[0], csv.Error) or len(records[0]) < 2:
            continue
        wide.append(delimiter)
        if all(not isinstance(fields, csv.Error) and len(fields) == len(records[0]) for fields in records):
            return delimiter
    return wide[0] if wide else ","


def _tsv_quoting(path: Path, encoding: str) -> int | None:
    """Whether quotes are text (QUOTE_NONE) or mean something (QUOTE_MINIMAL); None: no field begins with one."""
    width, even, quoted, needed = 0, True, False, True
    for _, fields in _records(path, encoding, "\t", csv.QUOTE_NONE):
        assert not isinstance(fields, csv.Error)
        if not width:
            width = len(fields)
            if any(len(name) > 1 and name[0] == name[-1] == '"' for name in fields):
                return csv.QUOTE_MINIMAL
        even = even and len(fields) == width
        starting = [field for field in fields if field.startswith('"')]
        quoted = quoted or bool(starting)
        needed = needed and all(QUOTED.fullmatch(field) for field in starting)
    if not quoted:
        return None
    if even:
        return csv.QUOTE_MINIMAL if needed else csv.QUOTE_NONE
    strict = _records(path, encoding, "\t", csv.QUOTE_MINIMAL)
    fits = all(not isinstance(fields, csv.Error) and len(fields) == width for _, fields in strict)
    return csv.QUOTE_MINIMAL if fits else csv.QUOTE_NONE


def _read(path: Path, encoding: str, delimiter: str, quoting: int, notes: Sequence[str], begin: int = 0) -> Dataset:
    import pyarrow
    from datasets import Dataset

    records, faults = _records(path, encoding, delimiter, quoting, begin), Faults()
    header = _header(path, records, faults)
    named = [at for at, name in enumerate(header) if name.strip()]
    names, lines, chunks, size = [header[at] for at in named], Lines(), [], 0
    columns: list[list[str]] = [[] for _ in names]

    def full() -> Any:
        made = pyarrow.table([pyarrow.array(c, pyarrow.string()) for c in columns], names=names)
        for column in columns:
            column.clear()
        return made

    for line, fields in records:
        if isinstance(fields, csv.Error):
            faults.add(f"{path}: a quoted field does not end as it should ({fields})", f"line {line}")
        elif len(fields) != len(header):
            faults.add(
                f"{path}: not as many fields as the header has ({len(header)}: {', '.join(header)[:100]})",
                f"line {line} has {len(fields)}",
                f"The fields are separated by {_called(delimiter)}; a text that holds one is written in quotes",
            )
        elif not faults:
            lines.append(line)
            for column, at in zip(columns, named, strict=True):
                column.append(fields[at])
            size += sum(map(len, fields))
            if len(columns[0]) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                chunks.append(full())
                size = 0
    faults.check()
    if not lines:
        raise ValueError(f"{path} has no rows")
    table = pyarrow.concat_tables([*chunks, full()])
    left = [str(at + 1) for at in range(len(header)) if at not in named]
    if left:  # an index that pandas wrote, a spreadsheet's empty columns
        notes = (*notes, f"{path}: column {', '.join(left)} has no name in the header and is left out")
    return described(Dataset(table), Source(str(path), lines, "line", (*notes, *assumed(encoding))))


def _header(path: Path, records: Records, faults: Faults) -> list[str]:
    """The names of the columns.  Raises ValueError for a file without any."""
    line, names = next(records, (0, []))
    if isinstance(names, csv.Error):
        raise ValueError(f"{path}, line {line}, the header: a quoted field does not end as it should ({names})")
    if not names:
        raise ValueError(f"{path} has no rows")
    if not any(name.strip() for name in names):
        raise ValueError(f"{path}, line {line}, the header: no column has a name")
    for name, count in Counter(names).items():
        if count > 1 and name.strip():
            faults.add(
                f"{path}, line {line}, the header: column {name!r} stands {count} times", advice="Rename all but one"
            )
    return names
