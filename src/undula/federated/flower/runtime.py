"""run(federation, out): the rounds by Flower on this machine: a SuperLink and a SuperNode for each client, on loopback.

OUT/flower/    keys and certificates, the app, and what each process says: logs/superlink.txt, logs/server.txt (of the
               rounds), logs/node/NAME.txt, logs/client/NAME.txt
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.extras import needs
from ...io.files import write_text
from ...io.whole import alone_in
from ...train.run import REPORT
from ..server import RUNTIME, SPEC, STATE, Record, check_place
from ..spec import Federation
from .apps import FEDERATION, OUT
from .bundle import write_app
from .keys import write_certificates, write_pair
from .link import Link
from .processes import Processes, free_ports

SUPERLINK, NODE, CLIENT = "superlink", "node", "client"  # the kinds of processes, and folders of what is theirs
LINUX = sys.platform == "linux"
RESTARTS = 5  # of a node; then its client is absent
TRIES = 2  # starts without a round in between
LOOK = 1.0  # seconds between looks at what is at work
WAIT = 120.0  # seconds for a SuperLink to answer, and for a server's app of before to end
QUIET = {  # no telemetry, no question for a newer version, no package installed by an app
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "PYTHONUNBUFFERED": "1",
}
FAILED = "ServerApp failed with exception: "


class Ended(RuntimeError):
    """A process that the rounds need is gone."""


@needs("flower")
def run(
    federation: Federation,
    out: str | Path,
    *,
    resume: bool = False,
    told: Callable[[Record], Any] = lambda record: None,
    app: str | Path | None = None,
) -> dict[str, Any]:
    """As `rounds.federate`.  told: is given the record of each round; app: a file of one's own, see `write_app`.

    A node that ends is started again; where the SuperLink or the ServerApp ends, all are, and go on from the last round
    (twice without a round in between).  Raises FileExistsError where `out` holds something and is not to be gone on
    with; RuntimeError with what the server said, or the end of the SuperLink's log.
    """
    place = Place(Path(out).resolve(), federation)
    check_place(place.out, resume)
    with alone_in(place.folder):
        place.prepare(app)
        followed, tries, rounds = Followed(place.out, told), 0, -1
        while True:
            _wait_alone(place.out)
            try:
                _session(place, followed)
                return report_of(place.out)
            except Ended:
                tries, rounds = (tries + 1 if len(followed.records) == rounds else 1), len(followed.records)
                if tries > TRIES:
                    raise


def report_of(out: Path) -> dict[str, Any]:
    """The report that is in OUT."""
    found: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return found


def _wait_alone(out: Path) -> None:
    """Until a server's app of before has ended.  Raises BlockingIOError where it does not."""
    end = time.monotonic() + WAIT
    while True:
        try:
            with alone_in(out):
                return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@dataclass(frozen=True)
