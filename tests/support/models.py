"""Small models with random weights, and what every test of a host does with them."""

import peft
import torch
import transformers
from torch import nn

import undula

from .numbers import shake

VOCABULARY = 64
PREFIX = "base_model.model."


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | off | changes)).eval()


class Picture(nn.Module):
    """A convolution, a linear layer and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.middle(torch.tanh(self.conv(x)).mean((-1, -2)))))


def tokens(rows=4, length=7):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def hosted(method, *, model=None, name="default", **rules):
    """A tiny Llama with shaken adapters."""
    model = peft.get_peft_model(model or llama(), undula.peft_config(method, **rules), name).eval()
    shake(trained(model).values())
    return model


def sites(model):
    """Names of the adapted layers."""
    return sorted(n.removeprefix(PREFIX) for n, m in model.named_modules() if hasattr(m, "law"))
