"""One run of a study, from its whole configuration to its figures."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.base import quiet
from ..train.fit import Prepared, assembled
from ..train.measure import PeakMemory
from ..train.run import Run
from ..train.task import Examples, Task
from . import splits
from .spec import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapter import Adapter
    from .watch import Watch

PROTOCOL = 1  # raise it when the same configuration would give other figures


class Diverged(RuntimeError):
    """The loss or the adapter is no longer finite."""


@dataclass(frozen=True)
class Trial:
    """A run, its rows and how it is measured.  Two trials of equal configuration are one run in the store."""

    run: Run
    rows: Rows
    evaluations: int
    split_seed: int
    tested: bool  # on the test rows, and as deployed: final runs only

    @functools.cached_property
    def key(self) -> str:
        """A hash of the whole configuration."""
        return hashlib.sha256(json.dumps(self.encode(), sort_keys=True).encode()).hexdigest()[:24]

    def encode(self) -> dict[str, Any]:
        """As JSON values.  What is None or empty is left out, so that a new option of runs, which is off by default,
        does not make old records strangers."""
        run = self.run.encode()
        source = run["data"]  # a path made absolute: another process may stand elsewhere
        rows = dataclasses.asdict(dataclasses.replace(self.rows, source=source, label=source)) | {"task": None}
        rest = {"evaluations": self.evaluations, "split_seed": self.split_seed, "tested": self.tested}
        return {"protocol": PROTOCOL, "run": _told(run), "rows": _told(rows), **rest}

    @staticmethod
    def decode(data: Mapping[str, Any]) -> Trial:
        """The inverse of `encode`."""
        run = Run.decode({"eval_rows": None} | data["run"], Path("unused"))
        rest = {k: data[k] for k in ("evaluations", "split_seed", "tested")}
        every = {"train": None, "validation": None, "test": None} | data["rows"] | {"task": run.task}
        return Trial(run, Rows(**every), **rest)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    needed = ("method", "task")
    return {k: v for k, v in values.items() if k in needed or v not in (None, [], {}, ())}


def perform(trial: Trial, watch: Watch) -> dict[str, Any]:
    """Trains, keeps the best point on validation rows, and measures: the fields of an Outcome that a run decides.

    Raises Diverged, and whatever the training raises.
    """
    from transformers import set_seed

    gc.collect()
    begun = time.perf_counter()
    task, parts = splits.opened(trial.rows, trial.split_seed)
    with quiet(), PeakMemory() as memory, tempfile.TemporaryDirectory() as scratch:
        run = dataclasses.replace(trial.run, task=task, out=Path(scratch))
        ready = assembled(run, parts["train"], parts["validation"])
        watch.begin(ready, trial.evaluations)
        set_seed(run.seed)
        seconds, losses, steps = _fit(ready, watch) if ready.adapter.parameters() else _as_it_is(watch)
    if not watch.curve:
        raise Diverged(f"the loss was not finite at any evaluation (lr={run.lr:g})")
    heads = head_size(run.task, ready.model, ready.adapter)
    found = {
        "validation": watch.best,
        "parameters": ready.adapter.num_parameters() - heads,
        "head_parameters": heads,
        "steps": steps,
        "seconds": round(seconds - watch.seconds, 3),
        "peak_memory_bytes": memory.bytes,
        "losses": losses,
        "curve": watch.curve,
        "pruned": watch.pruned,
        "evaluation_seconds": round(watch.seconds, 3),
        "rows_digest": splits.digest(trial.rows, trial.split_seed),
    }
    found |= _tested(ready, watch, Examples(task, parts["test"], ready.processor)) if trial.tested else {}
    return found | {"wall_seconds": round(time.perf_counter() - begun, 3)}


def head_size(task: Task, model: PreTrainedModel, adapter: Adapter) -> int:
    """How many numbers of a new head train beside the adapter's own."""
    full = {id(t): t for name in task.head(model) if (t := adapter.full.get(name)) is not None}
    return sum(t.numel() for t in full.values())


def _fit(ready: Prepared, watch: Watch) -> tuple[float, list[tuple[int, float]], int]:
    """(seconds, losses, steps) of the training, evaluations included."""
    from transformers.trainer_utils import SaveStrategy

    from ..train.trainer import trainer

    fitter = trainer(ready.run, ready.model, ready.train, (watch,), ready.held)
    fitter.args.save_strategy = SaveStrategy.NO
    begun = time.perf_counter()
    fitter.train()
    seconds = time.perf_counter() - begun
    log = [(int(e["step"]), float(e["loss"])) for e in fitter.state.log_history if "loss" in e]
    return seconds, [(step, loss) for step, loss in log if math.isfinite(loss)], fitter.state.global_step


def _as_it_is(watch: Watch) -> tuple[float, list[tuple[int, float]], int]:
    """What `_fit` returns where there is nothing to train."""
    watch.evaluate(0)
    return watch.seconds, [], 0


def _tested(ready: Prepared, watch: Watch, test: Examples) -> dict[str, Any]:
    """The figures on the test rows, which are touched here alone: once as trained, once in each deployed form."""
    from .deploy import deployed

    ready = watch.restore()
    task: Task = ready.run.task
    others = task.score(ready.model, test, ready.run.batch)
    forms, errors = deployed(ready, test)
    return {"test": others[task.headline], "others": others, "deployed": forms, "deployed_error": errors}
