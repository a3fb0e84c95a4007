"""`undula federate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.extras import needs
from . import shell

if TYPE_CHECKING:
    from ..federated.spec import Federation


class Runtime(StrEnum):
    """What carries the rounds."""

    HERE = "in-process"
    FLOWER = "flower"
    RAY = "ray"


def federate(
    path: Annotated[Path, typer.Argument(metavar="FED.toml", help="The federation: a TOML file (docs/federated.md).")],
    *,
    out: Annotated[Path, typer.Option(help="The directory to write: the adapter, its report, the last round.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the federation in OUT.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read the file, the base and all rows, show who has which, and train nothing."),
    ] = False,
    runtime: Annotated[
        Runtime,
        typer.Option(
            help="in-process: one client after the other. flower: a SuperLink and a SuperNode for each client, on "
            "loopback over TLS: undula[flower]. ray: clients side by side, in Flower's simulation: undula[simulation]."
        ),
    ] = Runtime.HERE,
    to: shell.Json = None,
) -> None:
    """Train one adapter with clients that share no rows: rounds on this machine.

    Each round the server sends its adapter, clients train it on rows of theirs, and the server makes one adapter of
    what comes back.  A client that fails is a line in the report.
    """
    if dry_run:
        shell.show(_looked_at(path), to)
        return
    try:
        report = _run(path, out, resume, runtime)
    except KeyboardInterrupt:
        more = "" if runtime is Runtime.HERE else f" --runtime {runtime}"
        again = f"undula federate {shlex.quote(str(path))} --out {shlex.quote(str(out))}{more} --resume"
        shell.say(f"stopped; the rounds that are done are kept: go on with {again}", "yellow")
        raise typer.Exit(130) from None
    shell.write(to, report)
    if str(to) != "-":
        for note in report["notes"]:
            shell.remark(note)
        shell.show(list(_rows(report)))
        shell.note(f"Saved in {out}: {'the adapter, ' if report['trained'] else ''}report.html, report.json")


@needs("train")
def _looked_at(path: Path) -> list[dict[str, Any]]:
    from ..federated.desk import Desk
    from ..federated.part import unreached
    from ..federated.rounds import clients_at
    from ..federated.rows import Rows
    from ..federated.server import check_goes_on
    from ..federated.spec import read
    from ..train.base import quiet

    rows = Rows(read(path))
    f, found = rows.asked, []
    for name in f.names:
        train, held = rows.client(name)
        kinds = kinds_of(train["label"][:]) if "label" in train.column_names else None
        found.append({"client": name, "rows": len(train), "to measure": 0 if held is None else len(held),
                      "labels": kinds})  # fmt: skip
        if f.privacy is not None:  # the multiplier
            found[-1]["noise"] = f.privacy.noise_of(f, name, len(train))
    with quiet():
        desk = Desk(rows.settled(f), rows.server)
        check_goes_on(f.how, desk.first)
        clients = clients_at(desk, desk.federation, rows)  # which tell what is cut of their rows
        for client, row in zip(clients.values(), found, strict=True):
            row["trains"] = client.like.num_parameters()
        notes = [f"the server: {note}" for note in desk.notes]
        for note in (*notes, *unreached([client.part for client in clients.values()], desk.first)):
            shell.remark(note)
    server = {"client": "(the server)", "rows": 0, "to measure": len(rows.server)}
    return [*found, {**dict.fromkeys(found[0]), **server}]


def kinds_of(labels: Sequence[Any]) -> int:
    """How many labels there are; a row may have several."""
    return len({label for each in labels for label in (each if isinstance(each, list) else [each])})


@needs("train")
def _run(path: Path, out: Path, resume: bool, runtime: Runtime) -> dict[str, Any]:
    from ..federated.rounds import federate as here
    from ..federated.spec import read
    from ..train.base import quiet

    federation = read(path)
    verb = {Runtime.HERE: lambda: here, Runtime.FLOWER: _flower, Runtime.RAY: _ray}[runtime]()
    with quiet():
        return verb(federation, out, resume=resume, told=lambda record: _told(record, federation))


@needs("flower")
def _flower() -> Any:
    from ..federated.flower import run

    return run


@needs("simulation")
def _ray() -> Any:
    from ..federated.flower.simulated import run

    return run


def _told(record: dict[str, Any], federation: Federation) -> None:
    """A line for a round."""
    from ..federated.report import said, size

    if shell.voice.quiet:
        return
    failed = {name: c for name, c in record["clients"].items() if "failed" in c}
    measured = ", ".join(f"{k} {said(v)}" for k, v in record["server"].items())
    counted = f"{len(record['clients']) - len(failed)} of {len(record['clients'])} clients"
    text = f"round {record['round']} of {federation.rounds}: {measured}; {counted}, {size(record['up'])} up"
    shell.err.print(text, soft_wrap=True, highlight=False, markup=False)
    for name, c in failed.items():
        shell.remark(f"{name} ({c['failed']}): {c['why']}")
    if "stayed" in record:
        shell.remark(f"the adapter stays as it was: {record['stayed']}")


def _rows(report: dict[str, Any]) -> Any:
    first = report["rounds"][0]["server"]
    for name, value in report["after"].items():
        test = (report["test"] or {}).get(name)
        yield {"metric": name, "before": first.get(name), "after": value} | ({} if test is None else {"test": test})
