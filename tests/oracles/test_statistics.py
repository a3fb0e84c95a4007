"""The statistics of a study: against scipy, textbook examples, published tables, and by simulation at stated rates."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from undula.study import statistics as S
from undula.study.outcome import FINAL, ChosenRate, Outcome
from undula.study.rates import decide
from undula.study.summary import summarise

# Demsar (2006), table 5 a: critical values of the two-tailed Nemenyi test at 0.05, for k = 2 ... 10
NEMENYI = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)


def slack(rate, runs, sure=0.9999):
    """The counts between which a binomial with this rate stays, nearly always."""
    low, high = stats.binom.ppf([1 - sure, sure], runs, rate)
    return low / runs, high / runs


def draws(seed=0):
    return np.random.default_rng(seed)


# One group


def test_spread_is_students_interval():
    x = draws().normal(3.0, 2.0, 7)
    found, known = S.spread(x, 0.9), stats.t.interval(0.9, 6, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == pytest.approx(known)
    assert found.standard_error == pytest.approx(stats.sem(x))
    assert S.spread([1.5]) == S.Spread(1, 1.5)
    for equal in ([0.1] * 3, [0.7 - 0.6, 0.6 - 0.5, 0.8 - 0.7]):  # accuracies that agree by chance: no interval
        assert S.spread(equal) == S.Spread(3, pytest.approx(0.1), 0.0)
    with pytest.raises(ValueError, match="no figures"):
        S.spread([])


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_sign_flip_tries_every_combination(n):
    d = draws(n).normal(0.4, 1.0, n)
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
    assert S.sign_flip(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-12))


def test_sign_flip_is_scipys():
    d = draws(3).normal(0.5, 1.0, 11)
    known = stats.permutation_test((d,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf)
    assert S.sign_flip(d) == pytest.approx(known.pvalue)


def test_sign_flip_at_random_agrees_with_mcnemars_exact_test():
    """Of differences -1, 0, 1 the sum of signs is a binomial: 21 discordant rows are flipped at random."""
    d = [1.0] * 17 + [-1.0] * 7 + [0.0] * 40
    exact = stats.binomtest(17, 24, 0.5).pvalue
    assert abs(S.sign_flip(d) - exact) < 5 * math.sqrt(exact * (1 - exact) / S.Rule().resamples)


def test_the_smallest_p_is_reached_and_stated():
    for n in (2, 3, 6, S.EXACT):
        assert S.sign_flip([0.1] * n) == S.smallest_p(n) == 2 / 2**n
    assert S.smallest_p(3) == 0.25
    assert S.sign_flip([5.0] * 25) == S.smallest_p(25) == 1 / 10_001
    assert S.sign_flip([0.0, 0.0]) == 1.0


def test_equal_input_gives_equal_output():
    d = draws(1).normal(size=30)
    assert S.interval([d]) == S.interval([d])
    assert S.interval([d]) != S.interval([d], S.Rule(seed=1))
    assert S.sign_flip(d) == S.sign_flip(d)


@pytest.mark.parametrize("sizes", [(6,), (9,), (3, 4), (3, 3, 3), (13, 14)])
def test_an_interval_is_what_its_own_test_does_not_reject(sizes):
    """At both ends, by the test itself: inside it p is greater than 0.05, outside it is not."""
    draw = draws(sum(sizes))
    groups = [draw.normal(0.5, 1.0, n) for n in sizes]

    def p(theta):
        return S.sign_flip(S.weighed([g - theta for g in groups]))

    low, high = S.interval(groups)
    assert low < np.mean([g.mean() for g in groups]) < high
    step = 1e-6 * (high - low)
    assert min(p(low + step), p(high - step), p((low + high) / 2)) > 0.05
    assert max(p(low - step), p(high + step)) <= 0.05


def test_an_interval_leaves_nothing_out_exactly_when_p_says_so():
    """Of accuracies on few rows, where differences of 0 and equal sums are common."""
    draw, seen = draws(3), set()
    for _ in range(400):
        groups = [draw.integers(-2, 5, n) / 600 for n in (4, 4)]
        low, high = S.interval(groups)
        out, p = not low <= 0 <= high, S.sign_flip(S.weighed(groups))
        assert out == (p <= 0.05), (groups, low, high, p)
        seen.add(out)
    assert seen == {True, False}
    assert S.interval([[0.0] * 8]) == (0.0, 0.0)


def test_few_pairs_have_no_interval():
    assert S.interval([[0.1, 0.2, 0.3, 0.4, 0.5]]) is None
    assert S.interval([[0.1, 0.2, 0.3, 0.4, 0.5]], S.Rule(confidence=0.9)) == pytest.approx((0.1, 0.5))
    assert S.interval([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]) == pytest.approx((0.1, 0.6))


# Corrections


def test_holm_by_hand():
    """p (0.01, 0.04, 0.03, 0.005) of four: 4 x 0.005, 3 x 0.01, 2 x 0.03, then at least that for 0.04."""
    assert S.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert S.holm([0.6, 0.9]) == [1.0, 1.0]
    assert S.holm([]) == []


def test_tarone_by_hand():
    """Tarone's case: of 9 comparisons only those that can reach alpha / K count, K as small as can be."""
    assert S.decidable([0.25] * 5, 0.05) == [False] * 5
    assert S.decidable([0.25, 0.25, 2 / 2**9, 2 / 2**9], 0.05) == [False, False, True, True]
    assert S.decidable([2 / 2**6, 2 / 2**6], 0.05) == [False, False]  # 0.031 > 0.05 / 2
    assert S.decidable([2 / 2**6], 0.05) == [True]
    assert S.decidable([2 / 2**6] * 9 + [1e-4], 0.05) == [False] * 9 + [True]


