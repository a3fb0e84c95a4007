"""The application: addresses, who may ask, and what is said when something is refused."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..request import Refused
from . import changes, texts, vectors, watching
from .errors import body_of, refused, unmeant, unrouted
from .served import Served

SAFE = [(b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin")]


def application(served: Served) -> FastAPI:
    """What answers HTTP for an engine or an encoder that was started."""
    app = FastAPI(title="undula", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served = served
    for part in (texts, vectors, changes, watching):
        app.include_router(part.router)

    async def counted(request: Request, error: Exception) -> JSONResponse:
        served.metrics.refused.labels(getattr(error, "code", "error")).inc()
        return await refused(request, error)

    app.add_exception_handler(Refused, counted)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_middleware(Door, served=served)
    return app


class Door:
    """In front of everything: the names that this server answers to, headers for browsers, the count of answers, and
    faults."""

    def __init__(self, app: ASGIApp, served: Served):
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), *SAFE]}
                route = getattr(scope.get("route"), "path", "(other)")
                self.served.metrics.answers.labels(route, str(message["status"])).inc()
            await send(message)

        if (said := self._stranger(Request(scope))) is not None:
            await JSONResponse(body_of(said, 403, "wrong_host"), 403)(scope, receive, sent)
            return
        try:
            await self.app(scope, receive, sent)
        except Exception as error:  # answered here: the connection lives, and other requests may be on it
            if begun:
                raise
            self.served.metrics.refused.labels("internal_error").inc()
            await JSONResponse(unmeant(error), 500)(scope, receive, sent)

    def _stranger(self, request: Request) -> str | None:
        """What is said where a request came for another host: a page of any site can have a browser ask this address
        under a name of its own."""
        if self.served.hosts is None:
            return None
        host = request.headers.get("host", "").strip().lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if name in self.served.hosts:
            return None
        return (
            f"this server does not answer as {name[:100]!r}: ask it at its own address, or start it with --allow-host"
        )
