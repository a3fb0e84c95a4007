r"""The tables of a report as LaTeX, for papers: `\input` the file, or copy one table.

Needs booktabs and textcomp; names in letters that are not Latin need LuaLaTeX or XeLaTeX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...observe.page.content import Mark, Section, Table

SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\symbol{34}",  # active under some of babel's languages; \textquotedbl is not in every encoding
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "…": r"\ldots{}",
}
LONG = 40  # letters; a column with a longer cell is a paragraph


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    found = [(s.title, b) for s in sections for b in s.blocks if isinstance(b, Table)]
    head = f"% {' '.join(title.split())}\n% needs \\usepackage{{booktabs}} and \\usepackage{{textcomp}}\n"
    return head + "".join(f"\n% {name}\n{_table(i, table)}" for i, (name, table) in enumerate(found, 1))


def plain(text: str) -> str:
    """A text in one line, in which nothing is LaTeX; minus signs of numbers are set as such."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    escaped = "".join(SPECIAL.get(c, c) for c in line)
    signed = re.sub(r"(?<![\w.)}-])-(?=\d)", "$-$", escaped)
    return re.sub("-(?=-)", "-{}", signed)  # two would be set as a dash


def _table(number: int, table: Table) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        *([f"\\caption{{{plain(table.caption)}}}"] if table.caption else []),
        f"\\label{{tab:undula-{number}}}",
        f"\\begin{{tabular}}{{{''.join(_column(table, i) for i in range(len(table.head)))}}}",
        r"\toprule",
        _row(table.head),
        r"\midrule",
        *(_row(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _column(table: Table, i: int) -> str:
    if table.head[i] not in table.words:
        return "r"
    longest = max((len(_text(row[i])) for row in table.rows), default=0)
    return "p{0.4\\linewidth}" if longest > LONG else "l"


def _row(cells: Sequence[str | Mark]) -> str:
    return " & ".join(_cell(cell) for cell in cells) + r" \\"


def _cell(cell: str | Mark) -> str:
    bold = isinstance(cell, Mark) and cell.kind != "open-verdict"
    made = plain(_text(cell))
    made = "{}" + made if made.startswith(("[", "*")) else made  # which \\ before it would take for its own
    return f"\\textbf{{{made}}}" if bold else made


def _text(cell: str | Mark) -> str:
    return cell.text if isinstance(cell, Mark) else cell
