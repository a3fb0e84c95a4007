"""The server on several machines: replicas behind Ray Serve, each request at one that has its adapter loaded.

    from ray import serve
    from undula.serve.ray import deployment

    serve.run(deployment("bundled:smollm2", ["adapters"], replicas=2))

Every replica is the whole server (`undula serve`) with an engine and a pool of its own.  What is in front reads the
name of the adapter and leaves the choice of the replica to Ray Serve's multiplexing, which knows who holds what.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.extras import needs
from .folder import check_place
from .request import Part
from .server.app import application
from .server.bounds import Bounds
from .server.errors import body_of
from .server.keys import keys_of
from .server.opening import Plan, names_of, opened
from .server.places import Places
from .version import check_name

LOG = logging.getLogger("undula.serve")
CHANGES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")


@dataclass(frozen=True)
class Settings:
    """What every replica opens: see `Plan` and `undula serve`.  keys: a file of keys that each of them reads."""

    base: str
    adapters: tuple[str, ...] = ()
    memory: int = 2_000_000_000
    called: str | None = None
    keys: str | None = None
    more: dict[str, Any] = field(default_factory=dict)  # other fields of Plan

    def plan(self) -> Plan:
        places = Places.of(tuple(Path(each) for each in self.adapters))
        keys = keys_of(None if self.keys is None else Path(self.keys))
        return Plan(self.base, places, memory=self.memory, called=self.called, keys=keys, **self.more)


class Replica:
    """One server.  `answer` is called through a handle of Ray Serve's."""

    def __init__(self, settings: Settings):
        from ray import serve

        self.served, _ = opened(settings.plan(), LOG.warning)
        self.served.worker.start()
        self.app = application(self.served)
        self.id = serve.get_replica_context().replica_id.unique_id
        self.requests = 0

    def find(self, name: str) -> bool:
        """Whether there is an adapter of this name: registered, or in a directory since; of a directory that changed
        the new content counts from here on."""
        shelf = self.served.shelf
        try:
            check_name(name)
        except ValueError:
            return False
        for root in self.served.places.roots:
            place = root / name
            try:
                check_place(place, root)
                known = shelf.paths().get(name)
                if known is None or (known == place and not shelf.unchanged(name)):
                    shelf.register(name, place, replace=known is not None)
                return True
            except (OSError, ValueError, TypeError, LookupError) as error:
                if place.is_dir():
                    LOG.warning("%s is left out: %s", name, error)
        path = shelf.paths().get(name)
        if path is not None and path.parent in self.served.places.roots:
            shelf.unregister(name)  # its directory is gone
            return False
        return path is not None

    async def hold(self, name: str) -> str:
        """Has an adapter read.  From now on requests for it come here."""
        version = self.served.shelf.version([Part(name)])
        if version is not None:
            self.served.shelf.prefetch(version)
        return name

    def state(self) -> dict[str, Any]:
        """What this replica has done, and which adapters its pool holds."""
        held = [row.name for row in self.served.shelf.describe() if row.state in ("loaded", "in use", "loading")]
        return {"replica": self.id, "requests": self.requests, "adapters": held}

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        """One request: first {status, headers, state}, then the pieces of the answer."""
        from ray import serve

        self.requests += 1
        name = serve.get_multiplexed_model_id()
        if name and await asyncio.to_thread(self.find, name):
            await self.hold(name)
        messages: asyncio.Queue[Any] = asyncio.Queue(16)
        left, coming = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if coming:
                return coming.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app({**scope, "extensions": {}, "state": {}}, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield {"status": message["status"], "headers": message["headers"], "state": self.state()}
                elif message.get("body"):
                    yield message["body"]
            await task
        finally:
            left.set()  # who asked went away: the app hears of it, and cancels what it asked for
            emptying = asyncio.create_task(_emptied(messages))
            await asyncio.wait([task])
            emptying.cancel()

    def check_health(self) -> None:
        """What Ray Serve asks: a replica whose thread has ended is replaced.  Raises RuntimeError."""
        if not self.served.worker.alive:
            raise RuntimeError("the thread that computes has ended")

    def __del__(self) -> None:
        if hasattr(self, "served"):
            self.served.worker.stop()


class Front:
    """Reads whose adapter is meant, and passes a request on to a replica."""

    def __init__(self, replicas: Any, settings: Settings):
        self.replicas = replicas.options(stream=True)
        self.names = names_of(settings.base, settings.called)
        self.known: dict[str, dict[str, Any]] = {}

    def states(self) -> list[dict[str, Any]]:
        """Of each replica what it said last: its requests, and the adapters that its pool holds."""
        return list(self.known.values())

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        if request.url.path in CHANGES:
            said = (
                "behind several replicas adapters come and go with their directories: each replica finds a new or a "
                "changed one when it is asked for"
            )
            return JSONResponse(body_of(said, 400, "not_supported"), 400)
        scope = {key: request.scope[key] for key in PASSED if key in request.scope}
        body = await _read(request)
        name = adapter_of(body, self.names)
        handle = self.replicas.options(multiplexed_model_id=name) if name else self.replicas
        pieces = handle.answer.remote(scope, body)
        start = await anext(aiter(pieces))
        self.known[start["state"]["replica"]] = start["state"]
        made = StreamingResponse(pieces, start["status"])
        made.raw_headers = [*start["headers"], (b"x-undula-replica", start["state"]["replica"].encode())]
        return made


async def _emptied(messages: asyncio.Queue[Any]) -> None:
    """Takes what nobody reads any more."""
    while True:
        await messages.get()


async def _read(request: Any) -> bytes:
    """The body, no further than the server behind reads: it refuses what is longer."""
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > Bounds.body:
            break
    return bytes(found)


def adapter_of(body: bytes, bases: Sequence[str]) -> str:
    """The name of the (first) adapter that a request means; "" for the base alone, and for what is no such request."""
    try:
        asked = json.loads(body) if body else {}
        several = asked.get("adapters") or []
        name = several[0]["name"] if several else asked.get("model", "")
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return ""  # the server behind says what is wrong
    if not isinstance(name, str) or name in bases or len(name) > 200:
        return ""
    base = max((b for b in bases if name.startswith(f"{b}:")), key=len, default=None)
    return name if base is None else name[len(base) + 1 :]


@needs("ray")
def deployment(
    base: str,
    adapters: Sequence[str | Path] = (),
    *,
    replicas: int = 2,
    cpus: float = 1.0,
    held: int = 64,
    memory: int = 2_000_000_000,
    called: str | None = None,
    keys: str | Path | None = None,
    **more: Any,
) -> Any:
    """An application of Ray Serve's: `serve.run(deployment(...))`.

    base, adapters, memory, called, keys: as for `undula serve`; paths are those of the replicas' machines.  replicas:
    how many servers; cpus: that each of them asks Ray for; held: how many adapters at most one replica is known to
    hold, by which Ray Serve chooses (what is in memory its pool decides, by `memory`).  more: other fields of `Plan`,
    and `autoscaling_config` in the place of `replicas`.  Bounds and rates of keys hold for each replica by itself.
    """
    from ray import serve

    class Multiplexed(Replica):
        hold = serve.multiplexed(max_num_models_per_replica=held)(Replica.hold)

    scaling = more.pop("autoscaling_config", None)
    number = {"num_replicas": replicas} if scaling is None else {"autoscaling_config": scaling}
    places = tuple(str(Path(each).resolve()) for each in adapters)
    settings = Settings(base, places, memory, called, None if keys is None else str(keys), more)
    behind = serve.deployment(name="Replica", ray_actor_options={"num_cpus": cpus}, **number)(Multiplexed)
    front = serve.deployment(name="Front", ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(behind.bind(settings), settings)
