"""Embeddings and classes from encoders: one body, many adapters, each with its own head, in one batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.extras import needs
from ..train.asking import Question, medium_asked, question
from ..train.tasks.classification import Classification
from ..train.tasks.heads import HeadTask
from ..train.tasks.limits import UNLIMITED
from ..train.tasks.sentences import BEHIND, embedded
from ..train.tasks.similarity import Similarity
from .heads import Body, Worn
from .request import Part, Refused
from .worker import Holds, Job, Room, Stats, Worker

Text = str | Sequence[int]  # tokens, where it is no text


class Port(nn.Module):
    """In the place of the model of one adapter, for its task: a batch goes to the encoder's thread."""

    def __init__(self, computed: Callable[[Job], Tensor], version: Any, worn: Worn, head: bool, device: torch.device):
        super().__init__()
        self.computed, self.version, self.head, self.device = computed, version, head, device
        self.__dict__["worn"] = worn
        self.eval()

    def forward(self, **inputs: Tensor) -> Any:
        found = self.computed(Job(self.version, self.__dict__["worn"], inputs, self.head))
        return SimpleNamespace(logits=found) if self.head else (found,)


class Encoder:
    """Answers many threads with one body: what they ask at a time becomes one batch, in which each row goes through its
    adapter and its adapter's head.  An answer is that of `undula.load(DIRECTORY).predict` for the same row.

    One thread computes; `start` it, or use `with encoder:`.  The methods may be called from any other.
    """

    def __init__(self, body: Body, held: Holds, room: Room | None = None):
        self.body, self.held = body, held
        self.worker = Worker(body, held, room or Room())
        self.model_name = body.source
        self._base = Lazy(body.shared)
        self._turn = threading.Lock()  # a tokenizer is for one thread at a time

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
            port = Port(self._computed, version, worn, False, self.body.model.device)
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
            _check_answers(worn)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"a list is answered, a row each; found {type(given).__name__}")
            if medium_asked(worn.task) is not None and not all(isinstance(one, bytes) for one in given):
                raise TypeError(f"{type(worn.task).__name__} takes the bytes of files, no names of them")
            with self._turn:
                asked = question(worn.task, list(given), worn.roles)
            return list(self.answers(version, worn, asked, batch))

    def answers(self, version: Any, worn: Worn, asked: Question, batch: int = 32) -> Iterator[dict[str, Any]]:
        """The answers to rows that have been read, one by one."""
        _check_answers(worn)
        port = Port(self._computed, version, worn, isinstance(worn.task, HeadTask), self.body.model.device)
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
                    ids = (
                        task.example({"text": text}, reader)["input_ids"][0]
                        if cut
                        else reader(text, verbose=False)["input_ids"]
                    )
            else:
                ids = list(text)
                if not ids or not all(isinstance(i, int) and 0 <= i < (size or i + 1) for i in ids):
                    raise ValueError(f"text {number}: tokens are numbers from 0 to {(size or 0) - 1}, one or more")
            if len(ids) > most:
                raise ValueError(f"text {number} has {len(ids)} tokens, and {most} is what is embedded at most")
            found.append(ids)
        return found

    def count(self, given: Sequence[Any]) -> int:
        """How many tokens texts, pairs or lists of tokens have in all, by the base's tokenizer; how many images."""
        if self.body.model.main_input_name != "input_ids":
            return len(given)
        reader = self.body.processor(Classification(), None)
        with self._turn:
            every = [one if isinstance(one, list) and one and isinstance(one[0], int) else _said(one) for one in given]
            return sum(len(one if isinstance(one, list) else reader(one, verbose=False)["input_ids"]) for one in every)

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return self.body.limit() or UNLIMITED

    def _asked(self, adapters: Sequence[Part]) -> tuple[Any, Worn]:
        """What the names mean now, there and ready."""
        version = self.held.version(adapters)
        if version is None:
            return None, self._base()
        return version, self.worker.known.get(version.id) or self.worker.result(Job(version))

    @needs("similarity")
    def _reader(self, worn: Worn) -> Any:
        """The tokenizer of texts to embed."""
        if worn.processor is None:
            return self.body.processor(Similarity(), None)
        medium = medium_asked(worn.task)
        if medium is not None:
            raise ValueError(f"{type(worn.task).__name__} is asked with {medium.called}, not with texts")
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
            found: Tensor = self.worker.result(job)
            return found
        finally:
            self._turn.acquire()

    # Running

    def start(self) -> None:
        """Starts the thread that computes."""
        self.worker.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new rows; waits until those that wait are answered.  Returns whether they are."""
        return self.worker.drain(timeout)

    def stop(self) -> None:
        """At once: what waits is cancelled."""
        self.worker.stop()

    def stats(self) -> Stats:
        """What has been done so far."""
        return self.worker.stats()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self.worker.alive

    def __enter__(self) -> Encoder:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class Lazy:
    """Made when it is first asked for, by one thread."""

    def __init__(self, make: Callable[[], Worn]):
        self._make, self._lock, self._made = make, threading.Lock(), list[Worn]()

    def __call__(self) -> Worn:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def _check_answers(worn: Worn) -> None:
    """Raises ValueError for a task that answers no rows."""
    if not isinstance(worn.task, HeadTask | Similarity):
        raise ValueError(
            f"what is asked has no head of a task that undula has ({worn.task.peft or 'no task type'}): ask for "
            "embeddings, or name an adapter that classifies"
        )


def _said(one: Any) -> str:
    """The text of a row."""
    values = one.values() if isinstance(one, Mapping) else one
    return one if isinstance(one, str) else " ".join(str(v) for v in values)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a request is refused."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise Refused(str(error)) from error
