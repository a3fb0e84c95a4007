"""What the figures of a few seeds allow to say.  Pure functions of numbers; `docs/study.md` says why these.

A *pair* is a seed with which both an arm and the baseline were trained; a *difference* is arm - baseline of one pair.
Everything random takes a seed, and numbers of the same kind enter in a fixed order: equal input, equal output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..core.given import Checked
from ..core.ranges import Count, Inside, Seed32

EXACT = 20  # signs of so many differences are flipped in every combination; of more, at random
WIN, LOSS = "win", "loss"
NOT_SHOWN, UNDECIDED = "not shown", "undecided"  # it could have been shown; no outcome of so few pairs could show it
SHARED = "shared rate"  # not called: the luck of one choice of a rate is in all seeds of an arm


@dataclass(frozen=True)
class Rule(metaclass=Checked):
    """What decides, and how sure the intervals are."""

    alpha: Inside = 0.05  # the chance, at most, that a report without true differences calls any a win or a loss, where
    #                      the figures of different seeds share no luck: each seed swept for itself, or the rate given
    confidence: Inside = 0.95  # of each interval by itself
    resamples: Count = 10_000  # of the sign flips, where there are too many for all
    seed: Seed32 = 0


@dataclass(frozen=True)
class Spread:
    """The mean of some figures.  Without a second figure there is no error and no interval."""

    n: int
    mean: float
    standard_error: float | None = None
    low: float | None = None  # Student's interval of the mean
    high: float | None = None


@dataclass(frozen=True)
class Ranks:
    """Arms over several groups (Demsar 2006): rank 1 is the best; arms closer than `critical` are not told apart."""

    arms: tuple[str, ...]  # by average rank
    average: tuple[float, ...]
    groups: int
    chi2: float  # Friedman's statistic, corrected for ties
    p: float  # its share of random permutations within the groups: right for few groups too
    critical: float  # Nemenyi's critical difference
    cliques: tuple[tuple[str, ...], ...]  # the largest sets of neighbours that are not told apart


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Mean, standard error s / sqrt(n) and Student's interval: mean -+ t_{n-1} s / sqrt(n).

    For normal figures it covers at its stated rate for every n >= 2.  Equal figures have no interval: accuracies of
    few rows may agree by chance.  Raises ValueError for no figures.
    """
    x = np.asarray(values, float)
    if not x.size:
        raise ValueError("the mean of no figures does not exist")
    if x.size == 1:
        return Spread(1, float(x[0]))
    if _alike(x):
        return Spread(x.size, float(x.mean()), 0.0)
    mean, error = float(x.mean()), float(stats.sem(x))
    low, high = stats.t.interval(confidence, x.size - 1, loc=mean, scale=error)
    return Spread(x.size, mean, error, float(low), float(high))


def _alike(x: np.ndarray) -> bool:
    """Whether figures are equal but for the rounding of their differences."""
    return bool(np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())))


def sign_flip(terms: Sequence[float], rule: Rule = Rule()) -> float:
    """Two-sided p of the sign-flip permutation test of the sum (Fisher 1935): the share of the 2^n choices of signs
    whose sum is at least as far from 0 as the one seen.

    Exact when, without an effect, a difference is as likely as its negative; that holds when the labels `arm` and
    `baseline` of a pair could be exchanged.  Nothing need be normal.  Beyond EXACT terms `resamples` random choices of
    signs stand for all: p = (1 + hits) / (1 + resamples).

    `scipy.stats.permutation_test(permutation_type="samples")` gives the same exact p.  It takes 12 s for 20 terms where
    this takes 5 ms, and its random signs would not be those of `interval`, which must say the same.
    """
    d = np.asarray(terms, float)
    seen = abs(float(d.sum())) * (1 - 1e-9)  # sums in another order differ in their last bits
    if not d.any():
        return 1.0
    if d.size <= EXACT:
        sums = d[:1]  # the first sign stays: turning all signs round changes no distance from 0
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= seen))
    hits = sum(int(np.sum(np.abs(signs @ d) >= seen)) for signs in _signs(d.size, rule))
    return (1 + hits) / (1 + rule.resamples)


