"""What is left of a federation: the adapter as any training leaves it, OUT/report.json, and a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..io import files
from ..observe import drawing as D
from ..observe.page.content import Block, Bullets, Code, Drawn, Figure, Section, Table, Text
from ..train.base import called_elsewhere
from ..train.curves import Line, drawn, framed
from ..train.measure import versions
from ..train.page import LOG, PAGE, placed
from ..train.run import REPORT, Run, write_json
from .messages import ROWS
from .server import Record, Server
from .spec import written

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

CONFIG = "federation.toml"
UNTRAINED = "no round has changed the adapter: nothing was trained, and no adapter is written"
SHOWN = 100  # rounds, clients and failures in a table of the page
Report = Mapping[str, Any]


def concluded(server: Server) -> dict[str, Any]:
    """Writes OUT/adapter_*, run.json, report.json, report.html and federation.toml; returns the report.  Where no
    round has changed the adapter there is none to write, and the report says so."""
    f, out, task = server.federation, server.out, server.desk.run.task
    report = {
        "federation": f.encode(),
        "metric": task.headline,
        "rows": len(server.held),
        "rounds": server.records,
        "after": server.records[-1]["server"],
        "test": None if server.test is None else server.score(server.adapter, server.test),
        "bytes": {way: sum(r[way] for r in server.records[1:]) for way in ("down", "up")},
        "spread": spread(server.records[-1].get("spread", {}), task.headline),
        "notes": [*([] if server.moved else [UNTRAINED]), *server.notes],
        "trained": server.moved,
        "versions": versions(),
        "out": str(out),
    }
    if server.moved:
        Run.of(f.recipe, out).save(None, rounds="split" if f.split is not None else "clients")
        server.result.save(out, base=called_elsewhere(f.recipe.model), task=task.peft)
    files.write_text(out / CONFIG, written(f))
    write_page(server, report)
    write_json(out / REPORT, report)
    return report


def spread(found: Mapping[str, Record], metric: str) -> dict[str, float] | None:
    """Over the clients that have measured: their least, mean and most, and the standard deviation."""
    values = [c[metric] for c in found.values() if metric in c]
    if not values:
        return None
    return {
        "least": min(values),
        "mean": statistics.fmean(values),
        "most": max(values),
        "std": statistics.pstdev(values),
    }


def write_page(server: Server, report: Report) -> None:
    """Writes OUT/report.html.  Whatever goes wrong here is told and ends nothing."""
    try:
        f = server.federation
        sections = [
            Section("In short", (Bullets(tuple(_opening(report))),)),
            Section("Course", (Drawn(tuple(_figures(report))),)),
            Section("Rounds", tuple(_rounds(report))),
            Section("Clients", tuple(_clients(report))),
            Section("What failed", tuple(_failures(report))),
            Section("How to repeat it", (Code(CONFIG, written(f)), Code("Versions", _lines(report["versions"])))),
        ]
        placed(server.out / PAGE, f"{type(f.how).__name__} of {len(f.names)} clients", sections)
    except Exception as error:
        LOG.warning(f"{server.out / PAGE} could not be made: {type(error).__name__}: {error}")


def _lines(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} {value}" for name, value in table.items())


def _opening(report: Report) -> Iterator[str]:
    rounds, metric = report["rounds"], report["metric"]
    first, last = rounds[0]["server"].get(metric), report["after"].get(metric)
    course = f"{metric}: {said(first)} before, {said(last)} after {len(rounds) - 1} rounds"
    yield f"{course}, on {report['rows']:,} rows of the server's."
    if report["test"]:
        yield f"On test rows, by which nothing was chosen: {said(report['test'].get(metric))}."
    down, up = (size(report["bytes"][way]) for way in ("down", "up"))
    yield f"Sent: {down} down, {up} up, all clients and rounds together."
    if found := report["spread"]:
        yield (
            f"On rows of their own clients have {said(found['least'])} to {said(found['most'])}, {said(found['mean'])} "
            f"in the mean, with a standard deviation of {said(found['std'])}."
        )
    if spent := rounds[-1].get("privacy"):
        yield f"Privacy: {', '.join(f'{name} {told(value)}' for name, value in spent.items())}."
    if failed := sum(1 for _ in _failed(report)):
        yield f"{failed} answers were missing or refused; the rounds went on without them."
    if stayed := [str(r["round"]) for r in rounds if "stayed" in r]:
        yield f"Rounds after which the adapter stayed as it was: {', '.join(stayed[:20])}."
    yield from report["notes"]


def said(value: Any) -> str:
    """A number for people."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def told(value: Any) -> str:
    """A number (None: of an epsilon that nothing bounds), names, or numbers by name."""
    if value is None:
        return "unbounded"
    if isinstance(value, Mapping):
        return ", ".join(f"{said(number)} of {name}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else said(value)


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**20:.3g} MiB" if number >= 2**20 else f"{number / 2**10:.3g} KiB"


