"""Micro-batches of many jobs: nothing lost, nothing twice, steps in their order, the budget kept, few of them."""

import json
import math
import random

import pytest

from undula.jobs.cost import Cost, Memory
from undula.jobs.planner import Piece, apart, flat, padded, together, wholes
from undula.jobs.trial import Tried

HOW = (together, wholes, apart)


def drawn(count, seed=0):
    """(by job the lengths of the rows of each of its steps, a budget), so many times."""
    of = random.Random(seed)
    for _ in range(count):
        jobs = [
            [[of.randint(1, 60) for _ in range(of.randint(1, 5))] for _ in range(of.randint(1, 3))]
            for _ in range(of.randint(1, 4))
        ]
        yield jobs, of.randint(20, 90)


def pieces_of(jobs):
    return [
        Piece(f"job{j}", step + 7, i, tokens)
        for j, steps in enumerate(jobs)
        for step, rows in enumerate(steps)
        for i, tokens in enumerate(rows)
    ]


def fewest(lengths, budget):
    """The fewest micro-batches that are possible, by trying all subsets (dynamic programming over them)."""
    full = (1 << len(lengths)) - 1
    best = [(0, 0)] + [(math.inf, 0)] * full  # (bins closed and open, filled in the last)
    for held in range(full):
        bins, filled = best[held]
        for i, tokens in enumerate(lengths):
            if not held >> i & 1:
                fits = bins and filled + tokens <= budget
                new = (bins, filled + tokens) if fits else (bins + 1, tokens)
                best[held | 1 << i] = min(best[held | 1 << i], new)
    return best[full][0]


@pytest.mark.parametrize("size", [flat, padded])
@pytest.mark.parametrize("how", HOW)
def test_every_row_once_its_step_before_the_next_and_the_budget_kept(how, size):
    for jobs, budget in drawn(60):
        pieces = pieces_of(jobs)
        plan = how(pieces, budget, size)
        assert sorted((p for batch in plan for p in batch), key=pieces.index) == pieces
        for batch in plan:
            filled = size(len(batch), max(p.tokens for p in batch), sum(p.tokens for p in batch))
            assert filled <= budget or len(batch) == 1
        where = {p: at for at, batch in enumerate(plan) for p in batch}
        for p in pieces:
            assert all(where[p] < where[q] for q in pieces if (q.job, q.step) == (p.job, p.step + 1))


def test_first_fit_decreasing_keeps_its_bound_on_waste():
    """11/9 OPT + 6/9 (Dosa 2007) against all packings tried; and parts of jobs that stay whole: below twice."""
    of, worst = random.Random(1), 0
    for _ in range(80):
        lengths, budget = [of.randint(1, 30) for _ in range(of.randint(1, 8))], of.randint(30, 60)
        pieces = [Piece(f"job{i % 3}", 0, i, tokens) for i, tokens in enumerate(lengths)]
        least = fewest(lengths, budget)
        assert least <= len(together(pieces, budget)) <= 11 / 9 * least + 6 / 9
        assert least <= len(wholes(pieces, budget)) < 2 * sum(lengths) / budget + 1
        worst = max(worst, least)
    assert worst >= 4  # cases that ask something


def test_apart_a_micro_batch_is_of_one_step_of_one_job():
    for jobs, budget in drawn(40, seed=2):
        plan = apart(pieces_of(jobs), budget)
        assert all(len({(p.job, p.step) for p in batch}) == 1 for batch in plan)
        assert [batch[0].job for batch in plan] == sorted(batch[0].job for batch in plan)


SMALL = [Piece(f"job{j}", 0, i, 16) for j in range(8) for i in range(2)]


class Machine:
    """Takes rounds by a planner; `of(batches)` are the seconds of one."""

    def __init__(self, of, written=None, **more):
        self.of, self.round, self.spent, self.mixed = of, 0, 0.0, []
        self.planner = Tried(1024, flat, lambda: self.spent, lambda: self.round, **more)
        if written is not None:
            self.planner.decode(json.loads(json.dumps(written)))

    def go(self, rounds, pieces=SMALL):
        for _ in range(rounds):
            plan = self.planner(pieces)
            self.spent = self.of(plan)
            self.mixed.append(max(len({p.job for p in batch}) for batch in plan))
            self.round += 1
        return self


def dear(plan):
    """Seconds where a job beside another costs more than a micro-batch of its own."""
    return sum(1.0 + 2.0 * (len({p.job for p in batch}) - 1) for batch in plan)


def cheap(plan):
    """Seconds where micro-batches cost the same whatever is in them."""
    return float(len(plan))


def test_what_is_quickest_here_is_kept_whatever_the_usual_costs_say():
    """One job after the other where mixing loses, after few rounds of anything else."""
    assert Machine(dear).go(20).mixed[7:] == [1] * 13
    assert Machine(cheap).go(20).mixed[7:] == [8] * 13


def test_one_slow_round_decides_nothing():
    """As the first of a way is, which opens what it needs."""
    rounds = iter(range(100))
    assert Machine(lambda plan: cheap(plan) + 100.0 * (next(rounds) == 0)).go(20).mixed[8:] == [8] * 12


def test_each_shape_of_rounds_is_tried_by_itself():
    """What pays for small steps need not for long ones."""
    long = [Piece(piece.job, 0, piece.index, 300) for piece in SMALL]
    machine = Machine(lambda plan: dear(plan) if plan[0][0].tokens > 100 else cheap(plan)).go(12).go(12, long).go(2)
    assert machine.mixed[-2:] == [8, 8]
    assert machine.mixed[-4:-2] == [1, 1]


def test_what_was_tried_is_written_down_and_its_rounds_are_packed_as_they_were():
    """Two clocks never agree: what a training packs that goes on from a checkpoint must not depend on them."""
    first = Machine(dear).go(12)
    again = Machine(cheap, first.planner.encode()).go(12)
    assert again.mixed == first.mixed
    cut = Machine(dear).go(3)  # in its last round
    assert Machine(dear, cut.planner.encode()).go(20).mixed[8:] == [1] * 12


def test_short_trainings_try_nothing():
    machine = Machine(dear, long=lambda: False).go(5)
    assert machine.mixed == [8] * 5
    assert machine.planner.encode() == []


def test_usual_costs_go_by_tokens_along_straight_lines_and_by_jobs():
    cost = Cost(((16, 1.0), (64, 2.0)), further=0.25)
    assert [cost.seconds(40), cost.seconds(112), cost.seconds(16, jobs=3)] == [1.5, 3.0, 1.5]


def test_a_budget_of_bytes_bounds_tokens_and_jobs():
    memory = Memory(base=1000, per_token=10, budget=2000)
    assert memory.tokens([100, 200], most=1024) == 70
    assert memory.fits([100, 200], longest=70)
    assert not memory.fits([100, 200], longest=71)
    assert Memory(1000, 10).tokens([100], most=1024) == 1024