def test_what_cannot_be_decided_costs_nothing():
    p = S.corrected([0.25, 0.25, 0.004, 0.03], [0.25, 0.25, 2 / 2**9, 2 / 2**9], 0.05)
    assert p[:2] == [None, None]
    assert p[2:] == pytest.approx([0.008, 0.03])
    assert S.verdict(-0.1, p[2], 0.05) == S.LOSS
    assert S.verdict(0.1, p[2], 0.05) == S.WIN
    assert S.verdict(0.1, 0.06, 0.05) == S.NOT_SHOWN
    assert S.verdict(0.1, None, 0.05) == S.UNDECIDED


# Several groups


def test_friedman_is_scipys():
    table = draws(4).normal(size=(7, 5)) + np.arange(5) * 0.4
    found = S.ranks("abcde", table)
    assert found.chi2 == pytest.approx(stats.friedmanchisquare(*table.T).statistic)
    assert found.arms[0] == "abcde"[stats.rankdata(-table, axis=1).mean(0).argmin()]  # more is better
    tied = np.round(table)
    assert any(len(set(row)) < 5 for row in tied)
    assert S.ranks("abcde", tied).chi2 == pytest.approx(stats.friedmanchisquare(*tied.T).statistic)


@pytest.mark.parametrize("table", [[[3, 2, 1], [9, 8, 7]], [[3, 2, 1], [9, 8, 7], [1, 2, 3]], [[2, 2, 1], [1, 3, 2]]])
def test_friedmans_p_is_that_of_all_permutations(table):
    """Where two groups agree on three arms it is 1/6; Iman and Davenport's F says 0 there, chi-square 0.135."""
    found, ranked = S.ranks("abc", table), stats.rankdata(-np.array(table), axis=1)
    every = [
        np.square(np.sum(rows, 0)).sum() for rows in itertools.product(*(itertools.permutations(r) for r in ranked))
    ]
    exact = np.mean(np.array(every) >= np.square(ranked.sum(0)).sum())
    assert abs(found.p - exact) < 5 * math.sqrt(exact * (1 - exact) / S.Rule().resamples) + 1e-4
    assert found.p == S.ranks("abc", table).p


def test_friedmans_p_of_many_groups_is_chi_squares():
    table = draws(6).normal(size=(200, 4)) + np.arange(4) * 0.07
    assert S.ranks("abcd", table).p == pytest.approx(stats.friedmanchisquare(*table.T).pvalue, abs=0.02)


def test_demsars_example():
    """Demsar (2006), section 3.2.2: C4.5 with four settings on 14 data sets; average ranks 3.143, 2.000, 2.893, 1.964,
    chi2 9.28, F 3.69 and, at 0.05, a critical difference of 1.25."""
    table = [
        *[(0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967)],
        *[(0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931)],
        *[(0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875)],
        *[(1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669)],
        *[(0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970)],
    ]
    found = S.ranks(("C4.5", "+m", "+cf", "+m+cf"), table)
    average = dict(zip(found.arms, found.average, strict=True))
    assert [round(average[a], 3) for a in ("C4.5", "+m", "+cf", "+m+cf")] == [3.143, 2.000, 2.893, 1.964]
    without_ties = 12 * 14 / 20 * (sum(r * r for r in found.average) - 4 * 25 / 4)
    assert without_ties == pytest.approx(9.28, abs=0.01)
    assert found.chi2 > without_ties  # the paper does not correct for ties
    assert found.critical == pytest.approx(1.25, abs=0.005)


