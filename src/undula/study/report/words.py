"""The plain words of a report: what was compared, who won, what could not be told, and what the figures do not say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .. import statistics as S
from ..outcome import FINAL, SWEEP
from ..table import Group, Row, Summary

VERDICTS = {
    S.WIN: "better",
    S.LOSS: "worse",
    S.NOT_SHOWN: "not shown to differ",
    S.UNDECIDED: "undecidable with these seeds",
    S.SHARED: "compared at these chosen rates alone",
}
LOOKS = {S.WIN: "win", S.LOSS: "loss"}  # of marks and points; the rest looks alike


def look(verdict: str) -> str:
    """How a verdict is drawn."""
    return LOOKS.get(verdict, "open-verdict")


def called(group: Group) -> str:
    return ", ".join(group)


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    found = list(names)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def some(count: int, thing: str, things: str = "") -> str:
    """1 run, 2 runs."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def figure(value: float | None) -> str:
    """A metric's value."""
    if value is None:
        return ""
    if value and abs(value) < 5e-4:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def chance(p: float | None) -> str:
    if p is None:
        return ""
    return "1e-12 at most" if p < 1e-12 else f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def opening(summary: Summary, notes: Sequence[str] = ()) -> tuple[str, ...]:
    """What the reader should know first; `notes` about the whole stand behind the first sentence."""
    found = [_what(summary), *notes, *_without_figure(summary)]
    found += [SHARED_RATES] if summary.shared else []
    found += [_over_all(summary)] if summary.pooled else []
    found += [_in_group(summary, group) for group in summary.groups]
    found += [_too_few(summary)] if _undecided(summary) else []
    return (*found, _rates(summary), *_failed(summary))


SHARED_RATES = (
    "Where one choice of a rate serves all seeds of an arm, nothing is called a win or a loss of the method: the luck "
    "of that one choice moves all of its seeds the same way, and no number of seeds sees it. Such figures and their p "
    "hold at these chosen rates. A study without [sweep] seeds lets each seed sweep for itself."
)


def _what(summary: Summary) -> str:
    finals = [o for o in summary.runs if o.stage == FINAL]
    counts = sorted({row.quality.n for row in summary.rows if row.quality})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    groups = some(len(summary.groups), "group (model, data, budget)", "groups (model, data, budget)")
    compared = f"Every arm is compared with the baseline {summary.baseline}, on {summary.split} rows"
    compared += " that chose nothing" if summary.rates else ""
    if not any(row.quality for row in summary.rows if row.arm == summary.baseline):
        compared = f"The baseline {summary.baseline} has no figure, so nothing is compared with it"
    return (
        f"{some(len(summary.arms), 'arm')} in {groups}, {seeds} measured {'seed' if seeds == '1' else 'seeds'} each, "
        f"{some(len(finals), 'final run')} in all. {compared}."
    )


def _without_figure(summary: Summary) -> tuple[str, ...]:
    lacking = [f"{row.arm} ({called(row.group)})" for row in summary.rows if row.quality is None]
    if not lacking:
        return ()
    names = listed(lacking) if len(lacking) <= 6 else f"{len(lacking)} arms in their groups, see Every figure"
    return (f"No final run has given a figure of: {names}.",)


def _by_verdict(verdicts: Sequence[tuple[str, str]], than: str) -> str:
    """`verdicts`: (verdict, arm)."""
    parts = []
    for verdict, words in VERDICTS.items():
        arms = [arm for v, arm in verdicts if v == verdict]
        if not arms:
            continue
        names = listed(arms) if len(arms) <= 8 or verdict in (S.WIN, S.LOSS) else f"{len(arms)} arms"
        parts.append(f"{words}{' than ' + than if verdict in (S.WIN, S.LOSS) else ''}: {names}")
    return "; ".join(parts) or "nothing could be compared"


