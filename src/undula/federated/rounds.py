"""federate(federation, out): all rounds in this process, one client after the other."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..core.extras import needs
from ..core.turns import turn
from ..io.whole import alone_in
from .client import Client
from .desk import Desk
from .messages import Arrays, Counts, Failure
from .report import concluded
from .rows import Rows
from .server import Record, Server, check_place
from .spec import Federation

T = TypeVar("T")


class Participant(Protocol):
    """What takes part: a `Client`, or what stands for one."""

    def train(self, round: int, arrays: Arrays) -> tuple[Arrays, Counts]:
        """See `Client.train`."""

    def evaluate(self, arrays: Arrays) -> Counts:
        """See `Client.evaluate`."""


def clients_of(server: Server, rows: Rows) -> dict[str, Participant]:
    """All clients of a federation, on the server's own desk."""
    return {**clients_at(server.desk, server.federation, rows)}


def clients_at(desk: Desk, federation: Federation, rows: Rows) -> dict[str, Client]:
    """The same before there is a server.  Raises ValueError or LookupError for rows that cannot be trained on."""
    return {name: Client(federation, name, rows, desk) for name in federation.names}


@needs("train")
@turn()
def federate(
    federation: Federation,
    out: str | Path,
    *,
    resume: bool = False,
    parties: Callable[[Server, Rows], Mapping[str, Participant]] = clients_of,
    told: Callable[[Record], Any] = lambda record: None,
) -> dict[str, Any]:
    """Runs the rounds that are left, writes the adapter and the report, and returns this (OUT/report.json).

    parties: what stands for the clients, by their names; told: is given the record of each round.

    Raises what `Server` and `Client` raise before the first round; RuntimeError where no client gets through the first.
    """
    out = Path(out)
    with alone_in(out):
        check_place(out, resume)
        rows = Rows(federation)
        desk = Desk(rows.settled(federation), rows.server)
        # what is wrong with rows that are here is told before OUT holds anything
        here = clients_at(desk, desk.federation, rows) if parties is clients_of else {}
        digests = {f"the rows of {name}": rows.digest(name) for name in here}
        server = Server(federation, out, rows, desk, resume, digests)
        go(server, here or parties(server, rows), told)
        return concluded(server)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Within the context the garbage collector leaves out what there is: each client's Trainer begins with a search."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@set_aside()
def go(server: Server, parties: Mapping[str, Participant], told: Callable[[Record], Any] = lambda record: None) -> None:
    """The rounds that are left.  Raises RuntimeError where no client gets through the first."""
    f = server.federation
    while server.round < f.rounds or server.measures():
        number = server.round + 1
        if server.measures():
            briefs = server.briefs(f.names)
            server.spread(each(f.names, parties, lambda name, party: party.evaluate(briefs[name]), None))  # noqa: B023
            continue
        briefs = server.briefs(chosen := server.ask())
        answers = each(chosen, parties, lambda name, party: party.train(number, briefs[name]), f.timeout)  # noqa: B023
        record = server.take(answers)
        check_first(record)
        told(record)


def check_first(record: Record) -> None:
    """Raises RuntimeError where no client got through the first round: what is wrong with all is told at once."""
    failed = [c for c in record["clients"].values() if "failed" in c]
    if record["round"] == 1 and len(failed) == len(record["clients"]):
        raise RuntimeError(
            f"no client got through the first round, and OUT holds no adapter; the first of them: {failed[0]['why']}"
        )


def each(
    names: Iterable[str],
    parties: Mapping[str, Participant],
    ask: Callable[[str, Participant], T],
    timeout: float | None,
) -> dict[str, T | Failure]:
    """What each of these answers; of one that raises, is not there or takes more than `timeout` seconds, a Failure."""
    found: dict[str, T | Failure] = {}
    for name in names:
        begun = time.perf_counter()
        try:
            found[name] = ask(name, parties[name]) if name in parties else Failure("absent", "no answer")
        except (Exception, SystemExit) as error:  # whatever a client's training or rows raise: the round goes on
            found[name] = Failure("error", f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - begun
        if timeout is not None and seconds > timeout:
            found[name] = Failure("late", f"{seconds:.1f} s, and the server waits {timeout:g} s")
    return found
