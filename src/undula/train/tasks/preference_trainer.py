"""TRL's DPOTrainer with checkpoints that hold the adapter, and the base as the reference.

Imported only when a training begins: it pulls in TRL.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from ...core.extras import needs
from ...host.host import selected
from ...host.reference import alone
from ..adapter_trainer import AdapterTrainer


class PreferenceTrainer(AdapterTrainer, DPOTrainer):
    """The loss is TRL's; what it asks of the reference is asked of the base, with the adapter off, batch by batch."""

    def __init__(self, *, optimizer_cls_and_kwargs: Any, **given: Any) -> None:
        held = [(p, p.data) for p in given["model"].parameters() if p.requires_grad]
        super().__init__(**given)
        for p, data in held:  # of a quantised base TRL makes bfloat16 of what trains
            p.data = data
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # the task has made tokens of it

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # see compute_loss

    def _send_telemetry(self) -> None:
        """Nothing is told to anybody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint is no model to publish."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad(), alone(self.model):
            chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        given = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super().compute_loss(model, given, return_outputs, num_items_in_batch)


@needs("preference")
def preference_trainer(*, train_dataset: Any, **given: Any) -> PreferenceTrainer:
    """The trainer of a run.  Raises ValueError for an adapter on the output head, whose weight TRL reads past it."""
    model, examples = given["model"], train_dataset
    head = model.get_output_embeddings()
    name = next((n for n, module in model.named_modules() if module is head), None)
    if name in selected(model).methods:
        raise ValueError(
            f"TRL computes with the weight of {name} itself, so an adapter on it would not train: leave it out, "
            f"exclude={name!r}, --exclude {name}; or train it in full, full={name!r}, --full {name}"
        )
    rows = Dataset.from_list([{k: v for k, v in examples[i].items() if k != "input_ids"} for i in range(len(examples))])
    return PreferenceTrainer(train_dataset=rows, processing_class=examples.processor, **given)
