"""What one run of a study came to: the record that the store keeps and that statistics and reports read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SWEEP, FINAL = "sweep", "final"
PRECISION = re.compile(r" \((?:[48] bits|b?float\d+)(?:, b?float\d+)?\)$")  # what `Base.label` puts behind a source


@dataclass(frozen=True)
class Outcome:
    """One run.  Runs are compared within one group: the same model, data and budget.

    `arm` is what a table calls the method with its settings.  Runs of a sweep choose a learning rate (or lose against
    another) on validation rows; final runs are made at the chosen rate and alone touch the test rows.
    """

    arm: str
    model: str
    data: str
    budget: str  # "r=8", "37,000 parameters"
    stage: str  # SWEEP or FINAL
    lr: float
    seed: int
    metric: str  # the task's headline metric
    more_is_better: bool
    error: str | None = None  # why the run failed; the fields below are then empty
    validation: float | None = None  # the metric on validation rows at the best evaluation of the run
    test: float | None = None  # the metric on test rows, at that same point (final runs only)
    others: Mapping[str, float] = field(default_factory=dict)  # every metric on the test rows
    parameters: int | None = None  # that train, the head apart
    head_parameters: int | None = None  # that train in full beside them
    wanted_parameters: int | None = None  # by an equal-parameter budget
    steps: int | None = None
    pruned: bool = False  # ended early by successive halving (runs of a sweep only)
    ranks: int | None = None  # that are open at the measured point, over all sites (under an allocator only)
    seconds: float | None = None  # of training, evaluations apart, by the clock: they follow the machine's load
    cpu_seconds: float | None = None  # of the same, that the process had; neither is compared by any report
    peak_memory_bytes: int | None = None
    deployed: Mapping[str, float] = field(default_factory=dict)  # test metric in other forms: {"merged": 0.81, ...}
    deployed_error: Mapping[str, float] = field(default_factory=dict)  # relative error of the outputs in these forms
    losses: tuple[tuple[int, float], ...] = ()  # (step, training loss)
    curve: tuple[tuple[int, float], ...] = ()  # (step, validation metric)
    model_source: str = ""  # what stands behind the label: a base in two precisions is one source; "": the label
    data_source: str = ""

    @property
    def group(self) -> tuple[str, str, str]:
        """Within which runs are comparable."""
        return self.model, self.data, self.budget

    @property
    def place(self) -> tuple[str, str]:
        """Figures of other places are independent evidence; precisions, budgets and options of one place are not."""
        return self.model_source or PRECISION.sub("", self.model), self.data_source or self.data

    def encode(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def decode(data: Mapping[str, Any]) -> Outcome:
        """The inverse of `encode`.  Raises TypeError for fields that do not exist."""
        values: dict[str, Any] = {
            k: tuple(tuple(p) for p in v) if k in ("losses", "curve") else v for k, v in data.items()
        }
        known = {f.name for f in fields(Outcome)}
        if unknown := sorted(set(values) - known):
            raise TypeError(f"an outcome has no field {', '.join(unknown)}")
        return Outcome(**values)


@dataclass(frozen=True)
class ChosenRate:
    """What a sweep chose for one arm of a group: for one final seed, or one rate for all of them."""

    arm: str
    model: str
    data: str
    budget: str
    lr: float
    bracketed: bool  # a lower and a higher rate were tried and did no better: the best does not lie at an edge
    tried: tuple[tuple[float, float | None], ...]  # (rate, mean validation metric; None: every run there failed)
    seed: int | None = None  # whose final run has this rate; None: all of them share it, and with it the choice's luck

    @property
    def group(self) -> tuple[str, str, str]:
        return self.model, self.data, self.budget
