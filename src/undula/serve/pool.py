"""Many adapters on disk, as many in memory as one budget of bytes holds."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..host.frame import Frame
from ..host.ready import Ready, put, take
from .catalog import Catalog, Described, total
from .form import Forms, Heads
from .loader import Loader, read, told
from .request import Broken, Part
from .room import Held, Room, State
from .version import Source, Version, check_name, stamp

AGAIN = 5.0  # seconds after which what could not be loaded is tried again
PAUSE = 0.02  # seconds between two looks for room while nothing has changed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds, and what it has done so far."""

    registered: int
    budget: int
    bytes: int
    loaded: int
    in_use: int
    waiting: int
    hits: int
    misses: int
    loads: int
    failures: int
    evictions: int
    load_seconds: float
    attach_seconds: float


class Pool:
    """Adapters by name: registered (checked, not read), loaded when a request needs one, and out again when others need
    the room.

    `budget` is in bytes of the adapters' tensors on the model.  What is in use or pinned stays; of the rest the longest
    unused leaves first.  Requests hold a `Version`, which means one content for ever: a name that is registered anew
    has another, and one whose files change without that ends in Broken once they are read again, never in another
    adapter's answer.  `bases` are the names by which adapters may call the model that they are for; none: any.  `dtype`
    narrows factors as `undula.attach` does.  With `heads` adapters may hold parameters in full (a classification head):
    it says what of them goes onto the model, and `kept` gives what it makes of the rest.  `patience` and `lapse`: see
    `Room`.

    `acquire` and `release` are for the one thread that computes; any thread may call the others.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        bases: Collection[str] = (),
        dtype: torch.dtype | None = None,
        heads: Heads | None = None,
        patience: float = 2.0,
        lapse: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
            raise ValueError(f"a budget is a whole number of bytes, found {budget!r}")
        self.model, self.dtype = model, dtype
        frame = Frame(model)
        self._catalog = Catalog(Forms(frame, bases, dtype, heads), budget)
        self._clock = clock
        self._room = Room(budget, patience, lapse)
        self._lock = threading.RLock()
        self._loader = Loader(lambda version: read(version, frame, dtype, heads), self._loaded)
        self._listeners: list[Callable[[], None]] = []
        self._looks = {True: -math.inf, False: -math.inf}  # for room: when, by whether what is attached might leave
        self._counts = dict.fromkeys(("hits", "misses", "loads", "failures", "evictions"), 0)
        self._load_seconds = self._attach_seconds = 0.0
        self.before: Callable[[], None] = lambda: None  # called before an adapter comes onto the model or leaves it

    # Any thread

    def register(self, name: str, path: str | Path, *, replace: bool = False, pin: bool = False) -> Version:
        """Makes the adapter in the directory `path` known as `name`: from now on requests for that name get it.

        Its configuration and the header of its tensors are read and checked against the model; no weights are.  Over a
        name that is taken: with `replace`, new requests get the new one, and those that hold the old one finish on it.
        `pin` has it loaded soon, and kept.  Raises ValueError for a name that no address could say, for what does not
        fit the model or the budget and for what is malformed, LookupError or TypeError for a method that is not known
        or cannot act, FileNotFoundError where there is no adapter, FileExistsError for a name that is taken.
        """
        check_name(name)
        if not replace:
            self._catalog.check_free(name)
        source = self._catalog.read(name, Path(path).absolute(), pin)
        with self._lock:
            if not replace:
                self._catalog.check_free(name)
            if self._catalog.put(source):
                self._look_again()
        if pin:
            self.prefetch(source.version)
        return source.version

    def unregister(self, name: str) -> None:
        """Makes a name unknown.  Requests that hold its version finish on it.  Raises Unknown."""
        with self._lock:
            self._catalog.remove(name)
            self._look_again()

    def pin(self, name: str, on: bool = True) -> None:
        """Has an adapter loaded and kept in memory, or lets it go again.  Raises Unknown, and ValueError where the
        pinned ones do not fit together."""
        with self._lock:
            source = self._catalog.pin(name, on)
        if on:
            self.prefetch(source.version)

    def version(self, parts: Sequence[Part]) -> Version | None:
        """What these parts mean now; None for the base alone (no parts, or all of them with the scale 0).

        A name that stands twice counts with the sum of its scales.  Raises Unknown; Refused for scales that are no
        finite numbers up to `catalog.LARGEST`, for a weighted sum of what has no update dW, and for what can never fit
        into the budget.
        """
        scales = total(parts)
        with self._lock:
            return self._catalog.version(scales)

    def prefetch(self, version: Version) -> None:
        """Has the version read beside the computation, as soon as there is room that nothing in use takes.  Does
        nothing where it is there or on its way."""
        with self._lock:
            self._wanted(version)
            self._let_in(attached=False)

    def withdraw(self, version: Version) -> None:
        """No request waits for this version any more, so that it need not be kept for one.  (Else it is for `lapse`
        seconds.)"""
        with self._lock:
            held = self._room.held.get(version.id)
            if held is not None:
                held.claimed = None
                self._look_again()
                if held.state is State.WAITING and not held.pinned:
                    self._room.drop(held)

    def listen(self, call: Callable[[], None]) -> None:
        """`call()`, in the loader's thread, whenever something was loaded or could not be."""
        self._listeners.append(call)

    def names(self) -> list[str]:
        """All that is registered."""
        with self._lock:
            return sorted(self._catalog.sources)

    def paths(self) -> dict[str, Path]:
        """Where each was registered from."""
        with self._lock:
            return {name: source.path for name, source in self._catalog.sources.items()}

    def unchanged(self, name: str) -> bool:
        """Whether the files are those that were registered, as far as their sizes and times tell.  Raises Unknown."""
        with self._lock:
            source = self._catalog.source(name)
        return stamp(source.path) == source.stamp

    def there(self, version: Version) -> bool:
        """Whether the version is in memory, or on its way."""
        held = self._room.held.get(version.id)
        return held is not None and held.inside

    def describe(self) -> list[Described]:
        """All that is registered, by name."""
        with self._lock:
            return [self._described(source) for _, source in sorted(self._catalog.sources.items())]

    def stats(self) -> PoolStats:
        with self._lock:
            held = list(self._room.held.values())
            return PoolStats(
                registered=len(self._catalog.sources),
                budget=self._room.budget,
                bytes=self._room.bytes,
                loaded=sum(h.state in (State.LOADED, State.ATTACHED) for h in held),
                in_use=sum(h.users > 0 for h in held),
                waiting=sum(h.state is State.WAITING for h in held),
                load_seconds=self._load_seconds,
                attach_seconds=self._attach_seconds,
                **self._counts,
            )

    def close(self) -> None:
        """Ends the loader's thread."""
        self._loader.stop()

    # The thread that computes

    def acquire(self, version: Version) -> str | None:
        """The name under which the version is attached to the model; it stays until `release`, which each success needs
        once.  None: it is being read, or there is no room yet; ask again at the next step.  Raises Broken where it
        cannot be loaded."""
        with self._lock:
            held = self._wanted(version)
            if held.state is State.FAILED:
                raise Broken(told(version, held.error)) from held.error
            ready = held.state in (State.LOADED, State.ATTACHED) and version.id not in self._room.ending
            if ready:
                held.users += 1  # it stays from here on
            held.claimed = None if ready else self._clock()
            self._let_in(attached=True)
            if not ready:
                return None
            kind = "misses" if held.cold else "hits"
            self._counts[kind] += 1
            for _, source in version.terms:
                setattr(source, kind, getattr(source, kind) + 1)
            held.use(self._clock())
            made, held.ready = held.ready, None
        if made is not None:
            self._attach(held, made)
        return version.id

    def release(self, version: Version) -> None:
        """One request less computes with the version."""
        with self._lock:
            self._room.held[version.id].users -= 1
            self._look_again()
            self._let_in(attached=True)

    def kept(self, version: Version) -> Any:
        """What `heads` made of a version that is acquired."""
        with self._lock:
            return self._room.held[version.id].kept

    # Within

    def _wanted(self, version: Version) -> Held:
        held, now = self._room.held.get(version.id), self._clock()
        if held is None or (held.state is State.FAILED and now - held.failed > AGAIN):
            held = self._room.held[version.id] = Held(version, now)
            self._look_again()
        held.seen = now
        return held

    def _look_again(self) -> None:
        self._looks = dict.fromkeys(self._looks, -math.inf)

    def _let_in(self, attached: bool) -> None:
        """Looks who leaves and who comes in; where nothing has changed not at every call."""
        now = self._clock()
        if now - self._looks[attached] < PAUSE:
            return
        self._looks[attached] = now
        for held in self._room.stale(now):
            if attached or held.state is not State.ATTACHED:
                self._room.drop(held)
                self._out(held)
        come, leave = self._room.grant(now, attached)
        for held in leave:
            self._out(held)
        for held in come:
            self._loader.ask(held)

    def _out(self, held: Held) -> None:
        if held.state is State.ATTACHED:
            try:
                self.before()
                take(self.model, held.version.id)
            except Exception:  # somebody else had to do with it; the others come and go all the same
                log.exception("%s could not be taken off the model", held.version.names)
        self._counts["evictions"] += held.state in (State.LOADED, State.ATTACHED)
        held.ready = held.kept = None

    def _loaded(self, held: Held, found: tuple[Ready, Any] | None, seconds: float, error: Exception | None) -> None:
        """What the loader calls, in its thread."""
        with self._lock:
            self._load_seconds += seconds
            if found is not None:
                self._counts["loads"] += 1
                error = self._measured(held, *found)
            if error is not None:
                self._counts["failures"] += 1
                held.state, held.error, held.failed = State.FAILED, error, self._clock()
                log.warning("%s cannot be loaded: %s", held.version.names, error)
            self._look_again()
            self._let_in(attached=False)
        for call in self._listeners:
            try:
                call()
            except Exception:  # who listens is not to keep others waiting for ever
                log.exception("a listener failed")

    def _measured(self, held: Held, made: Ready, kept: Any) -> Exception | None:
        """Takes in what was read, by what it really takes; where that is more than there is room for now it waits anew.
        The error where it never fits."""
        version = held.version
        held.bytes = made.nbytes + sum(source.form.beside for _, source in version.terms)
        if version.plain:
            version.terms[0][1].form.bytes = held.bytes  # others of its form will ask for so much
        try:
            self._catalog.check_fits(held.bytes, version.names, {source for _, source in version.terms})
        except ValueError as error:
            return error
        if self._room.bytes > self._room.budget:
            held.state = State.WAITING
        else:
            held.state, held.ready, held.kept = State.LOADED, made, kept
        return None

    def _attach(self, held: Held, made: Ready) -> None:
        began = time.perf_counter()
        self.before()
        try:
            put(self.model, made, held.version.id, self._room.budget)
        except Exception as error:
            with self._lock:
                held.users, held.state, held.error, held.failed = 0, State.FAILED, error, self._clock()
                self._look_again()
            raise Broken(told(held.version, error)) from error
        with self._lock:
            held.state = State.ATTACHED
            self._attach_seconds += time.perf_counter() - began

    def _described(self, source: Source) -> Described:
        held, form = self._room.held.get(source.version.id), source.form
        state = "registered" if held is None else "in use" if held.users else held.state.value
        return Described(
            source.name, source.version.id, source.digest, form.method, form.rank, form.bytes,
            "loaded" if state == "attached" else state, source.pinned, source.hits, source.misses,
        )  # fmt: skip
