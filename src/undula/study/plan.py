"""From a study to its runs: which there are, which follow from the results so far, and what they came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ..method import Method
from ..sites import choose, site
from ..train.base import open_model, quiet
from ..train.run import Run, dtype_called
from . import splits
from .outcome import FINAL, SWEEP, ChosenRate, Outcome
from .rates import Decision, decide
from .sizes import Shapes, at_rank, count, with_parameters
from .spec import Arm, Base, Budget, Rows, Study, faults
from .store import Record, Store
from .trial import Trial

NOT_OUTCOME = ("evaluation_seconds", "wall_seconds", "rows_digest")  # of a run's figures: about how it was made


@dataclass(frozen=True)
class Cell:
    """One arm on one model, data set and budget: its rates are swept, then its final runs made."""

    study: Study
    arm: Arm
    base: Base
    rows: Rows
    budget: Budget
    method: Method | None  # the arm's, at the size that the budget asks for
    wanted: int | None  # parameters, by an equal-parameter budget
    made: dict[tuple[float, int, bool], Trial] = field(default_factory=dict, repr=False, compare=False)

    def trial(self, lr: float, seed: int, tested: bool) -> Trial:
        """One run of this cell: always the same object, which knows its key."""
        which = lr, seed, tested
        if which not in self.made:
            self.made[which] = self._trial(lr, seed, tested)
        return self.made[which]

    def _trial(self, lr: float, seed: int, tested: bool) -> Trial:
        t, rows = self.study.train, self.rows
        alone = self.method is None and not self.arm.full  # then the head's rate is what is swept
        run = Run(
            model=self.base.source, data=rows.source, task=rows.task, method=self.method, out=Path("unused"),
            allocator=self.arm.allocator, where=t.where, full=("*",) if self.arm.full else (), lr=lr,
            head_lr=None if alone else t.head_lr, epochs=rows.epochs or t.epochs, max_steps=t.steps,
            batch=rows.batch or t.batch, accumulate=t.accumulate, warmup=t.warmup, weight_decay=t.weight_decay,
            seed=seed, train_rows=rows.train, eval_rows=rows.validation, dtype=dtype_called(self.base.dtype),
            bits=self.base.bits,
        )  # fmt: skip
        return Trial(run, rows, t.evaluations, self.study.split_seed, tested)

    @property
    def untrained(self) -> bool:
        """A model without a new head and without a method: measured as it is, once."""
        return self.method is None and not self.arm.full and not self.rows.task.has_head

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the final runs."""
        return self.study.seeds[:1] if self.untrained else self.study.seeds

    @property
    def grid(self) -> tuple[float, ...]:
        return self.arm.rates or self.study.sweep.rates

    def sweep(self, lr: float) -> list[Trial]:
        """The runs that measure one rate; none where nothing trains."""
        return [] if self.untrained else [self.trial(lr, seed, tested=False) for seed in self.study.sweep.seeds]

    def halved(self) -> list[Trial]:
        """The runs that successive halving may end early: of each rate the one with the sweep's first seed.  By each
        seed apart, every rate could lose once."""
        return [] if self.study.sweep.halving is None else [t for lr in self.rates() for t in self.sweep(lr)[:1]]

    def rates(self) -> list[float]:
        """Every rate that the sweep could come to, see `decide`."""
        s, grid = self.study.sweep, sorted(self.grid)
        if self.untrained:
            return [self.grid[0]]
        found, low, high = set(grid), grid[0], grid[-1]
        for _ in range(s.extend):
            low, high = (float(f"{v:.3g}") for v in (low / s.factor, high * s.factor))
            found |= {low, high}
        return sorted(found)

    def decision(self, known: Mapping[str, Record]) -> Decision:
        """What the sweep has come to."""
        s = self.study.sweep
        if self.untrained:
            return Decision(chosen=self.grid[0])
        return decide(self.grid, self.scores(known), s.factor, s.extend, self.rows.task.more_is_better)

    def scores(self, known: Mapping[str, Record]) -> dict[float, float | None]:
        """{rate: mean validation metric} of the rates whose runs have all ended; None: one failed, or the first was
        pruned, and then the others are not made."""
        scores: dict[float, float | None] = {}
        for lr in self.rates():
            records = [known.get(t.key) for t in self.sweep(lr)]
            if not records:
                continue
            ended = [r for r in records if r is not None and r.state in ("done", "failed")]
            if any(r.pruned for r in ended):
                scores[lr] = None
            elif len(ended) == len(records):
                values = [r.result["validation"] for r in ended if r.result is not None]
                scores[lr] = fmean(values) if len(values) == len(records) else None
        return scores

    def due(self, known: Mapping[str, Record]) -> list[Trial]:
        """The runs that can be made now and have not ended."""
        decision = self.decision(known)
        if decision.chosen is not None:
            trials = [self.trial(decision.chosen, seed, tested=True) for seed in self.seeds]
        else:
            trials = [t for lr in decision.more for t in self.sweep(lr)]
        return [t for t in trials if t.key not in known or known[t.key].state == "running"]

    def every(self) -> Iterator[str]:
        """The keys of every run that this cell could come to."""
        for lr in self.rates():
            yield from (t.key for t in self.sweep(lr))
            yield from (self.trial(lr, seed, tested=True).key for seed in self.seeds)

    def outcomes(self, known: Mapping[str, Record]) -> Iterator[Outcome]:
        """The runs that have ended."""
        chosen = self.decision(known).chosen
        for lr in self.rates():
            for t in self.sweep(lr):
                yield from self._outcome(t, SWEEP, known)
            if lr == chosen:
                for seed in self.seeds:
                    yield from self._outcome(self.trial(lr, seed, tested=True), FINAL, known)

    def _outcome(self, trial: Trial, stage: str, known: Mapping[str, Record]) -> Iterator[Outcome]:
        record = known.get(trial.key)
        if record is None or record.state == "running":
            return
        task = self.rows.task
        labels = {"model": self.base.label, "data": self.rows.label, "budget": self.budget.label, "arm": self.arm.name}
        what = {"stage": stage, "lr": trial.run.lr, "seed": trial.run.seed, "wanted_parameters": self.wanted}
        metric = {"metric": task.headline, "more_is_better": task.more_is_better, "error": record.error}
        figures = {k: v for k, v in (record.result or {}).items() if k not in NOT_OUTCOME}
        yield Outcome.decode(labels | what | metric | figures)

    def chosen(self, known: Mapping[str, Record]) -> ChosenRate | None:
        """The rate that the sweep chose, once it has; None where there is nothing to choose."""
        decision = self.decision(known)
        if decision.chosen is None or self.untrained:
            return None
        tried = tuple(sorted(self.scores(known).items()))
        labels = self.base.label, self.rows.label, self.budget.label
        return ChosenRate(self.arm.name, *labels, decision.chosen, decision.bracketed, tried)


