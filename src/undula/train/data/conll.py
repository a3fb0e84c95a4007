"""CoNLL files: a token a line, its tag in the last column, a blank line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .decoding import assumed, encoding_of, opened
from .faults import Faults
from .source import Lines, Source, described, nothing_left

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT = "-DOCSTART-"  # begins a document in CoNLL-2003: no sentence
Sentence = tuple[int, list[str], list[str]]  # the line where it begins, its tokens, their tags


def read_conll(path: Path, faults: Faults) -> Dataset:
    """Rows {tokens, tags}, a sentence each: of every line the first column and the last.  Columns are separated by tabs
    where the first sentence has any, else by white space; lines that begin with "# " before a sentence are comments.
    Adds to the faults; raises ValueError where there is nothing to return."""
    from datasets import Dataset, Features, List, Value

    encoding = encoding_of(path, faults)
    rows, lines, order, count = {"tokens": list[list[str]](), "tags": list[list[str]]()}, Lines(), Lines(), 0
    for line, tokens, tags in _sentences(path, encoding, faults):
        if len(tokens) == len(tags):
            rows["tokens"].append(tokens)
            rows["tags"].append(tags)
            lines.append(line)
            order.append(count)
        count += 1
    nothing_left(path, count, lines, faults)
    kind = List(Value("string"))
    made = Dataset.from_dict(rows, features=Features({"tokens": kind, "tags": kind}))
    source = Source(
        str(path), lines, "the sentence of line", assumed(encoding), order if len(order) < count else Lines()
    )
    return described(made, source)


def _sentences(path: Path, encoding: str, faults: Faults) -> Iterator[Sentence]:
    """Every sentence; of one with a line that is none, the tokens have no tags."""
    begin, tokens, tags, number = 0, list[str](), list[str](), 0
    width, tabs, good = 0, False, True
    with opened(path, encoding) as file:
        for line, text in enumerate((*file, ""), 1):
            text = text.rstrip("\r\n")
            if not text.strip():
                if tokens:
                    yield begin, tokens, tags if good else []
                    number += 1
                tokens, tags, good = [], [], True
                continue
            if not tokens and (text.startswith("# ") and len(text.split()) != width or text.startswith(DOCUMENT)):
                continue
            tabs = tabs or not width and "\t" in text
            fields = [field.strip() for field in text.split("\t")] if tabs else text.split()
            width = width or len(fields)
            begin = begin if tokens else line
            tokens.append(fields[0])
            tags.append(fields[-1])
            if len(fields) != width or width < 2 or not fields[0] or not fields[-1]:
                what = f"{path}: a line has a token and its tag, and as many columns as the first ({width}), but"
                faults.add(what, f"line {line} has {len(fields)} ({text!r:.60})", "", (str(path), number))
                good = False
