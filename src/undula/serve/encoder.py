"""Embeddings and classes from encoders: one body, many adapters, each with its own head, in one batch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.extras import needs
from ..host.host import select
from ..host.mixing import rows
from ..train.asking import Question, medium_asked, question
from ..train.tasks.heads import HeadTask
from ..train.tasks.limits import UNLIMITED
from ..train.tasks.sentences import BEHIND, embedded
from ..train.tasks.similarity import Similarity
from . import padded
from .heads import Body, Split, Worn, own_modules
from .request import Busy, Cancelled, Draining, Part, Refused

Text = str | Sequence[int]  # tokens, where it is no text


class Holds(Protocol):
    """What holds the adapters: a `Pool`, or `Hung`."""

    def worn(self, version: Any) -> Worn: ...

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


class Port(nn.Module):
    """In the place of the model of one adapter, for its task: a batch goes to the encoder's thread."""

    def __init__(self, encoder: Encoder, version: Any, worn: Worn, head: bool):
        super().__init__()
        vars(self).update(encoder=encoder, version=version, worn=worn, head=head, device=encoder.body.model.device)
        self.eval()

    def forward(self, **inputs: Tensor) -> Any:
        found = self.encoder._computed(Job(self.version, self.worn, inputs, self.head))
        return SimpleNamespace(logits=found) if self.head else (found,)


