"""On which line of a TOML file a value stands: `tomllib` does not say, so it is given one statement after another."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
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
