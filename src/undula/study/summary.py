"""From the runs of a study to the rows of its tables: what each arm came to, and against the baseline."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from . import statistics as S
from .outcome import FINAL, ChosenRate, Outcome
from .table import (
    Comparison,
    Group,
    Pooled,
    Row,
    Summary,
    failed,
    measured,
)

Figures = Mapping[tuple[Group, str], Mapping[int, float]]  # of a group's arm, by seed


def summarise(
    outcomes: Iterable[Outcome],
    chosen: Iterable[ChosenRate],
    baseline: str,
    rule: S.Rule = S.Rule(),
    split: str = "test",
    floors: Mapping[str, float] | None = None,
) -> Summary:
    """The figures of a study.  The order of the runs does not matter; without a figure of the baseline nothing is
    compared.  `split` names the rows of the figures; `floors`: by data set, what an answer that never
    looks at its input would have.

    Raises ValueError for no final runs, for two final runs of one arm, group and seed, and for several metrics in a
    group.
    """
    runs = tuple(sorted(outcomes, key=lambda o: (*o.group, o.arm, o.stage, o.lr, o.seed)))
    rates = tuple(sorted(chosen, key=lambda c: (*c.group, c.arm, c.seed is not None, c.seed)))
    _check(runs)
    figures = _figures(runs)
    rows = _rows(runs, rates, figures, baseline, rule)
    pooled = _pooled(rows, figures, baseline, rule)
    rows, pooled = _decided(rows, pooled, baseline, rule)
    ranked, unranked = _ranked(rows, rule)
    wrong = tuple(o for o in runs if failed(o))
    return Summary(
        baseline, rule, split, runs, rates, tuple(rows), tuple(pooled), ranked, unranked, wrong, floors or {}
    )


def _check(runs: Sequence[Outcome]) -> None:
    finals = [o for o in runs if o.stage == FINAL]
    if not finals:
        errors = Counter(o.error for o in runs if o.error)
        told = "".join(f"\n  {count} of them failed: {error}" for error, count in errors.most_common(5))
        raise ValueError(f"there is nothing to compare yet: none of the {len(runs)} runs is a final one{told}")
    seen = Counter((*o.group, o.arm, f"seed {o.seed}") for o in finals)
    faults = [f"{count} final runs of {', '.join(key)}" for key, count in seen.items() if count > 1]
    for group in sorted({o.group for o in runs}):
        kinds = sorted({(o.metric, o.more_is_better) for o in runs if o.group == group})
        if len(kinds) > 1:
            faults.append(f"{', '.join(group)} is measured by {' and '.join(metric for metric, _ in kinds)}")
    if faults:
        raise ValueError(f"these runs cannot be compared: {'; '.join(faults)}")


def _rows(
    runs: Sequence[Outcome], rates: Sequence[ChosenRate], figures: Figures, baseline: str, rule: S.Rule
) -> list[Row]:
    """By group, in each the best first."""
    made: dict[tuple[Group, str], list[Outcome]] = {}
    for run in runs:
        made.setdefault((run.group, run.arm), []).append(run)
    chosen: dict[tuple[Group, str], list[ChosenRate]] = {}
    for rate in rates:
        chosen.setdefault((rate.group, rate.arm), []).append(rate)
    rows = []
    for (group, arm), here in made.items():
        own = figures.get((group, arm), {})
        d = list(_differences(own, figures.get((group, baseline), {})).values())
        against = _against(d, here[0].more_is_better, rule) if arm != baseline and d else None
        rows.append(_row(here, chosen.get((group, arm), []), own, against, rule))
    return sorted(rows, key=lambda r: (r.group, r.quality is None, -_quality(r) if r.quality else 0.0, r.arm))


def _figures(runs: Iterable[Outcome]) -> Figures:
    """{(group, arm): {seed: test metric}} of the final runs."""
    found: dict[tuple[Group, str], dict[int, float]] = {}
    for o in runs:
        if o.stage == FINAL and measured(o) and o.test is not None:
            found.setdefault((o.group, o.arm), {})[o.seed] = o.test
    return found


def _differences(arm: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """{seed: arm - baseline} of the pairs."""
    return {seed: arm[seed] - baseline[seed] for seed in sorted(set(arm) & set(baseline))}


def _against(d: Sequence[float], more_is_better: bool, rule: S.Rule) -> Comparison:
    sign, mean = 1 if more_is_better else -1, fmean(d)
    low, high = S.interval([d], rule) or (None, None)
    return Comparison(
        pairs=len(d),
        ahead=sum(sign * v > 0 for v in d),
        difference=mean,
        gain=sign * mean,
        low=low,
        high=high,
        p=S.sign_flip(d, rule),
        smallest_p=S.smallest_p(len(d), rule),
    )


def _row(
    runs: Sequence[Outcome],
    chosen: Sequence[ChosenRate],
    figures: Mapping[int, float],
    against: Comparison | None,
    rule: S.Rule,
) -> Row:
    finals = [o for o in runs if o.stage == FINAL]
    good, first = [o for o in finals if measured(o)], runs[0]
    ranks = _some(o.ranks for o in good)
    return Row(
        *(*first.group, first.arm, first.metric, first.more_is_better),
        quality=S.spread(list(figures.values()), rule.confidence) if figures else None,
        against=against,
        failed=len(finals) - len(good),
        failed_sweep=sum(failed(o) for o in runs if o.stage != FINAL),
        parameters=max(_some(o.parameters for o in finals), default=None),
        wanted_parameters=max(_some(o.wanted_parameters for o in finals), default=None),
        head_parameters=max(_some(o.head_parameters for o in finals), default=None),
        ranks=fmean(ranks) if ranks else None,
        rates=tuple(sorted({o.lr for o in finals} or {c.lr for c in chosen})),
        bracketed=all(c.bracketed for c in chosen) if chosen else None,
        shared=any(c.seed is None for c in chosen),
        deployed=_means([o.deployed for o in good]),
        deployed_error=_means([o.deployed_error for o in good]),
        place=first.place,
    )


def _some(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if v is not None]


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{form: mean} over the runs that were measured in that form."""
    return {form: fmean(f[form] for f in found if form in f) for form in sorted({k for f in found for k in f})}


