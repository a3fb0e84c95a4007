"""A tiny language model and adapters whose answers say which adapter wrote them.

Every adapter has a tag, a word of the vocabulary, and answers with it alone; the base answers "base".  The tag goes
through the cache: an adapter changes the values that attention reads, so an answer is that of the adapter through which
the whole of its prompt was computed.  Nothing is trained: the hidden state has one large constant number, by which an
adapter of any rung can write its tag's code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import undula

TAGS, SIZE, CONSTANT, GAIN = 256, 64, 8.0, 2.0
SITE = "model.layers.0.self_attn.v_proj"
WORDS = ["<s>", "base", *(f"w{i}" for i in range(64)), *(f"tag{i}" for i in range(TAGS))]
FIRST = WORDS.index("tag0")
METHODS = (
    undula.LoRA(r=1, alpha=1),
    undula.LoRA(r=4, alpha=4),
    undula.LoRA(r=8, alpha=8),
    undula.DoRA(undula.LoRA(r=2, alpha=2)),
    undula.LoRAN(r=2, alpha=2),
    undula.AuroRA(r=2),
)


def codes() -> torch.Tensor:
    """(tags, size): a code of each, 0 where the constant is."""
    found = torch.randint(0, 2, (TAGS, SIZE), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    found[:, 0] = 0
    return found


@torch.no_grad()
def base(folder: Path) -> None:
    """Writes the model and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=SIZE, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    model.model.embed_tokens.weight.mul_(5).clamp_(-0.2, 0.2)[:, 0] = CONSTANT
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.copy_(torch.eye(SIZE) * (i == 0))
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[1, 0] = 1.0
    model.lm_head.weight[FIRST:] = codes()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


class Maker:
    """Makes adapters for the base in this folder."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.folder, self.codes = folder, codes()
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.weight = self.model.get_submodule(SITE).weight.detach().clone()

    @torch.no_grad()
    def adapter(self, path: Path, tag: int, method: Any) -> int:
        """Writes one that answers with this tag; returns the bytes of its factors."""
        given = undula.attach(self.model, method, [SITE], name="made")
        code, factors = self.codes[tag], given.factors[SITE]
        x = torch.zeros(1, SIZE)
        x[0, 0] = CONSTANT
        factors["A"].zero_()[0, 0] = 1 / CONSTANT
        factors["B"].zero_()[:, 0] = code
        layer = self.model.get_submodule(SITE)
        if "m" in factors:  # a magnitude that leaves the direction's length as it is
            factors["m"].copy_((self.weight + factors["B"].mul_(GAIN) @ factors["A"]).norm(dim=1))
        else:
            written = (layer(x) - x @ self.weight.T) @ code
            factors["B"].mul_(GAIN * (SIZE - 1) / float(written))
        made = undula.detach(self.model, "made")
        dataclasses.replace(made, about={"base_model_name_or_path": str(self.folder)}).save(path)
        return sum(t.numel() * t.element_size() for _, _, t in made.tensors())
