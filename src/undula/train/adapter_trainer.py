"""`transformers.Trainer` with checkpoints that hold the adapter instead of the model; everything else is the Trainer's.

Imported only when a training begins: it pulls in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..core.adapter import Adapter
from ..host.host import selected
from ..integrations.callback import Allocating
from ..optim.schedules import Linear, Schedule
from . import processes
from .begun import leave
from .checkpoints import restore
from .evaluating import same_draws
from .tasks.lending import still_statistics
from .tasks.segments import segments
from .tasks.step import Step
from .tasks.weighing import weighed


class AdapterTrainer(Trainer):
    """Saves and restores the selected adapter of its model, leaves the base's statistics alone, and gives the head its
    own learning rate."""

    model: Any
    allocated = False  # whether an allocator may have changed the methods that a checkpoint holds
    own_rates: tuple[tuple[list[torch.nn.Parameter], float], ...] = ()  # of those that have one of their own
    rates: Schedule = Linear()
    items_of: Callable[[Any], int] = staticmethod(len)  # see `Task.items`
    items = batches = 1  # of the update under way
    measure: Callable[[], dict[str, float]]  # of the model as it is
    weights: torch.Tensor | None = None  # of the classes
    own_loss: Callable[[Any, Any], torch.Tensor] | None = None  # see `Task.own_loss`
    beside: Allocating | None = None  # whose course looks at the answers, see `Course.term`
    step: Step = Step()  # how a step is taken
    still: list[torch.nn.Module] | None = None  # see `kept_still`

    def kept_still(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The layers that keep statistics, looked for once: a model has hundreds of others."""
        if self.still is None:
            self.still = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        return self.still

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor = self.rates.multiplier(num_training_steps, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *given: Any) -> Any:
        samples, items = super().get_batch_samples(*given)
        self.items, self.batches = sum(self.items_of(batch) for batch in samples), len(samples)
        if torch.is_tensor(items):  # of rows of which nothing is left to learn the loss is 0, not 0 / 0
            items = items.clamp(min=1)
        return samples, items

    def train(self, *args: Any, **named: Any) -> Any:
        with self.step.around(self.model):
            return super().train(*args, **named)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args)
        for parameters, lr in self.own_rates:
            give_rate(made, parameters, lr)
        return made

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody reads it, and the Trainer walks over all modules and parameters for it in each step

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        own = super().training_step
        loss = own(*given, **named)
        twice = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "twice", None)
        if twice is not None:  # an optimiser that looks at the rows of a step again, see `optim.sam`
            twice(lambda: own(*given, **named))
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # here, because the Trainer puts the whole model into training mode before every batch
        still_statistics(self.kept_still(model))
        given = {name: value for name, value in inputs.items() if name != "segments"}
        with segments(inputs.get("segments")):
            if self.beside is None:
                return self._loss(model, given, return_outputs, num_items_in_batch)
            loss, outputs = self._loss(model, given, True, num_items_in_batch)
            loss = loss + self.beside.term(given, outputs) * self._part(given, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    def _part(self, inputs: Any, items: Any) -> float:
        """What a mean over this batch is multiplied by, as `_loss` does with the loss's."""
        if not self.model_accepts_loss_kwargs:
            return 1.0 if self.batches == 1 else self._share(inputs)
        if items is None:
            return 1.0
        several = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.items_of(inputs) * several / items

    def _loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        if self.own_loss is not None:
            loss = self.own_loss(model, inputs) * (1.0 if self.batches == 1 else self._share(inputs))
            return (loss, {}) if return_outputs else loss
        if self.step.head is not None:
            loss = self._of_labels(self.step.head.losses(model, inputs), inputs, num_items_in_batch)
            return (loss, {}) if return_outputs else loss
        found: Any = super().compute_loss(model, inputs, return_outputs or self.weights is not None, num_items_in_batch)
        if self.weights is not None:
            loss = weighed(found[1]["logits"], inputs["labels"], self.weights)
            found = (loss, *found[1:]) if return_outputs else loss
        if not self.items_of(inputs):  # a mean of nothing, 0/0: no row of this batch has a label that counts
            found = (found[0].nan_to_num(), *found[1:]) if return_outputs else found.nan_to_num()
        if self.model_accepts_loss_kwargs or self.batches == 1:
            return found
        return (found[0] * self._share(inputs), *found[1:]) if return_outputs else found * self._share(inputs)

    def _of_labels(self, losses: torch.Tensor, inputs: Any, items: Any) -> torch.Tensor:
        """What the Trainer makes of a language model's loss: the sum of this batch's over the labels of all batches of
        the update, on all processes, which take the mean of theirs."""
        if items is None:
            return losses.sum() / max(self.items_of(inputs), 1)
        several = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() * several / items

    def _share(self, inputs: Any) -> float:
        """Of a mean over this batch, which may be shorter than others."""
        return self.items_of(inputs) * self.batches / max(self.items, 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What the task measures while it trains, by the first process; the training's own draws stay what they are.
        Of an adapter whose numbers are not finite nothing is measured."""

        def measured() -> dict[str, float]:
            if not all(torch.isfinite(t).all() for t in selected(self.model).parameters()):
                return {}
            with same_draws():
                return self.measure()

        found = {f"eval_{k}": v for k, v in processes.by_first(measured).items()}
        if found:
            self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        adapter = selected(self.model)
        # of a training that has diverged there is no checkpoint, but for the folder that the Trainer writes into:
        # `train` says so at its end
        Path(output_dir or str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
        if self.args.should_save and all(torch.isfinite(t).all() for t in adapter.parameters()):
            adapter.save(output_dir or str(self.args.output_dir))
            leave(self.optimizer, output_dir or str(self.args.output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # each process its own; what makes a checkpoint complete comes after all
        processes.wait()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for p, memory in self.optimizer.state.items():  # type: ignore[union-attr]
            if getattr(p, "shape", ()) == (
                1,
            ):  # of a number that had no dimension when this was written, see `reading.with_dimension`
                memory |= {k: t.reshape(1) for k, t in memory.items() if k.startswith("exp_") and t.ndim == 0}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.allocated:  # else the callback loads the adapter, with the state of the course that belongs to it
            restore(selected(self.model), Adapter.load(resume_from_checkpoint))


def give_rate(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], lr: float) -> None:
    """Moves these parameters into groups of their own that have the learning rate `lr`."""
    own = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": lr})
