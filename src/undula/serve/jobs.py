"""A request on its way through an engine, what an engine may take, and what it says of itself."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState

from .admission import Claim
from .policy import Ticket
from .replies import Reply
from .request import Chosen, Piece
from .sampling import Drawing
from .words import Words


@dataclass(frozen=True)
class Limits:
    """What an engine may take.  `running`: requests at a time; `waiting`: beside them, before new ones are Busy;
    `batch_tokens`: in one step, which bounds how long prompts keep others waiting; `cache`: bytes of keys and values;
    `page`: tokens in a block of them, the unit in which prefixes are shared; `copies`: bytes of private copies of
    weights (see `Copies`)."""

    running: int = 64
    waiting: int = 1024
    batch_tokens: int = 512
    cache: int = 2**30
    page: int = 16
    copies: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.running < self.batch_tokens and self.waiting > 0 and self.page >= 4 and self.cache > 0):
            raise ValueError(
                "`running` is 1 or more and below `batch_tokens`, `waiting` and `cache` are 1 or more, a `page` has 4 "
                f"tokens or more; found {self}"
            )


@dataclass(frozen=True)
class Stats:
    """Of an engine so far: requests, tokens, and bytes of keys and values."""

    waiting: int = 0
    running: int = 0
    requests: int = 0
    finished: int = 0
    refused: int = 0  # those that ended otherwise: late, cancelled, broken
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, not computed again
    completion_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    cache_used: int = 0
    cache_total: int = 0


@dataclass(eq=False)
class Job:
    """One request: its reply, its place in the cache and how its tokens are chosen."""

    ticket: Ticket
    version: Any  # of its adapters; None: the base alone
    reply: Reply
    drawing: Drawing
    words: Words
    ends: Collection[int]  # tokens that end an answer
    state: RequestState = field(init=False)
    name: str | None = None  # under which its adapter is attached
    begun: bool = False  # whether any of it was computed
    told: list[Chosen] = field(default_factory=list)  # tokens whose text is held back

    def __post_init__(self) -> None:
        self.state = RequestState(self.ticket.id, list(self.reply.request.prompt))

    @property
    def id(self) -> str:
        return self.ticket.id

    def late(self, now: float) -> bool:
        """Whether its first token can no longer come in time."""
        return self.ticket.deadline is not None and now >= self.ticket.deadline and self.reply.usage.first is None

    @property
    def unread(self) -> int:
        """How many tokens of its prompt are still to be computed; 0 once it writes."""
        return 0 if self.state.generated_tokens else len(self.state.initial_tokens) - self.state.position_offset

    def claim(self, delay: int) -> Claim:
        """What it may come to have in the cache, if it begins to write after `delay` steps at most."""
        written = len(self.state.generated_tokens)
        return Claim(len(self.state.initial_tokens) + written, self.drawing.sampling.max_tokens - written, delay=delay)

    def used(self, **changes: Any) -> None:
        self.reply.usage = replace(self.reply.usage, **changes)

    def took(self, chosen: Chosen) -> str | None:
        """Goes on with this token, and gives out what is sure of the text.  Why the answer ended, None: it has not."""
        sampling = self.drawing.sampling
        self.state.generated_tokens.append(chosen.token)
        self.state.tokens_to_process = [chosen.token]
        self.told.append(chosen)
        count = len(self.state.generated_tokens)
        first = self.reply.usage.first
        self.used(
            completion_tokens=count,
            first=time.monotonic() - self.reply.request.arrived if first is None else first,
        )
        ended = chosen.token in self.ends and not sampling.ignore_eos
        text = "" if ended else self.words.add(chosen.token)
        finish = "stop" if ended or self.words.stopped else "length" if count >= sampling.max_tokens else None
        if finish and not self.words.stopped:
            text += self.words.end()
            finish = "stop" if self.words.stopped else finish
        if text or finish or self.words.tokenizer is None:
            self.reply.put(Piece(text, tuple(self.told), finish))
            self.told = []
        return finish