class Encoder:
    """Answers many threads with one body: what they ask at a time becomes one batch, in which each row goes through its
    adapter and its adapter's head.  An answer is that of `undula.load(DIRECTORY).predict` for the same row.

    One thread computes; `start` it, or use `with encoder:`.  The methods may be called from any other.
    """

    def __init__(self, body: Body, held: Holds, room: Room | None = None):
        self.body, self.held, self.room = body, held, room or Room()
        self.model_name = body.source
        self._base = Lazy(body.shared)
        self._waiting: list[Job] = []
        self._ready = threading.Condition()
        self._turn = threading.Lock()  # a tokenizer is for one thread at a time
        self._thread: threading.Thread | None = None
        self._busy = self._draining = self._stopped = False
        self._rows = self._tokens = self._batches = 0
        self._seconds = 0.0

    # Asking

    def embed(self, texts: Sequence[Text], adapters: Sequence[Part] = ()) -> list[list[float]]:
        """A vector for each text (or list of tokens), pooled as the base's folder says (modules.json of
        sentence-transformers; else the mean of its tokens), by the body with these adapters.

        Texts are cut where the adapter was trained on cut ones.  Raises Refused for an empty text, one that is too
        long, tokens that the model has not, and a base that makes no embeddings.
        """
        with _refusing():
            version, worn = self._asked(adapters)
            ids = self.tokens(texts, worn)
            port = Port(self, version, worn, False)
            port.__dict__[BEHIND] = self.body.behind()
            pad, found = self._reader(worn), []
            for start in range(0, len(ids), 32):
                with self._turn:
                    batch = pad.pad({"input_ids": ids[start : start + 32]}, return_tensors="pt")
                    with torch.no_grad():
                        found += embedded(port, batch.to(self.body.model.device)).cpu().tolist()
            return found

    def classify(self, given: Sequence[Any], adapters: Sequence[Part] = (), batch: int = 32) -> list[dict[str, Any]]:
        """What `predict` says of a list of texts, pairs (a, b) or {column: value}: {label, probability, probabilities},
        {labels, probabilities}, {value}, {entities} or {similarity}, by the adapter's own head and names.

        Raises Refused for rows that cannot be answered, with all that is wrong with them.
        """
        with _refusing():
            version, worn = self._asked(adapters)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"a list is answered, a row each; found {type(given).__name__}")
            if medium_asked(worn.task) is not None and not all(isinstance(one, bytes) for one in given):
                raise TypeError(f"{type(worn.task).__name__} takes the bytes of files, no names of them")
            with self._turn:
                asked = question(worn.task, list(given), worn.roles)
            return list(self.answers(version, worn, asked, batch))

    def answers(self, version: Any, worn: Worn, asked: Question, batch: int = 32) -> Iterator[dict[str, Any]]:
        """The answers to rows that have been read, one by one."""
        if not isinstance(worn.task, HeadTask | Similarity):
            raise ValueError(
                f"{worn.run.out.name} has no head of a task that undula has ({worn.task.peft or 'no task type'}): ask "
                "for embeddings, or name an adapter that classifies"
            )
        port = Port(self, version, worn, isinstance(worn.task, HeadTask))
        if isinstance(worn.task, Similarity):
            port.__dict__[BEHIND] = self.body.behind()
        made = worn.task.answers(port, asked.asked, worn.processor, batch)  # type: ignore[arg-type]
        while True:
            with self._turn:
                if (answer := next(made, None)) is None:
                    return
            yield answer

    def tokens(self, texts: Sequence[Text], worn: Worn | None = None) -> list[list[int]]:
        """The tokens that are embedded of each text.  Raises ValueError as `embed` refuses."""
        worn = self._base() if worn is None else worn
        if isinstance(texts, str) or not len(texts):
            raise ValueError("embeddings are of a list of texts, one or more")
        reader, task = self._reader(worn), worn.task
        most = min(self.body.limit() or UNLIMITED, reader.model_max_length)
        size, found = self.body.size, list[list[int]]()
        for number, text in enumerate(texts, 1):
            if isinstance(text, str):
                if not text.strip():
                    raise ValueError(f"text {number} is empty")
                with self._turn:
                    cut = isinstance(task, Similarity)
                    ids = task.example({"text": text}, reader)["input_ids"][0] if cut else reader(text, verbose=False)["input_ids"]
            else:
                ids = list(text)
                if not ids or not all(isinstance(i, int) and 0 <= i < (size or i + 1) for i in ids):
                    raise ValueError(f"text {number}: tokens are numbers from 0 to {(size or 0) - 1}, one or more")
            if len(ids) > most:
                raise ValueError(f"text {number} has {len(ids)} tokens, and {most} is what is embedded at most")
            found.append(ids)
        return found

    def stats(self) -> Stats:
        """What has been done so far."""
        with self._ready:
            return Stats(sum(j.rows for j in self._waiting), self._rows, self._tokens, self._batches, self._seconds)

    @property
    def max_length(self) -> int | None:
        """Tokens that a text may have."""
        return self.body.limit()

    def _asked(self, adapters: Sequence[Part]) -> tuple[Any, Worn]:
        """What the names mean now, there and ready."""
        version = self.held.version(adapters)
        return (None, self._base()) if version is None else (version, self._result(Job(version)))

    @needs("similarity")
    def _reader(self, worn: Worn) -> Any:
        """The tokenizer of texts to embed."""
        if worn.processor is None:
            return self.body.processor(Similarity(), None)
        if medium_asked(worn.task) is not None:
            raise ValueError(f"{type(worn.task).__name__} is asked with {medium_asked(worn.task).called}, not with texts")  # type: ignore[union-attr]
        self.body.behind()  # refuses a base without embeddings
        return worn.processor

    def _computed(self, job: Job) -> Tensor:
        """What comes of a batch; meanwhile other threads may use the tokenizer."""
        ids = (job.inputs or {}).get("input_ids")
        table, size = self.body.table, self.body.size
        if ids is not None and size is not None and ids.numel() and int(ids.max()) >= size:
            raise ValueError(f"a text has the token {int(ids.max())}, and the model knows {size} (0 to {size - 1})")
        if ids is not None and table is not None and job.width > table:
            raise ValueError(f"a text has {job.width} tokens, and the model has {table} positions: shorten it")
        self._turn.release()
        try:
            found: Tensor = self._result(job)
            return found
        finally:
            self._turn.acquire()

    def _result(self, job: Job) -> Any:
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

    # Running

    def start(self) -> None:
        """Starts the thread that computes."""
        if self._thread is None:
            self._draining = self._stopped = False
            self._thread = threading.Thread(target=self._run, name="undula-encoder", daemon=True)
            self._thread.start()

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

    def __enter__(self) -> Encoder:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _run(self) -> None:
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
            job.done.set_result(self.held.worn(job.version))
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
        if not any(names):
            yield
        elif _alone(jobs[0]):
            select(self.body.model, names[0])
            try:
                yield
            finally:
                select(self.body.model, None)
        else:
            with rows(self.body.model, names):
                yield


class Lazy:
    """Made when it is first asked for, by one thread."""

    def __init__(self, make: Callable[[], Worn]):
        self._make, self._lock, self._made = make, threading.Lock(), list[Worn]()

    def __call__(self) -> Worn:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


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


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a request is refused."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise Refused(str(error)) from error
