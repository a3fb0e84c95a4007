"""look(run): what a training is about to do, before it does it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.extras import needs
from ..observe.listen import moved
from . import processes
from .activations import AsTrained, device_of, placed, step_of, unchanged
from .data.splitting import told_quality
from .prepared import Prepared, prepare
from .recipe import Recipe
from .run import Run
from .tasks.shown import Piece
from .tasks.task import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 3
WARM = 5.0  # seconds of a first step, which prepares things once, above which no second one is taken


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a part as the model gets them, how many rows are cut, and how many of these lose the end
    token that they would have learned."""

    median: float
    longest: int
    cut: int
    lost_ends: int


@dataclass(frozen=True)
class Look:
    """What a training is about to do.

    rows, lengths: of each part; form: what was found in the columns of the data; classes: {part: {class: rows}};
    majority: the share of validation rows that always answering the most frequent class of train gets right;
    examples: training rows as the model sees them, in pieces (text, whether it is learned);
    seconds: an estimate of the training alone, from a step forwards and backwards that changed nothing.
    """

    rows: dict[str, int]
    form: str
    classes: dict[str, dict[str, int]]
    majority: float | None
    lengths: dict[str, Lengths]
    examples: tuple[tuple[Piece, ...], ...]
    trainable_parameters: int
    parameters: int
    device: str
    processes: int
    rows_in_a_step: int
    steps: int
    seconds: float
    notes: tuple[str, ...]

    def encode(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"examples": [[list(piece) for piece in example] for example in self.examples]}


@needs("train")
def look(run: Recipe) -> Look:
    """What `train(run)` would begin with: rows, form, classes, lengths, examples, parameters, device, steps and time.
    Opens data and model, and writes nothing, so a recipe without a place will do.  Raises what `train` raises for bad
    input."""
    placed = run if isinstance(run, Run) else Run.of(run, Path())
    processes.join()
    return looked(processes.first_then_all(lambda: prepare(placed)))


def looked(ready: Prepared) -> Look:
    """The look at a run that is in memory."""
    run, parts = ready.run, {"train": ready.train, "validation": ready.held}
    check_course(ready)
    steps = steps_of(run, len(ready.train))
    spread = sorted({i * (len(ready.train) - 1) // (EXAMPLES - 1) for i in range(EXAMPLES)})
    made = [run.task.shown(ready.train.rows[i], ready.processor) for i in spread]
    lengths = {name: found for name, part in parts.items() if (found := _lengths(part)) is not None}
    return Look(
        rows={name: len(part) for name, part in parts.items()},
        form=ready.figures.get("form", ""),
        classes=dict(ready.figures.get("classes", {})),
        majority=ready.figures.get("majority"),
        lengths=lengths,
        examples=tuple(tuple(pieces) for pieces in made),
        trainable_parameters=ready.adapter.num_parameters(),
        parameters=sum(p.numel() for p in ready.model.parameters()),
        device=str(device_of(ready.model)),
        processes=processes.count(),
        rows_in_a_step=processes.count() * run.batch * run.accumulate,
        steps=steps,
        seconds=steps * run.accumulate * _seconds(ready),
        notes=ready.notes,
    )


def steps_of(run: Run, rows: int) -> int:
    """How many steps the Trainer will take."""
    if run.max_steps is not None:
        return run.max_steps
    if run.allocator is not None and run.allocator.needs_quality:
        rows -= told_quality(rows)
    batches = math.ceil(math.ceil(rows / run.batch) / processes.count())
    return math.ceil(run.epochs * max(1, math.ceil(batches / run.accumulate)))


def check_course(ready: Prepared) -> None:
    """Raises what an allocator, a penalty or an optimiser that sees factors has against this model, adapter or number
    of steps: the training would say it after all rows are measured.  Nothing is changed."""
    if (how := ready.run.procedure) is not None:
        optimizer = torch.optim.SGD(ready.adapter.parameters(), lr=0.0)
        how.start(ready.model, optimizer, steps_of(ready.run, len(ready.train)), quality=lambda: 0.0)
    if ready.run.optimiser.paired:
        kind, constants = ready.run.optimiser.made()
        trained = ready.adapter.parameters()
        try:
            kind(trained, adapted=ready.model, **constants)  # type: ignore[call-arg]
        finally:
            for p in trained:  # LoRA-FA freezes A
                p.requires_grad_(True)


def _lengths(part: Examples) -> Lengths | None:
    """None for rows that have no tokens, or that nobody has looked at."""
    found = part.seen.get("lengths")
    if not found:
        return None
    from statistics import median  # with it come decimal and fractions, which `import undula` need not load

    return Lengths(median(found), max(found), part.seen["cut"], part.seen["lost_ends"])


def _seconds(ready: Prepared) -> float:
    """Of one batch forwards and backwards: rows that lie evenly in the training part, on the device that will train."""
    run, model = ready.run, ready.model
    apart = max(1, len(ready.train) // run.batch)
    chosen = range(0, len(ready.train), apart)[: run.batch]
    step = step_of(model, ready.train, run.plain)
    batch = step.gather([ready.train[i] for i in chosen])
    with unchanged(model), placed(model) as device, step.around(model):
        first = _step(model, step, batch, device)
        return first if first > WARM else min(first, _step(model, step, batch, device))


def _step(model: PreTrainedModel, step: AsTrained, batch: Mapping[str, Any], device: torch.device) -> float:
    begun = time.perf_counter()
    step.loss(model, moved(batch, device)).backward()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun
