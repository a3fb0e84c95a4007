"""Whose a model is: one thread computes with it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

_computing: weakref.WeakKeyDictionary[Any, threading.Thread] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def check_free(model: Any) -> None:
    """Raises RuntimeError where an engine or an encoder computes with the model: another would compute through the
    layers and the attention that the first has put there."""
    thread = _computing.get(model)
    if thread is not None and thread.is_alive():
        raise RuntimeError(
            f"another engine computes with this {type(model).__name__}, and one model is one engine's: register more "
            "adapters in its pool, or stop it first"
        )


def begin(model: Any, thread: threading.Thread) -> None:
    """Starts the thread that computes with the model, whose it is until the thread has ended.  Raises RuntimeError as
    `check_free`."""
    with _lock:
        check_free(model)
        thread.start()
        _computing[model] = thread
