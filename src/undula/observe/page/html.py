"""The report as one page: no script, nothing from elsewhere, light and dark, wide and narrow."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import singledispatch
from html import escape
from pathlib import Path

from .. import drawing
from .content import (
    Bullets,
    Code,
    Drawn,
    Figure,
    Mark,
    Pictures,
    Section,
    Table,
    Text,
)

PAGE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
COLOURS = "".join(
    f"{begin}:root {{ {' '.join(f'--{name}: {colour};' for name, colour in theme.items())} }}{end}\n"
    for begin, theme, end in (
        ("", drawing.LIGHT, ""),
        ("@media (prefers-color-scheme: dark) { ", drawing.DARK, " }"),
    )
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, sections: Sequence[Section], drawn: Mapping[str, str]) -> str:
    """The whole file; `drawn`: the SVG of each figure, by its name."""
    links = "".join(f'<a href="#{_anchor(i)}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "\n".join(_section(i, section, drawn) for i, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{COLOURS}{PAGE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1><nav>{links}</nav>\n{body}\n</main></body></html>\n"
    )


def _anchor(i: int) -> str:
    return f"part-{i + 1}"


def _section(i: int, section: Section, drawn: Mapping[str, str]) -> str:
    inner = "\n".join(_drawn(b, drawn) if isinstance(b, Drawn) else block(b) for b in section.blocks)
    kind = ' class="lead"' if i == 0 else ""
    return f'<section id="{_anchor(i)}"><h2>{escape(section.title)}</h2><div{kind}>{inner}</div></section>'


@singledispatch
def block(value: object) -> str:
    """A block as HTML."""
    raise TypeError(f"a report has no block {type(value).__name__}")


@block.register
def _(value: Text) -> str:
    return f"<p>{escape(value.text)}</p>"


@block.register
def _(value: Bullets) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in value.items)}</ul>"


@block.register
def _(value: Code) -> str:
    return f"<h3>{escape(value.title)}</h3><pre>{escape(value.text)}</pre>"


@block.register
def _(value: Table) -> str:
    words = [name in value.words for name in value.head]
    head = "".join(f"<th{_kind(w, '')}>{escape(name)}</th>" for name, w in zip(value.head, words, strict=True))
    rows = "".join(
        f"<tr>{''.join(_cell(cell, w) for cell, w in zip(row, words, strict=True))}</tr>" for row in value.rows
    )
    caption = f'<div class="caption">{escape(value.caption)}</div>' if value.caption else ""  # does not scroll
    return f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


@block.register
def _(value: Pictures) -> str:
    return '<div class="pictures">' + "".join(
        f'<figure><img alt="" src="data:image/png;base64,{b64encode(p.png).decode()}">'
        f"<figcaption>{escape(p.text)}</figcaption></figure>"
        for p in value.items
    ) + "</div>"  # fmt: skip


def _cell(cell: str | Mark, word: bool) -> str:
    text = cell.text if isinstance(cell, Mark) else cell
    inner = f'<b class="{cell.kind}">{escape(text)}</b>' if isinstance(cell, Mark) else escape(text)
    return f"<td{_kind(word, text)}>{inner}</td>"


def _kind(word: bool, text: str) -> str:
    if not word:
        return ""
    return ' class="word long"' if len(text) > 60 else ' class="word"'


def _drawn(value: Drawn, drawn: Mapping[str, str]) -> str:
    return f'<div class="figures">{"".join(_figure(f, drawing.inline(drawn[f.name])) for f in value.figures)}</div>'


def _figure(value: Figure, svg: str) -> str:
    said = f"<figcaption><b>{escape(value.title)}.</b> {escape(value.caption)}.</figcaption>"
    if not value.many:
        return f"<figure>{svg}{said}</figure>"
    shown = f'<summary>{said}</summary><div class="scroll">{svg}</div>'
    return f'<figure class="many"><details open>{shown}</details></figure>'
