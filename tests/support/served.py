"""A tiny Llama with adapters of several methods, and a pool that has all of them attached."""

import dataclasses

import torch

import undula
from tests.support.numbers import shake
from undula.serve.request import Broken, Part, Request, Sampling, Unknown

VOCABULARY = 61


@dataclasses.dataclass(frozen=True)
class Version:
    id: str
    parts: tuple = ()
    bytes: int = 100


class Attached:
    """What an engine asks of a pool, of adapters that are on the model already."""

    def __init__(self, names):
        self.names = {name: Version(name) for name in names}
        self.users = dict.fromkeys(names, 0)
        self.loading, self.broken = set(), set()

    def version(self, parts):
        if parts[0].name not in self.names:
            raise Unknown(parts[0].name)
        if parts[0].scale != 1:
            return Version(f"{parts[0].name} x {parts[0].scale}")
        return self.names[parts[0].name]

    def prefetch(self, version): ...

    def withdraw(self, version): ...

    def listen(self, call): ...

    def there(self, version):
        return version.id not in self.loading

    def acquire(self, version):
        name = version.id.partition(" ")[0]
        if name in self.broken:
            raise Broken("it is damaged")
        if name in self.loading:
            return None
        self.users[name] += 1
        return name

    def release(self, version):
        self.users[version.id.partition(" ")[0]] -= 1
        assert self.users[version.id.partition(" ")[0]] >= 0


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    asked = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 40, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
             "max_position_embeddings": 512}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **asked | settings)).double().eval()


def adapted(model, methods):
    """The model with an adapter of each method, as a pool attaches them; their names."""
    for i, method in enumerate(methods):
        shake(undula.attach(model, method, name=f"a{i}"), 0.3)
        undula.attach(model, undula.detach(model, f"a{i}"), name=f"a{i}", frozen=True)
    undula.select(model, None)
    return [f"a{i}" for i in range(len(methods))]


@torch.no_grad()
def alone(model, name, prompt, count, pick=lambda logits: int(logits.argmax())):
    """The tokens that one request gets by itself: its adapter selected, all of its text through the model each time."""
    undula.select(model, name)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(pick(model(torch.tensor([tokens])).logits[0, -1]))
    undula.select(model, None)
    return tokens[len(prompt) :]


def asked(prompt, name=None, scale=1.0, **sampling):
    return Request(
        tuple(prompt), () if name is None else (Part(name, scale),), Sampling(**{"max_tokens": 8} | sampling)
    )


def tokens(reply):
    return [chosen.token for piece in reply for chosen in piece.tokens]
