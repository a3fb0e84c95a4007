"""JSON Lines, and JSON arrays of objects, as rows: the columns are all the keys that any row has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import assumed, encoding_of, opened
from .faults import Faults
from .source import Lines, Source, described

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 10_000  # rows that are in memory as Python's objects
WORDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
Row = dict[str, Any]


def read_json(path: Path) -> Dataset:
    """An array of objects, or an object a line.  Raises ValueError."""
    encoding = encoding_of(path)
    with opened(path, encoding) as file:
        head = file.read(4096)
        while head and not head.strip():
            head = file.read(4096)
    return _read(path, encoding, _items if head.lstrip().startswith("[") else _lines)


def read_jsonl(path: Path) -> Dataset:
    """An object a line.  Raises ValueError with all the lines that are none."""
    return _read(path, encoding_of(path), _lines)


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in an object")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _lines(path: Path, encoding: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line that is not blank."""
    with opened(path, encoding, newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.strip(" \t\r\n")
            if text:
                try:
                    yield number, DECODER.decode(text)
                except (ValueError, RecursionError) as error:
                    faults.add(
                        f"{path}: not JSON",
                        f"line {number} ({_why(error)})",
                        "A file has an object a line, or (.json) is an array of objects",
                    )


def _items(path: Path, encoding: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    """(number of the line where it begins, value) of every item of an array."""
    with opened(path, encoding) as file:
        text = file.read()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _after(text, at)
        if text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return faults.add(f"{path}: not JSON", f"the item that begins in line {line} ({_why(error)})")
        yield line, value
        at = _after(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            return faults.add(f"{path}: not JSON", f"line {line} (a comma or ] should follow the item)")
        at += 1
    if text[at + 1 :].strip():
        faults.add(f"{path}: not JSON", f"line {line + text.count(chr(10), counted, at)} (after the array's end)")


def _after(text: str, at: int) -> int:
    """Where the white space that begins at `at` ends."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


@dataclass
class _Column:
    """The values of one key so far: their kinds with the line of the first, chunks of Arrow, nested values."""

    before: int  # rows that were there before the first with this key
    kinds: dict[type, int] = field(default_factory=dict)
    wide: bool = False  # some whole number has more than 64 bits
    chunks: list[Any] = field(default_factory=list)
    nested: list[Any] = field(default_factory=list)

    def see(self, value: Any, line: int) -> None:
        if value is not None:
            self.kinds.setdefault(type(value), line)
            self.wide = self.wide or type(value) is int and not -(2**63) <= value < 2**63

    def type(self) -> Any:
        """Numbers that no Arrow type holds exactly become the text that was written."""
        import pyarrow

        if self.wide:
            return pyarrow.string()
        if float in self.kinds:
            return pyarrow.float64()
        if int in self.kinds:
            return pyarrow.int64()
        return pyarrow.bool_() if bool in self.kinds else pyarrow.string() if str in self.kinds else pyarrow.null()

    def put(self, values: list[Any]) -> None:
        """Takes a chunk.  Raises UnicodeEncodeError for a text that is none."""
        import pyarrow

        if self.nested or {list, dict} & set(self.kinds):
            earlier = sum(len(c) for c in self.chunks)
            self.nested += [None] * (self.before + earlier - len(self.nested)) + values
            return
        written = [None if v is None else str(v) for v in values] if self.wide else values
        self.chunks.append(pyarrow.array(written, self.type()))

    def array(self) -> Any:
        import pyarrow

        if self.nested:
            try:
                return pyarrow.array(self.nested)
            except (pyarrow.ArrowException, OverflowError):  # values of several shapes: as the JSON that they were
                return pyarrow.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in self.nested])
        kind = self.type()
        chunks = [pyarrow.nulls(self.before, kind), *(c.cast(kind, safe=False) for c in self.chunks)]
        return pyarrow.chunked_array(chunks, kind)


def _read(path: Path, encoding: str, rows: Callable[[Path, str, Faults], Iterator[tuple[int, Any]]]) -> Dataset:
    import pyarrow
    from datasets import Dataset

    faults, lines = Faults(), Lines()
    chunk: list[Row] = []
    columns: dict[str, _Column] = {}

    def full() -> None:
        first = len(lines) - len(chunk)
        for name, column in columns.items():
            try:
                column.put([row.get(name) for row in chunk])
            except UnicodeEncodeError:
                for i in (i for i, row in enumerate(chunk) if _halved(row.get(name))):
                    place = f"line {lines[first + i]}"
                    faults.add(f"{path}, column {name!r}: half of a surrogate pair, which is no character", place)
        chunk.clear()

    for line, row in rows(path, encoding, faults):
        if not isinstance(row, dict):
            faults.add(f"{path}: every line or item is an object", f"line {line} has {WORDS.get(type(row), 'null')}")
        elif not faults:
            for name, value in row.items():
                if name not in columns:
                    columns[name] = _Column(before=len(lines) - len(chunk))
                columns[name].see(value, line)
            lines.append(line)
            chunk.append(row)
            if len(chunk) >= CHUNK:
                full()
    _mixed(path, columns, faults)
    if not faults:
        full()
    faults.check()
    if not lines:
        raise ValueError(f"{path} has no rows")
    table = pyarrow.table({name: column.array() for name, column in columns.items()})
    return described(Dataset(table), Source(str(path), lines, "line", assumed(encoding)))


def _halved(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)


def _mixed(path: Path, columns: Mapping[str, _Column], faults: Faults) -> None:
    """Adds a fault for every column with values of kinds that are no one kind."""
    for name, column in columns.items():
        words: dict[str, int] = {}
        for kind, line in column.kinds.items():
            words.setdefault(WORDS[kind], line)
        if len(words) > 1:
            places = ", ".join(f"line {line} has {word}" for word, line in words.items())
            faults.add(
                f"{path}, column {name!r}: values of several kinds", places, "Make them all texts, or all numbers"
            )
