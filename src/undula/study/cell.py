"""One arm in one place: the searches for its rates, and the final runs that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

from ..core.method import Method
from ..train.recipe import AUTO, Recipe, dtype_called
from .outcome import FINAL, SWEEP, ChosenRate, Outcome
from .rates import Decision, around, decide, reachable
from .spec import Arm, Base, Budget, Rows, Study
from .splits import place
from .store import Record
from .trial import Trial

ANY_RATE = 1e-3  # of runs whose rate counts for nothing, and is part of their keys
NOT_OUTCOME = ("evaluation_seconds", "wall_seconds", "rows_digest", "made")  # of a run's figures: about its making


@dataclass(frozen=True)
class Cell:
    """One arm on one model, data set and budget."""

    study: Study
    arm: Arm
    base: Base
    rows: Rows
    budget: Budget
    method: Method | None  # the arm's, at the size that the budget asks for
    wanted: int | None  # parameters, by an equal-parameter budget
    guesses: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)  # see `Plan`
    made: dict[tuple[float, int, bool], Trial] = field(default_factory=dict, repr=False, compare=False)

    def trial(self, lr: float, seed: int, tested: bool) -> Trial:
        """One run of this cell: always the same object, which knows its key."""
        which = lr, seed, tested
        if which not in self.made:
            self.made[which] = self._trial(lr, seed, tested)
        return self.made[which]

    def _trial(self, lr: float, seed: int, tested: bool) -> Trial:
        study, rows, settings = self.study, self.rows, self.study.settings(self.arm, self.rows)
        if self.method is None and not settings["full"]:
            settings["head_lr"] = None  # the head's rate is what is swept
        recipe = Recipe(
            self.base.source, rows.source, rows.task, self.method, allocator=self.arm.allocator, lr=lr, seed=seed,
            train_rows=rows.train, eval_rows=rows.validation, dtype=dtype_called(self.base.dtype), bits=self.base.bits,
            **settings,
        )  # fmt: skip
        return Trial(
            recipe, rows, study.train.evaluations, study.split_seed, tested, f"{self.arm.name} on {rows.label}"
        )

    @property
    def untrained(self) -> bool:
        """A model without a new head and without a method: measured as it is, once."""
        trained = self.rows.task.has_head or self.study.settings(self.arm)["full"]
        return self.method is None and not trained

    @property
    def place(self) -> str:
        return ", ".join((self.base.label, self.rows.label, self.budget.label))

    @property
    def auto(self) -> bool:
        """Whether the grid is to lie around a rate that is found first (see `guess`)."""
        said = self.study.sweep.rates if self.arm.rates == () else self.arm.rates
        return said is None and not self.untrained

    @property
    def asker(self) -> Trial:
        """The run whose rate is looked for; its own counts for nothing."""
        return self.trial(ANY_RATE, (self.study.sweep.seeds or self.study.seeds)[0], tested=False)

    @property
    def grid(self) -> tuple[float, ...]:
        """The rates to begin with; none as long as they are to be found."""
        if self.auto:
            found = self.guesses.get(self.asker.key)
            return () if found is None else around((found,), self.study.sweep.factor)
        return self.arm.rates or self.study.sweep.rates or (ANY_RATE,)

    @property
    def told_rates(self) -> str:
        """The grid, in words."""
        return ", ".join([AUTO] * self.auto + [f"{lr:g}" for lr in sorted(self.grid)])

    @cached_property
    def rates(self) -> list[float]:
        """Every rate that a search could come to."""
        s = self.study.sweep
        if not self.grid:
            return []
        return [min(self.grid)] if self.untrained else reachable(self.grid, s.factor, s.extend)

    @cached_property
    def searches(self) -> tuple[Search, ...]:
        """Each final seed searches for itself, so that the luck of a choice is part of the figure of that seed and of
        no other; or one search for all (`[sweep] seeds`); or none, where there is one rate alone."""
        seeds, shared = self.study.seeds, self.study.sweep.seeds
        if self.untrained:
            return (Search(self, (), seeds[:1]),)
        if len(self.rates) == 1:
            return (Search(self, (), seeds),)
        return (Search(self, shared, seeds),) if shared else tuple(Search(self, (s,), (s,)) for s in seeds)


@dataclass(frozen=True)
class Search:
    """One choice of a rate on validation rows, by runs with `seeds`, and the final runs that are made at it."""

    cell: Cell
    seeds: tuple[int, ...]  # none: the rate is given
    finals: tuple[int, ...]

    def sweep(self, lr: float) -> list[Trial]:
        """The runs that measure one rate."""
        return [self.cell.trial(lr, seed, tested=False) for seed in self.seeds]

    def halved(self) -> list[Trial]:
        """The runs that successive halving may end early: of each rate the one with the search's first seed.  By each
        seed apart, every rate could lose once."""
        if self.cell.study.sweep.halving is None:
            return []
        return [t for lr in self.cell.rates for t in self.sweep(lr)[:1]]

    def rivals(self, trial: Trial, known: Mapping[str, Record]) -> list[list[tuple[int, float]]] | None:
        """The curves that halving compares `trial` with, those of the rates that come before its own: what a run is
        up against does not depend on who runs beside it.  None for a run that halving leaves whole."""
        if trial.key not in {t.key for t in self.halved()}:
            return None
        asked = self.decision(known).asked
        records = [known.get(self.sweep(lr)[0].key) for lr in asked[: asked.index(trial.run.lr)]]
        return [[(int(s), float(v)) for s, v in r.result["curve"]] for r in records if r is not None and r.result]

    def decision(self, known: Mapping[str, Record]) -> Decision:
        """What the search has come to."""
        s, cell = self.cell.study.sweep, self.cell
        if not cell.grid:
            return Decision()
        if not self.seeds:
            return Decision(chosen=cell.rates[0])
        return decide(cell.grid, self.scores(known), s.factor, s.extend, cell.rows.task.more_is_better)

    def scores(self, known: Mapping[str, Record]) -> dict[float, float | None]:
        """{rate: mean validation metric} of the rates whose runs have all ended; None: one failed, or the first was
        pruned, and then the others are not made."""
        scores: dict[float, float | None] = {}
        for lr in self.cell.rates if self.seeds else ():
            records = [known.get(t.key) for t in self.sweep(lr)]
            ended = [r for r in records if r is not None and r.state in ("done", "failed")]
            if any(r.pruned for r in ended):
                scores[lr] = None
            elif len(ended) == len(records):
                values = [r.result["validation"] for r in ended if r.result is not None]
                scores[lr] = fmean(values) if len(values) == len(records) else None
        return scores

    def final(self, lr: float) -> list[Trial]:
        return [self.cell.trial(lr, seed, tested=True) for seed in self.finals]

    def due(self, known: Mapping[str, Record]) -> list[Trial]:
        """The runs that can be made now and have not ended."""
        decision = self.decision(known)
        trials = self._swept(decision, known) if decision.chosen is None else self.final(decision.chosen)
        return [t for t in trials if not _ended(t, known)]

    def _swept(self, decision: Decision, known: Mapping[str, Record]) -> list[Trial]:
        """With halving, a rate waits for those before it, which decide how far it goes."""
        trials: list[Trial] = []
        for lr in decision.more:
            first, *others = self.sweep(lr)
            trials.append(first)
            if self.cell.study.sweep.halving is not None and not _ended(first, known):
                break
            trials += others
        return trials

    def to_come(self, known: Mapping[str, Record]) -> tuple[set[str], int]:
        """(the keys of runs that are still to come at least, how many more there may be): see `Plan.counts`."""
        finals = {f"{seed} {id(self)}" for seed in self.finals}
        if not self.cell.grid:  # three to begin with, wherever they will lie
            begun = {f"{i} {seed} {id(self)}" for i in range(3) for seed in self.seeds}
            return begun | finals, 2 * self.cell.study.sweep.extend * len(self.seeds)
        decision = self.decision(known)
        if decision.chosen is not None or not decision.more:
            return {t.key for t in self.due(known)}, 0
        swept = {t.key for lr in decision.more for t in self.sweep(lr) if not _ended(t, known)}
        beyond = len(self.cell.rates) - len(decision.asked)
        return swept | finals, beyond * len(self.seeds)

    def trials(self) -> Iterator[Trial]:
        """Every run that this search could come to."""
        for lr in self.cell.rates:
            yield from self.sweep(lr)
            yield from self.final(lr)

    def outcomes(self, known: Mapping[str, Record]) -> Iterator[Outcome]:
        """The runs that have ended."""
        chosen = self.decision(known).chosen
        for lr in self.cell.rates:
            for t in self.sweep(lr):
                yield from self._outcome(t, SWEEP, known)
            for t in self.final(lr) if lr == chosen else ():
                yield from self._outcome(t, FINAL, known)

    def _outcome(self, trial: Trial, stage: str, known: Mapping[str, Record]) -> Iterator[Outcome]:
        record, cell = known.get(trial.key), self.cell
        if record is None or record.state == "running":
            return
        task = cell.rows.task
        labels = {"model": cell.base.label, "data": cell.rows.label, "budget": cell.budget.label, "arm": cell.arm.name}
        sources = {"model_source": place(cell.base.source), "data_source": place(cell.rows.source)}
        what = {"stage": stage, "lr": trial.run.lr, "seed": trial.run.seed, "wanted_parameters": cell.wanted}
        metric = {"metric": task.headline, "more_is_better": task.more_is_better, "error": record.error}
        figures = {k: v for k, v in (record.result or {}).items() if k not in NOT_OUTCOME}
        yield Outcome.decode(labels | sources | what | metric | figures)

    def chosen(self, known: Mapping[str, Record]) -> ChosenRate | None:
        """The rate that was chosen, once it has been; None where there is nothing to choose."""
        decision, cell = self.decision(known), self.cell
        if decision.chosen is None or not self.seeds:
            return None
        scores = self.scores(known)
        tried = tuple((lr, scores[lr]) for lr in sorted(decision.asked))
        labels = cell.base.label, cell.rows.label, cell.budget.label
        seed = None if cell.study.sweep.seeds else self.finals[0]
        return ChosenRate(cell.arm.name, *labels, decision.chosen, decision.bracketed, tried, seed)


def _ended(trial: Trial, known: Mapping[str, Record]) -> bool:
    return trial.key in known and known[trial.key].state != "running"