def interval(groups: Sequence[Sequence[float]], rule: Rule = Rule()) -> tuple[float, float] | None:
    """The shifts theta that `sign_flip` of the differences, each less theta, does not reject at 1 - confidence: the
    interval of the mean over groups of the groups' mean differences that says the same as its p.  It holds no 0 exactly
    when p <= 1 - confidence.  None where so few pairs could reject nothing.

    A choice of signs that turns the pairs S round gives a sum as large as the one seen exactly when the weighted mean
    of S is at most theta (weights 1 / n_g), so the ends are two of the means of subsets (Hartigan 1969).
    """
    d = np.concatenate([np.asarray(g, float) for g in groups])
    w = np.concatenate([np.full(len(g), 1 / len(g)) for g in groups])
    least, most = _subset_means(d, w) if d.size <= EXACT else _drawn_means(d, w, rule)
    rejected = (
        math.floor((1 - rule.confidence) * (least.size + 1) * (1 + 1e-12))
        if d.size > EXACT
        else math.floor((1 - rule.confidence) * 2.0 ** (d.size - 1) * (1 + 1e-12))
    )
    if rejected < 1:
        return None
    low = float(np.partition(least, rejected - 1)[rejected - 1])
    high = float(-np.partition(-most, rejected - 1)[rejected - 1])
    nothing = 1e-9 * float(np.abs(d).max())
    return 0.0 if abs(low) <= nothing else low, 0.0 if abs(high) <= nothing else high


