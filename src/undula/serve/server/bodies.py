"""Reading the JSON of a request: bounded before it is read, strict in what it takes."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from ..request import Cancelled
from .errors import Wrong
from .schemas import Body

B = TypeVar("B", bound=Body)
NAMES = {"string": "a text", "integer": "an integer", "boolean": "true or false"}
PLACES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
FORMS = {
    "adapters": '[{"name": "NAME", "scale": 1.0}]',
    "messages": '[{"role": "user", "content": "TEXT"}]',
    "stream_options": '{"include_usage": true}',
}


def reading(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """What FastAPI calls for a checked body of this kind."""

    async def read(request: Request) -> B:
        bounds = request.app.state.served.bounds
        _check_type(request)
        text = await _bounded(request, bounds.body, bounds.reading)
        try:
            return checked(kind, parsed(text))
        except RecursionError:
            raise Wrong("the body is nested too deeply") from None

    return read


def _check_type(request: Request) -> None:
    """JSON alone, said to be JSON: a page of another site cannot send that to a local server unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Wrong(
            f"the body has to be JSON: say 'Content-Type: application/json' in the headers (found {kind[:50]!r})",
            status=415,
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Wrong("a compressed body is not read: send it as it is", status=415)


async def _bounded(request: Request, most: int, seconds: float) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise _too_long(most)
    pieces: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                length += len(piece)
                if length > most:
                    raise _too_long(most)
                pieces.append(piece)
    except TimeoutError:
        raise Wrong(f"the body did not come within {seconds:g} seconds", status=408) from None
    except ClientDisconnect:
        raise Cancelled("the client went away") from None
    return b"".join(pieces)


def _too_long(most: int) -> Wrong:
    return Wrong(f"the body is over {most:,} bytes, the most that this server reads", status=413, code="body_too_large")


def parsed(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name stands twice and every number is one."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
        if b"\\u" in text:  # half a letter, which JSON can write and nothing can say
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise Wrong(f"the body is no JSON that can be read: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Wrong('the body has to be a JSON object, {"model": ..., ...}')
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the name {twice[:100]!r} stands twice in one object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def checked(kind: type[B], found: dict[str, Any]) -> B:
    """The body; what would change the answer and is not served is refused by name.  `null` is a field that is not
    given."""
    given = {name: value for name, value in found.items() if value is not None}
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise Wrong(f"the field {where!r} is missing{_elsewhere(where, found)}", where) from None
        if first["type"] == "extra_forbidden":
            raise Wrong(f"{where} is no field that is known here{_shape(where)}", where) from None
        shown = repr(first["input"])
        had = f" (found {shown if len(shown) <= 60 else shown[:57] + '...'})"
        raise Wrong(f"{where} {in_words(first['msg'])}{had}{_shape(where)}", where) from None
    for name, value in (body.model_extra or {}).items():
        if name not in kind.HARMLESS and not _changes_nothing(kind, name, value):
            raise Wrong(_unserved(kind, name), name[:100])
    return body


def in_words(said: str) -> str:
    """What pydantic says of a value, in terms of JSON."""
    said = re.sub(r"^\w+ should ", "has to ", said.replace(" after validation", ""))
    said = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", said)
    return re.sub(r"a valid (\w+)", lambda found: NAMES.get(found[1], f"a {found[1]}"), said)


def _elsewhere(missing: str, found: dict[str, Any]) -> str:
    """Where what was sent instead of a field is taken."""
    other = next((name for name in ("messages", "prompt") if name != missing and name in found), None)
    return f": {other} is asked at {PLACES[other]}" if missing in ("messages", "prompt", "input") and other else ""


def _shape(where: str) -> str:
    form = FORMS.get(where.partition(".")[0])
    return f": it is as {form}" if form else ""


def _changes_nothing(kind: type[Body], name: str, value: Any) -> bool:
    return any(type(value) is type(same) and value == same for same in kind.NEUTRAL.get(name, ()))


def _unserved(kind: type[Body], name: str) -> str:
    shown = name[:100]
    if name in kind.NEUTRAL:
        usual = kind.NEUTRAL[name]
        return f"{shown} is not served here beyond {' or '.join(json.dumps(v) for v in usual)}: leave it out"
    known = [*kind.model_fields, *kind.NEUTRAL, *kind.HARMLESS]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"the field {shown!r} is not served here, and it may be meant to change the answer: leave it out{hint}"
