"""What is behind the address: a base, its adapters, and who computes."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..pool import Pool
from ..request import Draining
from .bounds import Bounds
from .errors import Wrong
from .keys import Keys
from .metrics import Metrics
from .places import Places
from .words import Words


@dataclass
class Served:
    """One base behind an address.

    names: those of the base, the first of which is shown.  engine: what writes, an `Engine`; encoder: what embeds and
    classifies, an `Encoder`; one of them is None.  shelf: where adapters are registered, of
    either.
    """

    names: tuple[str, ...]
    shelf: Pool
    engine: Any = None
    encoder: Any = None
    places: Places = field(default_factory=lambda: Places(()))
    keys: Keys = field(default_factory=Keys)
    bounds: Bounds = field(default_factory=Bounds)
    hosts: frozenset[str] | None = None  # that requests may name in their Host header; None: any
    since: float = field(default_factory=time.time)
    draining: bool = False

    def __post_init__(self) -> None:
        self._told: tuple[float, list[Any]] = (-math.inf, [])
        self.metrics = Metrics(self.worker, self.shelf, self.rows, self.since)
        self.tokenising = ThreadPoolExecutor(1, "undula-tokens")  # a tokenizer is no matter of several threads
        self.changing = ThreadPoolExecutor(1, "undula-changes")  # adapters come and go one at a time
        self.answering = ThreadPoolExecutor(32, "undula-answers")  # who waits for an encoder
        self.pending = 0  # requests that do
        self.words = None if self.engine is None else Words(self.engine.tokenizer)

    @property
    def worker(self) -> Any:
        """The engine, or the encoder."""
        return self.engine or self.encoder

    @property
    def longest(self) -> int:
        """Tokens that a text may have."""
        return int(self.worker.max_length)

    def has(self, name: str) -> bool:
        """Whether an adapter of this name is registered."""
        return name in self.shelf.names()

    def rows(self) -> list[Any]:
        """What the shelf tells of each adapter, asked at most once in a second: of thousands it takes a while."""
        now = time.monotonic()
        if now - self._told[0] > 1:
            self._told = (now, self.shelf.describe())
        return self._told[1]

    def check_open(self) -> None:
        """Raises Draining."""
        if self.draining:
            raise Draining("this server is stopping: ask another, or this one later")

    def writer(self) -> Any:
        """The engine.  Raises Wrong where the base is no language model."""
        self.check_open()
        if self.engine is None:
            raise Wrong(
                f"{self.names[0]} is an encoder, which writes no text: ask /v1/embeddings or /classify", "model", 400
            )
        return self.engine

    def reader(self, what: str) -> Any:
        """The encoder.  Raises Wrong where the base is a language model."""
        self.check_open()
        if self.encoder is None:
            raise Wrong(
                f"{self.names[0]} is a language model, which {what}: ask /v1/chat/completions or /v1/completions, or "
                "serve an encoder",
                "model",
            )
        return self.encoder
