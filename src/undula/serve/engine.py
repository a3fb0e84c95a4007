"""The engine: one thread that owns a model and answers requests of many adapters in one batch."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path
from typing import Any

from .jobs import Job, Limits, Stats
from .owners import begin, check_free
from .policy import Fcfs, Policy, Ticket
from .replies import Reply
from .request import Cancelled, Draining, Exchanged, Failed, Refused, Request
from .sampling import Drawing, check, whole
from .steps import longest
from .words import Words
from .work import Work

log = logging.getLogger(__name__)

__all__ = ["Engine", "Limits", "Stats"]


class Engine:
    """Answers requests, each through its own adapters, many in one batch.

        with Engine(model, tokenizer, pool) as engine:
            print(engine.submit(Request(tokens, (Part("french"),))).text())

    While it runs the model is its thread's alone.  Any thread may submit; what a request may not have is refused at
    once, with numbers.  Raises ValueError for a model whose attention cannot be kept apart by request, RuntimeError for
    one that another engine computes with.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pool: Any, policy: Policy | None = None, limits: Limits | None = None
    ):
        check_free(model)
        self.limits = limits or Limits()
        said = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.model_name = Path(said).name if Path(said).is_dir() else said  # where it lies is nobody's business
        self.tokenizer, self.pool = tokenizer, pool
        self._work = Work(model.eval(), pool, policy or Fcfs(), self.limits)
        self.cache_tokens = self._work.admission.capacity - self.limits.page + 1  # that one request can be sure of
        self.max_length = min(longest(model), self.cache_tokens)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.ends = _ends(model, tokenizer)
        self._changed = threading.Condition()
        self._coming: list[Job] = []
        self._leaving: list[str] = []
        self._jobs: dict[str, Job] = {}  # all that are not done
        self._numbers = itertools.count(1)
        self._requests = self._used = 0
        self._draining = self._stopping = False
        self._error: Refused | None = None
        self._thread = threading.Thread(target=self._run, name="undula-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread that computes.  Raises RuntimeError where another engine computes with the model."""
        begin(self._work.model.model, self._thread)
        self.pool.listen(self._wake)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def submit(self, request: Request) -> Reply:
        """Takes a request, from any thread, and returns at once.

        Raises Refused for a prompt or settings that cannot be served, Unknown for an adapter that is not registered,
        Exchanged for one that is another than the prompt was made for, Busy where too many wait, Late where its
        deadline cannot be kept, Draining after `drain` or `stop`, Failed where the engine's thread has died.
        """
        self._check(request)
        version = self.pool.version(request.adapters) if request.adapters else None
        if request.made_for is not None and version is not None and version.id != request.made_for:
            raise Exchanged(f"{version.names} was exchanged for another while the prompt was written for it")
        tokens = len(request.prompt) + request.sampling.max_tokens
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._draining or self._stopping:
                raise Draining("this engine takes no new requests: it is stopping")
            waiting = len(self._coming) + len(self._work.waiting)
            ahead = sum(job.ticket.tokens for job in self._jobs.values())
            self._work.admission.check(tokens, waiting, ahead, request.deadline)
            ticket = Ticket(
                id=f"{request.id}/{next(self._numbers)}",
                adapter=version.id if version is not None else "",
                key=request.key,
                tokens=tokens,
                arrived=request.arrived,
                deadline=None if request.deadline is None else request.arrived + request.deadline,
                bytes=version.bytes if version is not None else 0,
            )
            job = Job(
                ticket,
                version,
                Reply(request, lambda: self._cancel(ticket.id)),
                Drawing(request.sampling, request.prompt),
                Words(self.tokenizer, request.sampling.stop),
                self.ends,
            )
            self._jobs[ticket.id] = job
            self._requests += 1
            self._coming.append(job)
            self._changed.notify_all()
        return job.reply

    @property
    def alive(self) -> bool:
        """Whether it computes: it was started, and neither stopped nor died."""
        return self._thread.is_alive() and self._error is None and not self._stopping

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new requests and waits until those that are here are done.  Whether they are."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    def stop(self) -> None:
        """Ends at once: requests that are not done end with Cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._end_all(Cancelled("the engine was stopped"))

    def stats(self) -> Stats:
        """How it stands, from any thread: cheap."""
        work = self._work
        return Stats(
            waiting=len(self._coming) + len(work.waiting),
            running=len(work.running),
            requests=self._requests,
            step_seconds=work.seconds,
            cache_used=self._used,
            cache_total=work.cache.num_sectors * work.cache.bytes_per_sector,
            **work.counts,
        )

    # -- within

    def _check(self, request: Request) -> None:
        """Raises Refused for what can never be served."""
        count, sampling = len(request.prompt), request.sampling
        if not count:
            raise Refused("the prompt is empty: it needs a token at least")
        check(sampling, self.vocabulary)
        if odd := [t for t in request.prompt if not whole(t)]:
            raise Refused(f"the prompt is of whole numbers, its tokens; found {odd[0]!r:.40}")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.vocabulary:
            raise Refused(f"the prompt has tokens that the model does not: its go from 0 to {self.vocabulary - 1}")
        if count + sampling.max_tokens > self.max_length:
            raise Refused(
                f"the prompt has {count} tokens and max_tokens is {sampling.max_tokens}, {count + sampling.max_tokens} "
                f"together: at most {self.max_length} go into "
                + ("the cache" if self.max_length == self.cache_tokens else "the model's context")
            )

    def _cancel(self, name: str) -> None:
        with self._changed:
            self._leaving.append(name)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._take():
                self._work.turn()
                self._used = self._work.cache.used()
                self._forget_done()
            self._end_all(Cancelled("the engine was stopped"))
        except BaseException as error:
            with self._changed:
                self._error = Failed(
                    f"the engine's thread has died ({type(error).__name__}): it has to be started anew"
                )
            self._end_all(self._error)
            log.critical("the engine's thread has died", exc_info=error)
        finally:
            self._work.model.leave()

    def _take(self) -> bool:
        """Waits until there is something to do and takes in what came.  Whether to go on."""
        work = self._work
        with self._changed:
            if not (self._stopping or self._coming or self._leaving or work.running):
                if not work.waiting:
                    work.admission.rested()
                # who waits for an adapter or a deadline is looked at again soon
                self._changed.wait(0.02 if work.waiting else None)
            coming, self._coming, leaving, self._leaving = self._coming, [], self._leaving, []
        for job in coming:
            work.waiting[job.id] = job
        for name in leaving:
            gone = self._jobs.get(name)
            if gone is not None and not gone.reply.done:
                work.fail(gone, Cancelled("cancelled by who asked"))
        if leaving:
            self._forget_done()
        return not self._stopping

    def _forget_done(self) -> None:
        with self._changed:
            done = [name for name, job in self._jobs.items() if job.reply.done]
            for name in done:
                del self._jobs[name]
            if done:
                self._changed.notify_all()

    def _end_all(self, error: Refused) -> None:
        with self._changed:
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._changed.notify_all()
        for job in jobs:
            job.reply.fail(error)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, as the model's generation settings and the tokenizer say."""
    found: set[int] = set()
    for said in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        found.update(said if isinstance(said, (list, tuple)) else [] if said is None else [said])
    return frozenset(found)
