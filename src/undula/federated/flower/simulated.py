"""run(federation, out): the rounds by Flower's simulation engine: clients side by side, in processes of Ray's.

OUT/flower/logs/simulation.txt     what all of them say

A process that trains keeps the base and the rows open for the clients that come to it, as rounds in one process do.  A
simulated node is nobody's: what goes to it says whose message it is.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ...core.extras import needs
from ...io.files import write_text
from ...io.whole import alone_in, scratch
from ..client import Client
from ..desk import Desk
from ..rows import Rows
from ..server import Record, check_place
from ..spec import Federation
from .apps import FEDERATION, OUT, client_app, opened, server_app
from .processes import Processes
from .records import CONFIG
from .runtime import LOOK, Followed, Place, report_of

NAME, CLIENT = "simulation", "client"
RAY = {  # no telemetry, this environment as it is, and ports on loopback: Ray is told that it can have no cluster here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
}
DIED = re.compile(r"ray\.exceptions\.(ActorDied|ActorUnavailable|RayActor|WorkerCrashed|NodeDied|OutOfMemory)")
CALL = f"from {__name__} import simulate; simulate()"


@needs("simulation")
def run(
    federation: Federation,
    out: str | Path,
    *,
    resume: bool = False,
    told: Callable[[Record], Any] = lambda record: None,
) -> dict[str, Any]:
    """As `rounds.federate`: as many clients train at once as there are cores for the threads of this process, or GPUs.

    Raises ModuleNotFoundError without Ray, FileExistsError where `out` holds something and is not to be gone on with,
    RuntimeError with what the processes said last.
    """
    importlib.import_module("ray")  # before anything is written
    place = Place(Path(out).resolve(), federation)
    check_place(place.out, resume)
    room = scratch(Path(tempfile.gettempdir()), "ray")  # where Ray keeps what is said, too; paths of sockets are short
    with alone_in(place.folder), room as logs, Processes(place.folder / "logs") as processes:
        os.chmod(place.folder, 0o700)
        write_text(place.given, json.dumps(federation.encode()))
        followed = Followed(place.out, told)
        own = {k: v for k, v in place.environment(NAME).items() if k != "RAY_ADDRESS"}  # of a cluster of others'
        own |= {**RAY, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own |= {"RAY_TMPDIR": str(logs), FEDERATION: str(place.given), OUT: str(place.out)}
        processes.start(NAME, [sys.executable, "-c", CALL], own)
        while not processes.gone():
            followed.look()
            time.sleep(LOOK)
        followed.look()
        if processes.running[NAME].returncode:
            raise RuntimeError(f"the simulation has ended; its last words: {processes.said(NAME)}")
    return report_of(place.out)


def simulate() -> None:
    """The rounds of the federation, and in the folder, that the environment names: see `apps`.  Ends this process
    where it fails: the server's thread would wait for answers that nobody gives."""
    try:
        _simulated()
    except BaseException as error:
        traceback.print_exc()
        while error.__cause__ is not None:
            error = error.__cause__
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _simulated() -> None:
    from flwr.simulation import run_simulation

    federation, threads = opened(os.environ[FEDERATION]), torch.get_num_threads()
    cores, cards = os.cpu_count() or 1, torch.cuda.device_count()
    at_once = min(len(federation.chosen(1)), cards or max(1, cores // threads))
    run_simulation(
        named(server_app(), federation.names),
        cast(Any, Clients()),
        len(federation.names),
        backend_config={
            "init_args": {"num_cpus": at_once * threads, "num_gpus": cards, "log_to_driver": True},
            "client_resources": {"num_cpus": threads, "num_gpus": float(cards > 0)},
        },
    )


def named(server: ServerApp, names: Iterable[str]) -> ServerApp:
    """The same server, of nodes that bear these names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server(cast(Grid, Named(grid, names)), context)

    return app


class Named:
    """A grid of nodes without names: they get the clients', and each message its client's."""

    def __init__(self, grid: Grid, names: Iterable[str]):
        self.grid, self.names = grid, tuple(names)

    def get_nodes(self) -> list[SimpleNamespace]:
        """All of them, or none as long as some are missing."""
        nodes = sorted(self.grid.get_node_ids())
        if len(nodes) < len(self.names):
            return []
        return [SimpleNamespace(name=n, node_id=node) for n, node in zip(self.names, nodes, strict=True)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See Flower's `Grid`.  Raises RuntimeError where a process of Ray's has died: none takes its place, and what
        comes to it from then on would fail."""
        name_of, asked = {node.node_id: node.name for node in self.get_nodes()}, list(messages)
        for message in asked:
            config = {**message.content[CONFIG], CLIENT: name_of[message.metadata.dst_node_id]}
            message.content = RecordDict({**message.content, CONFIG: ConfigRecord(config)})
        found = list(self.grid.send_and_receive(asked, timeout=timeout))
        dead = [m for m in found if m.has_error() and DIED.search(m.error.reason or "")]
        if dead:
            name = name_of[dead[0].metadata.src_node_id]
            raise RuntimeError(
                f"a process of Ray's died while {name} was at work (was there memory enough?). --resume goes on after "
                "the last round that is done"
            )
        return found


class Clients:
    """The app of all clients."""

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config[CLIENT] = str(message.content[CONFIG][CLIENT])
        return client_app(of=client_here)(message, context)


def client_here(config: Mapping[str, Any]) -> Client:
    """The client of that name, in the federation that the environment names."""
    rows, desk = opened_here(os.environ[FEDERATION])
    return Client(desk.federation, str(config[CLIENT]), rows, desk)


@functools.cache
def opened_here(path: str) -> tuple[Rows, Desk]:
    """The rows and the base, once in a process."""
    rows = Rows(opened(path))
    return rows, Desk(rows.settled(rows.asked), rows.server)