def _subset_means(d: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted means of all subsets that are not empty, as the ends at either side use them."""
    sums, sizes = np.zeros(1), np.zeros(1)
    for value, weight in zip(d * w, w, strict=True):
        sums, sizes = np.concatenate([sums, sums + value]), np.concatenate([sizes, sizes + weight])
    means = sums[1:] / sizes[1:]
    return means, means


def _drawn_means(d: np.ndarray, w: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Of the choices of signs that `sign_flip` draws: the shift from which on (up to which) each is no less than what
    was seen, in either direction."""
    least, most = [], []
    for signs in _signs(d.size, rule):
        turned = (signs < 0).astype(float)
        sides = []
        for part in (turned, 1 - turned):
            size = part @ w
            sides.append(np.where(size > 0, (part @ (d * w)) / np.where(size > 0, size, 1), np.nan))
        least.append(np.where(np.isnan(sides).any(0), -np.inf, np.fmin(*sides)))
        most.append(np.where(np.isnan(sides).any(0), np.inf, np.fmax(*sides)))
    return np.concatenate(least), np.concatenate(most)


def _signs(n: int, rule: Rule) -> Iterator[np.ndarray]:
    """`resamples` random choices of n signs, in parts; equal ones for equal n and rule."""
    draw = np.random.default_rng(rule.seed)
    for count in _chunks(rule.resamples, n):
        yield draw.integers(2, size=(count, n), dtype=np.int8) * 2 - 1


def smallest_p(n: int, rule: Rule = Rule()) -> float:
    """The smallest p that `sign_flip` can give for n differences: 2 / 2^n as long as it is exact."""
    return 2.0 ** (1 - max(n, 1)) if n <= EXACT else 1 / (1 + rule.resamples)


def seeds_for(comparisons: int, alpha: float, groups: int = 1) -> int:
    """The fewest seeds with which the exact test could decide each of so many comparisons, each over so many groups:
    2 m / 2^(seeds groups) <= alpha."""
    return math.ceil(math.log2(2 * comparisons / alpha) / groups)


def _chunks(count: int, width: int, most: int = 1 << 22) -> list[int]:
    """`count` in parts whose product with `width` stays in memory."""
    part = max(1, most // max(width, 1))
    return [min(part, count - start) for start in range(0, count, part)]


def weighed(groups: Sequence[Sequence[float]]) -> list[float]:
    """The differences of several groups as terms of one sum, the mean over groups of their means: d / (n_g G)."""
    return [float(v) / (len(group) * len(groups)) for group in groups for v in group]


def standardised(groups: Sequence[Sequence[float]]) -> list[float]:
    """The same of groups whose figures have different units: d / (n_g rms_g), so every group weighs the same.  A
    group's root mean square does not change when signs flip: `sign_flip` of these is exact too."""
    terms: list[float] = []
    for group in groups:
        d = np.asarray(group, float)
        size = rms(group)
        terms += [float(v) / (d.size * size) if size else 0.0 for v in d]
    return terms


def rms(values: Sequence[float]) -> float:
    """The root mean square; 0 of no values."""
    d = np.asarray(values, float)
    return math.sqrt(float(np.mean(d**2))) if d.size else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p (1979): sorted, times m, m - 1, ... 1, made monotone, at most 1."""
    values = np.asarray(p, float)
    order, adjusted, highest = np.argsort(values, kind="stable"), np.empty(values.size), 0.0
    for i, k in enumerate(order):
        highest = max(highest, min(1.0, float(values[k]) * (values.size - i)))
        adjusted[k] = highest
    return [float(v) for v in adjusted]


def decidable(smallest: Sequence[float], alpha: float) -> list[bool]:
    """Which comparisons any outcome could decide, from their smallest reachable p alone (Tarone 1990).

    The others need not be paid for in the correction, because they are never called: with K the smallest number for
    which at most K comparisons can reach alpha / K, these are the ones that can.
    """
    for k in range(1, len(smallest) + 1):
        within = [s <= alpha / k for s in smallest]
        if sum(within) <= k:
            return within
    return [False] * len(smallest)


def corrected(p: Sequence[float], smallest: Sequence[float], alpha: float) -> list[float | None]:
    """Holm's adjusted p over the decidable comparisons; None for the others."""
    within = decidable(smallest, alpha)
    adjusted = iter(holm([v for v, counts in zip(p, within, strict=True) if counts]))
    return [next(adjusted) if counts else None for counts in within]


def verdict(gain: float, p_holm: float | None, alpha: float) -> str:
    """`gain` is the mean difference, turned so that more is better."""
    if p_holm is None:
        return UNDECIDED
    return NOT_SHOWN if p_holm > alpha else WIN if gain > 0 else LOSS


def ranks(arms: Sequence[str], table: Sequence[Sequence[float]], rule: Rule = Rule()) -> Ranks | None:
    """Average ranks, Friedman's test (with ties) and Nemenyi's critical difference q_alpha sqrt(k (k + 1) / 6 N).

    Friedman's p is (1 + hits) / (1 + resamples) of random permutations of the ranks within each group; his chi-square
    and Iman and Davenport's F are for many groups (for two that agree on three arms F says p = 0, the truth is 1/6).
    `table`: one row of qualities (more is better) per group, one column per arm.  None for fewer than two groups or
    three arms, where the tests do not exist.
    """
    values = np.asarray(table, float)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 3:
        return None
    n, k = values.shape
    ranked = stats.rankdata(-values, axis=1)
    average = ranked.mean(0)
    alike = bool((ranked == ranked[:, :1]).all())  # every arm ties with every other in every group: 0 / 0
    chi2 = 0.0 if alike else float(stats.friedmanchisquare(*ranked.T).statistic)
    order = sorted(range(k), key=lambda i: (average[i], arms[i]))
    names, means = tuple(arms[i] for i in order), tuple(float(average[i]) for i in order)
    critical = (
        float(stats.studentized_range.ppf(1 - rule.alpha, k, math.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / 6 / n)
    )
    return Ranks(names, means, n, chi2, _friedman(ranked, rule), critical, _cliques(names, means, critical))


def standings(qualities: Sequence[float]) -> list[float]:
    """Minus the rank of each, 1 for the best: more is better, in any unit."""
    return [-float(r) for r in stats.rankdata([-q for q in qualities])]


def _friedman(ranked: np.ndarray, rule: Rule) -> float:
    """The p of Friedman's statistic, which grows with the sum over arms of the squared sums of ranks."""
    seen = float(np.sum(ranked.sum(0) ** 2)) * (1 - 1e-9)
    draw, hits = np.random.default_rng(rule.seed), 0
    for count in _chunks(rule.resamples, ranked.size):
        shuffled = draw.permuted(np.broadcast_to(ranked, (count, *ranked.shape)), axis=2)
        hits += int(np.sum((shuffled.sum(1) ** 2).sum(1) >= seen))
    return (1 + hits) / (1 + rule.resamples)


def _cliques(names: Sequence[str], means: Sequence[float], critical: float) -> tuple[tuple[str, ...], ...]:
    """Runs of neighbours (sorted by rank) whose ends are closer than `critical`; none that lies within another."""
    found, reached = [], 0
    for i in range(len(names)):
        end = max(j for j in range(i, len(names)) if means[j] - means[i] < critical)
        if end > i and end > reached:
            found.append(tuple(names[i : end + 1]))
            reached = end
    return tuple(found)
