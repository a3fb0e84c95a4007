"""How it goes: `/health`, `/ready`, `/metrics`, and the page `/` with its figures."""

from __future__ import annotations

import time
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from .callers import caller, observer
from .errors import body_of
from .keys import Key
from .page import HEADERS, PAGE
from .served import Served

SHOWN = 200  # adapters on the page
ORDER = {"in use": 0, "loading": 1, "waiting": 2, "failed": 3, "loaded": 4}  # the first are shown first
COLUMNS = ("name", "method", "rank", "bytes", "state", "pinned", "hits", "misses")
router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether it lives."""
    served: Served = request.app.state.served
    alive = getattr(served.worker, "alive", True)
    if not alive:
        return JSONResponse(body_of("the thread that computes has ended: start the server again", 503, "dead"), 503)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether it takes requests."""
    served: Served = request.app.state.served
    served.check_open()
    return await health(request)


@router.get("/metrics")
async def metrics(request: Request, _: Annotated[Key, Depends(observer)]) -> Response:
    """For Prometheus."""
    return Response(request.app.state.served.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/status.json")
async def status(request: Request, key: Annotated[Key, Depends(caller)]) -> Response:
    """What the page shows: the adapters that this key may use, those in use first."""
    served: Served = request.app.state.served
    every = [row for row in served.rows() if key.may(row.name)]
    every.sort(key=lambda row: (ORDER.get(row.state, len(ORDER)), -(row.hits + row.misses), row.name))
    rows = [{name: getattr(row, name) for name in COLUMNS} for row in every[:SHOWN]]
    figures = {"engine": _figures(served.worker), "pool": _figures(served.shelf)}
    return JSONResponse(
        {
            "model": served.names[0],
            "now": time.time(),
            "since": served.since,
            "draining": served.draining,
            "adapters": rows,
            "registered": len(every),
            **figures,
        }
    )


def _figures(of: Any) -> dict[str, Any]:
    stats = of.stats() if callable(getattr(of, "stats", None)) else None
    return asdict(stats) if is_dataclass(stats) and not isinstance(stats, type) else {}


@router.get("/")
async def page() -> Response:
    """The page itself, which holds no figures."""
    return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)
