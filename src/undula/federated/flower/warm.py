"""The executor of a node on this machine: `python -m undula.federated.flower.warm ADDRESS`.

Flower starts a process for each message to a client, and importing torch and transformers takes it ten times what a
small model's training does.  This process has imported them, and forks for each message; all else is Flower's own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from flwr.supercore.exit import exit_handler
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime.run_clientapp import run_clientapp

from .processes import leave_with_parent

PRELOADED = ("undula.federated.flower.apps", "undula.train.trainer", "transformers.trainer", "datasets")


class Forks(SubprocessExecutor):
    """A fork for each message."""

    def __init__(self) -> None:
        self.children: list[int] = []

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """See Flower's `Executor`."""
        child = os.fork()
        if not child:
            _answer(spec)
        self.children.append(child)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Lets go of those that have ended."""
        for child in list(self.children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG)[0] == 0:
                    continue
            self.children.remove(child)


def _answer(spec: ExecutionSpec) -> None:
    code = 1
    try:
        leave_with_parent()
        exit_handler.registered_exit_handlers.clear()  # those of the process that forked
        run_clientapp(spec.runtime_api_address, spec.token, spec.insecure, parent_pid=os.getppid())
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(address: str) -> None:
    """Answers the messages of the node whose runtime listens at `address`, until it is ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    superexec = importlib.import_module("flwr.supercore.superexec.run_superexec")
    superexec.get_executor = lambda *_, **__: Forks()  # type: ignore[attr-defined]
    superexec.run_superexec(address, True)


if __name__ == "__main__":
    main(sys.argv[1])
