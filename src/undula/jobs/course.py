"""A job while it runs: its rows in the order in which the Trainer would take them, its optimiser and its schedule."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.adapter import Live
from ..train.evaluating import same_draws
from ..train.resume import EVALUATIONS
from ..train.tasks.task import Example, Examples
from ..train.trainer import trainer
from .job import DIVERGED, FAILED, Job, told_of

if TYPE_CHECKING:
    from ..train.prepared import Prepared

SAVES = 0.1  # of a job's steps between checkpoints, where its run does not say


@dataclass(frozen=True)
class Numbered(Examples):
    """Rows that are asked for by their numbers alone."""

    def __getitem__(self, i: int) -> Any:
        return i


@dataclass(frozen=True)
class Row:
    """One row of a step.  number: how many rows the job has had before it, by which its dropout draws; tokens: of it;
    items: what it counts in the mean that the loss is."""

    example: Example
    number: int
    tokens: int
    items: int


@dataclass(frozen=True)
class Step:
    """The rows of one optimiser step, of all the batches that are accumulated; items: of all of them, 1 at least."""

    rows: Sequence[Row]
    items: int


class Course:
    """Made while the job's adapter is selected on `ready.model`, with all that trains in its place.

    `adapter` holds the very tensors that train; `full` those of them that are no factors."""

    def __init__(self, job: Job, ready: Prepared, adapter: Live):
        self.job, self.ready, self.adapter = job, ready, adapter
        run = ready.run
        rows = Numbered(ready.train.task, ready.train.rows, ready.train.processor, seen=ready.train.seen)
        fitter = trainer(dataclasses.replace(run, plain=True), ready.model, rows, ())
        fitter.data_collator = _numbers
        loader = fitter.get_train_dataloader()
        per_epoch = max(1, -(-len(loader) // run.accumulate))
        job.steps = run.max_steps or math.ceil(run.epochs * per_epoch)
        self.optimiser: Any = fitter.create_optimizer()
        self.schedule: Any = fitter.create_scheduler(job.steps)
        self.weights = fitter.weights  # of the classes
        self.parameters = [p for p in ready.model.parameters() if p.requires_grad]
        self.taken = 0  # rows
        self.state = SimpleNamespace(global_step=0, max_steps=job.steps, stateful_callbacks={})
        self.control = SimpleNamespace(should_evaluate=False, should_training_stop=False)
        self.evaluations = job.kept.listening(self)
        self.evaluations.on_train_begin(None, self.state, self.control, model=ready.model)
        self.losses: list[list[float]] = []  # [step, mean since the last]
        self.points: list[dict[str, float]] = []  # of the evaluations
        self.sums: list[float] = []  # losses of the steps since
        self.seconds, self.resumed_from = 0.0, 0  # its share of the rounds, by tokens
        self.before: dict[str, float] = {}
        self.ended: str | None = None  # the state in which it ended
        self.alone = False  # whether its rows cannot be mixed with others'
        self._order = _order(loader, run.accumulate)
        self._found: list[Tensor] = []  # the losses of the step under way

    @property
    def log_every(self) -> int:
        return max(1, math.ceil(0.01 * self.job.steps))

    @property
    def save_every(self) -> int:
        return self.ready.run.save_every or max(1, math.ceil(SAVES * self.job.steps))

    def skip(self, steps: int) -> None:
        """So many steps were taken already."""
        for numbers in itertools.islice(self._order, steps):
            self.taken += len(numbers)

    def next_step(self) -> Step:
        """The rows of the next optimiser step."""
        numbers, made = next(self._order), list[Row]()
        for number in numbers:
            example = self.ready.train[number]
            made.append(Row(example, self.taken, len(example["input_ids"]), items_of(self.ready, example)))
            self.taken += 1
        return Step(made, max(1, sum(row.items for row in made)))

    def take(self, loss: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Adds what a micro-batch gave to the step under way."""
        self._found.append(loss)
        taken = set[int]()
        for p, g in zip(self.parameters, grads, strict=True):
            if g is None:
                continue
            if p.grad is not None:
                p.grad.add_(g)
            elif g.stride() == p.stride() and g.data_ptr() not in taken:
                p.grad = g
            else:  # it lies otherwise in memory than p, which fused optimisers do not look at, or is another's too
                p.grad = torch.empty_like(p).copy_(g)
            taken.add(g.data_ptr())

    def drop(self) -> None:
        """Forgets the step under way."""
        self._found = []
        self.optimiser.zero_grad()

    def fail(self, error: Exception) -> None:
        """What went wrong ends the job, and no other."""
        self.drop()
        self.ended, self.job.error = FAILED, told_of(error)

    def diverge(self, loss: float) -> None:
        """The loss or its gradient is not finite: the job ends with the weights that it had before this step."""
        self.drop()
        self.job.loss = math.nan if math.isfinite(loss) else loss
        self.losses.append([self.job.step + 1, self.job.loss])
        self.ended = DIVERGED

    def stepped(self, step: Step) -> None:
        """Takes the step whose rows were all seen."""
        run, job = self.ready.run, self.job
        if run.max_grad_norm and not run.optimiser.clips:
            torch.nn.utils.clip_grad_norm_(self.parameters, run.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        job.loss = float(sum(self._found, torch.zeros(())))
        self.drop()
        job.step = self.state.global_step = job.step + 1
        job.tokens += sum(row.tokens for row in step.rows)
        self.sums.append(job.loss)
        if job.step % self.log_every == 0 or job.step == job.steps:
            self.losses.append([job.step, sum(self.sums) / len(self.sums)])
            self.sums = []
        self.control.should_evaluate = False
        self.evaluations.on_step_end(None, self.state, self.control)

    def evaluate(self) -> None:
        """What is measured while it trains; the adapter is selected.  No draw of any job moves."""
        self.job.kept.measure(self)

    @property
    def told(self) -> dict[str, Any]:
        """What the evaluations have found, see `evaluating.Evaluations`."""
        found: dict[str, Any] = self.state.stateful_callbacks[EVALUATIONS]
        return found


def items_of(ready: Prepared, example: Example) -> int:
    """What one row counts in the mean that the loss is."""
    labels = torch.as_tensor(example["labels"])
    return ready.run.task.items({"labels": labels[None]})


def _numbers(batch: list[Any]) -> Any:
    """A batch as it is."""
    return batch


def _order(loader: Any, accumulate: int) -> Iterator[list[int]]:
    """The numbers of the rows of each step, epoch after epoch, as `Trainer._run_epoch` takes them."""
    for epoch in itertools.count():
        for part in (loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)):
            if (tell := getattr(part, "set_epoch", None)) is not None:
                tell(epoch)
        with same_draws():
            batches = list(loader)  # numbers alone
        for at in range(0, len(batches), accumulate):
            yield [int(i) for batch in batches[at : at + accumulate] for i in batch]
        if not batches:
            return
