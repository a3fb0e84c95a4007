"""Who asks, for each address."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from .errors import Wrong
from .keys import Key


async def caller(request: Request) -> Key:
    """Whose key a request has, before its body is read.  Raises Wrong (401)."""
    key: Key = request.app.state.served.keys.who(request.headers.get("authorization"))
    return key


async def changer(key: Annotated[Key, Depends(caller)]) -> Key:
    """One that may load and unload adapters.  Raises Wrong (403)."""
    if not key.admin:
        raise Wrong("this key may not load or unload adapters", status=403, code="not_allowed")
    return key


async def observer(key: Annotated[Key, Depends(caller)]) -> Key:
    """One that may read the metrics.  Raises Wrong (403)."""
    if not key.metrics:
        raise Wrong("this key may not read the metrics: they tell of all adapters", status=403, code="not_allowed")
    return key
