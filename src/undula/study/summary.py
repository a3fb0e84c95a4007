"""From the runs of a study to the rows of its tables: what each arm came to, and against the baseline."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from . import statistics as S
from .outcome import FINAL, ChosenRate, Outcome
from .table import Comparison, Group, Pooled, Row, Summary, failed, measured


def summarise(
    outcomes: Iterable[Outcome],
    chosen: Iterable[ChosenRate],
    baseline: str,
    rule: S.Rule = S.Rule(),
    split: str = "test",
) -> Summary:
    """The figures of a study.  The order of the runs does not matter; without a figure of the baseline nothing is
    compared.  `split` names the rows of the figures.

    Raises ValueError for no final runs, for two final runs of one arm, group and seed, and for several metrics in a
    group.
    """
    runs = tuple(sorted(outcomes, key=lambda o: (*o.group, o.arm, o.stage, o.lr, o.seed)))
    rates = tuple(sorted(chosen, key=lambda c: (*c.group, c.arm)))
    _check(runs)
    groups = sorted({o.group for o in runs})
    rows = [row for group in groups for row in _rows(runs, rates, group, baseline, rule)]
    pooled = _pooled(rows, runs, baseline, rule)
    rows, pooled = _decided(rows, pooled, rule)
    ranked, unranked = _ranked(rows, rule)
    wrong = tuple(o for o in runs if failed(o))
    return Summary(baseline, rule, split, runs, rates, tuple(rows), tuple(pooled), ranked, unranked, wrong)


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


def _rows(runs: Sequence[Outcome], rates: Sequence[ChosenRate], group: Group, baseline: str, rule: S.Rule) -> list[Row]:
    here = [o for o in runs if o.group == group]
    arms = sorted({o.arm for o in here})
    figures = {arm: _figures(here, arm) for arm in arms}
    made = []
    for arm in arms:
        d = _differences(figures[arm], figures.get(baseline, {}))
        against = _against(list(d.values()), here[0].more_is_better, rule) if arm != baseline and d else None
        rate = next((c for c in rates if (c.group, c.arm) == (group, arm)), None)
        made.append(_row([o for o in here if o.arm == arm], rate, figures[arm], against, rule))
    return sorted(made, key=lambda r: (r.quality is None, -_quality(r) if r.quality else 0.0, r.arm))


def _figures(runs: Iterable[Outcome], arm: str) -> dict[int, float]:
    """{seed: test metric} of an arm's final runs in one group."""
    return {o.seed: o.test for o in runs if o.arm == arm and o.stage == FINAL and measured(o) and o.test is not None}


