"""The addresses of encoders: `/v1/embeddings` and `/classify`."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from ...core.extras import Missing
from ..request import Busy, Part
from . import schemas
from .bodies import reading
from .callers import caller
from .errors import Wrong
from .keys import Key
from .models import parts_of
from .prompts import asked, rows
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
    texts = [text if isinstance(text, str) else list(text) for text in asked(body.input, "input", served.bounds.texts)]
    found, usage = await _answered(served, key, parts, texts, encoder.embed)
    if body.dimensions not in (None, len(found[0])):
        raise Wrong(f"dimensions={body.dimensions}, and vectors of this model have {len(found[0])}", "dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(found)
    ]
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


@router.post("/classify")
async def classify(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Classify, Depends(reading(schemas.Classify))],
) -> Response:
    """What the adapter's own head says of each text or pair, as `undula predict` does; of classes in vLLM's words
    too."""
    served: Served = request.app.state.served
    encoder = served.reader("gives no labels")
    parts = parts_of(served, key, body.model, body.adapters)
    texts = rows(body.input, "input", served.bounds.texts)
    found, usage = await _answered(served, key, parts, texts, encoder.classify)
    data = [{"index": i, **answer, **_as_vllm(answer)} for i, answer in enumerate(found)]
    head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": body.model}
    return JSONResponse({**head, "data": data, "usage": usage})


async def _answered(
    served: Served, key: Key, parts: tuple[Part, ...], texts: list[Any], answer: Callable[..., list[Any]]
) -> tuple[list[Any], dict[str, int]]:
    """(answers, usage), made on a thread that waits for them.  Raises Busy where too many wait."""
    served.keys.spend(key, len(texts))
    if served.pending >= served.bounds.waiting:
        raise Busy(f"{served.pending} requests wait already, and {served.bounds.waiting} may")

    def made() -> tuple[list[Any], int]:
        return answer(texts, parts), served.encoder.count(texts)

    began = time.monotonic()
    served.pending += 1
    try:
        found, count = await asyncio.get_running_loop().run_in_executor(served.answering, made)
    except Missing as error:
        raise Wrong(str(error), status=501, code="not_installed") from None
    finally:
        served.pending -= 1
    served.metrics.asked(parts)
    served.metrics.whole.observe(time.monotonic() - began)
    return found, {"prompt_tokens": count, "total_tokens": count}


def _written(vector: list[float], form: str) -> Any:
    """As numbers, or as the base64 of little-endian float32."""
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _as_vllm(answer: dict[str, Any]) -> dict[str, Any]:
    """Probabilities by number, where the answer has them by name."""
    found = answer.get("probabilities")
    return {"probs": list(found.values()), "num_classes": len(found)} if isinstance(found, dict) else {}
