"""Tokens with tags, and texts with spans, as people write them."""

from __future__ import annotations

import ast
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import spot
from .faults import Faults
from .source import source_of
from .tags import Span

if TYPE_CHECKING:
    from datasets import Dataset

ALONE = "\u3040\u30ff\u3400\u9fff"  # kana, and the characters of Chinese: no blanks stand between their words
KINDS = ("label", "type", "tag", "entity", "category")  # what a span may call its label
LONG = 1 << 20  # characters of a cell that is a list in Python's words


def lists(rows: Dataset, column: str, faults: Faults) -> list[list[Any]]:
    """A column of lists: lists, texts that are one in JSON or Python, and texts with white space between."""
    source, found = source_of(rows), list[list[Any]]()
    for row, value in enumerate(rows[column][:]):
        value = _parsed(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not value:
            what = "holds what is no list" if value and not isinstance(value, list) else "is empty"
            advice = "A row has a list of tokens and a list of tags, or texts with blanks between them"
            faults.add(spot(rows, column, what), source.place(row), advice, source.key(row))
        found.append(value if isinstance(value, list) else [])
    return found


def _parsed(text: str) -> list[Any]:
    if text.strip().startswith("[") and text.strip().endswith("]") and len(text) < LONG:
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(found, list):
                return found
    return text.split()


def token_lists(rows: Dataset, column: str, faults: Faults) -> list[list[str]]:
    """A column of lists of texts."""
    source, found = source_of(rows), lists(rows, column, faults)
    for row, tokens in enumerate(found):
        if strange := next((t for t in tokens if not isinstance(t, str)), None) or (None in tokens and "null"):
            kind = f"{source.place(row)} has {strange!r:.60}"
            faults.add(spot(rows, column, "holds tokens that are no texts"), kind, row=source.key(row))
    return [[t if isinstance(t, str) else "" for t in tokens] for tokens in found]


def tag_lists(rows: Dataset, column: str, names: Sequence[str], faults: Faults) -> list[list[str]]:
    """A column of lists of tags: texts, a `ClassLabel`'s numbers, or numbers of the `names`."""
    source, kind = source_of(rows), rows.features[column]
    names = tuple(getattr(getattr(kind, "feature", kind), "names", None) or ()) or names
    found = list[list[str]]()
    for row, tags in enumerate(lists(rows, column, faults)):
        wrong = next((t for t in tags if not _is_tag(t, names)), tags)
        if wrong is not tags:
            place = f"{source.place(row)} has {wrong!r:.60}"
            advice = f"Tags are texts such as B-PER, or numbers{f' from 0 to {len(names) - 1}' if names else ''}"
            faults.add(spot(rows, column, "holds tags that are not known"), place, advice, source.key(row))
        numbers = [names[t] if names and isinstance(t, int) and 0 <= t < len(names) else str(t) for t in tags]
        found.append(numbers)
    return found


def _is_tag(tag: Any, names: Sequence[str]) -> bool:
    if isinstance(tag, str):
        return bool(tag.strip())
    return type(tag) is int and 0 <= tag < (len(names) or tag + 1)


def words_of(text: str, edges: Sequence[int] = ()) -> list[tuple[int, int]]:
    """The words of a text, each (first character, the one behind its last): runs of what is neither white space nor
    punctuation; marks, kana and Chinese characters one by one; cut at the `edges`."""
    cuts, found, begin = set(edges), list[tuple[int, int]](), -1
    for i, character in enumerate((*text, " ")):
        alone = unicodedata.category(character)[0] in "PS" or ALONE[0] <= character <= ALONE[1]
        alone = alone or ALONE[2] <= character <= ALONE[3]
        if begin >= 0 and (alone or character.isspace() or i in cuts):
            found.append((begin, i))
            begin = -1
        if alone:
            found.append((i, i + 1))
        elif begin < 0 and not character.isspace():
            begin = i
    return found


def span_lists(rows: Dataset, column: str, texts: Sequence[str], faults: Faults) -> list[list[Span]]:
    """A column of lists of spans of the `texts`: {start, end, label}, [start, end, label], or three lists of these, all
    in characters, the end behind the last.  Spans that leave their text, hold no word or overlap are faults."""
    source, found = source_of(rows), list[list[Span]]()
    for row, (value, text) in enumerate(zip(rows[column][:], texts, strict=True)):
        try:
            found.append(_spans(value, text))
        except ValueError as error:
            advice = "Spans are {start, end, label}, in characters, the end behind the last one, and do not overlap"
            place = f"{source.place(row)}: {error}"
            faults.add(spot(rows, column, "holds what is no list of spans"), place, advice, source.key(row))
            found.append([])
    return found


def _spans(value: Any, text: str) -> list[Span]:
    """Raises ValueError for what is none."""
    found = sorted((_span(each, text) for each in _items(value)), key=lambda span: (span[1], span[2]))
    for one, other in itertools.pairwise(found):
        if other[1] < one[2]:
            raise ValueError(f"{one[0]!r} ({one[1]} to {one[2]}) and {other[0]!r} ({other[1]} to {other[2]}) overlap")
    return found


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"{value!r:.60}") from None
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) > 1:
            raise ValueError(f"lists of different lengths, {value!r:.60}")
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.60}")
    return value


def _span(each: Any, text: str) -> Span:
    if isinstance(each, Mapping):
        label = next((each[name] for name in KINDS if each.get(name) is not None), None)
        start, end = each.get("start"), each.get("end")
    elif isinstance(each, list | tuple) and len(each) == 3:
        start, end, label = each
    else:
        raise ValueError(f"{each!r:.60}")
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
        raise ValueError(f"{each!r:.80}")
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise ValueError(f"{label!r} from {start} to {end}, in a text of {len(text)} characters")
    return label.strip(), start, end