def _over_all(summary: Summary) -> str:
    count = len(summary.groups)
    arms = [
        (each.verdict, each.arm if each.groups == count else f"{each.arm} (in {each.groups} of {count})")
        for each in summary.pooled
    ]
    return f"Over all groups together: {_by_verdict(arms, summary.baseline)}."


def _in_group(summary: Summary, group: Group) -> str:
    rows = summary.rows_of(group)
    verdicts = [(row.against.verdict, row.arm) for row in rows if row.against]
    best = next((row for row in rows if row.quality), None)
    words = f"{called(group)}: {_by_verdict(verdicts, summary.baseline)}."
    if best is None or best.quality is None:
        return f"{words} No run gave a figure."
    extreme = "highest" if best.more_is_better else "lowest"
    base = next((row for row in rows if row.arm == summary.baseline and row.quality), None)
    beside = f" ({summary.baseline}: {figure(base.quality.mean)})" if base and base.quality and base != best else ""
    equals = [row.arm for row in rows if row.quality and _same(row.quality.mean, best.quality.mean)]
    if len(equals) == sum(row.quality is not None for row in rows) > 1:
        told = f"{words} Every arm has the same mean {best.metric}, {figure(best.quality.mean)}."
    else:
        whose = f"{best.arm}'s" if len(equals) == 1 else f"that of {listed(equals)}"
        told = f"{words} The {extreme} mean {best.metric} is {whose}, {figure(best.quality.mean)}{beside}."
    return told + _beside_floor(summary, group)


def _same(a: float, b: float) -> bool:
    """But for the rounding of a mean."""
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


def _beside_floor(summary: Summary, group: Group) -> str:
    """Who is no better than an answer that never looks at its input."""
    floor = summary.floors.get(group[1])
    if floor is None:
        return ""
    rows = [row for row in summary.rows_of(group) if row.quality]
    none = [
        row.arm
        for row in rows
        if row.quality and ((row.quality.mean > floor) != row.more_is_better or _same(row.quality.mean, floor))
    ]
    told = f" Always answering the commonest class of the training rows gives {figure(floor)}"
    if not none:
        return f"{told}."
    return f"{told}, and no better than that: {listed(none) if len(none) < len(rows) else 'every arm'}."


def _undecided(summary: Summary) -> list[Row]:
    """An untrained model has one run, and no seeds would change that."""
    return [r for r in summary.rows if r.against and r.against.verdict == S.UNDECIDED and not r.untrained]


def _too_few(summary: Summary) -> str:
    """How many seeds it would take."""
    rows, alpha = _undecided(summary), summary.rule.alpha
    trained = [row for row in summary.rows if row.against and not row.untrained]
    pooled = [each for each in summary.pooled if each.arm in {row.arm for row in trained}]
    pairs = max(row.against.pairs for row in rows if row.against)
    one, every = (S.seeds_for(m, alpha) for m in (1, len(trained) + len(pooled)))
    needed = f"{one} seeds would do for a single comparison"
    if every > one:
        needed += f", {every} for all {len(trained) + len(pooled)} of this report"
    if any(each.verdict == S.UNDECIDED for each in pooled):
        over = S.seeds_for(len(pooled), alpha, summary.places)
        needed += f", {over} for those over all groups together, where an arm has figures in every group"
    return (
        f"Undecidable does not mean equal. With {some(pairs, 'pair')} of seeds the smallest p that the exact test can "
        f"give is {chance(S.smallest_p(pairs, summary.rule))}, whatever the figures: {needed}. Until then there are "
        "only the intervals and the dots below, and they are no verdict."
    )


