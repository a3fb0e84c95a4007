"""A server in virtual time: requests arrive, wait in the order of a policy, are admitted and computed in steps.

What decides is the library's own: `Policy`, `Admission`, and `Room` for the adapters that fit into memory.  What takes
time is a formula (`Machine`), so that hours of load pass in seconds, the same each time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from undula.serve.admission import Admission, Claim
from undula.serve.policy import Policy, Ticket
from undula.serve.request import Refused
from undula.serve.room import Held, Room, State


@dataclass(frozen=True)
class Machine:
    """Seconds that things take, and what there is room for."""

    step: float = 0.05
    token: float = 0.002
    adapter: float = 0.002  # each that is in a step
    load: float = 0.1  # reading one adapter; one at a time
    adapters: int = 16  # in memory
    cache: int = 16384  # tokens
    running: int = 32  # requests
    batch: int = 128  # tokens in one step

    def seconds(self, tokens: int, adapters: int) -> float:
        return self.step + self.token * tokens + self.adapter * adapters


@dataclass(frozen=True)
class Arrival:
    """A request: `writes` of the tokens that it may write it really does."""

    ticket: Ticket
    prompt: int
    writes: int


@dataclass(eq=False)
class Job:
    arrival: Arrival
    admitted: float
    read: int = 0
    written: int = 0
    first: float = math.inf
    done: float = math.inf

    @property
    def most(self) -> int:
        return self.arrival.ticket.tokens - self.arrival.prompt

    def claim(self, delay: int) -> Claim:
        if self.read < self.arrival.prompt:
            return Claim(self.arrival.prompt, self.most, delay)
        return Claim(self.arrival.prompt + self.written, self.most - self.written)


@dataclass
class Course:
    """What became of the requests."""

    jobs: dict[str, Job] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    charges: list[tuple[float, str, str, int]] = field(default_factory=list)  # (when, key, adapter, tokens)
    backlog: list[tuple[float, frozenset[str]]] = field(default_factory=list)  # (when, the keys that waited)
    loads: int = 0
    most_running: int = 0  # tokens that those who ran at a time had asked for
    most_cached: int = 0  # tokens
    end: float = 0.0

    def wait(self, key: str | None = None) -> list[float]:
        """Seconds from arrival to the first token, sorted."""
        chosen = (j for j in self.jobs.values() if key is None or j.arrival.ticket.key == key)
        return sorted(j.first - j.arrival.ticket.arrived for j in chosen)

    def overtaken(self) -> float:
        """The most seconds by which a request that was admitted earlier had arrived later than another."""
        latest = most = 0.0
        for job in sorted(self.jobs.values(), key=lambda j: (j.admitted, j.arrival.ticket.arrived)):
            most = max(most, latest - job.arrival.ticket.arrived)
            latest = max(latest, job.arrival.ticket.arrived)
        return most

    def service(self, key: str) -> list[tuple[float, int]]:
        """(when, tokens computed for this key so far)."""
        total, found = 0, []
        for when, who, _, tokens in self.charges:
            if who == key:
                total += tokens
                found.append((when, total))
        return found


def quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(q * len(values)))]


class Adapters:
    """What `Pool` does, without adapters: reading takes `load` seconds, one after the other."""

    def __init__(self, machine: Machine, patience: float):
        self.room = Room(machine.adapters, patience, lapse=10.0)
        self.load, self.loading, self.free = machine.load, [], 0.0  # when the reader has nothing to do any more
        self.loads, self.looked = 0, -1.0

    def warm(self, names: Iterable[str]) -> None:
        """These are in memory from the beginning."""
        for name in names:
            self.held(name, 0.0).state = State.LOADED

    def held(self, name: str, now: float) -> Held:
        if name not in self.room.held:
            version = SimpleNamespace(id=name, bytes=1, terms=(), plain=False)
            self.room.held[name] = Held(version, now)
            self.looked = -1.0
        return self.room.held[name]

    def acquire(self, name: str, now: float) -> bool:
        held = self.held(name, now)
        held.seen = now
        ready = held.state in (State.LOADED, State.ATTACHED) and name not in self.room.ending
        held.users += ready
        held.claimed = None if ready else now
        self.let_in(now)
        if ready:
            held.use(now)
        return ready

    def let_in(self, now: float) -> None:
        if self.looked == now:  # nothing has changed since
            return
        self.looked = now
        for held in self.room.stale(now):
            self.room.drop(held)
        for held in self.room.grant(now, True)[0]:
            self.free = max(self.free, now) + self.load
            self.loading.append((self.free, held))
            self.loads += 1

    def release(self, name: str, now: float) -> None:
        self.room.held[name].users -= 1
        self.looked = -1.0
        self.let_in(now)

    def arrive(self, now: float) -> None:
        """What is read by now is in memory."""
        for when, held in self.loading:
            if when <= now:
                held.state = State.LOADED
        self.loading = [(when, held) for when, held in self.loading if when > now]


class Server:
    """One engine in virtual time."""

    def __init__(self, policy: Policy, machine: Machine, queue: int = 10**6, patience: float = 2.0):
        self.policy, self.machine = policy, machine
        self.adapters, self.admission = Adapters(machine, patience), Admission(machine.cache, queue)
        self.now, self.waiting, self.running, self.course = 0.0, {}, [], Course()

    def run(self, arrivals: Iterable[Arrival]) -> Course:
        """Until all of them are done or refused."""
        coming = sorted(arrivals, key=lambda a: -a.ticket.arrived)
        while coming or self.waiting or self.running:
            if not (self.waiting or self.running):
                self.admission.rested()
                self.now = max(self.now, coming[-1].ticket.arrived)
            while coming and coming[-1].ticket.arrived <= self.now:
                self.take(coming.pop())
            self.adapters.arrive(self.now)
            self.admit()
            if self.running:
                self.compute()
            elif self.waiting:  # for an adapter
                self.now += 0.01
        self.course.loads, self.course.end = self.adapters.loads, self.now
        return self.course

    def take(self, arrival: Arrival) -> None:
        t = arrival.ticket
        ahead = sum(a.ticket.tokens for a in self.waiting.values())
        ahead += sum(j.arrival.ticket.tokens - j.read - j.written for j in self.running)
        deadline = None if t.deadline is None else t.deadline - self.now
        try:
            self.admission.check(t.tokens, len(self.waiting), ahead, deadline)
        except Refused as refused:
            self.course.refused[t.id] = refused
        else:
            self.waiting[t.id] = arrival

    def tickets(self) -> list[Ticket]:
        there = {name for name, held in self.adapters.room.held.items() if held.inside}
        waiting = [a.ticket for a in self.waiting.values()]
        return [replace(t, bytes=0) if t.bytes and t.adapter in there else t for t in waiting]

    def admit(self) -> None:
        """From the front of the policy's order; for memory nobody is overtaken, who waits for an adapter is."""
        if not self.waiting:
            return
        self.course.backlog.append((self.now, frozenset(a.ticket.key for a in self.waiting.values())))
        for ticket in self.policy.order(self.tickets(), [j.arrival.ticket for j in self.running], self.now):
            arrival = self.waiting[ticket.id]
            job = Job(arrival, self.now)
            if len(self.running) >= self.machine.running:
                return
            if ticket.adapter and not self.adapters.acquire(ticket.adapter, self.now):
                continue
            if not self.fits(job):
                if ticket.adapter:
                    self.adapters.release(ticket.adapter, self.now)
                return
            self.running.append(job)
            del self.waiting[ticket.id]
            self.course.jobs[ticket.id] = job
        asked = sum(j.arrival.ticket.tokens for j in self.running)
        self.course.most_running = max(self.course.most_running, asked)

    def fits(self, new: Job) -> bool:
        unread = sum(j.arrival.prompt - j.read for j in [*self.running, new])
        delay = math.ceil(unread / max(1, self.machine.batch - len(self.running) - 1))
        return self.admission.fits([j.claim(delay) for j in self.running], new.claim(delay))

    def compute(self) -> None:
        """One step: a token of each that writes, and as much of the prompts as there is room for."""
        writing = {j for j in self.running if j.read == j.arrival.prompt}
        left, computed = self.machine.batch - len(writing), {}
        for job in self.running:
            computed[job] = 1 if job in writing else min(left, job.arrival.prompt - job.read)
            left -= 0 if job in writing else computed[job]
        names = {job.arrival.ticket.adapter for job, tokens in computed.items() if tokens}
        self.now += self.machine.seconds(sum(computed.values()), len(names - {""}))
        for job, tokens in computed.items():
            self.advance(job, tokens, job in writing)
        cached = sum(j.read + j.written for j in self.running)
        self.course.most_cached = max(self.course.most_cached, cached)
        for job in [j for j in self.running if j.written >= j.arrival.writes]:
            self.end(job)

    def advance(self, job: Job, tokens: int, writes: bool) -> None:
        t = job.arrival.ticket
        if tokens:
            self.policy.charge(t, tokens)
            self.course.charges.append((self.now, t.key, t.adapter, tokens))
        if writes:
            job.written += tokens
        else:
            job.read += tokens
            if job.read == job.arrival.prompt:
                job.first = self.now

    def end(self, job: Job) -> None:
        job.done = self.now
        self.running.remove(job)
        self.admission.ended(job.arrival.ticket.tokens, self.now)
        if job.arrival.ticket.adapter:
            self.adapters.release(job.arrival.ticket.adapter, self.now)


def poisson(rng: random.Random, rate: float, until: float, start: float = 0.0) -> list[float]:
    """Times of arrival at `rate` a second."""
    times, now = [], start
    while (now := now + rng.expovariate(rate)) < until:
        times.append(now)
    return times


def zipf(rng: random.Random, count: int, power: float = 1.0) -> str:
    """One of so many adapters, the i-th as often as 1 / i^power."""
    return f"a{rng.choices(range(count), [1 / (i + 1) ** power for i in range(count)])[0]}"


def request(rng: random.Random, when: float, key: str, adapter: str, number: int, prompt: int = 64) -> Arrival:
    """A request of about so many tokens, which writes a part of what it may."""
    length, most = rng.randint(prompt // 4, prompt), rng.randint(8, 32)
    ticket = Ticket(f"{key}{number:06d}", adapter, key, length + most, when, bytes=1 if adapter else 0)
    return Arrival(ticket, length, rng.randint(1, most))
