"""What nobody should do to an engine changes no answer: it is refused, or the answer is what it would have been."""

import math
import types

import pytest

import undula
from tests.support.numbers import shake
from tests.support.served import VOCABULARY, Attached, adapted, alone, asked, llama, tokens
from undula.serve.engine import Engine
from undula.serve.jobs import Limits
from undula.serve.policy import Fcfs
from undula.serve.pool import Pool
from undula.serve.request import Part, Refused, Request, Sampling

TEXT = [5, 9, 3, 60, 1, 2, 8, 8, 4, 7, 7, 2]
SMALL = Limits(running=6, batch_tokens=24, cache=2**20, page=4)


@pytest.fixture(scope="module")
def model():
    model = llama()
    model.names = adapted(model, [undula.LoRA(r=2), undula.LoRA(r=2)])
    model.want = {name: alone(model, name, TEXT, 4) for name in (None, *model.names)}
    return model


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, None, Attached(model.names), limits=SMALL) as engine:
        yield engine


@pytest.fixture
def folder(tmp_path):
    """Adapters a and b on disk."""
    model = llama()
    for name in "ab":
        shake(undula.attach(model, undula.LoRA(r=2), name=name), 0.3)
    for name in "ab":
        undula.detach(model, name).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"max_tokens": "3"},
        {"logprobs": 2.5},
        {"logprobs": True},
        {"top_k": 2.5},
        {"seed": [1]},
        {"seed": 0.5},
        {"temperature": None},
        {"temperature": "1"},
        {"stop": "END"},
        {"stop": (3,)},
        {"logit_bias": {1.5: 1.0}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {3: "x"}},
        {"logit_bias": {3: 1e308}},
        {"logit_bias": dict.fromkeys(range(VOCABULARY), -math.inf)},
        {"presence_penalty": -1e308},
        {"frequency_penalty": 1e308},
        {"repetition_penalty": 1e-320},
    ],
    ids=str,
)
def test_settings_that_no_choice_can_follow_are_refused_and_harm_nobody(engine, model, settings):
    """Of another type or beyond all numbers: they had ended the thread, or others' answers, or cut at every letter."""
    other = engine.submit(asked(TEXT, "a0", max_tokens=4))
    with pytest.raises(Refused, match=next(iter(settings))):
        engine.submit(asked(TEXT, "a1", **{"temperature": 1.0} | settings))
    assert tokens(other) == model.want["a0"]
    assert engine.alive


@pytest.mark.parametrize("prompt", [[1.0, 2], [True, 2], ["a"], [None], "abc"], ids=str)
def test_a_prompt_is_of_whole_numbers(engine, prompt):
    with pytest.raises(Refused, match="whole numbers"):
        engine.submit(Request(tuple(prompt)))


def test_one_model_is_one_engines(engine, model):
    """Two would compute through each other's layers and attention; when one has stopped another may."""
    with pytest.raises(RuntimeError, match="another engine"):
        Engine(model, None, Attached(model.names), limits=SMALL)
    other = llama()
    first, second = (Engine(other, None, Attached([]), limits=SMALL) for _ in range(2))
    with first, pytest.raises(RuntimeError, match="another engine"):
        second.start()
    assert other.config._attn_implementation == "sdpa"
    with Engine(other, None, Attached([]), limits=SMALL) as third:
        assert tokens(third.submit(asked(TEXT, max_tokens=4))) == model.want[None]


@pytest.mark.parametrize(
    "scale", [1e7, -1e308, 1e308, 10**400, math.inf, math.nan, True, "1"], ids=lambda s: str(s)[:9]
)
def test_a_scale_beyond_all_use_is_refused_at_once(folder, scale):
    pool = Pool(llama(), 10**6)
    pool.register("a", folder / "a")
    with pytest.raises(Refused, match="finite number"):
        pool.version((Part("a", scale), Part("a", scale)))


@pytest.mark.parametrize("verb", ["detach", "merge"])
def test_what_a_pool_holds_nobody_else_detaches_or_merges(folder, verb):
    """Under its name another adapter could come to answer in its place."""
    model = llama()
    pool, want = Pool(model, 10**6), alone(model, None, TEXT, 4)
    version = pool.register("a", folder / "a")
    with Engine(model, None, pool, limits=SMALL) as engine:
        answer = tokens(engine.submit(asked(TEXT, "a", max_tokens=4)))
        undula.select(model, version.id)
        with pytest.raises(RuntimeError, match="held by a pool"):
            undula.detach(model) if verb == "detach" else undula.merge(model)
        for name, expected in ((None, want), ("a", answer)):
            assert tokens(engine.submit(asked(TEXT, name, max_tokens=4))) == expected
        pool.register("b", folder / "b")
        pool.unregister("a")  # leaves, although it is selected
        assert tokens(engine.submit(asked(TEXT, "b", max_tokens=4))) != answer
        assert engine.alive
        assert version.id not in undula.adapters(model)
    pool.close()


