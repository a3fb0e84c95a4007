"""train(run): the verb."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.calls import called
from ..core.extras import needs
from ..host.build import chosen_parameters, fresh
from ..host.host import attach, detach
from ..methods.lora import LoRA
from ..observe.probe import Probe
from ..optim.groups import factors_B
from ..ranks.gates import in_use
from . import page, processes
from .activations import again
from .base import called_elsewhere, lacking, model_folder, open_model
from .card import of_run, put
from .data.splitting import told_quality
from .details import details, diagnosis
from .doubts import doubts, finite
from .fields import default_of
from .measure import PeakMemory, files_digest, rows_digest, versions
from .recipe import Recipe, Settings
from .reporting import reporters
from .resume import (
    EVALUATIONS,
    check_processes,
    claim,
    evaluated,
    last_checkpoint,
    progress,
    resume_command,
)
from .rows import LOG, rows_of
from .run import REPORT, Run, read_run, write_json
from .stages import stage
from .tasks.heads import Classes
from .tasks.task import Examples, Processor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerCallback


class Interrupted(RuntimeError):
    """The training was stopped, and can be resumed."""


class Diverged(RuntimeError):
    """Numbers of the training are no longer finite.  The report is written."""


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


@called("undula.train(undula.Run(model=..., data=..., task=..., method=undula.LoRA(), out=...))")
@needs("train")
def train(
    run: Run,
    *,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    begins: Callable[[Prepared], None] | None = None,
    report_to: str | Iterable[str] = (),
) -> dict[str, Any]:
    """Trains an adapter with `transformers.Trainer`, saves it in `run.out`, and returns the report (OUT/report.json).

    With `resume`, goes on from the last complete checkpoint of `run.out` (from the beginning if there is none): the
    result is the same to the bit as without the interruption.  A callback may end the training (early stopping): then
    what there is is the result.  `begins` is called with what is in memory, before anything is measured.  `report_to`
    names what hears of losses and evaluations beside the report ("tensorboard": OUT/logs; "wandb", "mlflow" ...).

    Raises Interrupted after Ctrl-C (a checkpoint is saved), Diverged after the report where a number is not finite,
    FileExistsError when `run.out` holds a run already, ValueError when its data or model have changed, LookupError,
    ValueError or FileNotFoundError for bad input.

    Where torchrun started several processes, all call this: each step is of `run.batch` rows in each, the first process
    measures and writes, and all return the same report.  Raises RuntimeError where they cannot be joined.
    """
    begun = time.perf_counter()
    if not isinstance(run, Run):
        what = "a recipe that says no place: Run.of(recipe, out)" if isinstance(run, Recipe) else f"{run!r:.80}"
        raise TypeError(f"train takes a Run(model=..., data=..., task=..., method=..., out=...); found {what}")
    processes.join()
    services = reporters(report_to, run.out)
    processes.by_first(lambda: claim(run, resume))
    with PeakMemory() as memory:
        ready = processes.first_then_all(lambda: prepare(run))
        if begins is not None:
            processes.by_first(lambda: begins(ready))
        before = processes.by_first(lambda: measured_before(ready, resume))
        ready, course = _fit(ready, resume, itertools.chain(services, callbacks))
        return concluded(ready, before, course, memory, begun)


def concluded(
    ready: Prepared,
    before: Mapping[str, float],
    course: Mapping[str, Any],
    memory: PeakMemory,
    begun: float,
    lost: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Saves and measures what was trained, where it is not `lost`, and returns the report, which is written; `course`
    is its part on the course.  Raises Diverged after that where a number is not finite."""
    run = ready.run
    after = {} if lost else processes.by_first(lambda: _after(ready))
    memory.read()
    last = course["losses"][-1:] + [[0, v] for v in after.values()]
    diverged = not after or not all(math.isfinite(loss) for _, loss in last)
    report = {
        "state": "diverged" if diverged else "stopped" if course["steps"] < course["steps_asked"] else "done",
        "warnings": [] if diverged else _doubts(ready, before, after, course["losses"]),
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
        **more,
    }
    report |= processes.by_first(lambda: _shown(ready, report))
    report = processes.by_first(lambda: _written(ready, finite(report)))
    if diverged:
        raise Diverged(
            f"the training diverged at step {course['steps']} of {course['steps_asked']}: its loss or its adapter is "
            f"no longer finite. Lower the rate (lr={run.lr:g}). The report is in {run.out / REPORT}"
        )
    return report


