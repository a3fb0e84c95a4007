"""What a request is answered with, piece by piece, for whoever waits for it in a thread or a task."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from .request import Piece, Refused, Request


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and of its answer so far; of the prompt's, `cached` were not computed again.  `waited`:
    seconds until it was begun, `first`: until its first token (both from `Request.arrived`; None: not yet)."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    waited: float | None = None
    first: float | None = None


class Reply:
    """The answer to one request: iterate over its pieces, in a thread or with `async for`.

    Ends after the piece with `finish`, or raises the Refused that ended it.  It may be iterated over again, from its
    beginning.
    """

    def __init__(self, request: Request, cancel: Callable[[], None]):
        self.request = request
        self.usage = Usage(len(request.prompt))
        self._cancel = cancel
        self._pieces: list[Piece] = []
        self._error: Refused | None = None
        self._changed = threading.Condition()
        self._wakers: dict[object, Callable[[], None]] = {}

    def __repr__(self) -> str:
        return f"Reply({self.request.id}, {len(self._pieces)} pieces, done={self.done}, error={self._error!r})"

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self._error is not None or bool(self._pieces and self._pieces[-1].finish)

    def cancel(self) -> None:
        """Ends it with Cancelled, from any thread; nothing where it is done."""
        if not self.done:
            self._cancel()

    def text(self) -> str:
        """Waits for the whole text.  Raises the Refused that ended it."""
        return "".join(piece.text for piece in self)

    def __iter__(self) -> Iterator[Piece]:
        at = 0
        while (piece := self._at(at, wait=True)) is not None:
            yield piece
            at += 1

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, came, key, at = asyncio.get_running_loop(), asyncio.Event(), object(), 0
        with self._changed:
            self._wakers[key] = lambda: loop.call_soon_threadsafe(came.set)  # type: ignore[assignment, return-value]
        try:
            while True:
                came.clear()
                piece = self._at(at, wait=False)
                if piece is not None:
                    yield piece
                    at += 1
                elif self.done and at >= len(self._pieces):
                    return
                else:
                    await came.wait()
        finally:
            with self._changed:
                del self._wakers[key]

    def _at(self, at: int, wait: bool) -> Piece | None:
        """Piece number `at`; None after the last, and without `wait` where it has not come yet."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: at < len(self._pieces) or self.done)
            if at < len(self._pieces):
                return self._pieces[at]
            if self._error is not None:
                raise self._error
            return None

    # -- the generation thread's

    def put(self, piece: Piece) -> None:
        with self._changed:
            if not self.done:
                self._pieces.append(piece)
            self._wake()

    def fail(self, error: Refused) -> None:
        """Ends it with an error; nothing where it is done."""
        with self._changed:
            if not self.done:
                self._error = error
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for wake in list(self._wakers.values()):
            try:
                wake()
            except RuntimeError:  # its loop is closed: nobody waits there
                continue

    def since(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.request.arrived
