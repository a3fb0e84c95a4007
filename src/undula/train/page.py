"""OUT/report.html: a training on one page, to be looked at and shared; OUT/loss.svg: its course alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import needs
from ..io import files
from ..observe import drawing
from ..observe.page import html
from ..observe.page.content import (
    Block,
    Bullets,
    Code,
    Drawn,
    Figure,
    Mark,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from . import curves
from .config import written
from .worries import worries

if TYPE_CHECKING:
    from datasets import Dataset

    from .run import Run

LOG = logging.getLogger("undula.train")
PAGE, CURVE = "report.html", "loss.svg"
THUMB = 128  # pixels of an image's side
SITES = 60  # of the adapter that are listed
CLASSES = 200
MEASURED = ("rank", "norm", "effective_rank", "stable_rank", "nonlinearity")  # of a layer


def write(run: Run, report: Mapping[str, Any], rows: Dataset, sites: list[Mapping[str, Any]]) -> None:
    """Writes both, from the report; `rows` are those it was measured on, `sites` what `diagnose` says of the adapter.
    Whatever goes wrong here is told and ends no training."""
    try:
        drawn = placed(run.out / PAGE, _title(run, report), _sections(run, report, rows, sites))
        if "loss" in drawn:
            files.write_text(run.out / CURVE, drawn["loss"])
    except Exception as error:
        LOG.warning(f"{run.out / PAGE} could not be made: {type(error).__name__}: {error}")


def placed(path: Path, title: str, sections: Iterable[Section]) -> dict[str, str]:
    """Writes a page of those sections that hold something, and returns its drawings; without any where nothing can
    draw."""
    full = [s for s in sections if s.blocks]
    drawn = _drawn(full)
    files.write_text(path, html.page(title, full if drawn is not None else [_undrawn(s) for s in full], drawn or {}))
    return drawn or {}


def _drawn(sections: list[Section]) -> dict[str, str] | None:
    """The SVG of each figure; None where nothing can draw."""
    try:
        return {f.name: _draw(f) for s in sections for b in s.blocks if isinstance(b, Drawn) for f in b.figures}
    except ModuleNotFoundError as error:
        LOG.warning(f"{PAGE} has no pictures: {error}")
        return None


@needs("plot")
def _draw(figure: Figure) -> str:
    with drawing.styled(**{"svg.hashsalt": figure.name}):
        return drawing.rendered(figure.draw(), "svg", f"{figure.title}: {figure.caption}").decode()


def _undrawn(section: Section) -> Section:
    return Section(section.title, tuple(b for b in section.blocks if not isinstance(b, Drawn)))


def _title(run: Run, report: Mapping[str, Any]) -> str:
    data = Path(run.data).name if Path(run.data).exists() else run.data
    model = Path(run.model).name if Path(run.model).exists() else run.model
    return f"{report['method']} on {data}, {model}"


def _sections(run: Run, report: Mapping[str, Any], rows: Dataset, sites: list[Mapping[str, Any]]) -> Iterator[Section]:
    yield Section("In short", (Bullets(tuple(_opening(report))),))
    yield Section("Before and after", tuple(_numbers(report)))
    yield Section("Course", (Drawn(tuple(curves.figures(report))),))
    yield Section("Classes", tuple(_classes(report)))
    yield Section("The rows that are most wrong", tuple(_worst(report, rows)))
    yield Section("Written before and after", tuple(_written(report)))
    yield Section("The adapter", tuple(_adapter(report, sites)))
    notes = tuple(report["data"].get("notes", ()))
    yield Section("Of the rows", (Bullets(notes),) if notes else ())
    with_what = "\n".join(f"{name} {version}" for name, version in report["versions"].items())
    yield Section("How to repeat it", (Code("run.toml", written(run)), Code("Versions", with_what)))


def _opening(report: Mapping[str, Any]) -> Iterator[str]:
    metric, before, after = report["metric"], report["before"] or {}, report["after"] or {}
    if metric in after:
        course = f"{metric}: {said(before.get(metric))} before, {said(after[metric])} after"
        yield f"{course}, on {report['eval_rows']:,} validation rows."
    majority = report["data"].get("majority")
    if majority is not None:
        yield f"Always answering the most frequent class is right in {100 * majority:.1f} % of these rows."
    best, early = report.get("best"), report.get("ended_early")
    if best is not None:
        kept = "is kept" if best["kept"] else "is not kept: the last one is"
        which = f"{metric} {said(best['value'])}, step {best['step']}"
        yield f"Evaluated {best['of']} times while it trained; the best ({which}) {kept}."
    if early:
        yield f"The training {early}."
    if text := report.get("optimism"):
        yield text
    yield (
        f"{report['method']}: {report['trainable_parameters']:,} parameters train at {report['sites']} layers; "
        f"{report['steps']:,} steps of {report['rows_in_a_step']} rows, {report['train_rows']:,} training rows, "
        f"{report['seconds']:.0f} s on {report['device']}."
    )
    yield from (text[:1].upper() + text[1:] + "." for text in worries(report))


def said(value: Any) -> str:
    """A figure of a report, which holds None for what is not finite."""
    return "not finite" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(report: Mapping[str, Any]) -> Iterator[Block]:
    before, after = report["before"] or {}, report["after"] or {}
    names = list(dict.fromkeys([*before, *after]))
    rows = tuple((n, *(said(m[n]) if n in m else "" for m in (before, after))) for n in names)
    if rows:
        yield Table(("metric", "before", "after"), rows, "", frozenset({"metric"}))


def _classes(report: Mapping[str, Any]) -> Iterator[Block]:
    found = report.get("per_class") or []
    if not found:
        return
    trained = report["data"].get("classes", {}).get("train", {})
    rows = tuple(
        (c["class"], *(_share(c, k) for k in ("precision", "recall", "f1")), f"{c['rows']:,}", f"{c['answers']:,}",
         f"{trained.get(c['class'], 0):,}")
        for c in found[:CLASSES]
    )  # fmt: skip
    head = ("class", "precision", "recall", "F1", "rows", "answers", "training rows")
    more = f"; {len(found) - CLASSES} more are in report.json" if len(found) > CLASSES else ""
    yield Table(head, rows, f"Each class on the validation rows{more}", frozenset({"class"}))
    yield Drawn(tuple(curves.confusion(report)))
    pairs = [(c["class"], c["said"], str(c["rows"])) for c in report.get("confused", [])[:20]]
    if pairs:
        yield Table(
            ("class", "said to be", "rows"), tuple(pairs), "What is taken for what", frozenset({"class", "said to be"})
        )


def _share(c: Mapping[str, Any], name: str) -> str | Mark:
    """A figure of a class; 0 of one that has rows stands out."""
    text = f"{c[name]:.3f}"
    return Mark(text, "loss") if not c[name] and c["rows"] else text


def _worst(report: Mapping[str, Any], rows: Dataset) -> Iterator[Block]:
    found = report.get("worst") or []
    if not found:
        return
    yield Text("By the loss: what is wrong here is what the model is surest of, or what is labelled wrongly.")
    told = [(f"{w['loss']:.3f}", w["class"], w["said"], f"{w['probability']:.3f}", str(w["row"])) for w in found]
    if "image" in rows.column_names:
        said_of = [f"is {c}, said to be {g} ({p}); loss {loss}, row {row}" for loss, c, g, p, row in told]
        small = [_thumb(rows[w["row"]]["image"]) for w in found]
        yield Pictures(tuple(map(Picture, small, said_of)))
        return
    texts = [w.get("text", "") + (f" | {w['pair']}" if "pair" in w else "") for w in found]
    head = ("loss", "class", "said to be", "probability", "row", "text")
    cells = tuple((*cells, text) for cells, text in zip(told, texts, strict=True))
    yield Table(head, cells, "", frozenset({"class", "said to be", "text"}))


def _thumb(image: Any) -> bytes:
    from .data.images import opened

    small = opened(image).convert("RGB")
    small.thumbnail((THUMB, THUMB))
    small.save(made := io.BytesIO(), "PNG")
    return made.getvalue()


def _written(report: Mapping[str, Any]) -> Iterator[Block]:
    before, after = report.get("written_before") or [], report.get("written") or []
    if not after:
        return
    olds = [b["written"] for b in before] + [""] * (len(after) - len(before))
    rows = tuple((a["asked"], a["wanted"], old, a["written"]) for a, old in zip(after, olds, strict=False))
    head = ("asked", "wanted", "before", "after")
    yield Table(head, rows, "The first validation rows, written by the likeliest token each", frozenset(head))


def _adapter(report: Mapping[str, Any], sites: list[Mapping[str, Any]]) -> Iterator[Block]:
    if not sites:
        if report["sites"]:
            yield Text(f"Its spectra take long for this method: undula show {report['out']}")
        return
    *each, whole = sites
    if whole.get("warnings"):
        yield Bullets(tuple(whole["warnings"]))
    names = [
        n
        for n in ("rank", "norm", "effective_rank", "stable_rank", "nonlinearity")
        if any(s.get(n) is not None for s in each)
    ]
    rows = tuple((s["site"], *("" if s.get(n) is None else said(s[n]) for n in names)) for s in each[:SITES])
    head = ("layer", *(n.replace("_", " ") for n in names))
    more = f"; the first {SITES} of {len(each)} layers" if len(each) > SITES else ""
    yield Table(head, rows, f"What its updates are{more}", frozenset({"layer"}))
