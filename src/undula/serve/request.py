"""What is asked of an engine, and what comes back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Part:
    """One adapter of a request, by the name that it is registered under, and the weight that its update counts with."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in OpenAI's words.

    temperature T: 0 is the likeliest token; else one is drawn from softmax(logits / T), of the `top_k` likeliest (0:
    all) and of the likeliest that together have `top_p` of it.  The draws of a request follow its `seed` alone,
    whatever else is in the batch; None: another one each time.  Penalties act on the logits before T: presence and
    frequency are subtracted for tokens that were written, once and per occurrence; repetition divides positive and
    multiplies negative logits of tokens of prompt and answer (Keskar et al. 2019, arXiv:1909.05858).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()  # an answer ends before the first of these
    logprobs: int | None = None  # None: none; k: of each token, and of the k likeliest in its place
    ignore_eos: bool = False  # go on to max_tokens, for benchmarks


@dataclass(frozen=True)
class Request:
    """Tokens to go on after, through these adapters added up; none of them: the base alone."""

    prompt: tuple[int, ...]
    adapters: tuple[Part, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    key: str = ""  # who asks, as the server's keys call them: what FairShare shares among
    deadline: float | None = None  # seconds from `arrived` in which its first token has to come, else it is refused
    made_for: str | None = None  # id of the version that the prompt was written for, as a chat is; None: any
    id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Chosen:
    """One token that was written: log p of it and of the likeliest in its place, of the model's own distribution
    before temperature and penalties."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came since the last piece of a reply: text that is whole (no half character, no beginning of a stop
    string), its tokens, and in the last piece why it ended: "stop" (the model's end or a stop string) or "length"."""

    text: str = ""
    tokens: tuple[Chosen, ...] = ()
    finish: str | None = None


class Refused(Exception):
    """A request that is not answered.  `status` is the one of HTTP; what it says may be shown to who asked: it names no
    paths."""

    status = 400
    code = "invalid_request_error"


class Unknown(Refused):
    """No adapter of this name is registered."""

    status, code = 404, "model_not_found"


class Busy(Refused):
    """More waits than can be served in time, or than memory will hold.  `retry_after`: seconds."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, said: str, retry_after: float = 1.0):
        super().__init__(said)
        self.retry_after = retry_after


class Late(Busy):
    """Its deadline passed, or will have passed, before its first token."""

    status, code = 503, "deadline_exceeded"


class Draining(Refused):
    """The engine is stopping: running requests finish, new ones go elsewhere."""

    status, code = 503, "shutting_down"


class Cancelled(Refused):
    """Who asked went away, or cancelled."""

    status, code = 499, "cancelled"


class Broken(Refused):
    """The adapter that was asked for cannot be loaded (a damaged file, one that does not fit the base)."""

    status, code = 424, "adapter_failed"


class Exchanged(Refused):
    """The adapter was exchanged for another since the prompt was written for it: write it anew."""

    status, code = 503, "adapter_exchanged"


class Failed(Refused):
    """The engine failed at this request, through no fault of who asked."""

    status, code = 500, "internal_error"