def _figures(report: Report) -> Iterator[Figure]:
    rounds, metric = report["rounds"], report["metric"]
    on = "On the server's rows"
    if len(line := _line((r["round"], r["server"].get(metric)) for r in rounds)) > 1:
        yield Figure("metric", f"{metric} by round", on, partial(_draw, metric, [line]))
    loss = _line((r["round"], r["server"].get("loss")) for r in rounds)
    own = _line((r["round"], _mean(c.get("loss") for c in r["clients"].values())) for r in rounds[1:])
    if metric != "loss" and (lines := [line for line in (loss, own) if line]):
        caption = f"{on}; orange: of the clients while they train, in the mean"
        yield Figure("loss", "Loss by round", caption, partial(_draw, "loss", lines))
    bias = _line((r["round"], r.get("bias", {}).get("mean")) for r in rounds)
    if bias:
        caption = "How far the server's update is from the mean of the clients', of its size; the mean over layers"
        yield Figure("bias", "Bias of the aggregation", caption, partial(_draw, "|D - dW| / |D|", [bias]))
    spent = _line((r["round"], (r.get("privacy") or {}).get("epsilon")) for r in rounds)
    if spent:
        yield Figure("epsilon", "Privacy spent", "Of all rounds so far", partial(_draw, "epsilon", [spent]))


def _line(pairs: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in pairs if y is not None]


def _mean(values: Any) -> float | None:
    found = [v for v in values if v is not None]
    return statistics.fmean(found) if found else None


def _draw(title: str, lines: Sequence[Line]) -> Drawing:
    figure, axis = framed(lines, title)
    for line, colour in zip(lines, ("win", "loss"), strict=False):
        drawn(axis, line, D.LIGHT[colour], "o")
    axis.set_xlabel("rounds")
    return figure


def _rounds(report: Report) -> Iterator[Block]:
    metric, rounds = report["metric"], report["rounds"]
    head = ("round", "replies", "failed", metric, "loss", "bias", "down", "up", "epsilon", "note")
    rows = []
    for r in rounds[-SHOWN:]:
        there = r.get("clients", {})
        failed = sum("failed" in c for c in there.values())
        numbers = (r["server"].get(metric), r["server"].get("loss") if metric != "loss" else None,
                   r.get("bias", {}).get("mean"))  # fmt: skip
        sent = [size(r[way]) if way in r else "" for way in ("down", "up")]
        spent = told(r["privacy"]["epsilon"]) if r.get("privacy") else ""
        rows.append((str(r["round"]), str(len(there) - failed), str(failed), *map(said, numbers), *sent, spent,
                     r.get("stayed", "")))  # fmt: skip
    more = f"The last {SHOWN} of {len(rounds)}; all are in report.json. " if len(rounds) > SHOWN else ""
    yield Table(
        head,
        tuple(rows),
        f"{more}Bytes are those of the numbers, of all clients together, for training: "
        "to measure, each client is sent the adapter once more.",
        frozenset({"note"}),
    )


def _clients(report: Report) -> Iterator[Block]:
    metric, rounds = report["metric"], report["rounds"]
    names = list(dict.fromkeys(n for r in rounds for n in (*r.get("clients", {}), *r.get("spread", {}))))
    last = rounds[-1].get("spread", {})
    rows = []
    for name in names[:SHOWN]:
        took = [r["clients"][name] for r in rounds[1:] if name in r["clients"]]
        counted = [c for c in took if "failed" not in c]
        final = counted[-1] if counted else {}
        numbers = (final.get(ROWS), final.get("loss"), final.get("change"), last.get(name, {}).get(metric))
        rows.append((name, str(len(took)), str(len(took) - len(counted)), *map(said, numbers)))
    head = ("client", "rounds", "failed", "rows", "last loss", "last change", f"{metric} on own rows")
    more = f"The first {SHOWN} of {len(names)}. " if len(names) > SHOWN else ""
    yield Table(
        head, tuple(rows), f"{more}Change: the norm of what a client has changed in a round", frozenset({"client"})
    )


def _failed(report: Report) -> Iterator[tuple[str, str, str, str]]:
    for r in report["rounds"]:
        for part in ("clients", "spread"):
            for name, c in r.get(part, {}).items():
                if "failed" in c:
                    yield str(r["round"]), name, c["failed"], c["why"]


def _failures(report: Report) -> Iterator[Block]:
    rows = list(_failed(report))
    if not rows:
        yield Text("Nothing: every client that was asked answered.")
        return
    more = f"The first {SHOWN} of {len(rows)}" if len(rows) > SHOWN else ""
    yield Table(("round", "client", "what", "why"), tuple(rows[:SHOWN]), more, frozenset({"client", "what", "why"}))
