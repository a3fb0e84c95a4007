"""The report as Markdown, its figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import singledispatch

from ...observe.page.content import (
    Bullets,
    Code,
    Drawn,
    Mark,
    Section,
    Table,
    Text,
)

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")
FOLDER = "plots"


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    parts = [f"# {plain(title)}"]
    for section in sections:
        parts += [f"## {plain(section.title)}", *(block(b) for b in section.blocks)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """A text in one line, in which nothing is Markdown or HTML."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


@singledispatch
def block(value: object) -> str:
    """A block as Markdown."""
    raise TypeError(f"a report has no block {type(value).__name__}")


@block.register
def _(value: Text) -> str:
    return plain(value.text)


@block.register
def _(value: Bullets) -> str:
    return "\n".join(f"- {plain(item)}" for item in value.items)


@block.register
def _(value: Code) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", value.text))])
    return f"### {plain(value.title)}\n\n{fence}text\n{value.text.rstrip()}\n{fence}"


@block.register
def _(value: Table) -> str:
    lines = [_row(value.head), _row(["---" if name in value.words else "---:" for name in value.head], str)]
    lines += [
        _row([f"**{plain(c.text)}**" if isinstance(c, Mark) else plain(c) for c in row], str) for row in value.rows
    ]
    return (f"{plain(value.caption)}\n\n" if value.caption else "") + "\n".join(lines)


def _row(cells, show=plain) -> str:
    return f"| {' | '.join(show(cell) for cell in cells)} |"


@block.register
def _(value: Drawn) -> str:
    return "\n\n".join(
        f"![{plain(f.title)}]({FOLDER}/{f.name}.svg)\n\n{plain(f'{f.title}. {f.caption}.')}" for f in value.figures
    )