SUMMARY = ("metric", "before", "after", "steps", "train_rows", "eval_rows", "rows_in_a_step", "seed")


def _shown(ready: Prepared, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report's part on single classes and rows."""
    before = read_run(ready.run.out).get("written")
    best, others = report["best"], list(ready.figures.get("other_splits", ()))
    found = {"written_before": before} if before else {}
    if best is not None and best["kept"] and best["of"] > 1 and report["after"]:
        found["optimism"] = (
            f"These figures are the best of {best['of']} evaluations on the same rows, so a little too good: "
            f"undula eval {ready.run.out} "
            + (f"--split {others[0]} measures on rows by which nothing was chosen" if others else
               "--data FILE measures on rows that you kept aside")
        )  # fmt: skip
    return {**(details(ready.held) if report["after"] else {}), **found}


def _written(ready: Prepared, report: dict[str, Any]) -> dict[str, Any]:
    """Writes the report, and its figures into the adapter, with which they go wherever that goes.  report.json comes
    last: it says that the run is finished, and what a kill leaves without it can be resumed."""
    run, adapter = ready.run, ready.adapter
    with stage("writing the report"):
        page.write(run, report, ready.held.rows, diagnosis(adapter) if report["after"] else [])
    if report["after"]:
        data = Path(run.data).name if Path(run.data).exists() else run.data
        roles = [role for role in ready.train.rows.column_names if role in run.task.roles]
        training = {"data": data, **{k: report[k] for k in SUMMARY}, "lr": run.lr, "roles": roles}
        adapter.about = {**adapter.about, "training": training}  # type: ignore[misc]
        _save(ready)
        put(of_run(run, adapter), run.out)
    write_json(run.out / REPORT, report)
    return report


def _save(ready: Prepared) -> None:
    ready.adapter.save(ready.run.out, base=called_elsewhere(ready.run.model), task=ready.run.task.peft)


def _after(ready: Prepared) -> dict[str, float]:
    """Saves what was trained, and measures it; nothing where its numbers are not finite."""
    run = ready.run
    if not all(torch.isfinite(t).all() for t in ready.adapter.parameters()):
        return {}  # no directory would take it back
    _save(ready)
    with stage("measuring after", len(ready.held)):
        return run.task.score(ready.model, ready.held, run.batch)


def _doubts(ready: Prepared, before: Mapping[str, float], after: Mapping[str, float], losses: Any) -> list[str]:
    task = ready.run.task
    return doubts(ready.held.rows, before, after, losses, task.names if isinstance(task, Classes) else ())


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
        "processes": processes.count(),
        "rows_in_a_step": processes.count() * ready.run.batch * ready.run.accumulate,
        "seed": ready.run.seed,
    }


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The ranks of all sites in all, of the smallest and of the largest."""
    found = in_use(adapter).values()
    return {"total": sum(found), "least": min(found, default=0), "most": max(found, default=0)}


@needs("train")
def prepare(
    run: Run, opened: Callable[[Run], tuple[PreTrainedModel, Processor]] | None = None, name: str = "default"
) -> Prepared:
    """Data, model and adapter of a run; the adapter is attached.  `opened` gives model and processor, where they are in
    memory already, of the run whose task is fitted."""
    if run.method is None and not run.full and not run.task.has_head:
        raise ValueError("without a method only a head trains, and this task has none: choose a method")
    with stage(f"reading {run.data}"):
        read = rows_of(run)
    run = dataclasses.replace(run, task=read.task)
    ready = assembled(run, read.train, read.held, None if opened is None else opened(run), name)
    notes = (*read.notes, *ready.notes)
    for note in notes if processes.is_first() else ():
        LOG.warning(note)
    return dataclasses.replace(ready, notes=notes, figures=read.figures)


def assembled(
    run: Run,
    train_rows: Dataset,
    held_rows: Dataset,
    opened: tuple[PreTrainedModel, Processor] | None = None,
    name: str = "default",
) -> Prepared:
    """Model and adapter of a run whose task is fitted, on these rows; the adapter is attached, under that name.  Where
    the model and what makes its inputs are `opened` already, other adapters may be attached to it."""
    alone = opened is None
    if opened is None:
        with stage(f"opening {run.model}"):
            opened = open_model(run.model, run.task, run.dtype, run.seed, run.bits)
    model, processor = opened
    if run.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} cannot compute activations again; leave it out, and take "
            "smaller batches with accumulate instead"
        )
    full = (*run.task.head(model), *run.full)
    train_on, held = (Examples(run.task, rows, processor) for rows in (train_rows, held_rows))
    with stage("looking at the rows", len(train_on) + len(held)):
        notes = (*run.task.fits(train_on, model, "train"), *run.task.fits(held, model, "validation"), *_new(run, model))
    torch.manual_seed(run.seed)  # the factors do not depend on what opening the model drew
    _check_whole(run, model, full)
    batches = _probed(run, train_on)
    with stage("attaching the adapter"):
        adapter = _attached(run, model, full, batches, name)
    if names := getattr(run.task, "names", ()):
        adapter.about = {**adapter.about, "classes": list(names)}  # type: ignore[misc]
    if run.b_ratio is not None and run.method is not None:
        factors_B(model)  # there are some: said before anything is measured
    looked = inspect.getgeneratorstate(batches) != inspect.GEN_CREATED
    if alone:  # else who holds the model knows what it computes beside
        run, told = _checkpointing(run, model, train_on)
        notes = (*notes, *told)
    return Prepared(
        run, model, processor, adapter, train_on, held, (*notes, *_idle(run, model, looked), *_spread(run, train_on))
    )


def _checkpointing(run: Run, model: PreTrainedModel, rows: Examples) -> tuple[Run, list[str]]:
    """The run with its choice made whether activations are computed again, and a note where need made it."""
    if run.gradient_checkpointing is not None:
        return run, []
    on, told = again(model, rows, run.batch, run.plain)
    return dataclasses.replace(run, gradient_checkpointing=on), [] if told is None else [told]


def _attached(run: Run, model: PreTrainedModel, full: Sequence[str], batches: Iterator[Any], called: str) -> Adapter:
    if run.method is None:
        return attach(model, _head_only(model, run, full), name=called)
    return attach(
        model,
        run.method,
        run.where,
        name=called,
        exclude=run.exclude,
        overrides=run.overrides,
        full=full,
        probe=Probe(batches, run.task.loss()),
    )


def _idle(run: Run, model: PreTrainedModel, looked: bool) -> Iterator[str]:
    """Notes on options that were given and do nothing in this run."""
    if run.max_steps is not None and run.epochs != Run.epochs:
        yield f"epochs={run.epochs:g} does nothing beside max_steps={run.max_steps}"
    if run.head_lr is not None and not run.task.head(model):
        yield f"head_lr={run.head_lr:g} does nothing: this task has no head of its own; all that trains does so at lr"
    elif run.head_lr is not None and run.method is None and not run.full:
        yield f"head_lr={run.head_lr:g} does nothing: the head alone trains, and it does so at lr={run.lr:g}"
    if run.method is None:
        for f in fields(Settings):
            if f.metadata["layers"] and f.name != "probe_batches" and getattr(run, f.name) != default_of(f):
                yield f"{f.name}={getattr(run, f.name)!r} does nothing: without a method no layer is adapted"
    brought = None if run.allocator is None else run.allocator.schedule()
    if brought is not None and run.schedule is not None and run.schedule != brought:
        yield f"{run.allocator!r} brings the schedule {brought!r}; it trains by {run.schedule!r}, as this run says"
    if run.probe_batches is not None and not looked:
        yield f"probe_batches={run.probe_batches} does nothing: no method here looks at data before the training"


def _spread(run: Run, rows: Examples) -> Iterator[str]:
    """A note on how several processes share the rows."""
    number = processes.count()
    if number > 1:
        together = number * run.batch
        steps = "" if run.accumulate == 1 else f", {together * run.accumulate} in a step"
        yield f"{number} processes train with {run.batch} rows each: {together} rows in a batch{steps}"
        aside = told_quality(len(rows)) if run.allocator is not None and run.allocator.needs_quality else 0
        if extra := -(len(rows) - aside) % together:
            yield (
                f"{len(rows) - aside} rows are no multiple of {together}: in each epoch {extra} rows count twice, to "
                "fill up the last batch"
            )


def _new(run: Run, model: PreTrainedModel) -> Iterator[str]:
    """A note on what of the body the model's files lack, and what trains in full beside the head."""
    body = f"{model.base_model_prefix}."
    new = [n for n in lacking(model) if n.startswith(body) and n in run.task.head(model)]
    if new:
        yield (
            f"the files of {run.model} lack {', '.join(new[:5])}: {'it begins' if len(new) == 1 else 'they begin'} at "
            "random numbers, train in full and are saved with the adapter"
        )


