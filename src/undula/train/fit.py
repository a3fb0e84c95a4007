"""train(run): the verb."""

from __future__ import annotations

import dataclasses
import random
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter import Adapter
from ..extras import told
from ..host import attach
from ..making import fresh
from ..methods.lora import LoRA
from ..probe import Probe
from ..ranks.gates import in_use
from .base import model_folder, open_model
from .measure import PeakMemory, versions
from .rows import LOG, rows_of
from .run import REPORT, RUN, Run, read_run, write_json
from .task import Examples, Processor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerCallback


class Interrupted(RuntimeError):
    """The training was stopped, and can be resumed."""


@dataclass(frozen=True)
class Prepared:
    """A run with its model, adapter and examples in memory."""

    run: Run
    model: PreTrainedModel
    processor: Processor
    adapter: Adapter
    train: Examples
    held: Examples
    notes: tuple[str, ...] = ()  # what was assumed of the data, and what of the rows is not used
    figures: Mapping[str, Any] = field(default_factory=dict)  # what the report says of the rows


@told
def train(run: Run, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Trains an adapter with `transformers.Trainer`, saves it in `run.out`, and returns the report (OUT/report.json).

    With `resume`, goes on from the last complete checkpoint of `run.out` (from the beginning if there is none): the
    result is the same to the bit as without the interruption.  Raises Interrupted after Ctrl-C (a checkpoint is saved),
    FileExistsError when `run.out` holds a run already, LookupError, ValueError or FileNotFoundError for bad input.
    """
    begun = time.perf_counter()
    claim(run, resume)
    with PeakMemory() as memory:
        ready = prepare(run)
        before = _before(ready, resume)
        course = _fit(ready, resume, callbacks)
        _check_finite(ready.adapter, run)
        ready.adapter.save(run.out, base=model_folder(run.model), task=run.task.peft)
        after = ready.run.task.score(ready.model, ready.held, run.batch)
    report = {
        **_made(ready),
        "metric": run.task.headline,
        "before": before,
        "after": after,
        **course,
        "seconds_with_evaluation": round(time.perf_counter() - begun, 3),
        "peak_memory_bytes": memory.bytes,
        "peak_memory_is": memory.how,
        "versions": versions(),
        "run": ready.run.encode(),
        "out": str(run.out),
    }
    write_json(run.out / REPORT, report)
    return report


def _made(ready: Prepared) -> dict[str, Any]:
    """The report's part on what was trained."""
    method = ready.run.method
    return {
        "method": "head only" if method is None else type(method).public().__name__,
        "rung": None if method is None else method.rung(),
        "configuration": None if method is None else method.encode(),
        "allocator": None if ready.run.allocator is None else ready.run.allocator.encode(),
        "ranks": None if ready.run.allocator is None else _ranks(ready.adapter),
        "trainable_parameters": ready.adapter.num_parameters(),
        "sites": len(ready.adapter.methods),
        "train_rows": len(ready.train),
        "eval_rows": len(ready.held),
        "data": {**ready.figures, "notes": list(ready.notes)},
        "device": str(ready.model.device),
        "seed": ready.run.seed,
    }


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The ranks of all sites in all, of the smallest and of the largest."""
    found = in_use(adapter).values()
    return {"total": sum(found), "least": min(found, default=0), "most": max(found, default=0)}


def _check_finite(adapter: Adapter, run: Run) -> None:
    """Raises RuntimeError for an adapter that no directory would take back."""
    if not all(torch.isfinite(t).all() for t in adapter.parameters()):
        raise RuntimeError(f"the training diverged: the adapter holds NaN or infinity. Lower the rate (lr={run.lr:g})")


def claim(run: Run, resume: bool) -> None:
    """Refuses a directory that holds a run already, or with `resume` one that holds none."""
    if resume:
        read_run(run.out)
        if (run.out / REPORT).is_file():
            raise FileExistsError(f"the run in {run.out} is finished: its report is {run.out / REPORT}")
    elif (run.out / RUN).is_file() or (run.out / "adapter_config.json").is_file():
        again = "" if (run.out / REPORT).is_file() else f" resume it ({resume_command(run.out)}), or"
        raise FileExistsError(f"{run.out} holds a run already:{again} name another directory")


def resume_command(out: Path) -> str:
    """What to type to go on with a run."""
    return f"undula train --resume {shlex.quote(str(out))}"


@told
def prepare(run: Run) -> Prepared:
    """Data, model and adapter of a run; the adapter is attached."""
    if run.method is None and not run.full and not run.task.has_head:
        raise ValueError("without a method only a head trains, and this task has none: choose a method")
    read = rows_of(run)
    ready = assembled(dataclasses.replace(run, task=read.task), read.train, read.held)
    notes = (*read.notes, *ready.notes)
    for note in notes:
        LOG.warning(note)
    return dataclasses.replace(ready, notes=notes, figures=read.figures)


def assembled(run: Run, train_rows: Dataset, held_rows: Dataset) -> Prepared:
    """Model and adapter of a run whose task is fitted, on these rows; the adapter is attached."""
    model, processor = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
    full = (*run.task.head(model), *run.full)
    train_on, held = (Examples(run.task, rows, processor) for rows in (train_rows, held_rows))
    notes = (*run.task.fits(train_on, model, "train"), *run.task.fits(held, model, "validation"))
    torch.manual_seed(run.seed)  # the factors do not depend on what opening the model drew
    if run.method is None:
        adapter = attach(model, _head_only(model, run, full))
    else:
        probe = _probe(run, train_on)
        adapter = attach(model, run.method, run.where, overrides=run.overrides, full=full, probe=probe)
    return Prepared(run, model, processor, adapter, train_on, held, notes)


PROBE_BATCHES = 8  # where a run does not say


def _probe(run: Run, examples: Examples) -> Probe:
    """A few batches of the training data, for methods that start from gradients or activations.  They are made when
    such a method asks for them."""

    def batches() -> Iterator[Any]:
        collate, order = examples.task.collator(examples.processor), random.Random(run.seed)
        most = (run.probe_batches or PROBE_BATCHES) * run.batch
        numbers = order.sample(range(len(examples)), min(len(examples), most))
        for start in range(0, len(numbers), run.batch):
            yield collate([examples[i] for i in numbers[start : start + run.batch]])

    return Probe(batches())


def _head_only(model: nn.Module, run: Run, full: Sequence[str]) -> Adapter:
    """An adapter of no sites: what a head alone can do, or without one the model as it is."""
    if not full:
        return Adapter({}, {}, {})
    return Adapter({}, {}, {}, fresh(model, LoRA(r=1), run.where, {}, full).full)  # names resolved as `attach` does


def _before(ready: Prepared, resume: bool) -> dict[str, float]:
    """The metric before training: from run.json where an earlier session measured it."""
    known = read_run(ready.run.out)["before"] if resume else None
    if known is not None:
        return known
    ready.run.save(None)
    found = ready.run.task.score(ready.model, ready.held, ready.run.batch)
    ready.run.save(found)
    return found


def _fit(ready: Prepared, resume: bool, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """Trains.  Returns the report's part on its course."""
    from transformers import set_seed

    from .trainer import Stop, last_checkpoint, stopping, trainer

    out, stop = ready.run.out, Stop()
    fitter = trainer(ready.run, ready.model, ready.train, (stop, *callbacks), ready.held)
    checkpoint = last_checkpoint(out, ready.run.allocator is not None) if resume else None
    set_seed(ready.run.seed)  # whatever the evaluation drew
    begun = time.perf_counter()
    with stopping(stop):
        fitter.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, state = time.perf_counter() - begun, fitter.state
    if state.global_step < state.max_steps:
        raise Interrupted(
            f"stopped at step {state.global_step} of {state.max_steps}; go on with: {resume_command(out)}"
        )
    return {
        "steps": state.global_step,
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        "seconds": round(seconds, 3),  # of training alone, since the last resume
        "losses": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
    }
