"""In which order waiting requests are admitted."""

from __future__ import annotations

import abc
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ticket:
    """A request, as a policy sees it."""

    id: str
    adapter: str = ""  # a version's id; "" is the base
    key: str = ""  # who asks
    tokens: int = 1  # of its prompt, and as many as it may write
    arrived: float = 0.0
    deadline: float | None = None  # the time until which its first token has to come
    bytes: int = 0  # that loading its adapter would take; 0 where it is there


class Policy(abc.ABC):
    """Says in which order requests are admitted, and hears what was computed for them.

    An engine asks for `order` at every step, in one thread, and admits from the front as long as there is room; who
    cannot come in yet (an adapter that is still being read) is passed by.
    """

    @abc.abstractmethod
    def order(self, waiting: Sequence[Ticket], running: Sequence[Ticket], now: float) -> list[Ticket]:
        """All of `waiting`, the first to be admitted first."""

    def charge(self, ticket: Ticket, tokens: int) -> None:  # noqa: B027 (most do not count)
        """So many tokens were computed for this request."""


class Fcfs(Policy):
    """First come, first served."""

    def order(self, waiting: Sequence[Ticket], running: Sequence[Ticket], now: float) -> list[Ticket]:
        return sorted(waiting, key=_age)


@dataclass
class ClusterByAdapter(Policy):
    """First those whose adapters are in memory, then the others, adapter by adapter: fewer are read, and those that run
    together have fewer adapters.

    Who has waited for `bound` seconds is served first come, first served, before all others: nobody is overtaken by a
    request that came more than `bound` seconds later.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise ValueError(f"a bound is a number of seconds from 0 on, found {self.bound!r}")

    def order(self, waiting: Sequence[Ticket], running: Sequence[Ticket], now: float) -> list[Ticket]:
        there = {"", *(t.adapter for t in running), *(t.adapter for t in waiting if not t.bytes)}
        first: dict[str, float] = {}  # of each adapter, when the first of its requests came
        for t in waiting:
            first[t.adapter] = min(t.arrived, first.get(t.adapter, t.arrived))

        def place(t: Ticket) -> tuple:
            if now - t.arrived >= self.bound:
                return 0, 0.0, "", *_age(t)
            if t.adapter in there:
                return 1, 0.0, "", *_age(t)
            return 2, first[t.adapter], t.adapter, *_age(t)

        return sorted(waiting, key=place)


class FairShare(Policy):
    """Those who ask (`Ticket.key`) get equal shares of the tokens while they wait for more; what one of them gets is
    shared equally among its adapters.

    Virtual token counters (Sheng et al. 2024, arXiv:2401.00588): the one with the fewest tokens is next; who comes back
    after a pause has its counter lifted to the lowest of those who wait, so that nobody saves a share up.  While two
    of them have requests waiting, and none of them has to wait for its adapter, the tokens computed for them differ by
    at most 2 M over any time: M are the most tokens that running requests have asked for at a time (whoever is ahead
    gets no more than what runs already, which is as far as either can come ahead).
    """

    def __init__(self) -> None:
        self.keys = Counters()
        self.adapters: dict[str, Counters] = {}  # of each key

    def order(self, waiting: Sequence[Ticket], running: Sequence[Ticket], now: float) -> list[Ticket]:
        queues: dict[str, dict[str, list[Ticket]]] = {}
        for t in sorted(waiting, key=_age, reverse=True):
            queues.setdefault(t.key, {}).setdefault(t.adapter, []).append(t)
        self.keys.wait(queues)
        for key, own in queues.items():
            self.adapters.setdefault(key, Counters()).wait(own)
        alive = {*queues, *(t.key for t in running)}
        self.adapters = {key: c for key, c in self.adapters.items() if key in alive or key in self.keys.spent}
        among = self.keys.heap(queues)
        within = {key: self.adapters[key].heap(own) for key, own in queues.items()}
        found = []
        while among:
            spent, key = heapq.heappop(among)
            used, adapter = heapq.heappop(within[key])
            ticket = queues[key][adapter].pop()
            found.append(ticket)
            if queues[key][adapter]:
                heapq.heappush(within[key], (used + ticket.tokens, adapter))
            if within[key]:
                heapq.heappush(among, (spent + ticket.tokens, key))
        return found

    def charge(self, ticket: Ticket, tokens: int) -> None:
        self.keys.add(ticket.key, tokens)
        self.adapters.setdefault(ticket.key, Counters()).add(ticket.adapter, tokens)


class Counters:
    """The tokens that were computed for each of some names."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.waiting: set[str] = set()
        self.floor = 0.0  # who has less than this counts with it: the lowest of those who wait

    def wait(self, names: Iterable[str]) -> None:
        """These wait now; those who did not before are lifted, and those at the floor who do not are forgotten."""
        names = set(names)
        stayed = names & self.waiting
        if stayed:
            self.floor = max(self.floor, min(self.spent[name] for name in stayed))
        elif self.waiting:  # all of them left: whoever comes begins where the last of them ended
            self.floor = max(self.floor, *(self.spent[name] for name in self.waiting))
        for name in names - stayed:
            self.spent[name] = max(self.spent.get(name, 0.0), self.floor)
        self.waiting = names
        self.spent = {name: n for name, n in self.spent.items() if name in names or n > self.floor}

    def heap(self, names: Iterable[str]) -> list[tuple[float, str]]:
        """(tokens, name), the fewest first, by name where several have as many."""
        found = [(self.spent[name], name) for name in names]
        heapq.heapify(found)
        return found

    def add(self, name: str, tokens: float) -> None:
        self.spent[name] = self.spent.get(name, self.floor) + tokens


def _age(t: Ticket) -> tuple[float, str]:
    return t.arrived, t.id