def _check_whole(run: Run, model: nn.Module, full: Sequence[str]) -> None:
    """Refuses a model whose files lack a part that would be random numbers, and not train either."""
    trained = set(full) | set(chosen_parameters(model, run.full))
    missing = [n for n in lacking(model) if n not in trained]
    if missing:
        raise ValueError(
            f"the files of {run.model} lack {', '.join(missing[:5])} (or have it in another shape), {len(missing)} "
            "parameters in all: random numbers would stand there. Take a model that is whole, or train them: "
            f"full=({missing[0]!r}, ...), --full {missing[0]}"
        )


PROBE_BATCHES = 8  # where a run does not say


def _probed(run: Run, examples: Examples) -> Generator[Any, None, None]:
    """A few batches of the training data, for methods that start from gradients or activations.  They are made when
    such a method asks for them."""
    collate, order = examples.task.collator(examples.processor), random.Random(run.seed)
    most = (run.probe_batches or PROBE_BATCHES) * run.batch
    numbers = order.sample(range(len(examples)), min(len(examples), most))
    for start in range(0, len(numbers), run.batch):
        yield collate([examples[i] for i in numbers[start : start + run.batch]])


def _head_only(model: nn.Module, run: Run, full: Sequence[str]) -> Adapter:
    """An adapter of no sites: what a head alone can do, or without one the model as it is."""
    if not full:
        return Adapter({}, {}, {})
    return Adapter({}, {}, {}, fresh(model, LoRA(r=1), run.where, {}, full).full)  # names resolved as `attach` does