def test_what_cannot_be_taken_off_the_model_keeps_nobody_waiting(folder, monkeypatch):
    model = llama()
    pool = Pool(model, pool_size(folder))
    for name in "ab":
        pool.register(name, folder / name)
    with Engine(model, None, pool, limits=SMALL) as engine:
        engine.submit(asked(TEXT, "a")).text()
        monkeypatch.setattr("undula.serve.pool.take", lambda *_: (_ for _ in ()).throw(RuntimeError("merged")))
        assert len(tokens(engine.submit(asked(TEXT, "b", max_tokens=4)))) == 4
        assert engine.alive
    pool.close()


def pool_size(folder):
    return Pool(llama(), 10**6).register("a", folder / "a").bytes


@pytest.mark.parametrize("where", ["layer", "adapter"])
def test_a_model_that_somebody_put_in_training_answers_without_dropout(folder, where):
    model = llama(attention_dropout=0.5 if where == "layer" else 0.0)
    adapter = undula.Adapter.load(folder / "a")
    if where == "adapter":
        live = undula.attach(model, undula.Dropout(undula.LoRA(r=2), p=0.5), name="d")
        shake(live, 0.3)
        adapter = undula.detach(model, "d")
    undula.attach(model, adapter, name="it", frozen=True)
    model.eval()
    want = {name: alone(model, name, TEXT, 4) for name in (None, "it")}
    with Engine(model, None, Attached(["it"]), limits=SMALL) as engine:
        model.train()
        for name in (None, "it"):
            assert tokens(engine.submit(asked(TEXT, name, max_tokens=4))) == want[name]


class Odd(Fcfs):
    """Orders as it is told, wrongly."""

    def __init__(self, order):
        self.how = order

    def order(self, waiting, running, now):
        return self.how(waiting)

    def charge(self, ticket, tokens):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "order",
    [
        lambda waiting: 1 / 0,
        lambda waiting: [],
        lambda waiting: waiting[:1] * len(waiting),
        lambda waiting: [*waiting, types.SimpleNamespace(id="stranger")],
        lambda waiting: waiting.clear() or waiting,
        lambda waiting: None,
    ],
    ids=["raises", "none", "twice", "stranger", "emptied", "nothing"],
)
def test_a_policy_that_fails_makes_nobody_wait_for_ever(order):
    """Requests are admitted as they came then."""
    model = llama()
    with Engine(model, None, Attached([]), Odd(order), SMALL) as engine:
        replies = [engine.submit(asked(TEXT, max_tokens=2)) for _ in range(8)]
        assert len({tuple(tokens(r)) for r in replies}) == 1
        assert engine.alive


def test_a_listener_that_fails_does_not_end_loading(folder):
    model = llama()
    pool = Pool(model, 10**6)
    pool.listen(lambda: 1 / 0)
    with Engine(model, None, pool, limits=SMALL) as engine:
        for name in "ab":
            pool.register(name, folder / name)
            assert len(tokens(engine.submit(Request(tuple(TEXT), (Part(name),), Sampling(max_tokens=2))))) == 2
    pool.close()


def test_a_prefix_of_what_is_selected_beside_an_engine_is_no_ones(folder):
    """Whatever is attached and selected on the model while the engine runs, its rows say what they go through."""
    model = llama()
    pool, want = Pool(model, 10**6), {None: alone(model, None, TEXT, 4)}
    for name in "ab":
        pool.register(name, folder / name)
        undula.attach(model, undula.Adapter.load(folder / name), name="it")
        want[name] = alone(model, "it", TEXT, 4)
        undula.detach(model, "it")
    with Engine(model, None, pool, limits=SMALL) as engine:
        for name in (None, "a", "b", "a", None):
            undula.attach(model, undula.Adapter.load(folder / "b"), name=f"mine {name}{len(undula.adapters(model))}")
            assert tokens(engine.submit(asked(TEXT, name, max_tokens=4))) == want[name]
    pool.close()