def _differences(arm: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """{seed: arm - baseline} of the pairs."""
    return {seed: arm[seed] - baseline[seed] for seed in sorted(set(arm) & set(baseline))}


def _against(d: Sequence[float], more_is_better: bool, rule: S.Rule) -> Comparison:
    sign, over = 1 if more_is_better else -1, S.spread(d, rule.confidence)
    low, high = S.bootstrap(d, rule) or (None, None)
    return Comparison(
        pairs=len(d),
        ahead=sum(sign * v > 0 for v in d),
        difference=over.mean,
        gain=sign * over.mean,
        low=over.low,
        high=over.high,
        bootstrap_low=low,
        bootstrap_high=high,
        p=S.sign_flip(d, rule),
        smallest_p=S.smallest_p(len(d), rule),
    )


def _row(
    runs: Sequence[Outcome],
    rate: ChosenRate | None,
    figures: Mapping[int, float],
    against: Comparison | None,
    rule: S.Rule,
) -> Row:
    finals = [o for o in runs if o.stage == FINAL]
    good, first = [o for o in finals if measured(o)], runs[0]
    tried = sorted({o.lr for o in finals})
    memory = _some(o.peak_memory_bytes for o in good)
    seconds = _some(o.seconds_per_step for o in good)
    return Row(
        *(*first.group, first.arm, first.metric, first.more_is_better),
        quality=S.spread(list(figures.values()), rule.confidence) if figures else None,
        against=against,
        failed=len(finals) - len(good),
        failed_sweep=sum(failed(o) for o in runs if o.stage != FINAL),
        parameters=max(_some(o.parameters for o in finals), default=None),
        wanted_parameters=max(_some(o.wanted_parameters for o in finals), default=None),
        head_parameters=max(_some(o.head_parameters for o in finals), default=None),
        seconds_per_step=median(seconds) if seconds else None,
        peak_memory_bytes=round(median(memory)) if memory else None,
        lr=rate.lr if rate else tried[0] if len(tried) == 1 else None,
        bracketed=rate.bracketed if rate else None,
        deployed=_means([o.deployed for o in good]),
        deployed_error=_means([o.deployed_error for o in good]),
    )


def _some(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if v is not None]


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{form: mean} over the runs that were measured in that form."""
    return {form: fmean(f[form] for f in found if form in f) for form in sorted({k for f in found for k in f})}


def _pooled(rows: Sequence[Row], runs: Sequence[Outcome], baseline: str, rule: S.Rule) -> list[Pooled]:
    """The arms that are compared in two groups or more.  Budgets share seeds, rows and at times whole runs, so they are
    no new evidence: a pair is a seed on a model and data set, its gain the mean over the budgets."""
    made = []
    for arm in sorted({row.arm for row in rows} - {baseline}):
        compared = [row for row in rows if row.arm == arm and row.against is not None]
        if len(compared) < 2:
            continue
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        for row in compared:
            here = [o for o in runs if o.group == row.group]
            seeds = found.setdefault((row.model, row.data), {})
            for seed, d in _differences(_figures(here, arm), _figures(here, baseline)).items():
                seeds.setdefault(seed, []).append(d if row.more_is_better else -d)
        gains = [[fmean(d) for d in seeds.values()] for seeds in found.values()]
        pairs, alike = sum(map(len, gains)), len({row.metric for row in compared}) == 1
        terms = S.standardised(gains)
        made.append(
            Pooled(
                *(arm, len(compared), pairs, sum(v > 0 for d in gains for v in d)),
                gain=S.pooled(gains, rule.confidence) if alike else None,
                lean=sum(terms) / len(gains),
                p=S.sign_flip(terms, rule),
                smallest_p=S.smallest_p(pairs, rule),
                verdicts={},
            )
        )
    return made


def _decided(rows: Sequence[Row], pooled: Sequence[Pooled], rule: S.Rule) -> tuple[list[Row], list[Pooled]]:
    """The same with adjusted p and verdicts: one family of all comparisons, in groups and pooled."""
    single = [row.against for row in rows if row.against is not None]
    every: list[Comparison | Pooled] = [*single, *pooled]
    adjusted = iter(S.corrected([c.p for c in every], [c.smallest_p for c in every], rule.alpha))
    told = []
    for row in rows:
        if row.against is not None:
            holm = next(adjusted)
            verdict = S.verdict(row.against.gain, holm, rule.alpha)
            row = dataclasses.replace(row, against=dataclasses.replace(row.against, p_holm=holm, verdict=verdict))
        told.append(row)
    summed = []
    for each in pooled:
        holm = next(adjusted)
        counts = Counter(row.against.verdict for row in told if row.arm == each.arm and row.against is not None)
        verdict = S.verdict(each.lean, holm, rule.alpha)
        summed.append(dataclasses.replace(each, p_holm=holm, verdict=verdict, verdicts=dict(counts)))
    return told, summed


def _ranked(rows: Sequence[Row], rule: S.Rule) -> tuple[S.Ranks | None, tuple[str, ...]]:
    """The ranks, on every model and data set, of the arms that have a figure in all groups; and the other arms.  Over
    budgets the mean is ranked: they are no new evidence here either."""
    found = {(row.group, row.arm): _quality(row) for row in rows if row.quality is not None}
    arms = sorted({row.arm for row in rows})
    groups = sorted({group for group, _ in found})
    whole = [arm for arm in arms if all((group, arm) in found for group in groups)]
    places = sorted({(model, data) for model, data, _ in groups})
    table = [[fmean(found[g, arm] for g in groups if g[:2] == place) for arm in whole] for place in places]
    return S.ranks(whole, table, rule), tuple(arm for arm in arms if arm not in whole)


def _quality(row: Row) -> float:
    """The mean, turned so that more is better."""
    assert row.quality is not None
    return row.quality.mean if row.more_is_better else -row.quality.mean