class Plan:
    """The cells of a study.  Opens its models once, where a budget counts parameters.

    Raises ValueError for a study that cannot be carried out.
    """

    def __init__(self, study: Study):
        if found := "; ".join(text for _, text in faults(study)):
            raise ValueError(found)
        self.study = study
        self.cells = tuple(_cells(study))

    def keys(self) -> list[str]:
        """Of every run that the study could come to."""
        return [key for cell in self.cells for key in cell.every()]

    def due(self, known: Mapping[str, Record]) -> list[Trial]:
        """The runs that can be made now, each once, a cell after another: those that died thrice come last."""
        due = {t.key: t for cell in self.cells for t in cell.due(known)}
        return sorted(due.values(), key=lambda t: max(2, known[t.key].attempts) if t.key in known else 2)

    def rivals(self, trial: Trial, known: Mapping[str, Record]) -> list[list[tuple[int, float]]] | None:
        """The curves so far of the rates that halving compares `trial` with; None for a run that it leaves whole."""
        cell = next((c for c in self.cells if any(t.key == trial.key for t in c.halved())), None)
        if cell is None:
            return None
        records = [known.get(t.key) for t in cell.halved()]
        return [[(int(s), float(v)) for s, v in r.result["curve"]] for r in records if r is not None and r.result]

    def known(self, store: Store) -> dict[str, Record]:
        """What the store holds of this study's runs.  One that another form of the study cut short, and this one would
        make whole, counts as never made."""
        halved = {t.key for cell in self.cells for t in cell.halved()}
        return {k: r for k, r in store.records(self.keys()).items() if not r.pruned or k in halved}

    def outcomes(self, known: Mapping[str, Record]) -> tuple[list[Outcome], list[ChosenRate]]:
        """Everything that has ended, and the rates that were chosen."""
        outcomes = [o for cell in self.cells for o in cell.outcomes(known)]
        return outcomes, [c for cell in self.cells if (c := cell.chosen(known)) is not None]

    def strangers(self, known: Mapping[str, Record]) -> Iterator[str]:
        """Sentences on runs that were made on other rows than their source holds now."""
        for rows in self.study.data:
            keys = {key for cell in self.cells if cell.rows == rows for key in cell.every()}
            results = [r.result for k, r in known.items() if k in keys and r.result is not None]
            made = [r["rows_digest"] for r in results if "rows_digest" in r]  # records of older versions have none
            other = sum(digest != splits.digest(rows, self.study.split_seed) for digest in made)
            if other:
                yield f"{rows.label}: {other} of the runs here were made on other rows than there are now"

    def counts(self, known: Mapping[str, Record]) -> dict[str, int]:
        """Runs: ended, failed, at least still to come, at most still to come (if every grid grows to its bound)."""
        s, ended = self.study, {k: r for k, r in known.items() if r.state in ("done", "failed")}
        least: set[str] = set()
        most = 0
        for cell in self.cells:
            decision = cell.decision(known)
            least |= {t.key for t in cell.due(known)}
            if decision.chosen is None and (decision.more or not cell.scores(known)):
                least |= {f"{i} {id(cell)}" for i in range(len(s.seeds))}
                most += 2 * s.sweep.extend * len(s.sweep.seeds)
        return {"ended": len(ended), "failed": sum(r.state == "failed" for r in ended.values()),
                "least": len(least), "most": len(least) + most}  # fmt: skip


