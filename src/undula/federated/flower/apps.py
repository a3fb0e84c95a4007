"""What Flower runs: a ServerApp and a ClientApp, each made of the files of its own machine.

A client knows its file and its name by the configuration of its node (`--node-config`):

    federation    FED.toml, or the federation.json of a run
    client        its name
    data          its rows, where they are not where the file says

A server knows its file, and where it keeps the rounds, by the environment: UNDULA_FEDERATION, UNDULA_OUT.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from ...io import files
from ...io.whole import alone_in
from ..client import Client
from ..messages import FROZEN, Arrays, Counts
from ..report import concluded
from ..server import Server
from ..spec import Federation, read
from .processes import leave_with_parent
from .records import ARRAYS, CONFIG, ROUND, SETTINGS, answer, check_settings, numbers
from .secure import asked_securely, plainly, secure_answer
from .strategy import Rounds

FEDERATION, OUT = "UNDULA_FEDERATION", "UNDULA_OUT"
Asked = Callable[[Client, Arrays, int], tuple[Arrays | None, Counts]]
Found = Callable[[Mapping[str, Any]], Client]


def server_app(by: Strategy | SecAggPlusWorkflow | None = None) -> ServerApp:
    """The server's part.  by: a strategy of Flower's, or its secure aggregation, that makes one of the clients'
    adapters, before the federation's aggregation gets it: see `Rounds`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        leave_with_parent()
        with alone_in(out := Path(os.environ[OUT])):
            rounds = Rounds(Server(opened(os.environ[FEDERATION]), out, resume=True), by)
            rounds.go_on(grid)
            concluded(rounds.server)

    return app


def client_app(mods: Sequence[Callable[..., Any]] = (), of: Found | None = None) -> ClientApp:
    """A client's part.  mods: what Flower does around a training, such as `flwr.clientapp.mod.message_size_mod`, or
    `flwr.client.mod.secaggplus_mod` for a secure aggregation; of: finds the client by the configuration of its node
    (without: `client_of`)."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        return answered(message, of or client_of, context, lambda client, arrays, number: client.train(number, arrays))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answered(
            message, of or client_of, context, lambda client, arrays, number: (None, client.evaluate(arrays))
        )

    return app


def answered(message: Message, of: Found, context: Context, ask: Asked) -> Message:
    """The client's reply.  An error leaves the machine as its kind alone, since its text may quote rows: the text is in
    the node's own log.  Raises RuntimeError."""
    try:
        secure = asked_securely(message)
        config, told = plainly(message, context) if secure else (message.content[CONFIG], message.content[ARRAYS])
        client = of(context.node_config)
        check_settings(client.federation, config[SETTINGS], client.name)
        brief = {**numbers(told), FROZEN: np.frombuffer(config[FROZEN], np.uint8)}
        arrays, counts = ask(client, brief, int(config[ROUND]))
        if secure and arrays is not None:
            return secure_answer(message, context, client.federation, arrays, counts)
    except Exception as error:
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}; the log of this client's node says more") from None
    return answer(message, counts, arrays)


def client_of(config: Mapping[str, Any]) -> Client:
    """The client of a node.  Raises LookupError, ValueError, OSError."""
    if missing := [name for name in ("federation", "client") if name not in config]:
        raise LookupError(
            f"the configuration of this node lacks {' and '.join(missing)}: "
            """--node-config 'federation="/path/FED.toml" client="name"'"""
        )
    federation, name = opened(str(config["federation"])), str(config["client"])
    if "data" in config:
        parties = [dataclasses.replace(p, data=config["data"]) if p.name == name else p for p in federation.clients]
        federation = dataclasses.replace(federation, clients=tuple(parties))
    return Client(federation, name)


def opened(path: str) -> Federation:
    """The federation in a TOML file, or in JSON (of a run, or alone).  Raises ValueError, OSError, LookupError."""
    place = Path(path)
    if place.suffix != ".json":
        return read(place)
    with files.door(path):
        found = files.parsed(place.read_bytes(), path)
        return Federation.decode(found.get("federation", found))
