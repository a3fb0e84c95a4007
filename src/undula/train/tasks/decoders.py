"""What models with an encoder and a decoder have in common: what their decoder sees in training, and writing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..base import quiet
from .causal_lm import IGNORED
from .lending import generating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START = "undula_decoder_start"  # an attribute of a tokenizer, which collators see: the decoder's first token
GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": None, "top_p": None, "top_k": None,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "early_stopping": False, "min_length": 0, "min_new_tokens": None,
    "max_length": None,
}  # fmt: skip


def settle_start(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Sees to it that the model knows the token that its decoder begins with, and the tokenizer too, where the decoder
    sees in training what it is to write, that token put before it.  (Of some, such as mBART, it is another token for
    each language; they make the decoder's inputs themselves.)

    Raises ValueError where there is no token to begin with.
    """
    config, generation = model.config, getattr(model, "generation_config", None)
    own = (config, generation, config.get_text_config(decoder=True))
    found = (getattr(c, "decoder_start_token_id", None) for c in own if c is not None)
    start = next((i for i in found if i is not None), None)
    if start is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if start is None:
        raise ValueError(
            "neither the model's configuration nor the tokenizer says which token a decoder begins with: set "
            "decoder_start_token_id in config.json"
        )
    for each in (config, generation):
        if each is not None and getattr(each, "decoder_start_token_id", None) is None:
            each.decoder_start_token_id = start
    start = start[0] if isinstance(start, list) else start
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    probe = torch.arange(2, 5)[None]
    plain = prepare is None or torch.equal(prepare(labels=probe).cpu(), shifted(probe, start, 0))
    tokenizer.__dict__[START] = start if plain else None


def shifted(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """What the decoder sees while it learns `labels` (N, T): the same, one place to the right, behind `start`."""
    found = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return found.masked_fill(found == IGNORED, pad)


def with_decoder_inputs(batch: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The batch with `decoder_input_ids`, as far as they follow from its labels alone: a model without labels needs
    them."""
    start, pad = tokenizer.__dict__.get(START), tokenizer.pad_token_id
    if start is None:
        return batch
    return {**batch, "decoder_input_ids": shifted(batch["labels"], start, 0 if pad is None else int(pad))}


@contextlib.contextmanager
def greedy(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, without gradients, and writing the likeliest token alone: of the model's generation_config
    what asks for beams, penalties or sampling does not count; what a text begins and ends with does."""

    def plain(own: Any) -> Any:
        made = copy.deepcopy(own)
        for name, value in GREEDY.items():
            setattr(made, name, value)
        return made

    with generating(model, plain), torch.no_grad(), quiet():  # some say that max_new_tokens stands beside max_length
        yield