def _rates(summary: Summary) -> str:
    tried = [lr for c in summary.rates for lr, _ in c.tried]
    if not tried:
        return (
            "No learning rate was searched for: every arm was trained at the rate it was given, and what is said holds "
            "at these rates. Rates that were found by trying share the luck of that choice over all seeds."
        )
    loose = [f"{c.arm} ({called(c.group)})" for c in summary.rates if not c.bracketed]
    swept = sorted({o.seed for o in summary.runs if o.stage == SWEEP})
    each = "Each final seed of each arm chose its own learning rate on validation rows, by runs of its own"
    once = f"Each arm's learning rate was chosen once on validation rows, with {some(len(swept), 'seed')}"
    own = {c.seed is not None for c in summary.rates}
    how = each if own == {True} else once if own == {False} else f"{each}, or once for all seeds"
    text = f"{how}, among rates from {min(tried):g} to {max(tried):g}. "
    pruned = sum(o.pruned for o in summary.runs)
    text += f"Successive halving ended {pruned:,} of its runs early. " if pruned else ""
    if not loose:
        return text + "Every chosen rate lies between rates that did no better."
    names = listed(sorted(set(loose))) if len(set(loose)) <= 6 else f"{len(loose)} of {len(summary.rates)} choices"
    return text + (
        f"Unbracketed, that is at an edge of what was tried, so that the arm may be better than it seems: {names}."
    )


def _failed(summary: Summary) -> tuple[str, ...]:
    if not summary.failures:
        return ()
    finals = sum(o.stage == FINAL for o in summary.failures)
    return (
        f"{some(len(summary.failures), 'run')} failed ({finals} of them final). A failed final run is missing from its "
        "arm's mean and from its pairs: read what an arm came to together with how often it failed.",
    )


def limits(summary: Summary) -> tuple[str, ...]:
    """What is computed, what decides, and what the figures do not say."""
    rule, pairs = summary.rule, [row.against.pairs for row in summary.rows if row.against]
    percent = f"{rule.confidence:.0%}".replace("%", " %")
    found = [
        "A pair is a seed with which both the arm and the baseline were trained; seeds that only one of them has do "
        "not enter the comparison. The difference is arm - baseline.",
        "What decides: the exact two-sided sign-flip permutation test of the paired differences (beyond "
        f"{S.EXACT} pairs {rule.resamples:,} random flips), corrected by Holm over the {summary.corrected} comparisons "
        f"of this report that so many seeds could decide at all (Tarone); the other "
        f"{summary.compared - summary.corrected} are not called and cost nothing. Win or loss: corrected p at "
        f"most {rule.alpha:g}. So the chance that a report without any true difference calls a win or a loss is at "
        f"most {rule.alpha:g}, as long as the seeds share no luck: their rates were given, or each seed swept for "
        "itself.",
        "Not shown and undecided both mean that no difference was shown. Neither means that there is none: no two arms "
        "are called equal here.",
        f"Intervals of differences are those of the same test, {percent} each by itself: the shifts that it does not "
        "reject. One leaves 0 out exactly when its p, before the correction, is at most "
        f"{1 - rule.confidence:.2g}; with fewer than {S.seeds_for(1, 1 - rule.confidence)} pairs there is none. The "
        "interval of an arm's own mean in the drawings is Student's.",
    ]
    if any(n == 1 for n in pairs):
        found.append("An arm with one pair of seeds has no interval and no test: one run says nothing about the next.")
    found.append(
        "Seeds stand for the noise of training (factors, head, order of rows, and the rate where each sweeps for "
        "itself), not for other test rows: two arms may differ on these rows and not on others."
    )
    if summary.pooled:
        found.append(
            "Over all groups: the same test on the pairs of all models and data sets, of the mean gain over them, each "
            "counting the same; where they have different metrics, each difference is divided by the root mean square "
            "there. Precisions, options and budgets of one model on one data set are no new evidence: a pair's "
            "difference is the mean over them. Runs on different models or data count as independent. It is about "
            "these groups. Average ranks with Friedman's test and Nemenyi's critical difference ask about groups in "
            "general; they take groups as independent, which groups that share data are not, and see little with "
            "fewer than about ten."
        )
    return tuple(found)