class Place:
    """What is where in OUT/flower."""

    out: Path
    federation: Federation

    @property
    def folder(self) -> Path:
        return self.out / RUNTIME

    @property
    def given(self) -> Path:
        return self.folder / "given.json"

    def prepare(self, app: str | Path | None) -> None:
        """Keys that are not there yet, and the app."""
        os.chmod(self.folder, 0o700)
        if not (self.folder / "server.key").is_file():  # the last of them: what a kill has left of others is anew
            for name in ("ca.pem", "server.pem"):
                (self.folder / name).unlink(missing_ok=True)
            write_certificates(self.folder)
        for name in self.federation.names:
            if not (self.folder / NODE / f"{name}.pub").is_file():
                (self.folder / NODE / f"{name}.key").unlink(missing_ok=True)
                write_pair(self.folder / NODE, name)
        write_app(self.folder / "app", app)
        write_text(self.given, json.dumps(self.federation.encode()))

    def environment(self, name: str) -> dict[str, str]:
        """Of a process; each has a home of its own, and as many threads as this one."""
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        own = {"PATH": beside, "FLWR_HOME": str(home), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return {**os.environ, **QUIET, **own}

    def superlink(self, port: int) -> tuple[list[str | Path], dict[str, str]]:
        """(command, environment)."""
        f = self.folder
        command: list[str | Path] = [
            *(_beside("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"),
            *("--ssl-ca-certfile", f / "ca.pem", "--ssl-certfile", f / "server.pem", "--ssl-keyfile", f / "server.key"),
        ]
        return command, {**self.environment(SUPERLINK), FEDERATION: str(self.given), OUT: str(self.out)}

    def nodes(self, link: int) -> dict[str, tuple[list[str | Path], dict[str, str]]]:
        """{process: (command, environment)} of all clients: a SuperNode, and on Linux an executor that is `warm`."""
        names, f, found = self.federation.names, self.folder, {}
        for name, port in zip(names, free_ports(len(names)), strict=True):
            said = f"federation={json.dumps(str(self.out / SPEC))} client={json.dumps(name)}"
            command: list[str | Path] = [
                *(_beside("flower-supernode"), "--superlink", f"127.0.0.1:{link}", "--port", str(port)),
                *("--root-certificates", f / "ca.pem", "--auth-supernode-private-key", f / NODE / f"{name}.key"),
                *("--node-config", said, "--isolation", "process" if LINUX else "subprocess"),
            ]
            found[f"{NODE}/{name}"] = command, self.environment(f"{NODE}/{name}")
            if LINUX:
                warm: list[str | Path] = [sys.executable, "-m", f"{__package__}.warm", f"127.0.0.1:{port}"]
                found[f"{CLIENT}/{name}"] = warm, self.environment(f"{CLIENT}/{name}")
        return found


def _beside(name: str) -> Path:
    return Path(sys.executable).parent / name


class Followed:
    """The records that the server has written."""

    def __init__(self, out: Path, told: Callable[[Record], Any]):
        self.path, self.told, self.seen = out / f"{STATE}.json", told, 0
        self.records: list[Record] = []
        self.look(quietly=True)

    def look(self, quietly: bool = False) -> None:
        """Tells the rounds that are new."""
        if not self.path.is_file() or self.path.stat().st_mtime_ns == self.seen:
            return
        self.seen, before = self.path.stat().st_mtime_ns, len(self.records)
        self.records = json.loads(self.path.read_text(encoding="utf-8"))["records"]
        for record in self.records[max(before, 1) :]:
            if not quietly:
                self.told(record)


def _session(place: Place, followed: Followed) -> None:
    """From the start of the SuperLink to the end of the rounds.  Raises Ended, or RuntimeError with what the server
    said."""
    (port,) = free_ports(1)
    with Processes(place.folder / "logs") as processes:
        processes.start(SUPERLINK, *place.superlink(port))
        link = _connected(processes, f"127.0.0.1:{port}", place)
        try:
            for name in place.federation.names:
                link.register(name, place.folder / NODE / f"{name}.pub")
            nodes = place.nodes(port)
            left = dict.fromkeys(nodes, RESTARTS)
            for name, how in nodes.items():
                processes.start(name, *how)
            number = link.submitted(place.folder / "app")
            while not _finished(link, number, processes):
                for name in {*processes.gone()} & {n for n, more in left.items() if more}:
                    left[name] -= 1
                    processes.start(name, *nodes[name])
                followed.look()
                time.sleep(LOOK)
        finally:
            link.close()
            followed.look()


def _connected(processes: Processes, address: str, place: Place) -> Link:
    link, end = Link(address, place.folder / "ca.pem"), time.monotonic() + WAIT
    while not link.answers():
        if processes.gone() or time.monotonic() > end:
            link.close()
            raise Ended(f"the SuperLink does not answer; it says: {processes.said(SUPERLINK)}")
        time.sleep(0.2)
    return link


def _finished(link: Link, number: int, processes: Processes) -> bool:
    """Whether the run has ended well."""
    if SUPERLINK in processes.gone():
        raise Ended(f"the SuperLink has ended; its last words: {processes.said(SUPERLINK)}")
    status = link.status(number)
    if status is None or status.status != "finished":
        return False
    write_text(processes.logs / "server.txt", link.said(number))
    if status.sub_status == "completed":
        return True
    why = status.details or status.sub_status
    if why.startswith(FAILED):
        raise RuntimeError(f"{why.removeprefix(FAILED)} (logs: {processes.logs})")
    raise Ended(f"the server's app has ended: {why} (logs: {processes.logs})")
