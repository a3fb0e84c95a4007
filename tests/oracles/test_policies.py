"""Policies, admission and room for adapters in virtual time: thousands of requests, the same each time."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from undula.serve.admission import Admission, Claim, peak
from undula.serve.policy import ClusterByAdapter, FairShare, Fcfs, Ticket
from undula.serve.request import Busy, Late, Refused


@pytest.fixture
def queues(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import queues

    return queues


POLICIES = {"Fcfs": Fcfs, "FairShare": FairShare, "ClusterByAdapter": lambda: ClusterByAdapter(1.0)}


def mixed(queues, seed=0, seconds=30.0, burst=150):
    """A greedy key, some modest ones and a burst; adapters by Zipf, the base among them."""
    rng = random.Random(seed)
    asked = [("greedy", t) for t in queues.poisson(rng, 12.0, seconds)] + [("burst", seconds / 2)] * burst
    asked += [(f"k{i}", t) for i in range(3) for t in queues.poisson(rng, 2.0, seconds)]
    return [
        queues.request(rng, when, key, "" if rng.random() < 0.1 else queues.zipf(rng, 60), n)
        for n, (key, when) in enumerate(asked)
    ]


def warm(queues, policy, **options):
    """A server with room for all adapters, all of them in memory."""
    server = queues.Server(policy, queues.Machine(adapters=100), **options)
    server.adapters.warm(f"a{i}" for i in range(60))
    return server


@pytest.mark.parametrize("name", POLICIES)
def test_everyone_is_served_in_time_and_the_cache_is_never_overfull(queues, name):
    """With places for a tenth of the adapters nobody starves, and nobody is ever put out of the cache."""
    machine = queues.Machine(adapters=6, cache=1500)
    arrivals = mixed(queues)
    server = queues.Server(POLICIES[name](), machine, patience=1.0)
    course = server.run(arrivals)
    assert set(course.jobs) == {a.ticket.id for a in arrivals}
    assert all(math.isfinite(job.done) for job in course.jobs.values())
    assert course.most_cached <= machine.cache
    assert course.most_running > machine.cache  # more than what sums of the worst cases would have let in
    if name != "FairShare":  # which means to let others pass
        longest = max(job.done - job.admitted for job in course.jobs.values())
        turn = 1.0 + longest + 6 * machine.load  # of six adapters
        assert course.overtaken() <= 1.0 + (60 / 6) * turn + (name != "Fcfs")


def test_first_come_is_first_served(queues):
    """With all adapters in memory nobody is overtaken at all."""
    assert warm(queues, Fcfs()).run(mixed(queues)).overtaken() == 0


@pytest.mark.parametrize("bound", [0.0, 0.5, 2.0])
def test_clustering_overtakes_nobody_by_more_than_its_bound(bound):
    """Whatever adapters are in memory, and however long the queue is."""
    rng, policy, now, most = random.Random(0), ClusterByAdapter(bound), 0.0, 0.0
    waiting, there = [], ["a0"] * 8
    for i in range(1200):
        now += 0.02
        waiting += [
            Ticket(f"{i}/{k}", f"a{rng.randint(0, 50)}", arrived=now)
            for k in range(rng.choice([0, 1, 2, 2]) * (i < 800))
        ]
        tickets = [Ticket(t.id, t.adapter, arrived=t.arrived, bytes=t.adapter not in there) for t in waiting]
        for first in policy.order(tickets, [], now)[:1]:
            most = max(most, first.arrived - min(t.arrived for t in waiting))
            waiting = [t for t in waiting if t.id != first.id]
            there = [*there[1:], first.adapter]
    assert bound / 2 <= most <= bound


def test_clustering_reads_fewer_adapters(queues):
    """What it is for."""
    machine = queues.Machine(adapters=10, running=8)
    loads = {
        name: queues.Server(make(), machine).run(mixed(queues, seconds=20.0, burst=100)).loads
        for name, make in {"first come": Fcfs, "clustered": lambda: ClusterByAdapter(60.0)}.items()
    }
    assert loads["clustered"] < 0.8 * loads["first come"]


@pytest.mark.parametrize("seed", [0])
def test_two_who_always_wait_get_equal_shares_but_for_a_constant(queues, seed):
    """However much more one of them asks for: over any time in which both wait, what they get differs by 2 M at most,
    M being what running requests had asked for at a time."""
    course = warm(queues, FairShare()).run(mixed(queues, seed, burst=150))
    keys = {a[1] for a in course.charges}
    checked = 0
    for one in keys:
        for other in keys - {one}:
            gaps = gaps_while_both_wait(course, one, other)
            checked += len(gaps) > 50
            if gaps:
                assert max(gaps) - min(gaps) <= 2 * course.most_running
    assert checked
    total = {key: course.service(key)[-1][1] for key in keys}
    assert total["greedy"] > 2 * total["k0"]  # what nobody else wants it may have


def gaps_while_both_wait(course, one, other):
    """What one got more than the other, at each step of the longest time in which both waited throughout."""
    spans, span = [[]], spans_of(course, one, other)
    for when, both in span:
        if both:
            spans[-1].append(when)
        elif spans[-1]:
            spans.append([])
    longest = max(spans, key=len)
    gap, gaps, charges = 0, [], iter([*course.charges, (math.inf, "", "", 0)])
    charge = next(charges)
    for when in longest:
        while charge[0] <= when:
            gap += charge[3] * ((charge[1] == one) - (charge[1] == other))
            charge = next(charges)
        gaps.append(gap)
    return gaps


def spans_of(course, one, other):
    return [(when, {one, other} <= keys) for when, keys in course.backlog]


def test_a_greedy_key_makes_nobody_else_wait(queues):
    """Three who stay within their shares beside one who asks for ten times as much: the median wait of theirs is a
    small part of what first come, first served gives them."""
    waits = {}
    for policy in (Fcfs(), FairShare()):
        course = warm(queues, policy).run(mixed(queues, burst=0))
        modest = sorted(w for i in range(3) for w in course.wait(f"k{i}"))
        waits[type(policy)] = modest[len(modest) // 2]
    assert waits[FairShare] < 0.25 * waits[Fcfs]


def test_one_key_shares_equally_among_its_adapters(queues):
    """Without keys all requests have one, and then adapters are what is shared among."""
    rng = random.Random(0)
    times = queues.poisson(rng, 40.0, 10.0)
    arrivals = [
        queues.request(rng, when, "", "big" if rng.random() < 0.8 else "small", n) for n, when in enumerate(times)
    ]
    course = queues.Server(FairShare(), queues.Machine(load=0.0)).run(arrivals)
    got = {"big": 0, "small": 0}
    for when, _, adapter, tokens in course.charges:
        got[adapter] += tokens * (when < 8)
    assert got["small"] > 0.6 * got["big"]  # of requests it has a quarter as many


def test_who_comes_back_after_a_pause_has_saved_nothing_up():
    """Else a night without requests would buy a morning of nobody else's."""
    policy = FairShare()

    def waiting(*keys):
        return [Ticket(f"{key}{i}", key=key, tokens=10) for key in keys for i in range(5)]

    policy.order(waiting("a"), [], 0.0)
    for t in waiting("a"):
        policy.charge(t, 1000)
    first = [t.key for t in policy.order(waiting("a", "b"), [], 1.0)]
    assert first.count("a") == first.count("b")
    assert all(x != y for x, y in pairwise(first))  # in turn, not b's first