def _cells(study: Study) -> Iterator[Cell]:
    """In the order of the arms first: a study that is cut short has compared the first ones everywhere."""
    for arm in study.arms:
        for base in study.models:
            for rows in study.data:
                for budget in study.budgets:
                    shapes, wanted = _wanted(study, base, rows, budget)
                    yield Cell(study, arm, base, rows, budget, sized(arm, budget, wanted, shapes), wanted)


def impossible(study: Study) -> Iterator[tuple[int, str]]:
    """(number of the budget, why) of every arm that a budget does not fit."""
    for i, budget in enumerate(study.budgets):
        told = set()
        for base in study.models:
            for rows in study.data:
                shapes, wanted = _wanted(study, base, rows, budget)
                for arm in study.arms:
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


def _wanted(study: Study, base: Base, rows: Rows, budget: Budget) -> tuple[Shapes | None, int | None]:
    """(the sites, how many parameters the budget asks for) where a budget counts parameters."""
    if budget.parameters is None and budget.parameters_of is None:
        return None, None
    shapes = _shapes(study, base, rows)
    if budget.parameters_of is None:
        return shapes, budget.parameters
    method = study.arm(budget.parameters_of).method
    assert method is not None
    return shapes, count(method if budget.rank is None else at_rank(method, budget.rank) or method, shapes)


_known_shapes: dict[tuple[str, str, str], Shapes] = {}


def _shapes(study: Study, base: Base, rows: Rows) -> Shapes:
    """The (O, I) of every adapted layer."""
    key = (base.source, repr(rows.task), repr(study.train.where))
    if key not in _known_shapes:
        task, _ = splits.opened(rows, study.split_seed)
        with quiet():
            model, _ = open_model(base.source, task, dtype_called(base.dtype), seed=0)
        _known_shapes[key] = {n: site(n, layer).shape for n, layer in choose(model, study.train.where).items()}
    return _known_shapes[key]
