"""A SuperLink on loopback, over TLS, that nodes with registered keys alone may reach: what a run asks of it."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest, StreamLogsRequest
from flwr.proto.run_pb2 import RunStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from .keys import public_key


class Link:
    """The control of a SuperLink at `address`, whose certificate `authority` has signed."""

    def __init__(self, address: str, authority: Path):
        self.client = ControlHttpClient.from_server_address(
            address, False, authority.read_bytes(), [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        )

    def answers(self) -> bool:
        """Whether it is there."""
        with contextlib.suppress(httpx.TransportError):
            self.client.ListRuns(ListRunsRequest(limit=1))
            return True
        return False

    def register(self, name: str, key: Path) -> None:
        """The node that bears this key is the client of that name."""
        self.client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(public_key(key)), name=name))

    def submitted(self, app: Path) -> int:
        """The number of a run of the app in that folder."""
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        return int(self.client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def status(self, run: int) -> RunStatus | None:
        """Of a run: status "finished" with sub_status "completed" or "failed", or another; None where the SuperLink
        does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return self.client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        return None

    def said(self, run: int) -> str:
        """What the app of a run that has ended said on the server's side."""
        return "".join(part.log_output for part in self.client.StreamLogs(StreamLogsRequest(run_id=run)))

    def close(self) -> None:
        """Lets go of the connection."""
        self.client.close()
