"""Who is in memory: one budget of bytes, and who may come in when it is full."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..core.adapter import Adapter
from .version import Version

_uses = itertools.count(1)


class State(Enum):
    WAITING = "waiting"  # for room
    LOADING = "loading"  # its bytes are counted from here on
    LOADED = "loaded"  # read and checked, not on the model yet
    ATTACHED = "attached"
    FAILED = "failed"


@dataclass(eq=False)
class Held:
    """A version that is in memory, or is to come."""

    version: Version
    asked: float  # when it was first asked for
    seen: float = 0.0  # when it was last
    state: State = State.WAITING
    claimed: float | None = None  # when a request was last told to wait for it
    users: int = 0
    used: int = field(default_factory=lambda: next(_uses))  # rises with every use
    cold: bool = True  # nobody computed with it since it was read
    adapter: Adapter | None = None  # between reading and attaching
    kept: Any = None  # what `Heads` keeps beside it
    error: Exception | None = None
    failed: float = 0.0

    def use(self) -> None:
        """One more request computes with it."""
        self.cold, self.used = False, next(_uses)

    @property
    def inside(self) -> bool:
        """Whether its bytes count."""
        return self.state in (State.LOADING, State.LOADED, State.ATTACHED)

    @property
    def wanted(self) -> bool:
        """Whether its names still mean it."""
        return all(source.current for _, source in self.version.terms)

    @property
    def pinned(self) -> bool:
        return self.version.plain and self.version.terms[0][1].pinned and self.wanted


class Room:
    """Versions in memory, at most `budget` bytes of them.

    Room is given in the order in which it was asked for, to those that requests wait for before those that are only
    fetched ahead.  A small one may pass a large one that does not fit yet, until that has waited for `patience`
    seconds: from then on nobody passes, and as many of the versions in use as it needs room of (those with the fewest
    requests) take no new requests.  They end with the requests that they have, so everyone comes in.  A version that a
    request waits for stays until it was computed with, or until nobody has asked for it for `lapse` seconds.
    """

    def __init__(self, budget: int, patience: float, lapse: float):
        self.budget, self.patience, self.lapse = budget, patience, lapse
        self.held: dict[str, Held] = {}
        self.ending: set[str] = set()  # versions in use that take no new requests
        self.first: Held | None = None  # for whom they end

    @property
    def bytes(self) -> int:
        return sum(h.version.bytes for h in self.held.values() if h.inside)

    def claimed(self, held: Held, now: float) -> bool:
        """Whether a request waits for it."""
        return held.claimed is not None and now - held.claimed <= self.lapse

    def queue(self, now: float) -> list[Held]:
        """Those who wait for room, in turn."""
        waiting = [h for h in self.held.values() if h.state is State.WAITING]
        return sorted(waiting, key=lambda h: (not self.claimed(h, now), h.asked))

    def idle(self, now: float) -> list[Held]:
        """Those who may leave: what no name means any more, then the longest unused."""
        able = [
            h
            for h in self.held.values()
            if h.state in (State.LOADED, State.ATTACHED)
            and not (h.users or h.pinned)
            and (not self.claimed(h, now) or h.version.id in self.ending)
        ]
        return sorted(able, key=lambda h: (h.wanted, h.used))

    def grant(self, now: float, attached: bool) -> tuple[list[Held], list[Held]]:
        """(who comes in, who leaves for it); what is on the model leaves only where `attached` may.  What was fetched
        ahead and not used yet leaves for those that a request waits for alone."""
        if self.first is not None and not self.claimed(self.first, now):
            self._forget_first()  # who asked went away
        come: list[Held] = []
        leave: list[Held] = []
        free = self.budget - self.bytes
        able = [h for h in self.idle(now) if attached or h.state is State.LOADED]
        for held in self.queue(now):
            claimed = self.claimed(held, now)
            fresh = [] if claimed else [h for h in able if h.cold and now - h.seen <= self.lapse]
            gone: list[Held] = []
            for other in able:
                if free >= held.version.bytes:
                    break
                if other not in fresh:
                    gone.append(other)
                    free += other.version.bytes
            if free < held.version.bytes:
                free -= sum(other.version.bytes for other in gone)
                if claimed and now - held.asked > self.patience:
                    self._end_for(held, held.version.bytes - free - sum(h.version.bytes for h in able))
                    break
                continue
            free -= held.version.bytes
            able = [h for h in able if h not in gone]
            leave += gone
            come.append(held)
            held.state = State.LOADING
        for other in leave:
            del self.held[other.version.id]
        if self.first is not None and self.first.state is not State.WAITING:
            self._forget_first()
        return come, leave

    def _end_for(self, held: Held, lacking: int) -> None:
        """So many more bytes are needed for one that has waited for long."""
        if self.first is not held:
            self.first, self.ending = held, set()
        used = [h for h in self.held.values() if h.users and not h.pinned]
        lacking -= sum(h.version.bytes for h in used if h.version.id in self.ending)
        for other in sorted(used, key=lambda h: (h.users, h.used)):
            if lacking <= 0:
                break
            if other.version.id not in self.ending:
                self.ending.add(other.version.id)
                lacking -= other.version.bytes

    def _forget_first(self) -> None:
        self.first, self.ending = None, set()

    def drop(self, held: Held) -> None:
        """Nobody wants it any more."""
        del self.held[held.version.id]
        if held is self.first:
            self._forget_first()

    def stale(self, now: float) -> list[Held]:
        """Those who wait or failed and whom nobody has asked for since long, and what is there that no name means any
        more."""
        left = [
            h
            for h in self.held.values()
            if h.state in (State.WAITING, State.FAILED) and not h.pinned and now - h.seen > self.lapse
        ]
        return left + [h for h in self.idle(now) if not h.wanted]
