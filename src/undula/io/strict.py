"""JSON that is not trusted: no key twice, no NaN or infinity, no nesting that would exhaust a stack."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

DEEPEST = 256  # brackets within brackets
STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
BRACKET = re.compile(r"[\[\]{}]")


def parsed(data: bytes | str, what: str) -> dict[str, Any]:
    """The object that a JSON text holds.  Raises ValueError, which begins with `what`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if _depth(text) > DEEPEST:
            raise ValueError(f"brackets are nested more than {DEEPEST} deep")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds a {type(found).__name__}, not an object")
    return found


def _depth(text: str) -> int:
    """How deep brackets are within each other, where that can be too deep."""
    outside = STRING.sub("", text) if "\\" in text else "".join(text.split('"')[::2])
    if outside.count("[") + outside.count("{") <= DEEPEST:
        return 0  # there are not enough of them to be deep
    deepest = depth = 0
    for bracket in BRACKET.findall(outside):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.100} is there twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


@contextlib.contextmanager
def door(what: str) -> Iterator[None]:
    """Whatever reading a bad file raises leaves as one of FileNotFoundError, ValueError, LookupError; what the system
    says (no permission, no memory) leaves as it is."""
    try:
        yield
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        if type(error) is LookupError:
            raise
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error!s:.300}") from error
