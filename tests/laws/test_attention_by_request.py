"""Attention of flat batches over a paged cache: each request's is that of plain attention over its own keys."""

import random

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.served import llama
from undula.serve import attention
from undula.serve.prefixes import cache_of
from undula.serve.steps import Model

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 20, "vocab_size": 50,
         "initializer_range": 0.4, "head_dim": 4}  # fmt: skip


def mistral(window):
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=3, sliding_window=window))


def gemma():
    """Windows in every second layer, and scores that are capped."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, num_key_value_heads=2, sliding_window=6, query_pre_attn_scalar=4, attn_logit_softcapping=2.0
        )
    )


MODELS = {
    "grouped heads": llama,
    "own heads": lambda: llama(num_key_value_heads=4),
    "one key head": lambda: llama(num_key_value_heads=1),
    "window": lambda: mistral(5),
    "wide window": lambda: mistral(40),
    "windows and caps": gemma,
}


def plain(module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, **others):
    """softmax(cap(Q K^T scaling)) V with a causal mask, written out; transformers' own takes the softmax in float32."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    far = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
    hidden = (far < 0) | (far >= (sliding_window or 10**6))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("near", [attention.NEAR, 300])
@pytest.mark.parametrize("kind", MODELS)
def test_pieces_of_requests_get_the_logits_of_each_request_alone(kind, near, monkeypatch):
    """Prompts whole and in pieces, single tokens after few and many, in any order: logits as plain attention's over the
    whole request."""
    monkeypatch.setattr(attention, "NEAR", near)  # how many are computed at a time
    ALL_ATTENTION_FUNCTIONS.register("plain", plain)
    torch.manual_seed(1)
    model = MODELS[kind]().double().eval()
    served, cache = Model(model), cache_of(model, 400, 4, 64, 8)
    draw = random.Random(5)
    lengths = [1, 2, 9, 11, 14, 28]
    requests = [RequestState(str(i), [draw.randrange(50) for _ in range(n + 3)]) for i, n in enumerate(lengths)]
    for r in requests:
        cache.salts[r.request_id] = ""
    model.set_attn_implementation("plain")
    with torch.no_grad():
        want = [model(torch.tensor([r.initial_tokens])).logits[0] for r in requests]

    def step(batch):
        for f in batch:
            r = f.state
            r.tokens_to_process = r.initial_tokens[r.position_offset : r.position_offset + f.query_length]
            assert cache.can_store_request_tokens(r, f.query_length)
        logits = served.forward(cache, batch, [None] * len(batch))
        for f, found in zip(batch, logits, strict=True):
            f.state.position_offset += f.query_length
            torch.testing.assert_close(found, want[int(f.state.request_id)][f.state.position_offset - 1])

    def rest(r):
        return len(r.initial_tokens) - 3 - r.position_offset

    while left := [r for r in requests if rest(r)]:
        some = draw.sample(left, draw.randint(1, len(left)))
        step([FutureRequestState(r, True, {}, draw.choice([1, 1, min(3, rest(r)), rest(r)])) for r in some])
    for _ in range(3):
        step([FutureRequestState(r, True, {}, 1) for r in requests])


def test_a_step_reads_each_key_twice_at_most_however_lengths_differ():
    """What makes the cost of a step the sum over its requests: padding is bounded, and no request sees another's."""
    cache = cache_of(llama(), 20_000, 16, 64, 64)
    lengths = [5000, 1, 3, 700, 650, 4, 90, 2600, 60, 55, 2]
    states = [RequestState(str(i), [0] * n) for i, n in enumerate(lengths)]
    write, read, stretches = [], [], []
    (kind,) = cache.cache_allocators.values()
    for at, (state, n) in enumerate(zip(states, lengths, strict=True)):
        assert cache.can_store_request_tokens(state, n + 1)
        write += kind.get_write_indices(state.request_id, n, 1)
        read += kind.get_read_indices(state.request_id, n, 0)
        stretches.append(attention.Stretch(at, 1, n))
    (layers,) = attention.Plan(cache, stretches, [(write, read)]).kinds
    assert sum(d.rows.numel() for d in layers.decoded) <= 2 * (sum(lengths) + len(lengths))
    assert sorted(at for d in layers.decoded for at in d.at.tolist()) == list(range(len(lengths)))


def test_transformers_own_attention_stays_what_it_was():
    model = llama()
    before = model.config._attn_implementation
    served, cache = Model(model), cache_of(model, 64, 4, 16, 4)
    served.check(cache)
    assert model.config._attn_implementation == before
    assert cache.used() == 0
    with attention.attending(served.configs), pytest.raises(RuntimeError, match="belongs to the engine"):
        model(torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == before


def test_a_model_whose_layers_see_more_of_a_batch_is_refused():
    """Here one that mixes neighbouring tokens beside its attention, as convolutions and states do."""
    model = llama()
    layer = model.model.layers[0]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x) + x.cumsum(1)
    with pytest.raises(ValueError, match="get other logits than each alone"):
        Model(model).check(cache_of(model, 64, 4, 16, 4))


def test_a_model_with_an_attention_of_its_own_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be served"):
        Model(model).check(cache_of(model, 64, 4, 16, 4))
    assert LlamaConfig()._attn_implementation != attention.NAME
