"""One run of a study, from its whole configuration to its figures."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..ranks.gates import in_use
from ..train.base import config_of, quiet
from ..train.measure import PeakMemory, versions
from ..train.prepared import Prepared, assembled
from ..train.recipe import Recipe, recipe_of
from ..train.rows import in_own_order
from ..train.run import Run
from ..train.tasks.task import Examples, Task
from .sources import Sources
from .spec import Rows
from .spent import Spent

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel

    from ..core.adapter import Adapter
    from .watch import Watch

PROTOCOL = 3  # raise it when the same configuration would give other figures
# 2: dropout in steps of 1/256, gradients clipped before allocators saw them, heads over narrow bases without masters;
# 1: of equal validation points the first was kept, and those before an allocator's budget was reached counted
FORMER = (2, 1)


class Diverged(RuntimeError):
    """The loss or the adapter is no longer finite."""


@dataclass(frozen=True)
class Trial:
    """A run, its rows and how it is measured.  Two trials of equal configuration are one run in the store."""

    run: Recipe
    rows: Rows
    evaluations: int
    split_seed: int
    tested: bool  # on the test rows, and as deployed: final runs only
    label: str = field(default="", compare=False)  # what people call it; no part of what it is

    @functools.cached_property
    def key(self) -> str:
        """A hash of the whole configuration."""
        return self._hash(PROTOCOL)

    @functools.cached_property
    def formers(self) -> tuple[str, ...]:
        """The keys that protocols before this one gave it, the newest first."""
        return tuple(map(self._hash, FORMER))

    def _hash(self, protocol: int) -> str:
        told = self.encode() | {"protocol": protocol}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

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
        run = recipe_of({"eval_rows": None} | data["run"])
        rest = {k: data[k] for k in ("evaluations", "split_seed", "tested")}
        every = {"train": None, "validation": None, "test": None} | data["rows"] | {"task": run.task}
        return Trial(run, Rows(**every), **rest)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    needed = ("method", "task")
    return {k: v for k, v in values.items() if k in needed or v not in (None, [], {}, ())}


def perform(trial: Trial, watch: Watch, sources: Sources | None = None) -> dict[str, Any]:
    """Trains, keeps the best point on validation rows, and measures: the fields of an Outcome that a run decides.

    Raises Diverged, and whatever the training raises.
    """
    from transformers import set_seed

    gc.collect()
    begun, sources = time.perf_counter(), sources or Sources()
    task, parts = rows_of(trial, sources)
    with quiet(), PeakMemory() as memory, tempfile.TemporaryDirectory() as scratch:
        run = Run.of(dataclasses.replace(trial.run, task=task), Path(scratch))
        ready = assembled(run, parts["train"], parts["validation"])
        begin(trial, ready, watch, parts)
        set_seed(run.seed)
        times, losses, steps = _fit(ready, watch) if ready.adapter.parameters() else _as_it_is(watch)
    found = came_to(ready, watch, losses, steps)
    found |= {"seconds": round(times.wall, 3), "cpu_seconds": round(times.cpu, 3), "peak_memory_bytes": memory.bytes}
    found |= about(trial, ready, watch, sources)
    found |= tested(watch.restore(), Examples(task, parts["test"], ready.processor)) if trial.tested else {}
    return found | {"wall_seconds": round(time.perf_counter() - begun, 3)}


def rows_of(trial: Trial, sources: Sources) -> tuple[Task, DatasetDict]:
    """(the task, fitted; the three parts) of a run."""
    task, parts = sources.opened(trial.rows, trial.split_seed)
    return in_own_order(trial.rows.task, task, parts, config_of(trial.run.model))[:2]


def begin(trial: Trial, ready: Prepared, watch: Watch, parts: DatasetDict) -> None:
    """What is done before the first step."""
    if trial.tested:  # rows that the model cannot take are found now, not at the end
        task: Task = ready.run.task
        task.fits(Examples(task, parts["test"], ready.processor), ready.model, "test")
    watch.begin(ready, trial.evaluations)


def came_to(ready: Prepared, watch: Watch, losses: list[tuple[int, float]], steps: int) -> dict[str, Any]:
    """What was trained.  Raises Diverged."""
    run = ready.run
    if lost := [step for step, loss in losses if not math.isfinite(loss)]:
        raise Diverged(f"the loss was not finite after {lost[0]} updates (lr={run.lr})")
    if not all(p.isfinite().all() for p in ready.adapter.parameters()):
        raise Diverged(f"the adapter was not finite after {steps} updates (lr={run.lr})")
    if watch.kept is None:
        raise Diverged(f"the loss was not finite at any evaluation that counts (lr={run.lr})")
    heads = head_size(run.task, ready.model, ready.adapter)
    found: dict[str, Any] = {
        "validation": watch.best,
        "parameters": ready.adapter.num_parameters() - heads,
        "head_parameters": heads,
        "steps": steps,
        "losses": losses,
        "curve": watch.curve,
        "pruned": watch.pruned,
    }
    return found | ({} if run.allocator is None else {"ranks": sum(in_use(watch.kept).values())})


def about(trial: Trial, ready: Prepared, watch: Watch, sources: Sources) -> dict[str, Any]:
    """How it was made."""
    return {
        "evaluation_seconds": round(watch.spent.wall, 3),
        "rows_digest": sources.digest(trial.rows, trial.split_seed),
        "made": _made(ready, sources),
    }


def head_size(task: Task, model: PreTrainedModel, adapter: Adapter) -> int:
    """How many numbers of a new head train beside the adapter's own."""
    full = {id(t): t for name in task.head(model) if (t := adapter.full.get(name)) is not None}
    return sum(t.numel() for t in full.values())


def _made(ready: Prepared, sources: Sources) -> dict[str, Any]:
    """With what a run was made: what its figures may depend on beside its configuration."""
    device = ready.model.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": versions(),
        "device": f"{device.type} ({kind})",
        "threads": torch.get_num_threads(),
        "model": sources.model(ready.run.model),
    }


def _fit(ready: Prepared, watch: Watch) -> tuple[Spent, list[tuple[int, float]], int]:
    """(times without the evaluations, losses, steps) of the training."""
    from transformers.trainer_utils import SaveStrategy

    from ..train.trainer import trainer

    fitter = trainer(ready.run, ready.model, ready.train, (watch,), ready.held)
    fitter.args.save_strategy = SaveStrategy.NO
    begun = Spent.now()
    fitter.train()
    times = Spent.now() - begun - watch.spent
    log = [(int(e["step"]), float(e["loss"])) for e in fitter.state.log_history if "loss" in e]
    return times, log, fitter.state.global_step


def _as_it_is(watch: Watch) -> tuple[Spent, list[tuple[int, float]], int]:
    """What `_fit` returns where there is nothing to train."""
    watch.evaluate(0)
    return Spent(), [], 0


def tested(ready: Prepared, test: Examples) -> dict[str, Any]:
    """The figures on the test rows, which are touched here alone: once as trained, once in each deployed form."""
    from .deploy import deployed

    task: Task = ready.run.task
    others = task.score(ready.model, test, ready.run.batch)
    forms, errors = deployed(ready, test)
    return {"test": others[task.headline], "others": others, "deployed": forms, "deployed_error": errors}
