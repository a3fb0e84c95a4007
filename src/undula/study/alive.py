"""Who is alive, of the processes that share a store: told without clocks that agree and without names of machines."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SILENCE = 60.0  # seconds of the looker's own clock in which a live process gives a sign of life many times over
LOOK = 5.0  # of the time between two looks no more than this counts: who looks may have slept itself, and the rest too


@dataclass(frozen=True)
class Owner:
    """One process, told from every other: a random token, and where a process of this machine could be looked for."""

    token: str
    boot: str  # of the kernel; "" where it does not say
    space: str  # of process numbers: two containers on one machine have different ones
    pid: int
    birth: str  # tells a process from a later one of the same number

    @staticmethod
    def this() -> Owner:
        """The process that asks."""
        return Owner(
            _token(os.getpid()), _read("/proc/sys/kernel/random/boot_id"), _space(), os.getpid(), birth(os.getpid())
        )

    def __str__(self) -> str:
        return "/".join((self.token, self.boot, self.space, str(self.pid), self.birth))

    @staticmethod
    def named(text: str) -> Owner | None:
        """The owner that has this name; None for names of older versions."""
        parts = text.split("/")
        if len(parts) != 5 or not parts[3].isdigit():
            return None
        return Owner(parts[0], parts[1], parts[2], int(parts[3]), parts[4])

    def gone(self) -> bool | None:
        """Whether the process has ended; None for one that cannot be seen from here."""
        here = Owner.this()
        if self.token == here.token:
            return False
        if not here.boot or not here.space or (self.boot, self.space) != (here.boot, here.space):
            return None
        return birth(self.pid) != self.birth


class Watchman:
    """Looks at other processes again and again.  One that cannot be seen from here is gone when its count of signs of
    life has stood still for SILENCE seconds of this process's own clock, over many looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.seen: dict[str, tuple[str, float, float, float]] = {}  # {run: (owner, beat, last look, stood still for)}

    def gone(self, run: str, owner: str, beat: float) -> bool:
        """Whether the owner of a run is known to be gone."""
        named, now = Owner.named(owner), self.clock()
        if named is not None and (known := named.gone()) is not None:
            return known
        who, count, last, still = self.seen.get(run, (owner, beat, now, 0.0))
        still = still + min(now - last, LOOK) if (who, count) == (owner, beat) else 0.0
        self.seen[run] = owner, beat, now, still
        return still >= SILENCE


def birth(pid: int) -> str:
    """When a process was born, as the kernel counts; "" for one that is not there, or is dead already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


@cache
def _token(pid: int) -> str:
    """Of this process: a fork has its own."""
    return uuid.uuid4().hex


@cache
def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").replace("/", "-")
    except OSError:
        return ""
