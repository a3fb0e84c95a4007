"""A study as a value: methods x models x data x budgets, the rates to try and the seeds to report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from ..core.given import Checked, checked
from ..core.method import Method
from ..core.ranges import (
    Bits,
    Count,
    Natural,
    PartShare,
    Positive,
    Range,
    Rank,
    Seed32,
)
from ..ranks import Procedure
from ..train.fields import default_of
from ..train.recipe import AUTO, Settings
from ..train.refusals import refusals
from ..train.tasks.task import Task

Halving = Annotated[int, Range(least=2, most=1 << 16)]


def rates_meant(name: str, value: Any) -> Any:
    return None if name == "rates" and value == AUTO else value


@dataclass(frozen=True)
class Arm(metaclass=Checked):
    """One row of the table: a method with its settings, or one of the two yardsticks (method None): the head alone, or
    every parameter of the model."""

    name: str
    method: Method | None
    full: bool = False  # with method None: train everything
    rates: tuple[Positive, ...] | None = ()  # its own grid to begin with; empty: the sweep's; None: as of `Sweep`
    allocator: Procedure | None = None
    own: Mapping[str, Any] = field(default_factory=dict)  # settings in the place of [train]'s, by their names

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """See `Sweep`."""
        return rates_meant(name, value)

    def __post_init__(self) -> None:
        names = [f.name for f in fields(Settings)]
        if unknown := [name for name in self.own if name not in names]:
            raise ValueError(f"an arm has no setting {', '.join(unknown)}; there are: {', '.join(names)}")
        meant = {name: checked(Training, name, Settings.as_meant(name, value)) for name, value in self.own.items()}
        object.__setattr__(self, "own", meant)


@dataclass(frozen=True)
class Base(metaclass=Checked):
    """A pretrained model."""

    source: str
    bits: Bits | None = None  # 4 or 8: quantised when it is opened
    dtype: str = "float32"

    @property
    def label(self) -> str:
        how = [f"{self.bits} bits"] if self.bits is not None else []
        how += [self.dtype] if self.dtype != Base.dtype else []
        return f"{self.source} ({', '.join(how)})" if how else self.source


@dataclass(frozen=True)
class Rows(metaclass=Checked):
    """A data set, its task, and how many of its rows are used (None: all)."""

    source: str
    task: Task
    train: Count | None = None
    validation: Count | None = 1000
    test: Count | None = 2000
    splits: Mapping[str, str] = field(default_factory=dict)  # other names: {"test": "validation"}
    label: str = ""
    epochs: Positive | None = None  # of this data set, in the place of the study's
    batch: Count | None = None
    skip_faulty: PartShare | None = None  # see `undula.Run`

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.source)


@dataclass(frozen=True)
class Budget(metaclass=Checked):
    """What the methods have in common: a rank, or the number of trained parameters (heads apart).  Neither: every
    method as it was written."""

    rank: Rank | None = None
    parameters: Count | None = None
    parameters_of: str | None = None  # as many as this arm has at `rank`

    @property
    def label(self) -> str:
        if self.parameters_of is not None:
            return f"parameters of {self.parameters_of} at r={self.rank}"
        if self.parameters is not None:
            return f"{self.parameters:,} parameters"
        return f"r={self.rank}" if self.rank is not None else "as written"


@dataclass(frozen=True)
class Sweep(metaclass=Checked):
    """How the learning rate of each arm is chosen, on validation rows."""

    rates: tuple[Positive, ...] | None = (3e-4, 1e-3, 3e-3)  # None, which people write as "auto": see `guess`
    seeds: tuple[Seed32, ...] = ()  # none: each final seed has a sweep of its own; else one choice that all seeds share
    factor: Annotated[float, Range(least=1.01, most=1e6)] = 10**0.5  # between a rate and the next, where the grid grows
    extend: Natural = 3  # how often it may grow at either end
    halving: Halving | None = None  # successive halving that keeps one run in so many

    @staticmethod
    def as_meant(name: str, value: Any) -> Any:
        """`rates` of "auto" as None."""
        return rates_meant(name, value)


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """What is the same for all runs, but where an arm or a data set has its own; see `undula.Run`."""

    also: ClassVar[Mapping[str, str]] = {"steps": "max_steps"}  # what a study file calls it

    evaluations: Count = 6  # on validation rows in a run, evenly; the best point is kept


@dataclass(frozen=True)
class Study(metaclass=Checked):
    """Everything that is compared, and how.  `baseline` names the arm that differences are taken to."""

    title: str
    arms: tuple[Arm, ...]
    models: tuple[Base, ...]
    data: tuple[Rows, ...]
    budgets: tuple[Budget, ...] = (Budget(),)
    baseline: str = "LoRA"
    seeds: tuple[Seed32, ...] = (1, 2, 3)
    sweep: Sweep = Sweep()
    train: Training = Training()
    split_seed: Seed32 = 0  # of splits that the data do not bring, and of samples of rows

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(a for a in self.arms if a.name == name)

    def settings(self, arm: Arm, rows: Rows | None = None) -> dict[str, Any]:
        """How an arm is trained on these rows: by [train], but where the rows or the arm have their own.

        A schedule in [train] is not for an allocator that brings one, without which it would not be itself.
        """
        found = {f.name: getattr(self.train, f.name) for f in fields(Settings)}
        if arm.allocator is not None and arm.allocator.schedule() is not None:
            found["schedule"] = None
        theirs = {} if rows is None else {"epochs": rows.epochs, "batch": rows.batch}
        found |= {name: value for name, value in theirs.items() if value is not None} | dict(arm.own)
        if arm.method is None:
            idle = [f for f in fields(Settings) if f.metadata["layers"] and f.name != "where"]  # which old keys hold
            found |= {f.name: default_of(f) for f in idle}
        if arm.full:
            found["full"] = ("*",)
        return found


def faults(study: Study) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(place, why) of all that makes no study, models and data unopened.  A place is as `("methods", 2)`."""
    names = [arm.name for arm in study.arms]
    parts = {
        "methods": names,
        "models": [base.label for base in study.models],
        "data": [rows.label for rows in study.data],
        "budgets": [budget.label for budget in study.budgets],
    }
    for part, labels in parts.items():
        if not labels:
            yield (part,), f"a study needs at least one [[{part}]]"
        for i, label in enumerate(labels):
            if label in labels[:i]:
                yield (part, i), f"two of the {part} are called {label!r}: give them different names"
    if names and study.baseline not in names:
        why = f"no method is called {study.baseline!r}; there are: {', '.join(names)}"
        default = next(f.default for f in fields(Study) if f.name == "baseline")
        if study.baseline == default:
            why += f". `baseline` is {default!r} where it is not said: name one of them"
        yield ("baseline",), why
    counted = [arm.name for arm in study.arms if arm.method is not None]
    for i, budget in enumerate(study.budgets):
        if budget.parameters_of is not None and budget.parameters_of not in counted:
            why = f"no method is called {budget.parameters_of!r}; there are: {', '.join(counted)}"
            yield ("budgets", i, "parameters_of"), why
    yield from _unfit(study)
    for place, seeds, needed in ((("seeds",), study.seeds, True), (("sweep", "seeds"), study.sweep.seeds, False)):
        if len(set(seeds)) < len(seeds) or (needed and not seeds):
            yield place, f"seeds are different whole numbers, found {list(seeds)!r:.60}"
    if set(study.seeds) & set(study.sweep.seeds):
        yield (
            ("seeds",),
            (
                "where all final seeds share one sweep ([sweep] seeds), none of them may be a seed of it; without "
                "[sweep] seeds each final seed has a sweep of its own"
            ),
        )


def _unfit(study: Study) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Settings that do not go with an arm or a budget."""
    for i, arm in enumerate(study.arms):
        how = study.settings(arm)

        def place(name: str, i: int = i, arm: Arm = arm) -> tuple[str | int, ...]:
            return ("methods", i, name) if name in arm.own else ("train", name)

        for name, why in refusals(arm.allocator, arm.method, how["overrides"], how["optimiser"], how["penalty"]):
            yield ("methods", i, name) if name == "allocator" else place(name), f"{arm.name}: {why}"
        sized = any(b.label != Budget().label for b in study.budgets)
        counted = any(b.parameters is not None or b.parameters_of is not None for b in study.budgets)
        if "epochs" in arm.own and how["max_steps"] is not None:
            yield place("epochs"), f"{arm.name}: steps = {how['max_steps']} decides how long a run is, not epochs"
        if how["overrides"] and sized:
            yield place("overrides"), f"{arm.name}: a budget would size the arm's method, and overrides stay as written"
        if how["full"] and counted and not arm.full:
            yield place("full"), f"{arm.name}: a budget counts what the method trains; what trains in full it does not"
