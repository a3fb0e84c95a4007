"""From a study to its runs: which there are, which follow from the results so far, and what they came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..core.method import Method
from .cell import Cell, Search
from .outcome import ChosenRate, Outcome
from .sizes import Shapes, at_rank, count, with_parameters
from .sources import Sources
from .spec import (
    Arm,
    Base,
    Budget,
    Rows,
    Study,
    faults,
)
from .store import Record, Store
from .trial import Trial


class Plan:
    """The cells of a study.  Opens its models once, where a budget counts parameters; `sources` holds what is read.
    guesses: {key of `Cell.asker`: the rate that was found}, where a study asks for them.

    Raises ValueError for a study that cannot be carried out.
    """

    def __init__(self, study: Study, sources: Sources | None = None, guesses: Mapping[str, float] | None = None):
        if found := "; ".join(text for _, text in faults(study)):
            raise ValueError(found)
        self.study, self.sources = study, sources or Sources()
        self.cells = tuple(_cells(study, self.sources, guesses or {}))
        self.searches = tuple(search for cell in self.cells for search in cell.searches)

    def trials(self) -> dict[str, Trial]:
        """Every run that the study could come to, by its key."""
        return {t.key: t for search in self.searches for t in search.trials()}

    def due(self, known: Mapping[str, Record]) -> list[Trial]:
        """The runs that can be made now, each once, a cell after another: those that died thrice come last."""
        due = {t.key: t for search in self.searches for t in search.due(known)}
        return sorted(due.values(), key=lambda t: max(2, known[t.key].attempts) if t.key in known else 2)

    def rivals(self, trial: Trial, known: Mapping[str, Record]) -> list[list[tuple[int, float]]] | None:
        """See `Search.rivals`."""
        found = (search.rivals(trial, known) for search in self.searches)
        return next((rivals for rivals in found if rivals is not None), None)

    def known(self, store: Store) -> dict[str, Record]:
        """What the store holds of this study's runs, by their keys now.  One that another form of the study cut short,
        and this one would make whole, counts as never made.

        Where all seeds share a sweep, a run that an older protocol made stands for one that this one has not: such
        studies are read for what they once showed.
        """
        trials, shared = self.trials(), bool(self.study.sweep.seeds)
        keys = {key: (key, *(t.formers if shared else ())) for key, t in trials.items()}
        held = store.records(k for each in keys.values() for k in each)
        found = {key: next(held[k] for k in each if k in held) for key, each in keys.items() if held.keys() & set(each)}
        halved = {t.key for search in self.searches for t in search.halved()}
        return {k: r for k, r in found.items() if not r.pruned or k in halved}

    def outcomes(self, known: Mapping[str, Record]) -> tuple[list[Outcome], list[ChosenRate]]:
        """Everything that has ended, each run once in an arm and group, and the rates that were chosen."""
        outcomes = [o for search in self.searches for o in search.outcomes(known)]
        return outcomes, [c for search in self.searches if (c := search.chosen(known)) is not None]

    def strangers(self, known: Mapping[str, Record]) -> Iterator[str]:
        """Sentences on runs that were made on other rows, or on another model, than their source holds now."""
        for rows in self.study.data:
            made = [r["rows_digest"] for r in self._results(known, rows) if "rows_digest" in r]  # not in older records
            other = sum(digest != self.sources.digest(rows, self.study.split_seed) for digest in made)
            if other:
                yield f"{rows.label}: {other} of the runs here were made on other rows than there are now"
        for base in self.study.models:
            made = [m for r in self._results(known, base) if (m := r.get("made", {}).get("model"))]
            now = self.sources.model(base.source) if made else None
            other = sum(now is not None and digest != now for digest in made)
            if other:
                yield f"{base.label}: {other} of the runs here were made with another model than is there now"

    def mixtures(self, known: Mapping[str, Record]) -> Iterator[str]:
        """Sentences on runs in one table that were not made alike: with other versions, devices, threads."""
        if len({_made_with(r.result, False) for r in known.values() if r.result is not None}) > 1:
            yield f"the runs were not all made alike: {self.made(known)['the runs were made']}"

    def made(self, known: Mapping[str, Record]) -> dict[str, str]:
        """With what the runs were made, for a report; and where sweeps began, if that was found."""
        kinds, told = self._kinds(known), dict[str, str]()
        if kinds:
            told["the runs were made"] = "; ".join(f"{n} with {kind}" for kind, n in kinds.most_common())
        if auto := [cell for cell in self.cells if cell.auto and cell.grid]:
            told["sweeps began around rates that were found"] = "; ".join(
                f"{c.arm.name} ({c.place}) {c.grid[1]:g}" for c in auto
            )
        return told

    def _kinds(self, known: Mapping[str, Record]) -> Counter[str]:
        return Counter(_made_with(r.result) for r in known.values() if r.result is not None)

    def _results(self, known: Mapping[str, Record], part: Rows | Base) -> list[Mapping[str, Any]]:
        cells = [cell for cell in self.cells if part in (cell.rows, cell.base)]
        keys = {t.key for cell in cells for search in cell.searches for t in search.trials()}
        return [r.result for k, r in known.items() if k in keys and r.result is not None]

    def former(self, store: Store) -> int:
        """How many runs the store holds that sweep for all seeds together, where this study sweeps for each: another
        design, which older versions had and `[sweep] seeds` brings back."""
        if self.study.sweep.seeds:
            return 0
        swept = [cell.trial(lr, 0, False) for cell in self.cells for lr in cell.rates if cell.searches[0].seeds]
        mine = {t.key for t in self.trials().values()}
        keys = {k for t in swept for k in t.formers} | {t.key for t in swept if t.key not in mine}
        return len(store.records(keys))

    def outdated(self, store: Store) -> int:
        """How many runs of this study the store holds from versions that trained otherwise: none of them counts."""
        if self.study.sweep.seeds:
            return 0
        return len(store.records(k for t in self.trials().values() for k in t.formers))

    def counts(self, known: Mapping[str, Record]) -> dict[str, int]:
        """Runs: ended, failed, at least still to come, at most still to come (if every grid grows to its bound)."""
        ended = {k: r for k, r in known.items() if r.state in ("done", "failed")}
        least: set[str] = set()
        more = 0
        for search in self.searches:
            sure, beyond = search.to_come(known)
            least |= sure
            more += beyond
        return {"ended": len(ended), "failed": sum(r.state == "failed" for r in ended.values()),
                "least": len(least), "most": len(least) + more}  # fmt: skip


def _made_with(result: Mapping[str, Any], beside: bool = True) -> str:
    """Versions, device and threads of a run, in words; and whether others were trained `beside` it, which changes no
    more than rounding."""
    made = result.get("made")
    if made is None:
        return "nothing known of how (older versions did not note it)"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made["versions"].items()))
    others = ", together with others" if beside and made.get("together") else ""
    return f"{versions} on {made['device']}, {made['threads']} threads{others}"


def _cells(study: Study, sources: Sources, guesses: Mapping[str, float]) -> Iterator[Cell]:
    """In the order of the arms first: a study that is cut short has compared the first ones everywhere."""
    for arm in study.arms:
        for base in study.models:
            for rows in study.data:
                for budget in study.budgets:
                    wanted = _wanted(study, base, rows, budget, sources)
                    shapes = None if wanted is None else sources.shapes(study, arm, base, rows)
                    yield Cell(study, arm, base, rows, budget, sized(arm, budget, wanted, shapes), wanted, guesses)


def impossible(study: Study, sources: Sources) -> Iterator[tuple[int, str]]:
    """(number of the budget, why) of every arm that a budget does not fit."""
    for i, budget in enumerate(study.budgets):
        told = set()
        for base in study.models:
            for rows in study.data:
                wanted = _wanted(study, base, rows, budget, sources)
                for arm in study.arms:
                    shapes = None if wanted is None else sources.shapes(study, arm, base, rows)
                    try:
                        sized(arm, budget, wanted, shapes)
                    except ValueError as error:
                        told.add(str(error))
        yield from ((i, text) for text in sorted(told))


def sized(arm: Arm, budget: Budget, wanted: int | None, shapes: Shapes | None) -> Method | None:
    """The arm's method as the budget wants it.  Raises ValueError that names the arm where that cannot be."""
    if arm.method is None:
        return None
    try:
        if wanted is not None and shapes is not None:
            return with_parameters(arm.method, wanted, shapes)
        return arm.method if budget.rank is None else at_rank(arm.method, budget.rank) or arm.method
    except ValueError as error:
        raise ValueError(f"{arm.name}: {error}") from None


def _wanted(study: Study, base: Base, rows: Rows, budget: Budget, sources: Sources) -> int | None:
    """How many parameters the budget asks for, where it counts them."""
    if budget.parameters_of is None:
        return budget.parameters
    arm = study.arm(budget.parameters_of)
    assert arm.method is not None
    method = arm.method if budget.rank is None else at_rank(arm.method, budget.rank) or arm.method
    return count(method, sources.shapes(study, arm, base, rows))


__all__ = ["Cell", "Plan", "Search", "impossible", "sized"]
