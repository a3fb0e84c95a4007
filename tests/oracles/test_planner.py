"""Micro-batches of many jobs: nothing lost, nothing twice, steps in their order, the budget kept, few of them."""

import math
import random

import pytest

from undula.jobs.cost import Cost, Memory
from undula.jobs.planner import Piece, Planner, apart, flat, padded, together, wholes

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
LATENCY = Cost(((16, 1.0), (64, 1.1), (256, 1.5), (1024, 6.0)), further=0.01)  # small batches cost almost as large ones
LINEAR = Cost(((16, 0.16), (64, 0.64), (256, 2.56)), further=0.2)  # nothing is gained, a further job costs


@pytest.mark.parametrize(("cost", "jobs"), [(LATENCY, 8), (LINEAR, 1)])
def test_jobs_share_micro_batches_where_the_cost_model_says_so_alone(cost, jobs):
    plan = Planner(cost, 1024)(SMALL)
    assert max(len({p.job for p in batch}) for batch in plan) == jobs


@pytest.mark.parametrize("cost", [LATENCY, LINEAR])
def test_no_plan_is_chosen_that_costs_more_than_one_job_after_the_other(cost):
    for jobs, budget in drawn(30, seed=3):
        planner, pieces = Planner(cost, 4 * budget), pieces_of(jobs)
        assert planner.seconds(planner(pieces)) <= planner.seconds(apart(pieces, 4 * budget))


def test_a_planner_that_was_written_down_plans_the_same():
    """Two clocks never agree: what a resumed training packs must not depend on them."""
    assert Planner(Cost.decode(LATENCY.encode()), 300)(SMALL) == Planner(LATENCY, 300)(SMALL)


def test_the_cost_model_is_what_was_timed():
    """Between points a straight line, and for each further job what a mixed micro-batch took more."""

    def timed(tokens, jobs):
        return 0.5 + 0.01 * tokens + 0.125 * (jobs - 1)

    cost = Cost.measured(timed, most=500)
    assert cost.seconds(100) == pytest.approx(1.5)
    assert cost.seconds(100, jobs=5) == pytest.approx(2.0)
    assert cost.seconds(4000) == pytest.approx(40.5)
    assert cost.points[-1][0] == 500
    assert Cost.measured(timed, jobs=1).seconds(100, jobs=5) == pytest.approx(1.5)


def test_a_budget_of_bytes_bounds_tokens_and_jobs():
    memory = Memory(base=1000, per_token=10, budget=2000)
    assert memory.tokens([100, 200], most=1024) == 70
    assert memory.fits([100, 200], longest=70)
    assert not memory.fits([100, 200], longest=71)
    assert Memory(1000, 10).tokens([100], most=1024) == 1024
