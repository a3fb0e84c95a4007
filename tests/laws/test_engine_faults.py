"""Whatever happens to a request, its reply ends, others are what they would have been, and what it had is free."""

import asyncio
import dataclasses
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import undula
from tests.support.numbers import shake
from tests.support.served import VOCABULARY, Attached, Version, adapted, alone, asked, llama, tokens
from undula.serve.engine import Engine
from undula.serve.jobs import Limits
from undula.serve.request import Broken, Busy, Cancelled, Draining, Failed, Late, Refused, Unknown

SMALL = Limits(running=6, batch_tokens=24, cache=2**20, page=4)
LONG = 200
TEXT = [5, 9, 3, 60, 1, 2, 8, 8, 4]


@pytest.fixture(scope="module")
def model():
    model = llama()
    model.names = adapted(model, [undula.LoRA(r=2), undula.LoRA(r=2), undula.LoRAN(r=2)])
    model.want = {name: alone(model, name, TEXT, 8) for name in (None, *model.names)}
    return model


@pytest.fixture
def pool(model):
    return Attached(model.names)


@pytest.fixture
def engine(model, pool):
    with Engine(model, None, pool, limits=SMALL) as engine:
        yield engine


def settled(engine):
    """What it holds once nothing runs."""
    assert engine.drain(20)
    deadline = time.monotonic() + 5
    while engine.stats().cache_used and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.stats()


def test_who_cancels_is_told_so_and_its_memory_is_free_while_others_go_on(engine, model, pool):
    long, other = engine.submit(asked(TEXT, "a0", max_tokens=LONG)), engine.submit(asked(TEXT, "a1"))
    next(iter(long))
    long.cancel()
    with pytest.raises(Cancelled):
        tokens(long)
    assert tokens(other) == model.want["a1"]
    stats = settled(engine)
    assert (stats.cache_used, stats.finished, stats.refused, stats.running) == (0, 1, 1, 0)
    assert set(pool.users.values()) == {0}
    long.cancel()  # nothing


def test_a_request_that_waits_may_be_cancelled(engine, pool):
    pool.loading.add("a0")
    waiting = engine.submit(asked(TEXT, "a0"))
    waiting.cancel()
    with pytest.raises(Cancelled):
        waiting.text()
    assert settled(engine).waiting == 0


def test_who_waits_for_an_adapter_is_passed_by_and_comes_in_when_it_is_there(engine, model, pool):
    pool.loading.add("a0")
    first, second = engine.submit(asked(TEXT, "a0")), engine.submit(asked(TEXT, "a1"))
    assert tokens(second) == model.want["a1"]
    assert not first.done
    pool.loading.clear()
    assert tokens(first) == model.want["a0"]


def test_a_first_token_that_cannot_come_in_time_is_refused(engine, model, pool):
    pool.loading.add("a0")
    late = engine.submit(dataclasses.replace(asked(TEXT, "a0"), deadline=0.05))
    with pytest.raises(Late):
        late.text()
    pool.loading.clear()
    assert tokens(engine.submit(dataclasses.replace(asked(TEXT, "a0"), deadline=60.0))) == model.want["a0"]


def test_an_adapter_that_cannot_be_loaded_ends_its_requests_alone(engine, model, pool):
    pool.broken.add("a0")
    replies = [engine.submit(asked(TEXT, name)) for name in ("a0", "a1", None)]
    with pytest.raises(Broken):
        replies[0].text()
    assert [tokens(r) for r in replies[1:]] == [model.want["a1"], model.want[None]]


def test_an_adapter_that_fails_within_a_step_ends_its_requests_alone(engine, model, pool):
    pool.names["ghost"], pool.users["ghost"] = Version("ghost"), 0  # nothing of that name is on the model
    replies = [engine.submit(asked(TEXT, name)) for name in ("a0", "ghost", "a1", "ghost", None)]
    for ghost in (replies[1], replies[3]):
        with pytest.raises(Broken, match="LookupError"):
            ghost.text()
    assert [tokens(replies[i]) for i in (0, 2, 4)] == [model.want[n] for n in ("a0", "a1", None)]
    assert set(pool.users.values()) == {0}
    assert settled(engine).cache_used == 0


def test_an_adapter_whose_numbers_are_not_finite_answers_nothing(pool):
    model = llama()
    adapted(model, [undula.LoRA(r=2)])
    shake(undula.attach(model, undula.LoRA(r=2), name="nan"), torch.nan)
    undula.select(model, None)
    pool = Attached(["a0", "nan"])
    with Engine(model, None, pool, limits=SMALL) as engine:
        replies = [engine.submit(asked(TEXT, name)) for name in ("a0", "nan")]
        with pytest.raises(Broken, match="not finite"):
            replies[1].text()
        assert tokens(replies[0]) == alone(model, "a0", TEXT, 8)
        with pytest.raises(Broken, match="not finite"):
            engine.submit(asked(TEXT, "nan")).text()


