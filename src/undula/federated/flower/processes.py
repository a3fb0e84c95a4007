"""Processes that leave with the one that started them: at its end, at Ctrl-C, and on Linux when it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

# becomes a command that gets SIGTERM when the process that started it dies: prctl(PR_SET_PDEATHSIG, SIGTERM)
BECOME = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
LEASH = [sys.executable, "-I", "-c", BECOME] if sys.platform == "linux" else []
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
FAREWELL = 5.0  # seconds for a process to leave by itself when its parent is gone


class Processes:
    """By name; what each says is in LOGS/NAME.txt."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        """In a group of its own: Ctrl-C reaches this process alone, which ends the others in its turn."""
        path = self.logs / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as log:
            self.running[name] = subprocess.Popen(
                [*LEASH, *map(str, command)],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def gone(self) -> list[str]:
        """The names of those that have ended."""
        return [name for name, process in self.running.items() if process.poll() is not None]

    def said(self, name: str, most: int = 1500) -> str:
        """The end of a log."""
        text = (self.logs / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        return text[-most:].strip()

    def stop(self) -> None:
        """Ends them and what they have started, the last one first."""
        for process in reversed(self.running.values()):
            _send(process, signal.SIGTERM)
        end = time.monotonic() + GRACE
        for process in reversed(self.running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _send(process, signal.SIGKILL)
            process.wait()
        self.running.clear()


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def leave_with_parent() -> None:
    """Ends this process at once when the one that started it is gone, whatever holds it up: Flower's own way out waits
    for locks that a signal may have found taken.  What is on disk is whole at any time."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(FAREWELL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def free_ports(number: int) -> list[int]:
    """Ports of this machine's loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