def test_nemenyis_published_values():
    for k, q in enumerate(NEMENYI, 2):
        if k > 2:
            found = S.ranks([str(i) for i in range(k)], draws(k).normal(size=(6, k)))
            assert found.critical / math.sqrt(k * (k + 1) / 36) == pytest.approx(
                q, abs=1e-3
            )  # some are cut, not rounded
    assert S.ranks("ab", [[1, 2], [2, 3]]) is None
    assert S.ranks("abc", [[1, 2, 3]]) is None


def test_cliques_are_the_largest_runs():
    assert S._cliques("abcde", [1.0, 2.0, 2.8, 4.5, 5.0], 1.9) == (("a", "b", "c"), ("c", "d"), ("d", "e"))
    assert S._cliques("abc", [1.0, 2.0, 3.0], 0.5) == ()
    assert S._cliques("abc", [1.0, 2.0, 3.0], 5.0) == (("a", "b", "c"),)


# At stated rates


@pytest.mark.parametrize("n", [3, 5, 10])
def test_students_interval_covers_as_stated(n):
    runs, draw = 1000, draws(n)
    hits = sum((s := S.spread(draw.normal(0.7, 2.0, n))).low <= 0.7 <= s.high for _ in range(runs))
    low, high = slack(0.95, runs)
    assert low <= hits / runs <= high


def test_intervals_cover_as_stated():
    """Four data sets of three seeds, with their own noise and one effect: 0.95 or more, whatever the noise."""
    runs, draw, noise = 1500, draws(8), np.array([1.0, 1.0, 2.0, 4.0])[:, None]
    hits = 0
    for _ in range(runs):
        low, high = S.interval(0.7 + noise * draw.standard_t(3, size=(4, 3)))
        hits += low <= 0.7 <= high
    assert hits / runs >= slack(0.95, runs)[0]


def figures(draw, arms, sets, seeds, effect=0.0):
    """(arms and the baseline, which is first; data sets; seeds): the first arm is better by `effect` noise levels."""
    noise = draw.normal(size=(arms + 1, sets, seeds)) * (1 + np.arange(sets)[:, None])
    noise[1] += effect * (1 + np.arange(sets)[:, None])
    return noise


def report(draw, arms, sets, seeds, effect=0.0):
    """Adjusted p of every comparison of such a study, and the p before adjusting."""
    found = figures(draw, arms, sets, seeds, effect)
    d = found[1:] - found[0]
    p = [S.sign_flip(d[a, g]) for a in range(arms) for g in range(sets)]
    p += [S.sign_flip(S.weighed(d[a])) for a in range(arms)]
    smallest = [S.smallest_p(seeds)] * (arms * sets) + [S.smallest_p(seeds * sets)] * arms
    return S.corrected(p, smallest, 0.05), p, smallest


@pytest.mark.parametrize(("sets", "seeds"), [(4, 3), (1, 8), (2, 7)])
def test_a_summary_has_these_figures(sets, seeds):
    arms = ["LoRA", *"abcde"]
    runs = [
        Outcome(arm, "m", f"set {g}", "b", FINAL, 1e-3, s, "accuracy", True, test=float(v))
        for arm, rows in zip(arms, figures(draws(sets), 5, sets, seeds, 1.0), strict=True)
        for g, row in enumerate(rows)
        for s, v in enumerate(row)
    ]
    summary = summarise(runs, [], "LoRA")
    single = {(row.arm, row.data): row.against for row in summary.rows}
    every = [single[arm, f"set {g}"] for arm in arms[1:] for g in range(sets)]
    every += summary.pooled or [single[arm, "set 0"] for arm in arms[1:]]
    adjusted, p, smallest = report(draws(sets), 5, sets, seeds, 1.0)
    if sets == 1:  # then the pooled comparisons are the single ones, and no family of their own
        adjusted, p, smallest = S.corrected(p[:5], smallest[:5], 0.05) * 2, p[:5] * 2, smallest[:5] * 2
    assert [c.p for c in every] == pytest.approx(p)
    assert [c.smallest_p for c in every] == smallest
    assert [c.p_holm for c in every] == pytest.approx(adjusted)


