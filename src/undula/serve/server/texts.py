"""The addresses under which text is written: `/v1/completions`, `/v1/chat/completions`, and `/tokenize`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from ..request import Exchanged, Part, Piece, Refused, Sampling
from ..request import Request as Asked
from . import schemas
from .answers import Plain, Talk, Written, usage_of
from .bodies import reading
from .callers import caller
from .errors import Wrong, event_of
from .keys import Key
from .manners import manner_of
from .models import parts_of
from .prompts import asked, bias_of, talk, tokens
from .served import Served
from .streams import ALIVE, DONE, Events, event, merged, watched

T = TypeVar("T")
AGAIN = 5  # times that a chat is put in a template, where its adapter is exchanged for another meanwhile
COMPLETED = 16  # tokens of a completion where nothing is said, as OpenAI's
router = APIRouter()


@router.post("/v1/completions")
async def completions(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Completion, Depends(reading(schemas.Completion))],
) -> Response:
    """Goes on after prompts."""
    served: Served = request.app.state.served
    engine = served.writer()
    parts = parts_of(served, key, body.model, body.adapters)
    given = asked(body.prompt, "prompt", served.bounds.answers)
    if body.echo and body.logprobs is not None:
        raise Wrong("echo with logprobs is not served: probabilities are of what is written alone", "echo")
    _check_count(served, body, len(given))
    ids = await on_tokens(served, lambda: [tokens(prompt, engine.tokenizer) for prompt in given])
    how = [sampling_of(served, body, body.max_tokens, COMPLETED, body.logprobs, len(one)) for one in ids]
    texts = [p if isinstance(p, str) else str(engine.tokenizer.decode(list(p))) for p in given] if body.echo else []
    before = [text for text in texts for _ in range(body.n)] or [""] * (len(given) * body.n)
    shape = Plain(body.model, served.words, body.logprobs is not None, before)  # type: ignore[arg-type]
    served.keys.spend(key, len(given) * body.n)
    return await answer(request, key, body, parts, ids, how, shape)


@router.post("/v1/chat/completions")
async def chat(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Chat, Depends(reading(schemas.Chat))],
) -> Response:
    """Answers the last of some messages."""
    served: Served = request.app.state.served
    engine = served.writer()
    parts = parts_of(served, key, body.model, body.adapters)
    if body.top_logprobs is not None and not body.logprobs:
        raise Wrong("top_logprobs are given with logprobs: true alone", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise Wrong("max_tokens and max_completion_tokens say two things: give one", "max_completion_tokens")
    _check_count(served, body, 1)
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    shape = Talk(body.model, served.words, body.logprobs)  # type: ignore[arg-type]
    served.keys.spend(key, body.n)
    for left in reversed(range(AGAIN)):
        version = served.shelf.version(parts)  # first: what is exchanged after it is noticed
        ids = await on_tokens(served, lambda: talk(body.messages, engine.tokenizer, manner_of(served.shelf, parts)))
        how = sampling_of(served, body, most, served.bounds.tokens, logprobs, len(ids))
        try:
            return await answer(request, key, body, parts, [ids], [how], shape, None if version is None else version.id)
        except Exchanged:
            if not left:
                raise
    raise AssertionError("unreachable")


@router.post("/tokenize")
async def tokenize(
    request: Request,
    key: Annotated[Key, Depends(caller)],
    body: Annotated[schemas.Tokenize, Depends(reading(schemas.Tokenize))],
) -> Response:
    """The tokens that a prompt or messages come to."""
    served: Served = request.app.state.served
    tokenizer = served.writer().tokenizer
    parts = () if body.model is None else parts_of(served, key, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Wrong("tokenize takes one of prompt and messages", "prompt")

    def made() -> tuple[int, ...]:
        if body.messages is not None:
            return talk(body.messages, tokenizer, manner_of(served.shelf, parts))
        return tokens(body.prompt or "", tokenizer)

    ids = await on_tokens(served, made)
    return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": served.longest})


async def on_tokens(served: Served, make: Callable[[], T]) -> T:
    """What the tokenizer makes, on the thread that it has."""
    return await asyncio.get_running_loop().run_in_executor(served.tokenising, make)


def _check_count(served: Served, body: schemas.Sampled, prompts: int) -> None:
    most = served.bounds.answers
    if prompts * body.n > most:
        raise Wrong(f"{prompts} prompts with n={body.n} are {prompts * body.n} answers; one request takes {most}", "n")
    if not all(body.stop):
        raise Wrong("stop has an empty text, with which every answer would end before it begins", "stop")
    if body.stream_options is not None and not body.stream:
        raise Wrong("stream_options are given with stream: true alone", "stream_options")


def sampling_of(
    served: Served, body: schemas.Sampled, most: int | None, usual: int, logprobs: int | None, length: int
) -> Sampling:
    """How an answer to a prompt of `length` tokens is written.  Raises Wrong where there is no room for it."""
    bound, room = served.bounds.tokens, served.longest - length
    if most is not None and most > bound:
        raise Wrong(f"max_tokens={most}, and this server writes {bound} at most in one answer", "max_tokens")
    if room < (most or 1):
        raise Wrong(
            f"the prompt has {length} tokens"
            + (f" and {most} are to be written" if most else "")
            + f", and this model "
            f"has places for {served.longest}: shorten it" + (", or ask for fewer" if most else ""),
            "prompt" if isinstance(body, schemas.Completion) else "messages",
            code="context_length_exceeded",
        )
    return Sampling(
        max_tokens=most or min(usual, room, bound),
        temperature=float(body.temperature),
        top_p=float(body.top_p),
        top_k=max(0, body.top_k),
        seed=body.seed,
        presence_penalty=float(body.presence_penalty),
        frequency_penalty=float(body.frequency_penalty),
        repetition_penalty=float(body.repetition_penalty),
        logit_bias=bias_of(body.logit_bias, len(served.engine.tokenizer)),
        stop=tuple(body.stop),
        logprobs=logprobs,
        ignore_eos=body.ignore_eos,
    )


def _seeded(how: Sampling, i: int) -> Sampling:
    """That of answer i of n: each draws by a seed of its own."""
    return how if how.seed is None else replace(how, seed=(how.seed + i) % (1 << 63))


async def answer(
    request: Request,
    key: Key,
    body: schemas.Sampled,
    parts: tuple[Part, ...],
    prompts: Sequence[tuple[int, ...]],
    how: Sequence[Sampling],
    shape: Plain | Talk,
    made_for: str | None = None,
) -> Response:
    """Has n answers to each prompt written, and sends them whole or as they come.  Who goes away has them cancelled.
    Raises Exchanged where the adapter is no longer the version that the prompts were made for."""
    served: Served = request.app.state.served
    replies: list[Any] = []

    def gone() -> None:
        for reply in replies:
            reply.cancel()

    try:
        for prompt, sampling in zip(prompts, how, strict=True):
            for i in range(body.n):
                asked = Asked(prompt, parts, _seeded(sampling, i), key.name, served.bounds.deadline, made_for)
                replies.append(served.engine.submit(asked))
                served.metrics.asked(parts)
        pieces = merged([served.metrics.heard(reply) for reply in replies], served.bounds.patience)
        async with watched(request, gone):
            if not body.stream:
                return JSONResponse(await _whole(pieces, replies, body.n, shape))
            first = await anext(pieces)
    except BaseException:
        gone()
        raise
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return Events(_events(served, first, pieces, replies, body.n, shape, with_usage), gone, served.bounds.writing)


Pieces = AsyncIterator[tuple[int, Piece] | None]


async def _whole(pieces: Pieces, replies: Sequence[Any], n: int, shape: Plain | Talk) -> dict[str, Any]:
    answers = [Written() for _ in replies]
    async for item in pieces:
        if item is not None:
            answers[item[0]].add(item[1])
    return shape.whole(answers, usage_of(replies, n))


async def _events(
    served: Served,
    first: tuple[int, Piece] | None,
    pieces: Pieces,
    replies: Sequence[Any],
    n: int,
    shape: Plain | Talk,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    none = {"usage": None} if with_usage else {}
    try:
        for i in range(len(replies)):
            if (opening := shape.opening(i)) is not None:
                yield event({**opening, **none})
        item = first
        while True:
            if item is None:
                yield ALIVE
            else:
                for chunk in shape.piece(*item):
                    yield event({**chunk, **none})
            try:
                item = await anext(pieces)
            except StopAsyncIteration:
                break
        if with_usage:
            yield event(shape.last(usage_of(replies, n)))
    except Exception as error:  # the answer has begun: what went wrong can be said inside it alone
        served.metrics.refused.labels(error.code if isinstance(error, Refused) else "internal_error").inc()
        yield event(event_of(error))
    yield DONE
