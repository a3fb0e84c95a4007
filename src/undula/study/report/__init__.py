"""The report of a study: one page, the same as Markdown, its tables as LaTeX, and its figures and numbers as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...core.extras import needs
from ...observe import drawing
from ...observe.page import html
from ...observe.page.content import Drawn, Figure, Section
from .. import statistics as S
from ..outcome import ChosenRate, Outcome
from ..summary import summarise
from ..table import Summary
from . import export, latex, markdown
from .document import document

__all__ = ["write", "write_report"]

ENDS = ("svg", "pdf", "png")


def write_report(
    out: Path,
    outcomes: Iterable[Outcome],
    chosen: Iterable[ChosenRate],
    *,
    title: str,
    baseline: str,
    about: Mapping[str, str],
    notes: Sequence[str] = (),
    rule: S.Rule = S.Rule(),
    floors: Mapping[str, float] | None = None,
) -> Path:
    """Writes OUT/report.html, report.md, tables.tex, plots/*.svg, .pdf and .png, runs.csv, runs.parquet and table.csv;
    returns the first.

    `about`: what was run and how to repeat it, texts by their titles; `notes`: sentences to be told first; `floors` as
    in `summarise`.  Equal input gives equal files.  Raises what `summarise` raises.
    """
    return write(out, summarise(outcomes, chosen, baseline, rule, floors=floors), title, about, notes)


def write(
    out: Path,
    summary: Summary,
    title: str,
    about: Mapping[str, str],
    notes: Sequence[str] = (),
    extra: Sequence[Section] = (),
) -> Path:
    """The same for figures that are there already, with sections of its own behind the results."""
    out = Path(out)
    sections = document(summary, about, notes, extra)
    drawn = {f.name: _draw(f, out) for s in sections for b in s.blocks if isinstance(b, Drawn) for f in b.figures}
    export.text(out / "report.md", markdown.page(title, sections))
    export.text(out / "tables.tex", latex.page(title, sections))
    export.runs_csv(summary.runs, out / "runs.csv")
    export.runs_parquet(summary.runs, out / "runs.parquet")
    export.table_csv(summary.rows, out / "table.csv")
    export.text(out / "report.html", html.page(title, sections, drawn))
    return out / "report.html"


@needs("study")
def _draw(figure: Figure, out: Path) -> str:
    """Writes OUT/plots/NAME.svg, .pdf and .png; the first."""
    with drawing.styled(**{"svg.hashsalt": figure.name}):  # ids that differ between the figures of a page
        made = figure.draw()
        found = {end: drawing.rendered(made, end, f"{figure.title}: {figure.caption}") for end in ENDS}
    for end, content in found.items():
        export.content(out / markdown.FOLDER / f"{figure.name}.{end}", content)
    return found["svg"].decode()
