"""Serving until it is told to stop, and stopping so that nobody loses an answer."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from .app import application
from .served import Served

LOG = logging.getLogger("undula.serve")
CONNECTIONS = 2048  # at once
STUCK = 90  # seconds
MOMENT = 3.0  # seconds
IDLE = 75  # seconds that a connection stays open between requests: clients that keep one do not meet its end
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; at port 0 one that is free.  Raises OSError that names it."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{host} is no address of this machine: {error}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections that it accepts: whoever takes nothing for so long is gone
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STUCK)
    try:
        found.bind(where)
    except OSError as error:
        found.close()
        raise OSError(f"nothing can listen at {host}:{port} ({error.strerror}): choose another --port") from None
    return found


def address(listening: socket.socket) -> str:
    """http://HOST:PORT of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """At the first signal it takes no more requests, and ends when the running ones have their answers or `patience`
    seconds are over; at the second it ends at once."""

    def __init__(self, served: Served, patience: float | None = None):
        self.served, self.patience, self.signals, self.lost = served, patience, 0, False
        # a client that has its answer may take `writing` seconds to read what is left of it
        left = int(served.bounds.writing) + 1
        super().__init__(
            uvicorn.Config(
                application(served), http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, timeout_keep_alive=IDLE, timeout_graceful_shutdown=left,
                limit_concurrency=CONNECTIONS,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        # in a thread: the one that was interrupted may hold what these take
        threading.Thread(target=self.leave if self.signals == 1 else self.end, daemon=True).start()

    def leave(self) -> None:
        """Takes no more requests, and ends when the running ones have finished."""
        self.served.draining = True
        end = math.inf if self.patience is None else time.monotonic() + self.patience
        while self.served.pending and time.monotonic() < end and not self.should_exit:
            time.sleep(0.01)
        worker = self.served.worker
        if not worker.drain(self.patience):
            LOG.warning("some requests did not finish within %g seconds: they are cancelled", self.patience)
            self.lost = True
            worker.stop()
        self.should_exit = True

    def end(self) -> None:
        """Ends at once: whoever waits is told, if the worker stops within a moment."""
        self.lost = self.served.draining = True
        stopping = threading.Thread(target=self.served.worker.stop, daemon=True)
        stopping.start()
        stopping.join(MOMENT)
        time.sleep(0.1)  # for what is said to leave
        self.should_exit = self.force_exit = True


def serve(served: Served, listening: socket.socket, patience: float | None = None) -> bool:
    """Answers at this socket until a signal says to stop.  The engine or encoder is started and stopped here.  Returns
    whether all that ran could finish."""
    worker: Any = served.worker
    server = Server(served, patience)
    worker.start()
    try:
        server.run(sockets=[listening])
    finally:
        worker.stop()
        listening.close()
    return not server.lost


@contextlib.contextmanager
def in_background(served: Served, listening: socket.socket) -> Any:
    """Within, the socket is answered by another thread: for notebooks and tests."""
    server = Server(served)
    served.worker.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield server
    finally:
        server.end()
        thread.join(10)
        listening.close()
