"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
ALIVE = b": still waiting\n\n"  # a comment: clients skip it, proxies see that the connection lives
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


async def merged(
    streams: Sequence[AsyncIterator[T]], seconds: float | None = None
) -> AsyncIterator[tuple[int, T] | None]:
    """(number of the stream, item) as they come, of each at most one taken ahead; None whenever none came for so many
    seconds."""
    waiting = {asyncio.ensure_future(_next(s)): i for i, s in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in done:
                i = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    item = task.result()
                    waiting[asyncio.ensure_future(_next(streams[i]))] = i
                    yield i, item
    finally:
        await _ended(waiting)


async def _next(stream: AsyncIterator[T]) -> T:
    return await anext(stream)


async def _ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    every = list(tasks)
    for task in every:
        task.cancel()
    await asyncio.gather(*every, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def watched(request: Request, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Within, `gone` is called when the client goes away; the body has to be read already."""

    async def watch() -> None:
        await _gone(request.receive)
        gone()

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        await _ended([task])


class Events(Response):
    """A stream of events.  `gone` is called in the end, however it comes: the client's going, a client that takes more
    than `patience` seconds for reading, the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], None], patience: float):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.gone, self.patience = events, gone, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.gone()
            failed = tasks[0].exception() if tasks[0].done() and not tasks[0].cancelled() else None
            await _ended(tasks)
        if failed is not None and not isinstance(failed, TimeoutError):
            raise failed

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for item in self.events:
            await self._body(send, item, True)
        await self._body(send, b"", False)

    async def _body(self, send: Send, data: bytes, more: bool) -> None:
        async with asyncio.timeout(self.patience):
            await send({"type": "http.response.body", "body": data, "more_body": more})
