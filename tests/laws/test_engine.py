"""An engine's replies are those of each request alone."""

import pytest
import torch

import undula
from tests.support.numbers import shake
from tests.support.served import Attached, adapted, alone, asked, llama, tokens
from undula.serve.engine import Engine
from undula.serve.jobs import Limits
from undula.serve.request import Sampling
from undula.serve.sampling import Drawing, choose

METHODS = [
    undula.LoRA(r=2),
    undula.LoRA(r=4),
    undula.DoRA(undula.LoRA(r=2)),
    undula.LoRAN(r=2),
    undula.AuroRA(r=2),
    undula.VeRA(r=3),
    undula.SHiRA(r=1),
]
SMALL = Limits(running=6, batch_tokens=24, cache=2**20, page=4)


@pytest.fixture(scope="module")
def model():
    model = llama()
    model.names = adapted(model, METHODS)
    return model


@pytest.fixture
def pool(model):
    return Attached(model.names)


def prompts(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 50, (count,), generator=g).tolist()
    return [torch.randint(0, 61, (n,), generator=g).tolist() for n in sizes]


def test_each_reply_is_that_of_its_request_alone_through_its_adapter(model, pool):
    """Of every rung and the base, of all lengths, arriving while others run, more of them than run at a time."""
    texts = prompts(16)
    names = [[None, *model.names][i % 8] for i in range(16)]
    want = [alone(model, name, text, 5) for name, text in zip(names, texts, strict=True)]
    assert len(set(map(tuple, want))) > 12  # else nothing would tell them apart
    with Engine(model, None, pool, limits=SMALL) as engine:
        replies = []
        for i, (name, text) in enumerate(zip(names, texts, strict=True)):
            replies.append(engine.submit(asked(text, name, max_tokens=5)))
            if i % 5 == 4:
                tokens(replies[-2])
        assert [tokens(r) for r in replies] == want
        assert all(r.usage.completion_tokens == 5 and r.usage.first >= r.usage.waited for r in replies)
    assert set(pool.users.values()) == {0}


def test_a_block_serves_the_version_that_it_was_computed_through_alone(model, pool):
    """One prompt, asked again through the base, two adapters and one of them at another scale: cached where the version
    is the same, computed anew where it is another, and always the reply of its own."""
    (text,) = [p for p in prompts(20) if len(p) == max(map(len, prompts(20)))]
    want = {name: alone(model, name, text, 8) for name in (None, "a0", "a1")}
    with Engine(model, None, pool, limits=SMALL) as engine:
        for name, scale, again in [
            (None, 1.0, False),
            ("a0", 1.0, False),
            ("a1", 1.0, False),
            ("a0", 0.5, False),
            ("a0", 1.0, True),
            (None, 1.0, True),
            ("a0", 0.5, True),
        ]:
            reply = engine.submit(asked(text, name, scale))
            assert tokens(reply) == want[name]
            assert reply.usage.cached_tokens == (len(text) - 1) // 4 * 4 * again
        longer = engine.submit(asked(text + [7] + want["a0"], "a0"))
        assert tokens(longer) == alone(model, "a0", text + [7] + want["a0"], 8)
        assert longer.usage.cached_tokens == len(text) // 4 * 4


def test_a_cache_that_is_full_of_prefixes_still_answers(model, pool):
    """Prefixes that nobody uses give way; requests wait for memory, however long they write, and none is refused."""
    texts, writes = prompts(10, seed=3), [1, 9, 2, 5, 3, 7, 4, 2, 6, 1]
    limits = Limits(running=6, batch_tokens=24, cache=2**15, page=4)
    want = [alone(model, "a0", t, n) for t, n in zip(texts, writes, strict=True)]
    with Engine(model, None, pool, limits=limits) as engine:
        assert engine.cache_tokens < sum(map(len, texts))
        replies = [engine.submit(asked(t, "a0", max_tokens=n)) for t, n in zip(texts, writes, strict=True)]
        assert [tokens(r) for r in replies] == want
        assert engine.stats().cache_used <= engine.stats().cache_total


def test_an_adapter_of_the_head_sees_every_token():
    """The layer that gives the logits computes those of the last tokens alone, but where an adapter changes it."""
    model = llama()
    shake(undula.attach(model, undula.LoRA(r=2), ["lm_head", "q_proj"], name="head"), 0.3)
    undula.select(model, None)
    text = list(range(20))
    want = [alone(model, name, text, 4) for name in (None, "head")]
    assert want[0] != want[1]
    with Engine(model, None, Attached(["head"]), limits=SMALL) as engine:
        replies = [engine.submit(asked(text, name, max_tokens=4)) for name in (None, "head")]
        assert [tokens(r) for r in replies] == want


def test_draws_follow_the_seed_whatever_else_is_in_the_batch(model, pool):
    """Also prompts that come in pieces, and whose prefixes are there already."""
    settings = {"temperature": 1.0, "top_k": 30, "seed": 11, "frequency_penalty": 0.2}
    texts = prompts(4, seed=5)
    want = []
    for text in texts:
        drawing = Drawing(Sampling(**settings), text)
        want.append(alone(model, "a1", text, 6, lambda logits, d=drawing: choose(logits[None], [d])[0].token))
    with Engine(model, None, pool, limits=SMALL) as engine:
        for _ in range(2):
            replies = [engine.submit(asked(text, "a1", max_tokens=6, **settings)) for text in texts]
            others = [engine.submit(asked(text, "a2", temperature=2.0)) for text in texts]
            assert [tokens(r) for r in replies] == want
        assert len({tuple(tokens(r)) for r in others}) > 1


def test_windows_of_two_sizes_share_a_small_cache():
    """Layers with a window beside layers without have blocks of their own, which no prefix shares."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "intermediate_size": 40, "vocab_size": 61, "initializer_range": 0.3}  # fmt: skip
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=6, query_pre_attn_scalar=8)).double().eval()
    names = [None, *adapted(model, METHODS[:2])]
    texts = [text[:20] for text in prompts(6, seed=4)]
    want = [alone(model, names[i % 3], text, 4) for i, text in enumerate(texts)]
    limits = Limits(running=4, batch_tokens=24, cache=2**15, page=4)
    with Engine(model, None, Attached(names[1:]), limits=limits) as engine:
        replies = [engine.submit(asked(text, names[i % 3], max_tokens=4)) for i, text in enumerate(texts)]
        assert [tokens(r) for r in replies] == want
