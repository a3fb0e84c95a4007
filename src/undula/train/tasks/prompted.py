"""A text encoder with fixed vectors of classes behind it: what `DescribedClassification` trains and asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .lending import evaluating
from .segments import LENGTHS

ROWS = 32  # texts that are embedded at once


def pooled(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over each row's tokens (rows, d), in float32 or wider, of states (rows, tokens, d); within `segments` of
    (1, tokens, d), whose rows stand behind each other."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    if (lengths := LENGTHS.get()) is not None:
        sizes = torch.tensor(lengths, device=states.device)
        owner = torch.arange(len(lengths), device=states.device).repeat_interleave(sizes)
        sums = wide.new_zeros(len(lengths), wide.shape[-1]).index_add(0, owner, wide[0])
        return sums / sizes[:, None]
    if mask is None:
        return wide.mean(1)
    there = mask.to(wide.dtype)[..., None]
    return (wide * there).sum(1) / there.sum(1).clamp(min=1)


@torch.no_grad()
def vectors(body: Any, tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> Tensor:
    """(len(texts), d): the pooled states of texts, of at most `limit` tokens each, in evaluation mode."""
    found = []
    with evaluating(body):
        for at in range(0, len(texts), ROWS):
            some = list(texts[at : at + ROWS])
            given = tokenizer(some, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            given = {k: v.to(body.device) for k, v in given.items()}
            found.append(pooled(body(**given)[0], given["attention_mask"]))
    return torch.cat(found)


class Prompted(PreTrainedModel):
    """logits = scale cos(h, P): h (rows, d) the pooled states of the body, P (classes, d) a buffer."""

    prompts: Tensor
    supports_gradient_checkpointing = True

    def __init__(self, body: PreTrainedModel, prompts: Tensor, scale: float):
        super().__init__(body.config)
        self.base_model_prefix = body.base_model_prefix
        setattr(self, self.base_model_prefix, body)
        self.register_buffer("prompts", F.normalize(prompts, dim=-1), persistent=False)
        self.scale = scale

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        **more: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **more}
        out = self.base_model(**{k: v for k, v in given.items() if v is not None})
        h = F.normalize(pooled(out[0], attention_mask), dim=-1)
        logits = self.scale * nn.functional.linear(h, self.prompts.to(h.dtype))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=getattr(out, "hidden_states", None))

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Raises TypeError: no class of transformers has such a head."""
        raise TypeError(
            "a model whose classes are told by descriptions is of no class that transformers could open again: keep "
            "the adapter beside its base (undula.load, undula predict), or merge in Python (undula.merge) and save "
            "the encoder, model.base_model"
        )


def prompted(body: PreTrainedModel, prompts: Tensor, scale: float) -> Prompted:
    """The body with these vectors behind it, as a model of the body's own family: what transformers knows of that
    (attention, devices) holds on.  A pooler, which nothing asks, is taken off."""
    if isinstance(getattr(body, "pooler", None), nn.Module):
        body._modules["pooler"] = None
    family = next(kind for kind in type(body).__mro__ if kind.__name__.endswith("PreTrainedModel"))
    kind = type(f"Prompted{type(body).__name__}", (Prompted, family), {})
    made: Prompted = kind(body, prompts, scale)
    return made
