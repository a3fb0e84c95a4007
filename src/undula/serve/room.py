"""Who is in memory: one budget of bytes, and who may come in when it is full."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..host.ready import Ready
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
    since: float = 0.0  # when it was first computed with
    cold: bool = True  # nobody computed with it since it was read
    ready: Ready | None = None  # between reading and attaching
    kept: Any = None  # what `Heads` keeps beside it
    error: Exception | None = None
    failed: float = 0.0

    def use(self, now: float) -> None:
        """One more request computes with it."""
        self.since = now if self.cold else self.since
        self.cold, self.used = False, next(_uses)

    def __post_init__(self) -> None:
        self.bytes = self.version.bytes  # and what it really takes, once it was read

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
    seconds: from then on nobody passes, and as many of the versions in use as those who wait so long need room of take
    no new requests, the longest there first.  Each takes requests for `patience` seconds at least, and ends with those
    that it has.  So everyone comes in, after a time that the requests' lengths bound.  A version that a request waits
    for stays until it was computed with, or until nobody has asked for it for `lapse` seconds.
    """

    def __init__(self, budget: int, patience: float, lapse: float):
        self.budget, self.patience, self.lapse = budget, patience, lapse
        self.held: dict[str, Held] = {}
        self.ending: set[str] = set()  # versions in use that take no new requests

    @property
    def bytes(self) -> int:
        return sum(h.bytes for h in self.held.values() if h.inside)

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
        come: list[Held] = []
        leave: list[Held] = []
        free = self.budget - self.bytes
        able = [h for h in self.idle(now) if attached or h.state is State.LOADED]
        queue = self.queue(now)
        for i, held in enumerate(queue):
            claimed = self.claimed(held, now)
            gone, lacking = self._leaving([h for h in able if claimed or not self._fresh(h, now)], held, free)
            if lacking <= 0:
                free = -lacking
                able = [h for h in able if h not in gone]
                leave += gone
                come.append(held)
                held.state = State.LOADING
            elif claimed and now - held.asked > self.patience:
                late = [h for h in queue[i:] if self.claimed(h, now) and now - h.asked > self.patience]
                self._end_for(late, now, free + sum(h.bytes for h in able))
                break
        else:
            self.ending.clear()
        for other in leave:
            self.drop(other)
        return come, leave

    def _fresh(self, held: Held, now: float) -> bool:
        return held.cold and now - held.seen <= self.lapse

    def _leaving(self, able: list[Held], held: Held, free: int) -> tuple[list[Held], int]:
        """(who of these leaves so that `held` fits, what is lacking then)."""
        gone, lacking = [], held.bytes - free
        for other in able:
            if lacking <= 0:
                break
            gone.append(other)
            lacking -= other.bytes
        return gone, lacking

    def _end_for(self, late: list[Held], now: float, free: int) -> None:
        """Has versions end so that those who have waited for long come in."""
        used = [h for h in self.held.values() if h.users and not h.pinned]
        lacking = sum(h.bytes for h in late) - free
        lacking -= sum(h.bytes for h in used if h.version.id in self.ending)
        for other in sorted(used, key=lambda h: h.since):
            if lacking <= 0 or now - other.since < self.patience:
                break
            if other.version.id not in self.ending:
                self.ending.add(other.version.id)
                lacking -= other.bytes

    def drop(self, held: Held) -> None:
        """It is out, or nobody wants it any more."""
        del self.held[held.version.id]
        self.ending.discard(held.version.id)

    def stale(self, now: float) -> list[Held]:
        """Those who wait or failed and whom nobody has asked for since long, and what is there that no name means any
        more."""
        left = [
            h
            for h in self.held.values()
            if h.state in (State.WAITING, State.FAILED) and not h.pinned and now - h.seen > self.lapse
        ]
        return left + [h for h in self.idle(now) if not h.wanted]
