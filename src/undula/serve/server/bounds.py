"""How much one request may ask for, and how long the server waits for whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Bounds of requests: what is over them is refused before it costs anything.

    body: bytes of a request.  tokens: that an answer may have.  answers: that one request may ask for (prompts times
    n).  parts: adapters of one request.  texts: that one request for embeddings or labels may send.  waiting: requests
    that may wait for an encoder (an engine has its own bound).  deadline: seconds in which the first token has to come;
    None: no such bound.  reading, writing: seconds that a client may take for its body, and for reading what it was
    sent, before it counts as gone.  patience: seconds after which a stream begins though there is no token yet, and
    between signs of life while it waits.
    """

    body: int = 2 << 20
    tokens: int = 4096
    answers: int = 64
    parts: int = 16
    texts: int = 256
    waiting: int = 1024
    deadline: float | None = None
    reading: float = 30.0
    writing: float = 60.0
    patience: float = 10.0
