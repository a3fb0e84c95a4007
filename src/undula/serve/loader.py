"""Reading adapters beside the thread that computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..combine.weighted import combined
from ..core.adapter import Adapter
from ..core.method import LowRank
from ..host.frame import Frame
from ..host.ready import Ready, ready
from ..methods.lora import Fixed, LoRA
from .form import Heads
from .version import Source, Version, digest, stamp


class Changed(Exception):
    """The files of a source are no more what was registered."""

    def __init__(self, source: Source):
        self.source, self.gone = source, not any(stamp(source.path))
        super().__init__(f"{source.path} {'is gone' if self.gone else 'changed since it was registered'}")


class Loader:
    """A thread that reads what it is asked for, in turn, and tells what came of it."""

    def __init__(self, read: Callable[[Version], Any], done: Callable[..., None]):
        self.read, self.done = read, done
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def ask(self, held: Any) -> None:
        """Calls read(held.version), then done(held, what that gave or None, seconds, the error or None)."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="undula-loader", daemon=True)
            self.thread.start()
        self.asked.put(held)

    def stop(self) -> None:
        """Ends the thread after what it reads now."""
        if self.thread is not None:
            self.asked.put(None)
            self.thread.join()
            self.thread = None

    def _run(self) -> None:
        while (held := self.asked.get()) is not None:
            began = time.perf_counter()
            try:
                found, error = self.read(held.version), None
            except Exception as raised:  # whatever a file makes its readers raise: the others go on
                found, error = None, raised
            self.done(held, found, time.perf_counter() - began, error)
            del held, found, error


def read(
    version: Version, frame: Frame, dtype: torch.dtype | None = None, heads: Heads | None = None
) -> tuple[Ready, Any]:
    """(the adapter of a version, ready for the model; what `heads` keeps beside it).  Raises Changed, and what loading
    and checking raise."""
    terms = [(weight, _loaded(source)) for weight, source in version.terms]
    adapter = terms[0][1] if version.plain else combined(terms)
    adapter, kept = (adapter, None) if heads is None else heads.wear(version.terms[0][1].path, adapter)
    return ready(frame, _in_pairs(adapter), dtype), kept


@torch.no_grad()
def _in_pairs(adapter: Adapter) -> Adapter:
    """The same function with plain pairs where they take no more room: sums of pairs have one product then."""
    methods, factors = dict(adapter.methods), dict(adapter.factors)
    for site, method in adapter.methods.items():
        f = factors[site]
        if not isinstance(method, LowRank) or method.plain() is not None or method.drops:
            continue
        B_OR, A_RI = method.pair(f)
        if B_OR.numel() + A_RI.numel() <= sum(t.numel() for t in f.values()):
            methods[site] = LoRA(r=len(A_RI), alpha=1.0, scaling=Fixed(1.0))
            factors[site] = {"A": A_RI.contiguous(), "B": B_OR.contiguous()}
    return replace(adapter, methods=methods, factors=factors)


def told(version: Version, error: Exception | None) -> str:
    """Why a version cannot be loaded, for who asked for it: without paths."""
    if isinstance(error, Changed):
        if error.source.current and error.gone:
            return f"the files of the adapter {error.source.name!r} are gone: it was registered and is no longer there"
        if error.source.current:
            return (
                f"the files of the adapter {error.source.name!r} changed after it was registered, so it is not known "
                "what they hold now: register it again (in place)"
            )
        return (
            f"the adapter {error.source.name!r} was exchanged or removed while this request waited, and what it asked "
            "for is no longer on the disk: send it again"
        )
    text = str(error)
    for _, source in version.terms:
        text = text.replace(str(source.path), source.name)
    return f"the adapter {version.names} cannot be loaded: {text}"


def _loaded(source: Source) -> Adapter:
    """The adapter of one directory, if it is what was registered."""
    before = stamp(source.path)
    if source.digest is None and before != source.stamp:
        raise Changed(source)
    adapter = Adapter.load(source.path)
    found = digest(adapter)
    if source.digest is None:
        if stamp(source.path) != before:
            raise Changed(source)
        source.digest = found
    elif found != source.digest:
        raise Changed(source)
    return adapter
