"""The addresses of encoders: `/v1/embeddings` and `/classify`."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from . import schemas
from .bodies import reading
from .callers import caller
from .errors import Wrong
from .keys import Key
from .models import parts_of
from .prompts import asked
from .served import Served

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Embedding, Depends(reading(schemas.Embedding))],
) -> Response:
    """A vector for each text."""
    served: Served = request.app.state.served
    encoder = served.reader("gives no vectors of texts")
    parts = parts_of(served, key, body.model, body.adapters)
    texts = asked(body.input, "input", served.bounds.texts)
    served.keys.spend(key, len(texts))
    found = await asyncio.to_thread(encoder.embed, texts, parts)
    served.metrics.asked(parts)
    if body.dimensions not in (None, len(found[0])):
        raise Wrong(f"dimensions={body.dimensions}, and vectors of this model have {len(found[0])}", "dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(found)
    ]
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": _usage(encoder, texts)})


def _written(vector: list[float], form: str) -> Any:
    """As numbers, or as the base64 of little-endian float32."""
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(encoder: Any, texts: Any) -> dict[str, int]:
    count = encoder.count(texts)
    return {"prompt_tokens": count, "total_tokens": count}


@router.post("/classify")
async def classify(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Classify, Depends(reading(schemas.Classify))],
) -> Response:
    """A label for each text, by the adapter's own head."""
    served: Served = request.app.state.served
    encoder = served.reader("gives no labels")
    parts = parts_of(served, key, body.model, body.adapters)
    texts = asked(body.input, "input", served.bounds.texts)
    served.keys.spend(key, len(texts))
    found = await asyncio.to_thread(encoder.classify, texts, parts)
    served.metrics.asked(parts)
    data = [{"index": i, **answer} for i, answer in enumerate(found)]
    head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": body.model}
    return JSONResponse({**head, "data": data, "usage": _usage(encoder, texts)})
