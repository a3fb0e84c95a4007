"""TOML beyond `tomllib`, which reads it: on which line a value stands (it does not say, so it is given one statement
after another), faults with their lines, and writing."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as File
from typing import Any

Path = tuple[str | int, ...]
ENDS = ("]", '"""', "'''", "}")  # one of these stands in the last line of what goes over several
DEEP = 50  # how deep values may lie in one another


def lines(text: str) -> dict[Path, int]:
    """{path: line} of tables and keys, from 1; ("methods", 2, "set") is `set` in the third [[methods]].  `text` is
    TOML: a statement ends with the first line with which it can be read by itself."""
    found: dict[Path, int] = {}
    arrays: dict[Path, int] = {}
    table: Path = ()
    for number, statement, data in _statements(text):
        if statement.lstrip().startswith("["):
            table = _within(next(_paths(data)), arrays, statement.lstrip().startswith("[["))
            found.setdefault(table, number)
        else:
            for path in _paths(data):
                found.setdefault((*table, *path), number)
    return found


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, text, what it says by itself) of each statement that says something."""
    begun, held = 0, ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        begun, held = (begun, f"{held}\n{line}") if held else (number, line)
        if begun < number and not any(end in line for end in ENDS):
            continue
        try:
            data = tomllib.loads(held)
        except tomllib.TOMLDecodeError:
            continue  # a text or a list that goes on
        if data:
            yield begun, held, data
        held = ""


def _paths(data: dict[str, Any], before: Path = ()) -> Iterator[Path]:
    """The paths of all keys, the deepest of a chain of tables first."""
    for key, value in data.items():
        inside = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(inside, dict):
            yield from _paths(inside, (*before, key))
        yield (*before, key)


def _within(name: Path, arrays: dict[Path, int], another: bool) -> Path:
    """The path of a header: parts that are arrays of tables stand for the last table there."""
    table: Path = ()
    for i, part in enumerate(name, 1):
        table = (*table, part)
        if i == len(name) and another:
            arrays[table] = arrays.get(table, -1) + 1
        if table in arrays:
            table = (*table, arrays[table])
    return table


def depth(value: Any) -> int:
    """How deep tables and lists lie in one another; DEEP + 1 for more than DEEP."""
    level, deep = [value], 0
    while level and deep <= DEEP:
        level = [v for held in level if isinstance(held, dict | list)
                 for v in (held.values() if isinstance(held, dict) else held)]  # fmt: skip
        deep += 1
    return deep


def line_of(path: Path, where: dict[Path, int]) -> int | None:
    """The line of a path, or of the nearest thing around it."""
    for end in range(len(path), 0, -1):
        if path[:end] in where:
            return where[path[:end]]
    return None


class Faults(ValueError):
    """Everything that is wrong with a file, a line each."""

    def __init__(self, path: str, found: Iterable[tuple[int | None, str]]):
        self.found = sorted(found, key=lambda f: (f[0] or 0, f[1]))
        told = "\n".join(f"  line {line}: {text}" if line else f"  {text}" for line, text in self.found)
        super().__init__(f"{path} cannot be run; {len(self.found)} fault(s):\n{told}")


def text_of(path: File) -> str:
    """The text of a file that is there.  Raises Faults where it is no UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        why = f"not UTF-8: byte 0x{data[error.start]:02x} stands for no character; save the file as UTF-8"
        raise Faults(str(path), [(line, why)]) from None


def parsed(text: str, name: str) -> dict[str, Any]:
    """What a text says.  Raises Faults where it is no TOML, or values lie too deep in one another."""
    try:
        data = tomllib.loads(text)
        deep = depth(data)
    except tomllib.TOMLDecodeError as error:
        raise Faults(name, [(None, f"not TOML: {error}")]) from None
    except RecursionError:
        deep = DEEP + 1
    if deep > DEEP:
        raise Faults(name, [(None, f"values lie more than {DEEP} deep in one another: no file here has such")])
    return data


def written(data: Mapping[str, Any]) -> str:
    """A mapping of JSON values as TOML: what is plain first, then a [table] for each mapping, in which mappings stand
    in a line.  Raises TypeError for None, which TOML does not have."""
    plain = {k: v for k, v in data.items() if not isinstance(v, Mapping)}
    text = "".join(f"{_key(k)} = {_value(v)}\n" for k, v in plain.items())
    for name, table in data.items():
        if isinstance(table, Mapping):
            text += f"\n[{_key(name)}]\n" + "".join(f"{_key(k)} = {_value(v)}\n" for k, v in table.items())
    return text


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML has nothing for {value!r:.80}")
