"""JSON Lines, and JSON arrays of objects, as rows: the columns are all the keys that any row has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import assumed, encoding_of, opened
from .faults import Faults
from .source import Lines, Source, described, nameable, nothing_left

if TYPE_CHECKING:
    from datasets import Dataset

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes half of a pair
ADVICE = "A file has an object a line, or (.json) is an array of objects"
CHUNK = 10_000  # rows that are in memory as Python's objects
WORDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
Row = dict[str, Any]


def read_json(path: Path, faults: Faults) -> Dataset:
    """An array of objects, or an object a line.  Adds to the faults; raises ValueError where there is nothing to
    return."""
    encoding = encoding_of(path, faults)
    with opened(path, encoding) as file:
        head = file.read(4096)
        while head and not head.strip():
            head = file.read(4096)
    return _read(path, encoding, _items if head.lstrip().startswith("[") else _lines, faults)


def read_jsonl(path: Path, faults: Faults) -> Dataset:
    """An object a line.  Adds to the faults; raises ValueError where there is nothing to return."""
    return _read(path, encoding_of(path, faults), _lines, faults)


class _Unfit(ValueError):
    """Why a line or an item is no row."""

    def __init__(self, what: str, why: str = "") -> None:
        super().__init__(what, why)
        self.what, self.why = what, why


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise _Unfit(": not JSON", f"the key {twice!r} stands twice in an object")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_pairs)
Values = Iterator[tuple[int, Any]]  # (line, value), an _Unfit in the place of one that could not be read


def _lines(path: Path, encoding: str, faults: Faults) -> Values:
    """Every line that is not blank."""
    with opened(path, encoding, newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.strip(" \t\r\n")
            if text:
                try:
                    yield number, _whole(DECODER.decode(text), text)
                except _Unfit as error:
                    yield number, error
                except (ValueError, RecursionError) as error:
                    yield number, _Unfit(": not JSON", _why(error))


def _items(path: Path, encoding: str, faults: Faults) -> Values:
    """Every item of an array, by the line where it begins.  Where nothing tells where the next one begins, that is a
    fault of the file."""
    with opened(path, encoding) as file:
        text = file.read()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _after(text, at)
        if text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _item(text, at)
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


def _item(text: str, at: int) -> tuple[Any, int]:
    """(the item that begins there, where it ends)."""
    try:
        value, end = DECODER.raw_decode(text, at)
        return _whole(value, text[at:end]), end
    except _Unfit as error:
        return error, json.JSONDecoder().raw_decode(text, at)[1]


def _whole(value: Any, text: str) -> Any:
    """The value.  Raises _Unfit for one with a text that is none, which `text`, as it is written, may tell of."""
    if HALF.search(text):
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if _halved([name, part]):
                raise _Unfit(f", column {name!r}: half of a surrogate pair, which is no character")
    return value


def _halved(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_halved([name, part]) for name, part in value.items())
    if isinstance(value, list):
        return any(map(_halved, value))
    return isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)


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
    kinds: dict[type, list[int]] = field(default_factory=dict)  # [the line of the first, how many]
    wide: bool = False  # some whole number has more than 64 bits
    chunks: list[Any] = field(default_factory=list)
    nested: list[Any] = field(default_factory=list)

    def see(self, value: Any, line: int) -> None:
        if value is not None:
            self.kinds.setdefault(type(value), [line, 0])[1] += 1
            self.wide = self.wide or type(value) is int and not -(2**63) <= value < 2**63

    def words(self) -> list[tuple[str, int]]:
        """(a kind in words, the line of the first), the most frequent first."""
        found: dict[str, list[int]] = {}
        for kind, (line, count) in self.kinds.items():
            first, sum_ = found.get(WORDS[kind], (line, 0))
            found[WORDS[kind]] = [min(first, line), sum_ + count]
        return [(word, line) for word, (line, _) in sorted(found.items(), key=lambda item: -item[1][1])]

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
        """Takes a chunk; of a column of several kinds nothing, for it is read again."""
        import pyarrow

        if len(self.words()) > 1:
            return
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


class _Table:
    """Rows as they come, and those of them that are none.  `words` are the kinds that columns are to have, each
    with the line of the first value."""

    def __init__(self, path: Path, words: Mapping[str, tuple[str, int]]) -> None:
        self.name, self.words = str(path), words
        self.columns: dict[str, _Column] = {}
        self.chunk: list[Row] = []
        self.lines, self.order, self.count = Lines(), Lines(), 0

    def take(self, line: int, row: Any, faults: Faults) -> None:
        key = self.name, self.count
        self.count += 1
        if isinstance(row, _Unfit):
            place = f"line {line} ({row.why})" if row.why else f"line {line}"
            return faults.add(f"{self.name}{row.what}", place, ADVICE if row.why else "", key)
        if not isinstance(row, dict):
            place = f"line {line} has {WORDS.get(type(row), 'null')}"
            return faults.add(f"{self.name}: every line or item is an object", place, ADVICE, key)
        if self.words and self._strange(line, row, faults, key):
            return
        for name, value in row.items():
            if name not in self.columns:
                self.columns[name] = _Column(before=len(self.lines) - len(self.chunk))
            self.columns[name].see(value, line)
        self.lines.append(line)
        self.order.append(key[1])
        self.chunk.append(row)
        if len(self.chunk) >= CHUNK:
            self.full()

    def _strange(self, line: int, row: Row, faults: Faults, key: tuple[str, int]) -> bool:
        """Whether the row has a value of another kind than the column's, which is added to the faults."""
        found = {name: WORDS[type(row[name])] for name in self.words if row.get(name) is not None}
        wrong = {name: word for name, word in found.items() if word != self.words[name][0]}
        for name, word in wrong.items():
            most, first = self.words[name]
            what = f"{self.name}, column {name!r}: values of several kinds; line {first} has {most} as most have, but"
            faults.add(what, f"line {line} has {word}", "Make them all texts, or all numbers", key)
        return bool(wrong)

    def full(self) -> None:
        for name, column in self.columns.items():
            column.put([row.get(name) for row in self.chunk])
        self.chunk.clear()

    def mixed(self) -> dict[str, tuple[str, int]]:
        """{column: (the kind that most of its values have, the line of the first)}, of columns of several kinds."""
        found = {name: column.words() for name, column in self.columns.items()}
        return {name: words[0] for name, words in found.items() if words[1:]}


def _read(path: Path, encoding: str, values: Callable[[Path, str, Faults], Values], faults: Faults) -> Dataset:
    """Reads once, and where columns have values of several kinds once more, to tell which rows those are."""
    import pyarrow
    from datasets import Dataset

    made = _Table(path, {})
    for line, value in values(path, encoding, faults):
        made.take(line, value, faults)
    if mixed := made.mixed():
        made = _Table(path, mixed)
        for line, value in values(path, encoding, Faults()):  # what is no row has been told
            made.take(line, value, faults if isinstance(value, dict) else Faults())
    made.full()
    nothing_left(path, made.count, made.lines, faults)
    table = pyarrow.table({name: made.columns[name].array() for name in nameable(path, made.columns, faults)})
    order = made.order if len(made.order) < made.count else Lines()
    return described(Dataset(table), Source(str(path), made.lines, "line", assumed(encoding), order))
