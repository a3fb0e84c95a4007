"""The rounds of a federation in Flower's runtime: a SuperLink, a SuperNode for each client, TLS between them.

    from undula.federated.flower import run
    run(read("FED.toml"), "out/federation")

What is computed is `Server` and `Client`, as in one process, to the bit; Flower carries it.
"""

from .apps import client_app, server_app
from .runtime import run
from .strategy import Rounds

__all__ = ["Rounds", "client_app", "run", "server_app"]