def test_where_memory_is_short_fewer_requests_are_computed_at_a_time(engine, model, monkeypatch):
    work = engine._work.model
    forward = work.forward

    def short(cache, batch, names):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(cache, batch, names)

    monkeypatch.setattr(work, "forward", short)
    replies = [engine.submit(asked(TEXT, name)) for name in (None, None, None, "a0", "a0")]
    assert [tokens(r) for r in replies] == [model.want[n] for n in (None, None, None, "a0", "a0")]
    monkeypatch.setattr(work, "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(Busy, match="memory"):
        engine.submit(asked(TEXT)).text()
    monkeypatch.setattr(work, "forward", forward)
    assert tokens(engine.submit(asked(TEXT))) == model.want[None]


def test_a_step_that_fails_says_nothing_of_where(engine, model, monkeypatch):
    work = engine._work.model
    monkeypatch.setattr(work, "forward", lambda *_: (_ for _ in ()).throw(OSError("/home/someone/secret")))
    with pytest.raises(Failed) as said:
        engine.submit(asked(TEXT)).text()
    assert "secret" not in str(said.value)


def test_when_the_thread_dies_every_reply_ends_and_none_is_taken(model, pool, monkeypatch):
    with Engine(model, None, pool, limits=SMALL) as engine:
        running = engine.submit(asked(TEXT, max_tokens=LONG))
        next(iter(running))
        monkeypatch.setattr(engine._work, "turn", lambda: (_ for _ in ()).throw(SystemError("gone")))
        waiting = engine.submit(asked(TEXT)) if engine.alive else running
        for reply in (running, waiting):
            with pytest.raises(Failed, match="died"):
                reply.text()
        assert not engine.alive
        with pytest.raises(Failed, match="died"):
            engine.submit(asked(TEXT))


def test_draining_finishes_what_runs_and_takes_no_more(engine, model):
    reply = engine.submit(asked(TEXT, "a0"))
    assert not engine.drain(0)
    with pytest.raises(Draining):
        engine.submit(asked(TEXT))
    assert engine.drain(20)
    assert tokens(reply) == model.want["a0"]


def test_stopping_ends_at_once(model, pool):
    engine = Engine(model, None, pool, limits=SMALL)
    engine.start()
    replies = [engine.submit(asked(TEXT, max_tokens=LONG)) for _ in range(9)]
    engine.stop()
    for reply in replies:
        with pytest.raises(Cancelled):
            reply.text()
    with pytest.raises(Draining):
        engine.submit(asked(TEXT))
    assert not engine.alive


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        (asked([]), Refused, "empty"),
        (asked([0, VOCABULARY]), Refused, f"0 to {VOCABULARY - 1}"),
        (asked([-1]), Refused, "0 to"),
        (asked([1] * 500, max_tokens=13), Refused, "500 tokens and max_tokens is 13, 513 together: at most 512"),
        (asked([1], temperature=-1.0), Refused, "temperature"),
        (asked([1], "nobody"), Unknown, "nobody"),
    ],
    ids=["empty", "vocabulary", "negative", "long", "setting", "adapter"],
)
def test_what_can_never_be_served_is_refused_at_once(engine, request_, error, said):
    with pytest.raises(error, match=said):
        engine.submit(request_)


def test_what_never_fits_into_the_cache_is_refused_with_its_size(model, pool):
    engine = Engine(model, None, pool, limits=dataclasses.replace(SMALL, cache=2**15))
    assert engine.cache_tokens < engine._work.cache.num_blocks * SMALL.page
    with pytest.raises(Refused, match=f"at most {engine.cache_tokens} go into the cache"):
        engine.submit(asked([1] * engine.cache_tokens))


def test_too_many_requests_are_told_when_to_come_again(model, pool):
    engine = Engine(model, None, pool, limits=Limits(running=2, waiting=3, batch_tokens=24, cache=2**20))
    for _ in range(3):
        engine.submit(asked(TEXT))
    with pytest.raises(Busy) as said:
        engine.submit(asked(TEXT))
    assert said.value.retry_after >= 1


def test_replies_are_read_by_tasks_and_threads_alike(engine, model):
    """Also several at a time, and a reply that was read is read again."""

    async def read(reply):
        return [c.token async for piece in reply for c in piece.tokens]

    async def several():
        replies = [engine.submit(asked(TEXT, name)) for name in ("a0", "a1", "a2")]
        return await asyncio.gather(*map(read, replies), read(replies[0]))

    assert asyncio.run(several()) == [model.want[n] for n in ("a0", "a1", "a2", "a0")]
    found = {}
    reply = engine.submit(asked(TEXT, "a0"))
    threads = [threading.Thread(target=lambda i=i: found.update({i: tokens(reply)})) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert list(found.values()) == [model.want["a0"]] * 3
    assert tokens(reply) == model.want["a0"]

    async def failing():
        long = engine.submit(asked(TEXT, max_tokens=LONG))
        async for _ in long:
            long.cancel()

    with pytest.raises(Cancelled):
        asyncio.run(failing())


@pytest.fixture
def letters():
    """A tokenizer of a letter for each token."""
    made = Tokenizer(models.WordLevel({chr(48 + i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="0")


def test_an_answer_ends_at_the_models_ends_at_a_stop_text_or_at_its_length(model, pool, letters):
    """As generation_config lists the ends, and the tokenizer; a stop text is not in the answer, no more is an end."""
    want = model.want["a0"]
    words = letters.decode(want).split()
    model.generation_config.eos_token_id = [VOCABULARY - 1, want[3]]
    end = want.index(want[3])
    try:
        with Engine(model, letters, pool, limits=SMALL) as engine:
            reply = engine.submit(asked(TEXT, "a0"))
            assert reply.text().split() == words[:end]
            assert (list(reply)[-1].finish, tokens(reply)) == ("stop", want[: end + 1])
            reply = engine.submit(asked(TEXT, "a0", ignore_eos=True))
            assert reply.text().split() == words
            assert list(reply)[-1].finish == "length"
            stop = f"{words[1]} {words[2]}"
            reply = engine.submit(asked(TEXT, "a0", ignore_eos=True, stop=("never", stop)))
            assert reply.text() == letters.decode(want).partition(stop)[0]
            assert list(reply)[-1].finish == "stop"
            assert [p.finish for p in reply][:-1] == [None] * (len(list(reply)) - 1)
    finally:
        model.generation_config.eos_token_id = None