@pytest.mark.parametrize(("sets", "seeds"), [(4, 3), (1, 8), (2, 7)])
def test_a_study_of_nothing_finds_nothing_more_often_than_stated(sets, seeds):
    """Family-wise: any win or loss at all, over five arms that share one baseline, counts as an error."""
    runs, draw, wrong, uncorrected = 600, draws(sets), 0, 0
    for _ in range(runs):
        adjusted, p, _ = report(draw, 5, sets, seeds)
        wrong += any(v is not None and v <= 0.05 for v in adjusted)
        uncorrected += min(p) <= 0.05
    most = slack(0.05, runs)[1]
    assert wrong / runs <= most
    assert uncorrected / runs > most  # so this test would see a correction that is missing


def test_a_true_difference_is_found():
    """Three noise levels better on four data sets with three seeds: the pooled comparison says so, 9 times in 10 at
    least; a single data set with three seeds never can."""
    runs, draw, found = 200, draws(9), 0
    for _ in range(runs):
        adjusted, _, smallest = report(draw, 5, 4, 3, effect=3.0)
        assert all(v is None for v, s in zip(adjusted, smallest, strict=True) if s == 0.25)
        found += adjusted[20] <= 0.05
    assert found / runs >= slack(0.9, runs)[0]


def test_pooling_weighs_groups_alike_in_any_unit():
    a, b = [0.1, 0.2, 0.3], [-1.0, 4.0]
    assert S.standardised([a, b]) == pytest.approx(S.standardised([[1000 * v for v in a], b]))
    assert S.standardised([[0.0, 0.0], [1.0]]) == [0.0, 0.0, 1.0]


# A whole study, from the sweeps on


def a_study(draw, arms, sets, seeds, own, effect=0.0, c=0.02, v=0.02):
    """Every arm is the same in law but for `effect`; rates are chosen by `decide`, figures go through `summarise`.

    Quality falls by c per squared step from the best rate, a run on validation rows sees it with noise v, a final run's
    figure has noise 0.01 and is one of 600 rows.
    """
    grid, runs, rates = (1e-3, 3.16e-3, 1e-2), [], []

    def worth(lr):
        return 0.6 - c * (2 * math.log10(lr / 3.16e-3)) ** 2

    def choice():
        scores = {}
        while (found := decide(grid, scores, 10**0.5, 3, True)).chosen is None:
            scores |= {lr: worth(lr) + v * draw.normal() for lr in found.more}
        return found.chosen

    for a in range(arms + 1):
        for g in range(sets):
            once, labels = choice(), (f"arm {a}", "m", f"set {g}", "b")
            for seed in range(seeds):
                lr = choice() if own else once
                value = worth(lr) + 0.01 * draw.normal() + effect * (a > 0)
                runs.append(Outcome(*labels, FINAL, lr, seed, "accuracy", True, test=round(600 * value) / 600))
                if own or not seed:
                    rates.append(ChosenRate(*labels, lr, True, ((lr, 0.6),), seed if own else None))
    return summarise(runs, rates, "arm 0", S.Rule(resamples=50))


def verdicts(summary):
    return [row.against.verdict for row in summary.rows if row.against] + [each.verdict for each in summary.pooled]


@pytest.mark.parametrize(("arms", "sets", "seeds", "studies"), [(1, 1, 6, 150), (4, 1, 9, 60), (3, 3, 4, 50)])
def test_a_study_that_sweeps_for_each_seed_finds_nothing_more_often_than_stated(arms, sets, seeds, studies):
    """Where nothing differs, the chance of any win or loss is 0.05 at most, sweeps included.  The same figures with one
    sweep for all seeds, taken as if rates had been given, are found to differ far more often: what this test sees."""
    draw, wrong, by_luck = draws(arms), 0, 0
    for _ in range(studies):
        wrong += not {S.WIN, S.LOSS}.isdisjoint(verdicts(a_study(draw, arms, sets, seeds, own=True)))
        shared = a_study(draw, arms, sets, seeds, own=False)
        assert {S.WIN, S.LOSS}.isdisjoint(verdicts(shared))
        given = summarise(shared.runs, [], "arm 0", S.Rule(resamples=50))
        by_luck += not {S.WIN, S.LOSS}.isdisjoint(verdicts(given))
    most = slack(0.05, studies)[1]
    assert wrong / studies <= most
    assert by_luck / studies > most


def test_a_planted_difference_is_found_with_a_sweep_for_each_seed():
    draw, studies = draws(5), 60
    found = [verdicts(a_study(draw, 1, 1, 10, own=True, effect=0.1)) for _ in range(studies)]
    assert found.count([S.WIN]) / studies >= slack(0.9, studies)[0]