def test_counters_of_those_who_went_away_are_forgotten():
    """A server that runs for years sees many keys and versions."""
    policy = FairShare()
    for i in range(500):
        t = Ticket(str(i), adapter=f"v{i}", key=f"k{i % 250}", tokens=10)
        policy.order([t], [], float(i))
        policy.charge(t, 10)
    assert len(policy.keys.spent) + sum(len(c.spent) for c in policy.adapters.values()) < 20


@pytest.mark.parametrize("name", POLICIES)
def test_an_order_has_everyone_once(name):
    """Who is missing would wait for ever, who is twice would be computed twice."""
    rng = random.Random(0)
    policy = POLICIES[name]()
    for now in range(30):
        waiting = [
            Ticket(str(i), rng.choice("ab "), rng.choice("xyz"), rng.randint(1, 9), rng.random() * now, bytes=i % 2)
            for i in range(rng.randint(0, 40))
        ]
        found = policy.order(waiting, waiting[:3], float(now))
        assert sorted(t.id for t in found) == sorted(t.id for t in waiting)
        for t in found[:5]:
            policy.charge(t, t.tokens)


def ran(claims, block):
    """The most tokens in the cache, step by step, when each writes all it may after its delay."""
    most = 0
    for step in range(max(c.left + c.delay for c in claims) + 1):
        alive = [c for c in claims if step <= c.left + c.delay]
        most = max(most, sum(-(-(c.held + max(0, min(step - c.delay, c.left))) // block) * block for c in alive))
    return most


@pytest.mark.parametrize("block", [1, 16])
def test_the_peak_of_memory_is_never_less_than_what_happens(block):
    """And with blocks of one token and nobody delayed it is what happens: a rule that always says no is safe too."""
    rng = random.Random(0)
    for n in range(200):
        slow = n % 2
        claims = [
            Claim(rng.randint(0, 50), rng.randint(0, 40), slow * rng.randint(0, 5)) for _ in range(rng.randint(1, 12))
        ]
        assert peak(claims, block) >= ran(claims, block)
        if block == 1 and not slow:
            assert peak(claims) == ran(claims, 1)


def test_a_request_that_no_empty_cache_could_hold_is_refused_with_numbers():
    """Not told to come again."""
    with pytest.raises(Refused, match=r"101 tokens.*the cache holds 100") as error:
        Admission(100).check(101, 0, 0)
    assert not isinstance(error.value, Busy)
    Admission(100).check(100, 0, 0)


def test_a_full_queue_says_when_to_come_again(queues):
    """By what was measured: after so long what waited then is done, and not much earlier."""
    arrivals = mixed(queues, burst=0)
    course = warm(queues, Fcfs(), queue=50).run(arrivals)
    told = {a.ticket.arrived: course.refused[a.ticket.id] for a in arrivals if a.ticket.id in course.refused}
    assert len(told) > 50
    assert all(type(refused) is Busy for refused in told.values())
    found = []
    for when, refused in list(told.items())[20:]:
        before = [j.first for j in course.jobs.values() if j.arrival.ticket.arrived <= when]
        found.append((max(before) - when) / refused.retry_after)
    found.sort()
    assert 0.5 < found[0] <= found[-1] < 2.0


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(queues):
    """Rather than after it has passed: who asked can go elsewhere."""
    arrivals = mixed(queues, burst=0)
    late = [
        type(a)(Ticket(**{**vars(a.ticket), "deadline": a.ticket.arrived + 2.0}), a.prompt, a.writes) for a in arrivals
    ]
    course = warm(queues, Fcfs()).run(late)
    assert course.refused
    assert all(type(refused) is Late for refused in course.refused.values())
    kept = [w <= 2.0 for w in course.wait()]
    assert sum(kept) > 0.9 * len(kept)
    unbounded = warm(queues, Fcfs()).run(arrivals)
    assert sum(kept) > sum(w <= 2.0 for w in unbounded.wait())


def test_a_bound_is_a_number_of_seconds():
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="seconds from 0"):
            ClusterByAdapter(bad)
