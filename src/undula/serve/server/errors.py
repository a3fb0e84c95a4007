"""What a client is told of a request that is not answered: OpenAI's shape, no paths, no tracebacks."""

from __future__ import annotations

import difflib
import logging
import math
import re
import uuid
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..request import Busy, Refused

LOG = logging.getLogger("undula.serve")
# OpenAI's `type` of a status; others of 400 to 499 are invalid requests, of 500 and more the server's
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ADDRESSES = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/classify", "/v1/models", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/tokenize", "/health", "/ready", "/metrics", "/",
)  # fmt: skip
ABSOLUTE = re.compile(
    r"(?<![\w.:/\\~-])(?!/v1/)(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|:;,()]+[/\\])+([^\s/\\'\"<>|:;,()]*)"
)


class Wrong(Refused):
    """A request that cannot be meant, or may not be made.  `param`: the field that is at fault."""

    def __init__(self, said: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(said)
        self.param, self.status, self.code = param, status, code or Refused.code


def without_paths(text: str, *roots: str) -> str:
    """A message in which of every path only the last name is left."""
    for root in sorted(roots, key=len, reverse=True):
        text = text.replace(root + "/", "").replace(root, "the directory of adapters")
    return ABSOLUTE.sub(lambda found: found[1] or "a directory", text)


def body_of(said: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """{"error": ...} as OpenAI's clients read it."""
    kind = TYPES.get(status, Refused.code if status < 500 else "server_error")
    code = None if code == Refused.code else code
    return {"error": {"message": without_paths(said), "type": kind, "param": param, "code": code}}


def told(error: Refused) -> JSONResponse:
    """The answer to a request that is refused."""
    status = 503 if error.status == 499 else error.status  # who is still there to read it did not go away
    headers = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = body_of(str(error), status, error.code, getattr(error, "param", None))
    return JSONResponse(body, status, headers)


def event_of(error: Exception) -> dict[str, Any]:
    """The same inside a stream that has begun."""
    if isinstance(error, Refused):
        return body_of(str(error), error.status, error.code, getattr(error, "param", None))
    return unmeant(error)


def unmeant(error: Exception) -> dict[str, Any]:
    """Says nothing but a number, under which the log has the traceback."""
    number = uuid.uuid4().hex[:12]
    LOG.error("fault %s: %s", number, type(error).__name__, exc_info=error)
    return body_of(f"something went wrong inside the server; its log has it as fault {number}", 500, "internal_error")


async def refused(_: Request, error: Exception) -> JSONResponse:
    """The handler of `Refused`."""
    assert isinstance(error, Refused)
    return told(error)


async def unrouted(request: Request, error: Exception) -> JSONResponse:
    """The handler of an address or a method that is not served."""
    assert isinstance(error, HTTPException)
    said, asked = str(error.detail), request.url.path[:200]
    if error.status_code == 404:
        said = f"nothing is served at {asked}: {_meant(asked)}"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        said = f"{asked} does not take {request.method}" + (f": it takes {allowed}" if allowed else "")
    body = body_of("", error.status_code)
    body["error"]["message"] = said  # an address as it was asked, and no path of a disk
    return JSONResponse(body, error.status_code, error.headers)


def _meant(asked: str) -> str:
    """What there is near an address that is none."""
    path = "/" + asked.strip("/").replace("v1/v1/", "v1/")
    if meant := next((there for there in (f"/v1{path}", path, path.removeprefix("/v1")) if there in ADDRESSES), None):
        return f"{meant} is (the base_url of a client of OpenAI's ends with /v1)"
    close = difflib.get_close_matches(path, ADDRESSES, 1, 0.8)
    return f"did you mean {close[0]}?" if close else "there are " + ", ".join(ADDRESSES)
