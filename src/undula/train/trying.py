"""Steps of a run that are taken to see what they do, and taken back: the run's own Trainer makes batches and losses."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activations import placed, unchanged
from .evaluating import same_draws
from .prepared import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = list[Any]


class Walk:
    """Made within `trying`.  Rates are multiples of the run's: where B or the head have rates of their own they keep
    them, B in proportion.

    gradients: how many batches have gone forwards and backwards so far, losses: how many forwards alone.
    """

    def __init__(self, ready: Prepared, out: Path):
        from .trainer import trainer

        run = dataclasses.replace(ready.run, lr=1.0, allocator=None, penalty=(), out=out)
        self.run, self.model, self.gradients, self.losses = run, ready.model, 0, 0
        self.fitter = trainer(run, ready.model, ready.train, ())
        self.optimiser: Any = self.fitter.create_optimizer()
        self.fixed = _fixed(ready)
        self.own = [(group, group["lr"]) for group in self.optimiser.param_groups]
        self.batches = _endless(self.fitter.get_train_dataloader())
        torch.manual_seed(run.seed)

    @property
    def followed(self) -> list[tuple[Tensor, float]]:
        """(parameter, multiple of the run's rate) of what trains at it, or at a multiple."""
        return [(p, lr) for g, lr in self.own for p in g["params"] if p.requires_grad and id(p) not in self.fixed]

    def some(self, number: int) -> Batches:
        """The next batches of the training."""
        return [next(self.batches) for _ in range(number)]

    def step(self, rate: float) -> float:
        """One step of the run at a rate; the loss of its rows before it."""
        loss = self._backward(self.some(self.run.accumulate))
        if self.run.max_grad_norm and not self.run.optimiser.clips:
            torch.nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], self.run.max_grad_norm
            )
        for group, lr in self.own:
            alone = bool(group["params"]) and id(group["params"][0]) in self.fixed
            group["lr"] = lr if alone else lr * rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss

    def gradient(self, batches: Batches, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Of the mean loss, for each of the parameters; whatever is drawn (dropout) is the same each time."""
        with same_draws():
            torch.manual_seed(self.run.seed)
            self._backward(batches)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        self.optimiser.zero_grad()
        return found

    @torch.no_grad()
    def loss(self, batches: Batches) -> float:
        """The mean over batches of the loss as it is trained, drawn alike each time."""
        found = 0.0
        with same_draws():
            torch.manual_seed(self.run.seed)
            for batch in batches:
                _, items = self.fitter.get_batch_samples(iter([batch]), 1, self.fitter.args.device)
                given = self.fitter._prepare_inputs(batch)
                found += float(self.fitter.compute_loss(self.model, given, num_items_in_batch=items))
        self.losses += len(batches)
        return found / len(batches)

    def _backward(self, batches: Batches) -> float:
        samples, items = self.fitter.get_batch_samples(iter(batches), len(batches), self.fitter.args.device)
        self.fitter.current_gradient_accumulation_steps = len(samples)
        self.gradients += len(samples)
        return sum(float(self.fitter.training_step(self.model, batch, items)) for batch in samples)


def _fixed(ready: Prepared) -> set[int]:
    """The parameters of a head that has a rate of its own."""
    if ready.run.head_lr is None or (ready.run.method is None and not ready.run.full):
        return set()
    names = set(ready.run.task.head(ready.model))
    return {id(p) for name, p in ready.model.named_parameters() if name in names}


def _endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch, as the Trainer begins them."""
    epoch = 0
    while True:
        if (tell := getattr(loader, "set_epoch", None)) is not None:
            tell(epoch)
        yield from loader
        epoch += 1


@contextlib.contextmanager
def trying(ready: Prepared) -> Iterator[Walk]:
    """Gives steps of a run that has not begun.  Afterwards model, adapter, gradients, modes and random generators are
    what they were, to the bit."""
    model = ready.model
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    with unchanged(model), placed(model), tempfile.TemporaryDirectory() as scratch:
        walk = Walk(ready, Path(scratch))
        try:
            with walk.fitter.step.around(model), _again(model, bool(ready.run.gradient_checkpointing)):
                yield walk
        finally:
            with torch.no_grad():
                for p, k in zip(trained, kept, strict=True):
                    p.copy_(k)


@contextlib.contextmanager
def _again(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Within, activations are computed again in the backward pass, where the run does so."""
    if not on:
        yield
        return
    from .trainer import nothing_below

    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    nothing_below(model)
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
