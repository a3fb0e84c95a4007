"""Trainings of one process take turns: all draw from torch's one source of random numbers, so of two at once each would
get what the other leaves, and no seed would tell what comes out."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

LOG = logging.getLogger("undula.train")
TURN = threading.RLock()  # what a training calls may itself train


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Within it, or in a function that it decorates, no other thread trains: one that comes waits, and says so."""
    if not TURN.acquire(blocking=False):
        LOG.warning("another training is under way in this process: this one begins when that has ended")
        TURN.acquire()
    try:
        yield
    finally:
        TURN.release()