def _pooled(rows: Sequence[Row], figures: Figures, baseline: str, rule: S.Rule) -> list[Pooled]:
    """The arms that are compared in two groups or more.  Precisions, options and budgets of one model on one data
    source share seeds, rows, order and at times whole runs, so they are no new evidence: a pair is a seed on a place,
    its gain the mean over them."""
    made = []
    for arm in sorted({row.arm for row in rows} - {baseline}):
        compared = [row for row in rows if row.arm == arm and row.against is not None]
        if len(compared) < 2:
            continue
        alike = len({row.metric for row in compared}) == 1
        gains = _gains(compared, figures, baseline, alike)
        terms = S.weighed(gains) if alike else S.standardised(gains)
        pairs, lean = sum(map(len, gains)), sum(terms) / (1 if alike else len(gains))
        low, high = (S.interval(gains, rule) if alike else None) or (None, None)
        made.append(
            Pooled(
                *(arm, len(compared), pairs, sum(v > 0 for d in gains for v in d)),
                *(lean if alike else None, low, high, lean),
                p=S.sign_flip(terms, rule),
                smallest_p=S.smallest_p(pairs, rule),
                verdicts={},
            )
        )
    return made


def _gains(compared: Sequence[Row], figures: Figures, baseline: str, alike: bool) -> list[list[float]]:
    """Of every place the gain of each pair, the mean over the groups there; in units of its group's root mean square
    where the metrics are not alike, which flips of the signs leave as it is."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in compared:
        d = _differences(figures[row.group, row.arm], figures[row.group, baseline])
        size = 1.0 if alike else S.rms(list(d.values())) or 1.0
        for seed, value in d.items():
            found.setdefault(row.place, {}).setdefault(seed, []).append(
                (value if row.more_is_better else -value) / size
            )
    return [[fmean(d) for d in seeds.values()] for seeds in found.values()]


def _decided(
    rows: Sequence[Row], pooled: Sequence[Pooled], baseline: str, rule: S.Rule
) -> tuple[list[Row], list[Pooled]]:
    """The same with adjusted p and verdicts: one family of all comparisons, in groups and pooled.  Where one choice of
    a rate serves all seeds of an arm or of the baseline, seeds are no independent evidence on the method: such a
    comparison has its p, at these rates, and no verdict."""
    by_luck = {(row.group, row.arm) for row in rows if row.shared}
    shared = {(row.group, row.arm) for row in rows if by_luck & {(row.group, row.arm), (row.group, baseline)}}
    arms = {arm for _, arm in shared}
    family: list[Comparison | Pooled] = [r.against for r in rows if r.against and (r.group, r.arm) not in shared]
    family += [each for each in pooled if each.arm not in arms]
    adjusted = iter(S.corrected([c.p for c in family], [c.smallest_p for c in family], rule.alpha))
    told = []
    for row in rows:
        if row.against is not None:
            holm, verdict = None, S.SHARED
            if (row.group, row.arm) not in shared:
                holm = next(adjusted)
                verdict = S.verdict(row.against.gain, holm, rule.alpha)
            row = dataclasses.replace(row, against=dataclasses.replace(row.against, p_holm=holm, verdict=verdict))
        told.append(row)
    summed = []
    for each in pooled:
        holm = None if each.arm in arms else next(adjusted)
        counts = Counter(row.against.verdict for row in told if row.arm == each.arm and row.against is not None)
        verdict = S.SHARED if each.arm in arms else S.verdict(each.lean, holm, rule.alpha)
        summed.append(dataclasses.replace(each, p_holm=holm, verdict=verdict, verdicts=dict(counts)))
    return told, summed


def _ranked(rows: Sequence[Row], rule: S.Rule) -> tuple[S.Ranks | None, tuple[str, ...]]:
    """The ranks, on every place, of the arms that have a figure in all groups; and the other arms.  Over the groups of
    a place the mean is ranked, of their ranks where their metrics differ: they are no new evidence here either."""
    arms = sorted({row.arm for row in rows})
    groups = sorted({row.group for row in rows if row.quality is not None})
    found = {(row.group, row.arm): row for row in rows if row.quality is not None}
    whole = [arm for arm in arms if all((group, arm) in found for group in groups)]
    if not whole:
        return None, tuple(arms)
    places: dict[tuple[str, str], list[list[Row]]] = {}
    for group in groups:
        here = [found[group, arm] for arm in whole]
        places.setdefault(here[0].place, []).append(here)
    table = []
    for _, held in sorted(places.items()):
        alike = len({here[0].metric for here in held}) == 1
        figures = [
            [_quality(row) for row in here] if alike else S.standings([_quality(r) for r in here]) for here in held
        ]
        table.append([fmean(column) for column in zip(*figures, strict=True)])
    return S.ranks(whole, table, rule), tuple(arm for arm in arms if arm not in whole)


def _quality(row: Row) -> float:
    """The mean, turned so that more is better."""
    assert row.quality is not None
    return row.quality.mean if row.more_is_better else -row.quality.mean
