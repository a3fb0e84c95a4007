"""The largest resident set of this process within a stretch of it (Linux)."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path


def now() -> int:
    """The bytes that are resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def begin() -> int:
    """From here on the largest counts.  Returns the bytes that are resident now: what was taken and freed goes back to
    the system before, else it would hide what is taken from here on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = now()
    Path("/proc/self/clear_refs").write_text("5")
    return before


def most() -> int:
    """The most bytes that were resident at once since `begin`."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
