"""What an engine's one thread does: admits requests, computes steps, and ends requests one way or another."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState

from .admission import Admission
from .copies import Copies
from .jobs import Job, Limits
from .policy import Policy, Ticket
from .prefixes import cache_of, tokens_that_fit
from .request import Broken, Busy, Failed, Late, Refused
from .sampling import choose
from .steps import Model, Turns

AHEAD = 8  # of those who wait, whose adapters are read before their turn comes
log = logging.getLogger(__name__)


class Work:
    """The requests that one thread computes, waiting and running, on one model and one cache."""

    def __init__(self, model: Any, pool: Any, policy: Policy, limits: Limits):
        self.model, self.pool, self.policy, self.limits = Model(model), pool, policy, limits
        tokens = max(tokens_that_fit(model, limits.cache), limits.page)
        self.cache = cache_of(model, tokens, limits.page, limits.batch_tokens, limits.running)
        self.model.check(self.cache)
        self.admission = Admission(self.cache.num_blocks * limits.page, limits.waiting, limits.page)
        pool.before = self.model.leave
        self.copies = Copies(model, limits.copies, self.model.leave)
        self.turns = Turns(self.cache, 0.0, limits.running)
        # what a window has overwritten cannot be computed again
        self.again = all(kind.supports_block_sharing for kind in self.cache.cache_allocators.values())
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, Job] = {}
        self.counts = dict.fromkeys(("finished", "refused", "prompt_tokens", "cached_tokens", "completion_tokens",
                                     "steps"), 0)  # fmt: skip
        self.seconds = 0.0
        self.complained: set[str] = set()

    def turn(self) -> bool:
        """Admits who may come in and computes one step.  Whether anything was computed."""
        now = time.monotonic()
        for job in [job for job in (*self.waiting.values(), *self.running.values()) if job.late(now)]:
            waited = now - job.reply.request.arrived
            self.fail(job, Late(f"the first token did not come within {waited:.2f} s: try again later", 1.0))
        if self.waiting and len(self.running) < self.limits.running:
            self._admit(now)
        for job in list(itertools.islice(self.waiting.values(), AHEAD)):
            if job.version is not None:
                self._loading(job, self.pool.prefetch)
        if not self.running:
            return False
        self._step()
        self.counts["steps"] += 1
        self.seconds += time.monotonic() - now
        return True

    # -- admission

    def _admit(self, now: float) -> None:
        """Lets waiting requests in, in the policy's order.  For memory nobody is overtaken; whose adapter is still
        being read is passed by."""
        speed = self.limits.batch_tokens - self.limits.running  # tokens of prompts that each step reads at least
        unread, claims = 0, []
        for job in self.running.values():
            unread += job.unread
            claims.append(job.claim(-(-unread // speed) if job.unread else 0))
        running = [job.ticket for job in self.running.values()]
        for ticket in self._ordered(running, now):
            job = self.waiting[ticket.id]
            claim = job.claim(-(-(unread + job.unread) // speed))
            if len(self.running) >= self.limits.running or not self.admission.fits(claims, claim):
                break
            if job.version is not None:
                job.name = self._loading(job, self.pool.acquire)
                if job.name is None:
                    continue
            unread += job.unread
            claims.append(claim)
            self.running[job.id] = self.waiting.pop(job.id)
            self.cache.salts[job.id] = job.version.id if job.version is not None else ""
            self.turns.add_waiting_request(job.state)
            if job.name is not None:
                try:
                    self.copies.use(job.name, {each.name for each in self.running.values()})
                except Exception:  # it is computed without, slower
                    log.exception("no private copy could be made")
            job.used(waited=now - job.reply.request.arrived)

    def _ordered(self, running: list[Ticket], now: float) -> list[Ticket]:
        """Those who wait in the policy's order: as they came where it fails, or names others than those who wait."""
        waiting = [self._ticket(job) for job in self.waiting.values()]
        try:
            order = list(self.policy.order(list(waiting), running, now))
            if sorted(t.id for t in order) == sorted(t.id for t in waiting):
                return order
            said = f"it ordered {len(order)} requests, not the {len(waiting)} that wait"
        except Exception as error:
            said = repr(error)
        self._complain(f"order failed: {said}; requests are admitted as they came")
        return sorted(waiting, key=lambda t: t.arrived)

    def _complain(self, said: str) -> None:
        """Logs what a policy did, each thing once."""
        if said not in self.complained and len(self.complained) < 16:
            self.complained.add(said)
            log.error("the policy %s: %s", type(self.policy).__name__, said)

    def _charge(self, job: Job, tokens: int) -> None:
        try:
            self.policy.charge(job.ticket, tokens)
        except Exception as error:
            self._complain(f"charge failed: {error!r}")

    def _loading(self, job: Job, ask: Callable[[Any], str | None]) -> str | None:
        """What the pool says of a request's adapter; an error of that ends the request."""
        try:
            return ask(job.version)
        except Refused as error:
            self.fail(job, error)
        except Exception as error:
            log.exception("an adapter could not be loaded")
            self.fail(job, Broken(f"the adapter could not be loaded ({type(error).__name__})"))
        return None

    def _ticket(self, job: Job) -> Ticket:
        """A request as the policy sees it now: nothing is to be loaded for an adapter that is there."""
        there = job.version is not None and self.pool.there(job.version)
        return dataclasses.replace(job.ticket, bytes=0) if there else job.ticket

    # -- ends

    def fail(self, job: Job, error: Refused) -> None:
        """Ends a request with an error; its blocks are free at once."""
        self._out(job)
        self.counts["refused"] += 1
        job.reply.fail(error)

    def _out(self, job: Job) -> None:
        waited = self.waiting.pop(job.id, None) is not None and job.version is not None
        if waited and all(job.version is not other.version for other in self.waiting.values()):
            self.pool.withdraw(job.version)
        if self.running.pop(job.id, None) is not None:
            self.turns.forget(job.id)
            if job.version is not None:
                self.pool.release(job.version)
            if not self.running:
                self.model.leave()

    # -- a step

    def _step(self) -> None:
        found = self.turns.schedule_batch(self.limits.batch_tokens, self.cache.max_tokens_read)[0]
        if not found:  # windows of several sizes can leave room that none of them may take
            job = list(self.running.values())[-1]
            self.fail(job, Busy("the cache is full", 1.0))
            return
        # those of one adapter stand together: one product for all of them
        groups = [sorted(found, key=lambda f: self.running[f.state.request_id].name or "")]
        while groups:
            group = groups.pop()
            jobs = [self.running[f.state.request_id] for f in group]
            try:
                logits = self._forward(group, jobs)
            except Exception as error:
                log.exception("a step failed")
                groups += self._fewer(group, jobs, error)
                continue
            self._advance(group, jobs, logits)

    def _forward(self, group: list[FutureRequestState], jobs: list[Job]) -> Tensor:
        for job in jobs:
            if not job.begun:
                job.begun, cached = True, job.state.position_offset
                job.used(cached_tokens=cached)
                self.counts["prompt_tokens"] += len(job.reply.request.prompt)
                self.counts["cached_tokens"] += cached
        return self.model.forward(self.cache, group, [job.name for job in jobs])

    def _fewer(
        self, group: list[FutureRequestState], jobs: list[Job], error: Exception
    ) -> list[list[FutureRequestState]]:
        """Smaller groups to compute after an error of this one: each adapter's own, and fewer where memory was short;
        without any its requests end with the error."""
        names = list(dict.fromkeys(job.name for job in jobs))
        if self.again and len(names) > 1:
            return [[f for f, job in zip(group, jobs, strict=True) if job.name == name] for name in names]
        if self.again and len(group) > 1 and _memory(error):
            return [group[: len(group) // 2], group[len(group) // 2 :]]
        for job in jobs:
            self.fail(job, _refusal(error, job))
        return []

    def _advance(self, group: list[FutureRequestState], jobs: list[Job], logits: Tensor) -> None:
        """What follows from a step's logits, of those requests that have a next token."""
        for f, job in zip(group, jobs, strict=True):
            f.state.position_offset += f.query_length
            self._charge(job, f.query_length)
        writing = [job for f, job in zip(group, jobs, strict=True) if f.has_new_token]
        chosen = dict(zip(map(id, writing), choose(logits, [job.drawing for job in writing]), strict=True))
        for f, job in zip(group, jobs, strict=True):
            token = chosen.get(id(job))
            try:
                if f.has_new_token and token is None:
                    raise Broken("the model's numbers are not finite" + (", with this adapter" if job.name else ""))
                self.cache.mark_complete_blocks(f.state, f.complete_blocks)
                finish = job.took(token) if token is not None else None
            except Exception as error:
                log.exception("a request failed")
                self.fail(job, _refusal(error, job))
                continue
            self.counts["completion_tokens"] += token is not None
            if finish:
                self._out(job)
                self.admission.ended(job.ticket.tokens, time.monotonic())
                self.counts["finished"] += 1


def _memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)


def _refusal(error: Exception, job: Job) -> Refused:
    """What the asker hears of an error: nothing of its text, which may hold paths."""
    if isinstance(error, Refused):
        return error
    kind = type(error).__name__
    if _memory(error):
        return Busy(f"there was not enough memory for this request ({kind})", 5.0)
    return Broken(f"the adapter could not be computed with ({kind})") if job.name else Failed(f"a step failed ({kind})")
