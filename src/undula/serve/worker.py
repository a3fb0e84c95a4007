"""The thread of an encoder: what waits becomes batches, and each of these one pass of the body."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..host.host import select
from ..host.mixing import rows
from ..host.modules import Split, own_modules
from . import padded
from .heads import Body, Worn
from .owners import begin
from .request import Busy, Cancelled, Draining, Failed, Part

log = logging.getLogger(__name__)


class Holds(Protocol):
    """What holds the adapters: a `Pool` with a `Body` for its heads."""

    def kept(self, version: Any) -> Worn: ...

    def version(self, parts: Sequence[Part]) -> Any: ...

    def acquire(self, version: Any) -> str | None: ...

    def release(self, version: Any) -> None: ...


@dataclass(frozen=True)
class Room:
    """places: tokens (of images: rows) of a batch, those that pad it among them.  waiting: rows that may wait."""

    places: int = 8192
    waiting: int = 4096


@dataclass(frozen=True)
class Stats:
    """What an encoder has done so far, and what waits."""

    waiting: int = 0
    rows: int = 0
    tokens: int = 0
    batches: int = 0
    seconds: float = 0.0  # of computing


@dataclass(eq=False)
class Job:
    """Rows of one who asks; without inputs the wish to have the adapter there."""

    version: Any
    worn: Worn | None = None
    inputs: dict[str, Tensor] | None = None
    head: bool = False  # whether the head's output is asked for, or the body's
    done: Future[Any] = field(default_factory=Future)
    name: str | None = None  # under which the adapter is attached, once it is acquired

    def __post_init__(self) -> None:
        self.rows = 0 if self.inputs is None else len(next(iter(self.inputs.values())))
        self.width = 1 if self.inputs is None else padded.width(self.inputs)
        self.processor = None if self.worn is None else self.worn.processor
        self.kind = None if self.inputs is None else padded.kind(self.inputs, self.processor)


class Worker:
    """Computes what several threads ask for, with the adapters that it acquires for them."""

    def __init__(self, body: Body, held: Holds, room: Room):
        self.body, self.held, self.room = body, held, room
        self.known: WeakValueDictionary[str, Worn] = WeakValueDictionary()  # of what is there, by version
        self._waiting: list[Job] = []
        self._ready = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._draining = self._stopped = False
        self._rows = self._tokens = self._batches = 0
        self._seconds = 0.0

    def result(self, job: Job) -> Any:
        """What comes of a job: the rows' outputs, or without inputs what its adapter is.  Raises Draining or Busy, and
        whatever its adapter or its rows make the models raise."""
        with self._ready:
            if self._draining or self._stopped or self._thread is None:
                raise Draining("the encoder takes no requests: it is stopping, or was not started")
            waiting = sum(j.rows for j in self._waiting)
            if waiting and waiting + job.rows > self.room.waiting:
                raise Busy(f"{waiting} rows wait already, and {self.room.waiting} may", self._estimate(waiting))
            self._waiting.append(job)
            self._ready.notify_all()
        return job.done.result()

    def _estimate(self, waiting: int) -> float:
        return max(1.0, self._seconds / max(self._rows, 1) * waiting)

    def stats(self) -> Stats:
        """What has been done so far."""
        with self._ready:
            return Stats(sum(j.rows for j in self._waiting), self._rows, self._tokens, self._batches, self._seconds)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread that computes.  Raises RuntimeError where another computes with the body."""
        if self._thread is None:
            self._draining = self._stopped = False
            thread = threading.Thread(target=self._run, name="undula-encoder", daemon=True)
            begin(self.body.model, thread)
            self._thread = thread

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new rows; waits until those that wait are answered.  Returns whether they are."""
        with self._ready:
            self._draining = True
            return self._ready.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def stop(self) -> None:
        """At once: what waits is cancelled."""
        with self._ready:
            self._stopped = True
            self._ready.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for job in self._waiting:
            job.done.set_exception(Cancelled("the encoder was stopped"))
        self._waiting.clear()

    def _run(self) -> None:
        try:
            self._answer()
        except BaseException as error:  # nobody is to wait for ever
            log.critical("the encoder's thread has died", exc_info=error)
            with self._ready:
                self._stopped = True
                lost, self._waiting = self._waiting, []
                self._ready.notify_all()
            for job in lost:
                if not job.done.done():
                    job.done.set_exception(
                        Failed(f"the encoder's thread has died ({type(error).__name__}): it has to be started anew")
                    )

    def _answer(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                waiting = list(self._waiting)
                self._busy = True
            began = time.perf_counter()
            taken, answered = self._chosen(waiting)
            if taken:
                self._compute(taken)
            with self._ready:
                gone = {id(job) for job in (*taken, *answered)}
                self._waiting = [job for job in self._waiting if id(job) not in gone]
                self._rows += sum(job.rows for job in taken)
                self._tokens += sum(job.rows * job.width for job in taken)
                self._batches += bool(taken)
                self._seconds += time.perf_counter() - began if taken else 0.0
                self._busy = False
                self._ready.notify_all()
                if not gone and not self._stopped:
                    self._ready.wait(0.002)  # until an adapter has been read

    def _chosen(self, waiting: Sequence[Job]) -> tuple[list[Job], list[Job]]:
        """(jobs for one batch, jobs that are answered already): the oldest whose adapter is there, and those behind it
        that go with it without more padding than rows.  What it takes it has acquired."""
        taken, answered = list[Job](), list[Job]()
        for job in waiting:
            if taken and job.inputs is not None and not self._goes(taken, job):
                continue
            try:
                job.name = None if job.version is None else self.held.acquire(job.version)
            except Exception as error:  # of this adapter alone: a broken file, one that does not fit
                job.done.set_exception(error)
                answered.append(job)
                continue
            if job.version is not None and job.name is None:
                continue
            if job.inputs is not None:
                taken.append(job)
                continue
            self.known[job.version.id] = worn = self.held.kept(job.version)
            job.done.set_result(worn)
            self.held.release(job.version)
            answered.append(job)
        return taken, answered

    def _goes(self, taken: Sequence[Job], job: Job) -> bool:
        first = taken[0]
        if job.kind != first.kind or ((_alone(first) or _alone(job)) and job.version is not first.version):
            return False
        every = [*taken, job]
        places = sum(j.rows for j in every) * max(j.width for j in every)
        return places <= min(self.room.places, 2 * sum(j.rows * j.width for j in every))

    def _compute(self, jobs: list[Job]) -> None:
        try:
            jobs.sort(key=lambda j: (str(getattr(j.version, "id", "")), j.head))
            for job, found in zip(jobs, self._forward(jobs), strict=True):
                job.done.set_result(found)
        except Exception as error:  # one of several may be at fault: each gets its own
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
            else:
                for job in jobs:
                    self._compute([job])
                return
        for job in jobs:
            if job.version is not None:
                self.held.release(job.version)

    @torch.no_grad()
    def _forward(self, jobs: Sequence[Job]) -> Iterator[Tensor]:
        """What each asked for, computed in one pass of the body and one of each head."""
        processor = jobs[0].processor
        inputs = padded.together([job.inputs for job in jobs if job.inputs is not None], processor)
        groups = _groups(jobs)
        inner: dict[str, Split] = {}
        for part, _, worn, _ in groups:
            for path, module in worn.inner.items():
                inner.setdefault(path, []).append((part, module))
        with self._routed(jobs), own_modules(self.body.model, inner):
            out = self.body.model(**inputs)
        found: list[Tensor] = []
        for part, members, worn, head in groups:
            mine = _sliced(out, part)
            result = mine.last_hidden_state
            if head:
                assert worn.head is not None
                worn.head._modules[self.body.prefix.removesuffix(".")].output = mine  # type: ignore[union-attr]
                answer = worn.head(**{name: t[part] for name, t in inputs.items()})
                result = answer.logits
            tokenwise = "input_ids" in inputs and (not head or type(answer).__name__ == "TokenClassifierOutput")
            for job, one in zip(members, result.split([j.rows for j in members]), strict=True):
                found.append(padded.cut(one, job.width, processor) if tokenwise else one)
        return iter(found)

    @contextlib.contextmanager
    def _routed(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Within, each row goes through its adapter."""
        names = [job.name for job in jobs for _ in range(job.rows)]
        if any(names) and _alone(jobs[0]):
            select(self.body.model, names[0])
            try:
                yield
            finally:
                select(self.body.model, None)
        else:  # also rows of the base alone, which no selected adapter is to see
            with rows(self.body.model, names):
                yield


def _alone(job: Job) -> bool:
    return job.worn is not None and job.worn.alone


def _groups(jobs: Sequence[Job]) -> list[tuple[slice, list[Job], Worn, bool]]:
    """(their rows, the jobs, what their adapter is, whether its head is asked) of neighbours alike."""
    found: list[tuple[slice, list[Job], Worn, bool]] = []
    at = 0
    for job in jobs:
        assert job.worn is not None
        if found and found[-1][1][0].version is job.version and found[-1][3] == job.head:
            before, members, worn, head = found.pop()
            found.append((slice(before.start, at + job.rows), [*members, job], worn, head))
        else:
            found.append((slice(at, at + job.rows), [job], job.worn, job.head))
        at += job.rows
    return found


def _sliced(out: Any, part: slice) -> Any:
    """Some rows of a model's output."""
    count = len(out.last_hidden_state)
    kept = {k: v[part] if isinstance(v, Tensor) and v.shape[:1] == (count,) else None for k, v in out.items()}
    return type(out)(**kept)
