"""The models that there are, and changing them while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from ..request import Refused
from . import schemas
from .bodies import reading
from .callers import caller, changer
from .errors import Wrong, without_paths
from .keys import Key
from .models import listed, shown, unknown
from .places import check_name
from .served import Served

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request, key: Annotated[Key, Depends(caller)]) -> Response:
    """The base and the adapters that this key may use."""
    return JSONResponse({"object": "list", "data": list(listed(request.app.state.served, key))})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str, key: Annotated[Key, Depends(caller)]) -> Response:
    """One of them."""
    return JSONResponse(shown(request.app.state.served, key, name))


@router.post("/v1/load_lora_adapter")
async def load(
    request: Request,
    key: Annotated[Key, Depends(changer)],
    body: Annotated[schemas.Load, Depends(reading(schemas.Load))],
) -> Response:
    """Registers an adapter that lies in a directory of the server's, or anew one that was replaced."""
    served: Served = request.app.state.served
    served.check_open()
    name = body.lora_name
    check_name(name, served.names)
    if not key.may(name):
        raise Wrong(f"this key may not use the name {name!r}", "lora_name", 403, "not_allowed")
    if not body.load_inplace and served.has(name):
        raise Wrong(f"{name!r} is loaded already: say load_inplace to replace it", "lora_name", 409, "already_loaded")
    said = body.lora_path or name
    await _changed(served, lambda: served.shelf.register(name, served.places.inside(said), replace=body.load_inplace))
    return JSONResponse({"status": "ok", "message": f"the adapter {name!r} is loaded", "lora_name": name})


@router.post("/v1/unload_lora_adapter")
async def unload(
    request: Request,
    key: Annotated[Key, Depends(changer)],
    body: Annotated[schemas.Unload, Depends(reading(schemas.Unload))],
) -> Response:
    """Takes an adapter away from new requests; running ones finish with it."""
    served: Served = request.app.state.served
    name = body.lora_name
    if not key.may(name) or not served.has(name):
        raise unknown(served, key, name, "lora_name")
    await _changed(served, lambda: served.shelf.unregister(name))
    return JSONResponse({"status": "ok", "message": f"the adapter {name!r} is unloaded", "lora_name": name})


async def _changed(served: Served, change: Callable[[], Any]) -> None:
    """Carries a change out beside the loop, one at a time.  Raises Wrong in words without paths."""
    try:
        await asyncio.get_running_loop().run_in_executor(served.changing, change)
    except Refused:
        raise
    except FileExistsError as error:
        raise Wrong(without_paths(str(error), *map(str, served.places.roots)), "lora_name", 409, "exists") from None
    except (ValueError, LookupError, TypeError, OSError) as error:
        said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        told = without_paths(said, *map(str, served.places.roots))
        raise Wrong(f"the adapter cannot be served: {told}", "lora_path", 400, "adapter_failed") from None
