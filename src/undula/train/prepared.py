"""Data, model and adapter of a run, in memory and checked: what a training begins with."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.extras import needs
from ..host.build import chosen_parameters, fresh
from ..host.host import attach
from ..io.outline import head
from ..methods.lora import LoRA
from ..observe.probe import Probe
from ..optim.groups import factors_B
from . import processes
from .activations import again
from .base import lacking, open_model
from .data.splitting import told_quality
from .fields import default_of
from .recipe import Settings
from .rows import LOG, RunRows, rows_of
from .run import Run
from .stages import stage
from .tasks.task import Examples, Processor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


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


@needs("train")
def prepare(
    run: Run,
    opened: Callable[[Run], tuple[PreTrainedModel, Processor]] | None = None,
    name: str = "default",
    read: Callable[[Run], RunRows] = rows_of,
) -> Prepared:
    """Data, model and adapter of a run; the adapter is attached.  `opened` gives model and processor, where they are in
    memory already, of the run whose task is fitted; `read` the rows, where they are not those of `run.data`."""
    if run.begin_from is not None:
        from .begun import with_method

        run = with_method(run)
    for place in (place for how in run.penalty if how.active for place in how.reads):
        head(place)  # what is no adapter is told before rows are read and the base is opened
    if run.method is None and not run.full and not run.task.has_head:
        raise ValueError("without a method only a head trains, and this task has none: choose a method")
    with stage(f"reading {run.data}"):
        rows = read(run)
    run = dataclasses.replace(run, task=rows.task)
    ready = assembled(run, rows.train, rows.held, None if opened is None else opened(run), name)
    notes = (*rows.notes, *ready.notes)
    for note in notes if processes.is_first() else ():
        LOG.warning(note)
    return dataclasses.replace(ready, notes=notes, figures=rows.figures)


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
    _check_compared(run, model)
    batches = _probed(run, train_on)
    with stage("attaching the adapter"):
        adapter = _attached(run, model, full, batches, name)
    if names := getattr(run.task, "names", ()):
        adapter.about = {**adapter.about, "classes": list(names)}  # type: ignore[misc]
    if run.b_ratio is not None and run.method is not None:
        factors_B(model)  # there are some: said before anything is measured
    if run.optimiser.paired and run.optimiser.by_pairs:
        from ..optim.pairs import pairs

        pairs(adapter)
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
    if run.begin_from is not None:
        from .begun import begun

        return attach(model, begun(run, [*run.task.head(model), *chosen_parameters(model, run.full)]), name=called)
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
        yield f"head_lr={run.head_lr:g} does nothing: the head alone trains, and it does so at lr"
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


def _check_compared(run: Run, model: PreTrainedModel) -> None:
    """Refuses to compare with the answers of a head that is random numbers."""
    compared = next((p for p in run.penalty if p.compares and p.active), None)
    new = [name for name in lacking(model) if name in run.task.head(model)]
    if compared is not None and new:
        raise ValueError(
            f"penalty: {compared!r} compares with what the base answers, and {', '.join(new[:3])} of {run.model} is "
            "new, at random numbers: begin with a model that was trained for this task, or take a penalty that does "
            "not compare (BALoRA with form.consistency=0)"
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