def measured_before(ready: Prepared, resume: bool) -> dict[str, float]:
    """The metric before training: from run.json where an earlier start measured it."""
    told = read_run(ready.run.out) if resume else {}
    digest = _digest(ready)
    changed = [name for name, made in told.get("digest", digest).items() if digest.get(name) != made]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: not what the run in {ready.run.out} began with. Its rest would be trained and "
            "measured on something else: put it back, or begin another run"
        )
    if told.get("before") is not None:
        return told["before"]
    ready.run.save(None, digest)
    with stage("measuring before", len(ready.held)):
        found = ready.run.task.score(ready.model, ready.held, ready.run.batch)
    ready.run.save(found, digest, ready.held.seen.get("written"))
    return found


def _digest(ready: Prepared) -> dict[str, str]:
    """What rows, model and tokenizer are, told by their content."""
    folder = Path(model_folder(ready.run.model))
    commit = getattr(ready.model.config, "_commit_hash", None)
    return {
        "model": files_digest(folder) if folder.is_dir() else str(commit),
        "training rows": rows_digest(ready.train.rows),
        "validation rows": rows_digest(ready.held.rows),
    }


def _fit(ready: Prepared, resume: bool, callbacks: Iterable[TrainerCallback]) -> tuple[Prepared, dict[str, Any]]:
    """Trains.  Returns what it trained, and the report's part on its course."""
    with stage("preparing the trainer"):
        from transformers import set_seed

        from .evaluating import Evaluations
        from .stop import Stop, stopping
        from .trainer import as_left, quality_of, set_aside, trainer

    run, out, stop, aside = ready.run, ready.run.out, Stop(), None
    if run.allocator is not None and run.allocator.needs_quality:
        train_on, aside = set_aside(ready.train, run.seed)
        ready = dataclasses.replace(ready, train=train_on)
    checkpoint = processes.by_first(lambda: last_checkpoint(out, run.allocator is not None)) if resume else None
    if checkpoint is not None:
        processes.first_then_all(lambda: check_processes(out, checkpoint))
    begun_at = 0 if checkpoint is None else progress(checkpoint)[0]
    if checkpoint is not None and (begun_at >= progress(checkpoint)[1] or evaluated(checkpoint).get("ended")):
        quality = None if aside is None else quality_of(ready.model, aside)  # trained, but not measured
        left = dataclasses.replace(ready, adapter=as_left(run, ready.model, checkpoint, quality))
        course = course_of(begun_at, progress(checkpoint)[1], begun_at, 0.0, progress(checkpoint)[2])
        return with_best(left, course, evaluated(checkpoint), progress(checkpoint)[2])
    evaluations = Evaluations(run, len(ready.held))
    fitter = trainer(run, ready.model, ready.train, (*callbacks, evaluations, stop), aside)
    fitter.measure = lambda: run.task.watched(ready.model, ready.held, run.batch)
    set_seed(run.seed)  # whatever the evaluation drew
    begun = time.perf_counter()
    with stopping(stop):
        fitter.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, state = time.perf_counter() - begun, fitter.state
    found: Any = state.stateful_callbacks
    told = found.get(EVALUATIONS, {})
    if stop.agreed and state.global_step < state.max_steps and told.get("ended") is None:
        raise Interrupted(
            f"stopped at step {state.global_step} of {state.max_steps}; go on with: {resume_command(out)}"
        )
    course = course_of(state.global_step, state.max_steps, begun_at, seconds, state.log_history)
    return with_best(ready, course, told, state.log_history)


def with_best(
    ready: Prepared, course: dict[str, Any], told: Mapping[str, Any], log: list[Any]
) -> tuple[Prepared, dict[str, Any]]:
    """The run with the adapter of its best evaluation, where it keeps that, and its course with the evaluations."""
    from .evaluating import best_folder, curve, outcome
    from .trainer import restore

    run, step = ready.run, told.get("step")
    course |= outcome(run, told, curve(log))
    broken = not all(math.isfinite(loss) for _, loss in course["losses"][-1:])  # then it has diverged, and says so
    if step is None or step == course["steps"] or run.keep_best is False or broken:
        return ready, course
    saved = Adapter.load(best_folder(run.out, step))
    if run.allocator is None:
        restore(ready.adapter, saved)
        return ready, course
    detach(ready.model)  # it had other methods and shapes then
    return dataclasses.replace(ready, adapter=attach(ready.model, saved)), course


def course_of(steps: int, asked: int, begun_at: int, seconds: float, log: list[Any]) -> dict[str, Any]:
    return {
        "steps": steps,
        "steps_asked": asked,
        "resumed_from_step": begun_at,
        "seconds": round(seconds, 3),  # of training alone, since the last resume
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
    }
