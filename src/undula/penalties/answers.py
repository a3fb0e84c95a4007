"""What a model and its base answer to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..host.reference import alone
from .penalty import PenaltyCourse

LEFT_OUT = -100  # the label of what is not scored


def logits_of(outputs: Any) -> Tensor:
    """The answers: a tensor, or what is called logits.  Raises TypeError for anything else."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"a penalty of the answers needs logits, and the model returned {type(outputs).__name__}")
    return found


@torch.no_grad()
def base_answers(model: nn.Module, inputs: Any) -> Tensor:
    """What the base answers: adapter and what trains in full off, no dropout.  No start moves the base: what one puts
    into the factors the method counts out (see `Centred`), so this is the pretrained model with PiSSA too."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with alone(model):
            model.eval()
            return logits_of(_called(model, inputs))
    finally:
        for module, training in modes:
            module.training = training


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**{k: v for k, v in inputs.items() if k != "labels" or _needs_labels(model, inputs)})
    return model(*inputs) if isinstance(inputs, Sequence) else model(inputs)


def _needs_labels(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a decoder's inputs are made of the labels."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" not in inputs


def scored(model: nn.Module, logits: Tensor, inputs: Any) -> Tensor:
    """The answers that count (M, V): of rows all, of tokens those that have a label."""
    if logits.ndim <= 2:
        return logits
    given = inputs if isinstance(inputs, Mapping) else {}
    labels, mask = given.get("labels"), given.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        kept = labels != LEFT_OUT
        if answers_next(model):  # the answer at a token is to the next
            return logits[:, :-1][kept[:, 1:]]
        return logits[kept]
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return logits[mask.bool()]
    return logits.flatten(0, -2)


def answers_next(model: nn.Module) -> bool:
    """Whether what is answered at a token is the next one, as in a causal language model."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    name = type(model).__name__
    return not encodes and ("CausalLM" in name or "LMHead" in name)


def writes(model: nn.Module) -> bool:
    """Whether it answers tokens of a text."""
    return answers_next(model) or "ConditionalGeneration" in type(model).__name__


class AnswersCourse(PenaltyCourse):
    """A penalty of the answers, in the loss."""

    def term(self, inputs: Any, outputs: Any) -> Tensor | float:
        if not self.how.active:
            return 0.0
        logits = logits_of(outputs)
        rows = scored(self.model, logits, inputs)
        if rows.shape[-1] < 2:
            raise ValueError(
                f"{self.how!r} compares probabilities of classes, and the model answers one number for a row: a "
                "softmax over one is 1 whatever it is. Take a penalty of the factors, such as GroupLasso()"
            )
        if not rows.shape[0]:
            return logits.sum() * 0.0
        base = None
        if self.how.compares:
            base = scored(self.model, base_answers(self.model, inputs), inputs).float()
        return self.how.weight * self.of(rows.float() if rows.dtype != torch.float64 else rows, base)

    def of(self, rows_MV: Tensor, base_MV: Tensor | None) -> Tensor:
        """R of these answers."""
        raise NotImplementedError


def kl(base_MV: Tensor, rows_MV: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL( softmax(base / T) || softmax(rows / T) ), mean over rows."""
    p, q = (z / T for z in (base_MV.to(rows_MV), rows_MV))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return T * T * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
