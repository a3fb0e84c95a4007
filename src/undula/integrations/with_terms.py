"""Penalties under a `transformers.Trainer` of one's own."""

from __future__ import annotations

from typing import Any

import torch

from ..ranks import Procedure
from .callback import Allocating

LEFT_OUT = -100  # the label of what is not scored


def with_terms(trainer: type) -> type:
    """See `undula.penalised`."""

    class Penalised(trainer):  # type: ignore[misc, valid-type]
        """The Trainer, its loss with a penalty's terms of the answers; what is of the factors a callback does."""

        def __init__(self, *args: Any, penalty: Procedure, **named: Any):
            if not isinstance(penalty, Procedure):
                raise TypeError(f"a penalty such as GroupLasso(1e-3), or a sum of these, found {penalty!r:.80}")
            self.penalty = Allocating(penalty)
            super().__init__(*args, **named)
            self.add_callback(self.penalty)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **more: Any
        ) -> Any:
            if not self.penalty.allocator.answers or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **more)
            given = dict(inputs)  # a Trainer may take labels out of them
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **more)
            loss = loss + self.penalty.term(given, outputs) * self._part(given, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        def _part(self, inputs: Any, items: Any) -> Any:
            """What a mean over this batch is multiplied by: the Trainer divides a model's own loss by the labels of
            all batches of an update, any other by the number of these."""
            labels = inputs.get("labels")
            if items is None or not self.model_accepts_loss_kwargs or not torch.is_tensor(labels):
                return 1.0
            several = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return (labels != LEFT_OUT).sum() * several / items

    Penalised.__name__ = Penalised.__qualname__ = f"Penalised{trainer.__name__}"
    return Penalised
