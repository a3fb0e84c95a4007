"""The sections of a report, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ...observe.page.content import (
    Block,
    Bullets,
    Code,
    Draw,
    Drawn,
    Figure,
    Mark,
    Section,
    Table,
    Text,
)
from .. import statistics as S
from ..outcome import Outcome
from ..table import (
    Comparison,
    Group,
    Pooled,
    Row,
    Summary,
    why,
)
from . import curves, plots, words

WORDS = frozenset({"arm", "verdict", "rate", "rates", "model", "data", "budget", "stage", "why"})
NONE = "none"  # said of an interval, where others have one
CUT = " (an arrow where it goes on)"
LOOK = (
    "Blue triangles up: a win. Orange triangles down: a loss. Grey circles: no difference is shown. Diamond: the "
    "baseline. Dotted: what always answering the commonest class gives."
)


def document(
    summary: Summary, about: Mapping[str, str], notes: Sequence[str] = (), extra: Sequence[Section] = ()
) -> tuple[Section, ...]:
    """Everything that the report says; `notes` are told early, `extra` stands behind the results."""
    made = [
        Section("In plain words", (Bullets(words.opening(summary, notes)),)),
        Section("Results", tuple(_results(summary))),
        *extra,
        Section("Over all groups", tuple(_over_all(summary))),
        Section("Quality against parameters", tuple(_fronts(summary))),
        Section("Learning rates", tuple(_rates(summary))),
        Section("Training", tuple(_courses(summary))),
        Section("As deployed", tuple(_deployed(summary))),
        Section("Every figure", tuple(_whole(summary))),
        Section("Failed runs", tuple(_failures(summary))),
        Section("What the figures say, and what not", (Bullets(words.limits(summary)),)),
        Section("What was run, and how to repeat it", tuple(Code(name, text) for name, text in about.items())),
    ]
    return tuple(_without_empty(section) for section in made if section.blocks)


def _without_empty(section: Section) -> Section:
    """Its tables without the columns in which nothing stands."""
    return Section(section.title, tuple(_filled(b) if isinstance(b, Table) else b for b in section.blocks))


def _filled(table: Table) -> Table:
    kept = [i for i, _ in enumerate(table.head) if any(row[i] not in ("", NONE) for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(tuple(table.head[i] for i in kept), rows, table.caption, table.words)


def _each(summary: Summary, name: str, caption: str, draw: Callable[[Group], Draw | None]) -> Iterator[Figure]:
    """The figure of every group."""
    for i, group in enumerate(summary.groups, 1):
        if (drawn := draw(group)) is not None:
            yield Figure(f"{name}-{i}", words.called(group), caption, drawn)


def _results(summary: Summary) -> Iterator[Block]:
    sure = f"{100 * summary.rule.confidence:g} % interval"
    head = ("arm", "seeds", "mean", "standard error", "difference", sure, "ahead", "p", "p (Holm)", "verdict")
    for group in summary.groups:
        rows = summary.rows_of(group)
        cells = tuple((_named(row, summary), *_quality(row), *_against(row.against)) for row in rows)
        caption = f"{words.called(group)}: {plots.better(rows[0])}, {summary.split} rows"
        yield Table(head, cells, caption, WORDS)
    yield Text(LOOK)
    caption = f"Every seed a dot, the mean and its interval{CUT}; dashed: the baseline's mean"
    yield Drawn(tuple(_each(summary, "seeds", caption, lambda g: plots.seeds(summary, g))))
    caption = f"Paired difference to {summary.baseline}: every pair a dot, the mean and its interval{CUT}"
    yield Drawn(tuple(_each(summary, "differences", caption, lambda g: plots.differences(summary, g))))


def _named(row: Row, summary: Summary) -> str | Mark:
    return Mark(row.arm, "base") if row.arm == summary.baseline else row.arm


def _quality(row: Row) -> tuple[str, str, str]:
    q = row.quality
    if q is None:
        return "0", "", ""
    return str(q.n), words.figure(q.mean), "" if q.standard_error is None else words.figure(q.standard_error)


def _against(c: Comparison | None) -> tuple[str | Mark, ...]:
    if c is None:
        return ("",) * 6
    return (
        *(signed(c.difference), interval(c.low, c.high), f"{c.ahead} of {c.pairs}"),
        *(words.chance(c.p if c.pairs > 1 else None), words.chance(c.p_holm), Mark(c.verdict, words.look(c.verdict))),
    )


def signed(value: float) -> str:
    text = words.figure(abs(value))
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{text}"


def interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{signed(low)} to {signed(high)}"


def _over_all(summary: Summary) -> Iterator[Block]:
    if not summary.pooled:
        return
    sure = f"{100 * summary.rule.confidence:g} % interval"
    head = ("arm", "groups", "pairs", "ahead", "won / lost / neither", "mean gain", sure, "p", "p (Holm)", "verdict")
    rows: list[tuple[str | Mark, ...]] = [
        (
            *(each.arm, str(each.groups), str(each.pairs), str(each.ahead)),
            _tally(each),
            *(("", "") if each.gain is None else (signed(each.gain), interval(each.low, each.high))),
            *(words.chance(each.p), words.chance(each.p_holm), Mark(each.verdict, words.look(each.verdict))),
        )
        for each in sorted(summary.pooled, key=lambda e: (-e.lean, e.arm))
    ]
    caption = f"Against {summary.baseline}, all groups together; the gain only where all groups have one metric"
    yield Table(head, tuple(rows), caption, WORDS)
    drawn, ranks = plots.average_ranks(summary), summary.ranks
    if ranks is None or drawn is None:
        yield Text("Average ranks take three arms with a figure in every group, and two data sets or models.")
        return
    caption = "Arms joined by a line at the right are not told apart by Nemenyi's test, whose critical difference is "
    caption += "the bar below. Marks: the verdict above"
    yield Drawn((Figure("ranks", "Average ranks", caption, drawn),))
    text = f"Friedman's test that all arms rank alike: chi2 = {ranks.chi2:.2f}, p = {words.chance(ranks.p)}, by "
    text += f"{summary.rule.resamples:,} random permutations within the groups."
    if summary.unranked:
        text += f" Without a figure in every group, and so without a rank: {words.listed(summary.unranked)}."
    yield Text(text)


def _tally(each: Pooled) -> str:
    won, lost = each.verdicts.get(S.WIN, 0), each.verdicts.get(S.LOSS, 0)
    return f"{won} / {lost} / {sum(each.verdicts.values()) - won - lost}"


def _fronts(summary: Summary) -> Iterator[Block]:
    pairs, figures = list(dict.fromkeys((model, data) for model, data, _ in summary.groups)), []
    for i, (model, data) in enumerate(pairs, 1):
        if (drawn := plots.front(summary, model, data)) is not None:
            caption = "Dashed: the Pareto front of the means, which the noise of seeds moves"
            if sum((r.model, r.data) == (model, data) and bool(r.parameters) for r in summary.rows) > plots.NAMED:
                caption += ". Named: the front, the baseline, and arms with a verdict; every figure stands below"
            without = [r for r in summary.rows if (r.model, r.data, r.parameters) == (model, data, 0)]
            for why, heads in (("only a head trains", True), ("nothing trains", False)):
                arms = sorted({r.arm for r in without if (r.head_parameters != 0) == heads})
                caption += f". Not shown, because {why}: {words.listed(arms)}" if arms else ""
            figures.append(Figure(f"front-{i}", f"{model}, {data}", caption, drawn))
    if figures:
        yield Drawn(tuple(figures))


def _panels(summary: Summary, name: str, caption: str, draw: Callable[[Group], Draw | None]) -> Iterator[Block]:
    found = [(i, group, draw(group)) for i, group in enumerate(summary.groups, 1)]
    figures = [Figure(f"{name}-{i}", words.called(group), caption, made, many=True) for i, group, made in found if made]
    if figures:
        yield Drawn(tuple(figures))


def _rates(summary: Summary) -> Iterator[Block]:
    caption = (
        f"Validation metric by learning rate, a line for each sweep. Diamond: its choice. Grey: {summary.baseline}. "
        "Cross: every run failed. Open: below the edge. edge: a choice is not bracketed"
    )
    yield from _panels(summary, "rates", caption, lambda g: curves.rates(summary, g))


def _courses(summary: Summary) -> Iterator[Block]:
    behind = f"by step, every final run a line; grey: {summary.baseline}"
    yield from _panels(summary, "losses", f"Training loss {behind}", lambda g: curves.course(summary, g, "losses"))
    yield from _panels(summary, "curves", f"Validation metric {behind}", lambda g: curves.course(summary, g, "curve"))


def _deployed(summary: Summary) -> Iterator[Block]:
    for group in summary.groups:
        rows = [row for row in summary.rows_of(group) if row.deployed or row.deployed_error]
        forms = sorted({form for row in rows for form in (*row.deployed, *row.deployed_error)})
        if not rows:
            continue
        head = ("arm", "as trained", *(part for form in forms for part in (form, f"error {form}")))
        cells = tuple((_named(row, summary), _quality(row)[1], *_forms(row, forms)) for row in rows)
        caption = f"{words.called(group)}: mean {rows[0].metric} on {summary.split} rows in other forms; "
        caption += "relative error of the outputs"
        yield Table(head, cells, caption, WORDS)


def _forms(row: Row, forms: Sequence[str]) -> tuple[str, ...]:
    errors = [row.deployed_error.get(form) for form in forms]
    values = [words.figure(row.deployed.get(form)) for form in forms]
    return tuple(x for v, e in zip(values, errors, strict=True) for x in (v, "" if e is None else f"{e:.2g}"))


def _whole(summary: Summary) -> Iterator[Block]:
    head: tuple[str, ...] = ("model", "data", "budget", "arm", "seeds", "failed", "mean", "standard error")
    head += ("difference", "parameters", "wanted", "head", "open ranks", "rates")
    rows = tuple(_line(row, summary) for row in summary.rows)
    yield Table(head, rows, "failed: final runs, and runs of the sweep", WORDS)


def _line(row: Row, summary: Summary) -> tuple[str | Mark, ...]:
    c, counts = row.against, (row.parameters, row.wanted_parameters, row.head_parameters)
    rate = " ".join(f"{lr:g}" for lr in row.rates)
    rate += {None: "", True: "", False: " unbracketed"}[row.bracketed]
    if not row.parameters and row.head_parameters == 0:  # nothing was trained
        rate = ""
    return (
        *row.group,
        _named(row, summary),
        _quality(row)[0],
        f"{row.failed} + {row.failed_sweep}",
        *_quality(row)[1:],
        signed(c.difference) if c else "",
        *("" if n is None else f"{n:,}" for n in counts),
        "" if row.ranks is None else f"{row.ranks:.4g}",
        rate,
    )


def _failures(summary: Summary) -> Iterator[Block]:
    if summary.failures:
        head = ("arm", "model", "data", "budget", "stage", "rate", "seed", "why")
        yield Table(head, tuple(_failure(run) for run in summary.failures), "", WORDS)


def _failure(run: Outcome) -> tuple[str, ...]:
    return run.arm, *run.group, run.stage, f"{run.lr:g}", str(run.seed), why(run)
