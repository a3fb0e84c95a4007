"""OUT/report.html of requests to forget: what went and what stayed, request by request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..observe import drawing as D
from ..observe.page.content import Bullets, Code, Drawn, Figure, Section, Table
from . import page
from .page import LOG, PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def share(stage: Mapping[str, Any], names: Iterable[str]) -> float:
    """The accuracy over the rows of these classes."""
    there = [name for name in names if name in stage["classes"]]
    rows = sum(stage["rows"][name] for name in there)
    return sum(stage["classes"][name] * stage["rows"][name] for name in there) / rows if rows else 0.0


def called(report: Mapping[str, Any], request: Iterable[str]) -> str:
    """A request by its classes, with what has become of it."""
    names = list(request)
    return ", ".join(names) + (" (taken back)" if names in report["undone"] else "")


def since(report: Mapping[str, Any]) -> Iterator[str]:
    """What figures of a sequence of which requests were taken back do not say."""
    if report["undone"]:
        yield (
            f"Taken back: {'; '.join(', '.join(request) for request in report['undone'])}. All figures are of before "
            f"that; of what is there now: undula eval {report['out']}"
        )


def write(out: Path, report: Mapping[str, Any]) -> None:
    """Writes the page.  Whatever goes wrong here is told and ends nothing."""
    try:
        course = Figure(
            "forgetting",
            "Accuracy after each request",
            f"On {report['split']} rows. Blue: the classes that no request names; orange: those of each request",
            partial(_draw, report),
        )
        sections = [
            Section("In short", (Bullets(tuple(_told(report))),)),
            Section("Request by request", (_table(report),)),
            Section("Course", (Drawn((course,)),)),
            Section("Classes", (_classes(report),)),
            Section("How it was asked for", (Code("options", "\n".join(f"{k} = {v}" for k, v in _settings(report))),)),
        ]
        page.placed(out / PAGE, f"Forgetting in {Path(report['run']['model']).name}", sections)
    except Exception as error:
        LOG.warning(f"{out / PAGE} could not be made: {type(error).__name__}: {error}")


def _settings(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [*report["run"].items(), *report["options"].items()]


def _told(report: Mapping[str, Any]) -> list[str]:
    kept = report["kept"]
    found = [
        f"{len(report['requests'])} requests; figures are of {report['split']} rows"
        + (", by which checkpoints were chosen: a little too good." if report["split"] == "validation" else "."),
        f"Classes that no request names: {_percent(kept['before'])} before, {_percent(kept['after'])} after.",
    ]
    found += [f"{', '.join(r['request'])}: {why}." for r in report["requests"] for why in selected(r["groups"])]
    return [*found, *since(report)]


def selected(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What there is to say of how a penalty chose among the groups of a request."""
    for found in groups:
        if found.get("groups") and found["zero"] == found["groups"]:
            yield "the penalty has closed all groups, so nothing was forgotten: a lower weight"
        elif found.get("groups", 1) > 1 and found.get("zero") == 0:
            yield "the penalty has closed no group: a larger weight, or more steps"


def blocks(groups: Iterable[Mapping[str, Any]]) -> str:
    """How many groups are in use, and which."""
    found = next((g for g in groups if "groups" in g), None)
    if found is None:
        return ""
    told = f"{found['groups'] - found['zero']} of {found['groups']}"
    names = found.get("in_use", ()) if found["zero"] else ()
    return f"{told}: {', '.join(names)}" if names else told


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _table(report: Mapping[str, Any]) -> Table:
    head = (
        "request",
        "forgotten, before",
        "after",
        "kept, before",
        "after ",
        "H-mean",
        "earlier requests",
        "blocks changed",
    )
    rows = []
    for r in report["requests"]:
        shown = [_percent(r[k]) for k in ("forgotten_before", "forgotten", "kept_before", "kept", "h_mean", "earlier")]
        rows.append((called(report, r["request"]), *shown, blocks(r["groups"])))
    return Table(
        head, tuple(rows), "Earlier requests: the accuracy on what they have forgotten", frozenset({"request"})
    )


def _classes(report: Mapping[str, Any]) -> Table:
    stages = report["stages"]
    head = ("class", "before", *(f"after {i}" for i in range(1, len(stages))))
    rows = tuple((name, *(_percent(s["classes"].get(name)) for s in stages)) for name in stages[0]["classes"])
    return Table(head, rows, "", frozenset({"class"}))


def _draw(report: Mapping[str, Any]) -> Drawing:
    from .curves import drawn, framed

    stages, kept = report["stages"], report["kept"]["classes"]
    lines = [[(float(i), share(s, r["request"])) for i, s in enumerate(stages)] for r in report["requests"]]
    rest = [(float(i), share(s, kept)) for i, s in enumerate(stages)]
    figure, axis = framed([rest, *lines], "accuracy")
    for each in lines:
        drawn(axis, each, D.LIGHT["loss"], "o")
    drawn(axis, rest, D.LIGHT["win"], "o", width=2.4)
    axis.set_xlabel("requests")
    return figure
