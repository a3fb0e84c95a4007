"""The rows of a study's tables, as values: an arm in a group, an arm over all groups, and all of it together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import statistics as S
from .outcome import FINAL, ChosenRate, Outcome

Group = tuple[str, str, str]  # model, data, budget


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline, on the seeds that both have."""

    pairs: int
    ahead: int  # pairs in which the arm is better
    difference: float  # arm - baseline, mean
    gain: float  # the same, turned so that more is better
    low: float | None  # the interval of the difference that belongs to p; None where there are too few pairs for one
    high: float | None
    p: float  # sign-flip permutation test
    smallest_p: float  # that so many pairs can reach
    p_holm: float | None = None  # None: no outcome could have decided it
    verdict: str = S.UNDECIDED


@dataclass(frozen=True)
class Row:
    """One arm in one group: its final runs."""

    model: str
    data: str
    budget: str
    arm: str
    metric: str
    more_is_better: bool
    quality: S.Spread | None  # on test rows; None without a final run that worked
    against: Comparison | None  # None for the baseline, and where there is no pair
    failed: int  # final runs without a figure
    failed_sweep: int  # runs of the sweep
    parameters: int | None
    wanted_parameters: int | None
    head_parameters: int | None
    ranks: float | None  # that are open where the runs were measured, mean; None without an allocator
    rates: tuple[float, ...]  # of the final runs, each once
    bracketed: bool | None  # every choice of a rate; None: there was no sweep
    shared: bool  # one choice of a rate serves all seeds
    deployed: Mapping[str, float]  # {form: mean test metric}
    deployed_error: Mapping[str, float]  # {form: mean relative error of the outputs}
    place: tuple[str, str]  # see `Outcome.place`

    @property
    def group(self) -> Group:
        return self.model, self.data, self.budget

    @property
    def untrained(self) -> bool:
        """The model as it is: one run, whatever the seeds."""
        return self.parameters == 0 and not self.head_parameters

    def flat(self) -> dict[str, Any]:
        """One level of plain values, for CSV and Parquet."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        quality, against = own.pop("quality"), own.pop("against")
        forms, errors = own.pop("deployed"), own.pop("deployed_error")
        own |= {"model_source": own["place"][0], "data_source": own.pop("place")[1]}
        own["rates"] = " ".join(f"{lr:g}" for lr in self.rates)
        parts = [("", S.Spread, quality), ("against_baseline_", Comparison, against)]
        for prefix, kind, value in parts:
            own |= {prefix + f.name: value and getattr(value, f.name) for f in dataclasses.fields(kind)}
        own |= {f"deployed_{form}": v for form, v in forms.items()}
        return own | {f"deployed_error_{form}": v for form, v in errors.items()}


@dataclass(frozen=True)
class Pooled:
    """An arm against the baseline over all groups."""

    arm: str
    groups: int  # in which it is compared
    pairs: int  # independent ones: seeds on a model and data set, whatever the number of precisions and budgets
    ahead: int
    gain: float | None  # mean over models and data sets; None where they have several metrics
    low: float | None  # the interval of the gain that belongs to p
    high: float | None
    lean: float  # what is tested: the gain, or the mean of gain / root mean square where there are several metrics
    p: float
    smallest_p: float
    verdicts: Mapping[str, int]  # {"win": groups in which the arm won, ...}
    p_holm: float | None = None
    verdict: str = S.UNDECIDED


@dataclass(frozen=True)
class Summary:
    """All that a report tells, in numbers."""

    baseline: str
    rule: S.Rule
    split: str  # whose rows the figures are of: "test"
    runs: tuple[Outcome, ...]  # sorted
    rates: tuple[ChosenRate, ...]
    rows: tuple[Row, ...]  # by group, in each the best first
    pooled: tuple[Pooled, ...]  # empty with one group
    ranks: S.Ranks | None
    unranked: tuple[str, ...]  # arms that lack a figure in some group
    failures: tuple[Outcome, ...]
    floors: Mapping[str, float]  # {data: what an answer is worth that never looks at its input}

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(dict.fromkeys(row.group for row in self.rows))

    @property
    def arms(self) -> tuple[str, ...]:
        """The baseline, then the others by name."""
        return tuple(sorted({row.arm for row in self.rows}, key=lambda a: (a != self.baseline, a)))

    @property
    def places(self) -> int:
        """On how many models and data sets, precisions, options and budgets apart."""
        return len({row.place for row in self.rows})

    @property
    def shared(self) -> bool:
        """Whether any comparison rests on a rate that was chosen once for all seeds of an arm."""
        return any(row.shared for row in self.rows)

    def rows_of(self, group: Group) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.group == group)

    def finals(self, group: Group, arm: str) -> tuple[Outcome, ...]:
        """The final runs that have a figure."""
        return tuple(o for o in self.runs if o.stage == FINAL and (o.group, o.arm) == (group, arm) and measured(o))

    @property
    def compared(self) -> int:
        """How many comparisons the report makes."""
        return sum(row.against is not None for row in self.rows) + len(self.pooled)

    @property
    def corrected(self) -> int:
        """How many of these could be decided: the family that Holm's correction is over."""
        single = sum(row.against is not None and row.against.p_holm is not None for row in self.rows)
        return single + sum(each.p_holm is not None for each in self.pooled)


def measured(run: Outcome) -> bool:
    """Whether a final run has a figure."""
    return run.error is None and run.test is not None and math.isfinite(run.test)


def failed(run: Outcome) -> bool:
    """Whether a run has not given what its stage asks for."""
    if run.stage == FINAL:
        return not measured(run)
    return run.error is not None or run.validation is None or not math.isfinite(run.validation)


def why(run: Outcome) -> str:
    """Why a run failed, in words."""
    value, rows = (run.test, "test") if run.stage == FINAL else (run.validation, "validation")
    return run.error or (f"no {run.metric} on {rows} rows" if value is None else f"{run.metric} is {value}")
