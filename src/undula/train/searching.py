"""Which way to combine adapters, with which weights, is best on held-out rows: a search with Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..combine.combiner import Combiner
from ..combine.merge import Merge
from ..combine.names import named
from ..core.adapter import Adapter
from ..core.extras import needs
from ..host.host import attach, detach
from .base import quiet
from .load import load

if TYPE_CHECKING:
    from optuna import Trial

    from .restored import Restored
    from .tasks.task import Examples

WAYS = ("average", "stack", "ties", "dare", "della-linear", "knots", "slerp", "lego")
DENSITIES = (0.15, 0.85)  # in which every way that leaves something out is defined


@dataclass(frozen=True)
class Tried:
    """One trial: the way by its name, the weights as the combiner takes them, and what came of it; None where the
    adapters cannot be combined so."""

    how: str
    combiner: Combiner
    weights: tuple[float, ...]
    value: float | None


@dataclass(frozen=True)
class Found:
    """The best trial, all of them in order, and what `value` is: `metric`, of which more is better or not."""

    best: Tried
    trials: tuple[Tried, ...]
    metric: str
    more_is_better: bool


@needs("search")
def search(
    paths: Sequence[str | Path],
    *,
    trials: int,
    data: str | None = None,
    rows: int | None = None,
    model: str | None = None,
    ways: Sequence[str] = WAYS,
    rank: int | None = None,
    seed: int = 0,
    drop_full: bool = False,
    seen: Callable[[Tried], object] = lambda tried: None,
) -> Found:
    """Combines the adapters in `paths` in `trials` ways, by Optuna's TPE from `seed` on, and measures each.

    With `data`, rows of the first adapter's task, its headline metric on them counts.  Without, every adapter's own
    held-out rows, on its own task with its own head (what it trains in full): the mean over the adapters of the metric
    as a share of what the adapter reaches alone.  `rows` is how many at most, of each.  The first trial is the average.

    Raises what `undula.load` raises; ValueError where no trial could be measured.
    """
    import optuna

    with quiet():
        opened = load(list(paths), model)
    judge = _OnData(opened, data, rows, drop_full) if data is not None else _OnOwn(opened, rows)
    tried: list[Tried] = []

    def objective(trial: Trial) -> float:
        how, combiner, weights = _proposed(trial, ways, len(opened), rank, seed)
        try:
            value = judge(combiner, weights)
        except ValueError:  # opposite directions, heads that have no such average
            value = math.nan
        tried.append(Tried(how, combiner, weights, value if math.isfinite(value) else None))
        seen(tried[-1])
        if not math.isfinite(value):
            raise optuna.TrialPruned
        return value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    way: Literal["maximize", "minimize"] = "maximize" if judge.more_is_better else "minimize"
    study = optuna.create_study(direction=way, sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({"how": ways[0], **{f"weight {i}": 1.0 for i in range(len(opened))}})
    study.optimize(objective, n_trials=trials)
    measured = [t for t in tried if t.value is not None]
    if not measured:
        raise ValueError(f"none of {trials} trials could be measured: the adapters cannot be combined in these ways")
    best = max(measured, key=lambda t: (t.value or 0.0) * (1 if judge.more_is_better else -1))
    return Found(best, tuple(tried), judge.metric, judge.more_is_better)


def _proposed(
    trial: Trial, ways: Sequence[str], number: int, rank: int | None, seed: int
) -> tuple[str, Combiner, tuple[float, ...]]:
    """Weights are shares; where they do not count in proportion, their sum is chosen as well."""
    how = trial.suggest_categorical("how", list(ways))
    raw = [trial.suggest_float(f"weight {i}", 0.0, 1.0) for i in range(number)]
    combiner = named(how, rank=rank)
    if isinstance(combiner, Merge):
        if hasattr(combiner.sparsify, "density"):
            combiner = named(how, rank=rank, density=trial.suggest_float("density", *DENSITIES), seed=seed)
        whole = math.fsum(combiner.shares([1.0] * number))
        total = 1.0 if math.isclose(whole, 1.0) else trial.suggest_float("sum of weights", 0.5, float(number))
    else:
        total = 1.0
    summed = math.fsum(raw) or 1.0
    return how, combiner, tuple(total * w / summed for w in raw) if any(raw) else (total / number,) * number


class _Judge:
    metric: str
    more_is_better: bool

    def __call__(self, combiner: Combiner, weights: Sequence[float]) -> float:
        raise NotImplementedError


class _OnData(_Judge):
    """The first adapter's task on other rows."""

    def __init__(self, opened: Sequence[Restored], data: str, rows: int | None, drop_full: bool):
        self.first, task = opened[0], opened[0].run.task
        self.adapters = [replace(o.adapter.copy(), full={}) if drop_full else o.adapter.copy() for o in opened]
        self.own = dict(opened[0].adapter.copy().full) if drop_full else {}
        self.examples = self.first.examples(data, None, rows)
        self.metric, self.more_is_better = task.headline, task.more_is_better

    def __call__(self, combiner: Combiner, weights: Sequence[float]) -> float:
        made = combiner(self.adapters, weights)
        made.check_usable()
        return _measured(self.first, replace(made, full=self.own or made.full), self.examples)


class _OnOwn(_Judge):
    """Each adapter's own rows."""

    metric, more_is_better = "share of what each reaches alone", True

    def __init__(self, opened: Sequence[Restored], rows: int | None):
        self.opened = opened
        self.whole = [o.adapter.copy() for o in opened]
        self.bodies = [replace(a, full={}, about={}) for a in self.whole]
        self.examples = [o.examples(None, None, rows) for o in opened]
        self.alone = [_measured(*each) for each in zip(opened, self.whole, self.examples, strict=True)]
        for o, alone in zip(opened, self.alone, strict=True):
            if not alone > 0:
                raise ValueError(
                    f"{o.run.out} reaches {alone:g} alone ({o.run.task.headline}), of which there are no shares: "
                    "search on other rows (data=..., or --data), or leave it out"
                )

    def __call__(self, combiner: Combiner, weights: Sequence[float]) -> float:
        made = combiner(self.bodies, weights)
        shares = []
        for o, whole, examples, alone in zip(self.opened, self.whole, self.examples, self.alone, strict=True):
            value = _measured(o, replace(made, full=whole.full, about=whole.about), examples)
            over = value / alone
            shares.append(over if o.run.task.more_is_better else 1 / over if over else math.nan)
        return math.fsum(shares) / len(shares)


def _measured(opened: Restored, adapter: Adapter, examples: Examples) -> float:
    """The headline metric of the base with this adapter."""
    detach(opened.model)
    attach(opened.model, adapter)
    opened.model.eval()
    return opened.run.task.score(opened.model, examples, opened.run.batch)[opened.run.task.headline]
