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
from .faults import Faults, Row
from .source import Lines, Source, described, nameable, nothing_left

if TYPE_CHECKING:
    from datasets import Dataset

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SNIFFED = 100  # records that tell what separates the fields
CHUNK_ROWS, CHUNK_CHARACTERS = 10_000, 1 << 26  # in memory as Python's texts; what is full goes to Arrow
SEPARATOR = re.compile('"?sep=([^\r\n])"?')  # a first line by which spreadsheets are told what separates the fields
QUOTED = re.compile(r'"(?:(?:[^"]|"")*""(?:[^"]|"")*)?"')  # as csv.writer writes a field for its quotes
Records = Iterator[tuple[int, int, list[str] | csv.Error]]


def read_csv(path: Path, faults: Faults) -> Dataset:
    """Comma-separated values, or what a first line `sep=;` says, or the first records show, to be between the fields.
    Adds to the faults; raises ValueError where there is nothing to return."""
    encoding = encoding_of(path, faults)
    with _wide_fields():
        said = _said(path, encoding)
        delimiter = said or _delimiter(path, encoding)
        told = () if delimiter == "," else (f"the fields are separated by {_called(delimiter)}",)
        return _read(path, encoding, delimiter, csv.QUOTE_MINIMAL, told, faults, begin=1 if said else 0)


def read_tsv(path: Path, faults: Faults) -> Dataset:
    """Tab-separated values.  Quotes are characters like any other (as in GLUE's files) unless the header is quoted, or
    the rows are of one width only when they are read as `csv` writes them.  Adds to the faults; raises ValueError where
    there is nothing to return."""
    encoding = encoding_of(path, faults)
    with _wide_fields():
        quoting = _tsv_quoting(path, encoding)
        if quoting is None:
            return _read(path, encoding, "\t", csv.QUOTE_NONE, (), faults)
        read = quoting == csv.QUOTE_MINIMAL
        meant = "fields in quotes are read as spreadsheets write them" if read else "quotes are text like any other"
        return _read(path, encoding, "\t", quoting, (meant,), faults)


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
    """(lines where it begins and ends, fields or what is wrong) of every record that is not a blank line, after `begin`
    lines."""
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
                yield line, begin + reader.line_num, error
                continue
            if fields:
                yield line, begin + reader.line_num, fields


def _delimiter(path: Path, encoding: str) -> str:
    """What separates the fields: that by which the first records are of one width, the header's; commas in doubt."""
    wide = []
    for delimiter in DELIMITERS:
        records = [fields for *_, fields in islice(_records(path, encoding, delimiter, csv.QUOTE_MINIMAL), SNIFFED)]
        if not records or isinstance(records[0], csv.Error) or len(records[0]) < 2:
            continue
        wide.append(delimiter)
        if all(not isinstance(fields, csv.Error) and len(fields) == len(records[0]) for fields in records):
            return delimiter
    return wide[0] if wide else ","


def _tsv_quoting(path: Path, encoding: str) -> int | None:
    """Whether quotes are text (QUOTE_NONE) or mean something (QUOTE_MINIMAL); None: no field begins with one."""
    width, even, quoted, needed = 0, True, False, True
    for *_, fields in _records(path, encoding, "\t", csv.QUOTE_NONE):
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
    fits = all(not isinstance(fields, csv.Error) and len(fields) == width for *_, fields in strict)
    return csv.QUOTE_MINIMAL if fits else csv.QUOTE_NONE


def _read(
    path: Path, encoding: str, delimiter: str, quoting: int, notes: Sequence[str], faults: Faults, begin: int = 0
) -> Dataset:
    import pyarrow
    from datasets import Dataset

    records = _records(path, encoding, delimiter, quoting, begin)
    header = _header(path, records, faults)
    known = nameable(path, header, faults)
    named = [at for at, name in enumerate(header) if name.strip() and name in known and name not in header[:at]]
    if not named:
        raise faults.error()
    names, lines, order = [header[at] for at in named], Lines(), Lines()
    columns, chunks, size, count = [list[str]() for _ in names], [], 0, 0

    def full() -> Any:
        made = pyarrow.table([pyarrow.array(c, pyarrow.string()) for c in columns], names=names)
        for column in columns:
            column.clear()
        return made

    for count, (line, last, fields) in enumerate(records, 1):
        if isinstance(fields, csv.Error) or len(fields) != len(header):
            _faulty((str(path), count - 1), line, last, fields, header, delimiter, faults)
            continue
        lines.append(line)
        order.append(count - 1)
        for column, at in zip(columns, named, strict=True):
            column.append(fields[at])
        size += sum(map(len, fields))
        if len(columns[0]) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            chunks.append(full())
            size = 0
    nothing_left(path, count, lines, faults)
    table = pyarrow.concat_tables([*chunks, full()])
    kept = order if len(order) < count else Lines()
    left = [str(at + 1) for at, name in enumerate(header) if not name.strip()]
    if left:  # an index that pandas wrote, a spreadsheet's empty columns
        notes = (*notes, f"{path}: column {', '.join(left)} has no name in the header and is left out")
    return described(Dataset(table), Source(str(path), lines, "line", (*notes, *assumed(encoding)), kept))


def _faulty(
    key: Row, line: int, last: int, found: list[str] | csv.Error, header: list[str], delimiter: str, faults: Faults
) -> None:
    """Adds what is wrong with a record.  One of several lines is a fault of the file: it may have swallowed rows."""
    alone, path = line == last, key[0]
    place, row = (f"line {line}", key) if alone else (f"line {line} to line {last}", None)
    swallowed = "" if alone else ", and may hold other rows"
    if isinstance(found, csv.Error):
        return faults.add(f"{path}: a quoted field does not end as it should ({found}){swallowed}", place, row=row)
    faults.add(
        f"{path}: not as many fields as the header has ({len(header)}: {', '.join(header)[:100]}){swallowed}",
        f"{place} has {len(found)}",
        f"The fields are separated by {_called(delimiter)}; a text that holds one is written in quotes",
        row,
    )


def _header(path: Path, records: Records, faults: Faults) -> list[str]:
    """The names of the columns.  Raises ValueError for a file without any."""
    line, _, names = next(records, (0, 0, []))
    if isinstance(names, csv.Error):
        faults.add(f"{path}, line {line}, the header: a quoted field does not end as it should ({names})")
        raise faults.error()
    if names and not any(name.strip() for name in names):
        faults.add(f"{path}, line {line}, the header: no column has a name")
        raise faults.error()
    if not names:
        nothing_left(path, 0, (), faults)
    for name, count in Counter(names).items():
        if count > 1 and name.strip():
            faults.add(
                f"{path}, line {line}, the header: column {name!r} stands {count} times", advice="Rename all but one"
            )
    return names
