"""An engine on a real pool: adapters on disk, more of them than have room, added and replaced while it runs."""

import pytest
import torch

import undula
from tests.support.numbers import shake
from tests.support.served import alone, asked, llama, tokens
from undula.combine.weighted import combined
from undula.serve.engine import Engine, Limits
from undula.serve.pool import Pool
from undula.serve.request import Broken, Part, Request, Sampling, Unknown

TEXT = [5, 9, 3, 60, 1, 2, 8, 8, 4, 7, 7, 2, 30, 31]
METHODS = [undula.LoRA(r=2), undula.LoRA(r=4), undula.DoRA(undula.LoRA(r=2)), undula.LoRAN(r=2), undula.LoRA(r=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters 0 to 4 on disk, and the answers of each by itself."""
    path, model = tmp_path_factory.mktemp("adapters"), llama()
    for i, method in enumerate(METHODS):
        shake(undula.attach(model, method, name=str(i)), 0.3)
    for i in range(len(METHODS)):
        undula.detach(model, str(i)).save(path / str(i))
    return path


@pytest.fixture(scope="module")
def want(folder):
    model, found = llama(), {None: alone(llama(), None, TEXT, 6)}
    for i in range(len(METHODS)):
        undula.attach(model, undula.Adapter.load(folder / str(i)), name="it")
        found[str(i)] = alone(model, "it", TEXT, 6)
        undula.detach(model, "it")
    terms = [(0.5, undula.Adapter.load(folder / "0")), (-1.0, undula.Adapter.load(folder / "4"))]
    undula.attach(model, combined(terms), name="it")
    found["sum"] = alone(model, "it", TEXT, 6)
    assert len(set(map(tuple, found.values()))) == len(found)
    return found


def test_more_adapters_than_have_room_all_answer_as_themselves(folder, want):
    model = llama()
    pool = Pool(model, 2 * max(pool_bytes(folder)))
    for i in range(len(METHODS)):
        pool.register(str(i), folder / str(i))
    with Engine(model, None, pool, limits=Limits(running=4, batch_tokens=24, cache=2**20, page=4)) as engine:
        names = [None, *"01234", "sum"] * 2
        replies = []
        for name in names:
            parts = (Part("0", 0.5), Part("4", -1.0)) if name == "sum" else () if name is None else (Part(name),)
            replies.append(engine.submit(Request(tuple(TEXT), parts, Sampling(max_tokens=6))))
        assert [tokens(r) for r in replies] == [want[name] for name in names]
        assert pool.stats().evictions > 0
        assert pool.stats().in_use == 0
    pool.close()


def pool_bytes(folder):
    pool = Pool(llama(), 10**9)
    return [pool.register(str(i), folder / str(i)).bytes for i in range(len(METHODS))]


def test_a_name_that_is_registered_anew_means_the_new_one_from_then_on(folder, want):
    """The old one's prefix blocks serve nobody who asks for the new one; who runs on the old one ends on it."""
    model = llama()
    pool = Pool(model, 10**9)
    pool.register("x", folder / "0")
    with Engine(model, None, pool, limits=Limits(running=4, batch_tokens=24, cache=2**20, page=4)) as engine:
        assert tokens(engine.submit(asked(TEXT, "x", max_tokens=6))) == want["0"]
        old = engine.submit(asked(TEXT, "x", max_tokens=6))
        pool.register("x", folder / "1", replace=True)
        new = engine.submit(asked(TEXT, "x", max_tokens=6))
        assert (tokens(old), old.usage.cached_tokens) == (want["0"], 12)
        assert (tokens(new), new.usage.cached_tokens) == (want["1"], 0)
        pool.unregister("x")
        with pytest.raises(Unknown):
            engine.submit(asked(TEXT, "x"))
    pool.close()


def test_a_file_that_is_damaged_after_it_was_registered_breaks_its_own_requests(folder, want, tmp_path):
    model = llama()
    undula.Adapter.load(folder / "0").save(tmp_path / "bad")
    pool = Pool(model, 10**9)
    pool.register("bad", tmp_path / "bad")
    pool.register("good", folder / "1")
    (file,) = (tmp_path / "bad").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with Engine(model, None, pool, limits=Limits(running=4, batch_tokens=24, cache=2**20, page=4)) as engine:
        replies = [engine.submit(asked(TEXT, name, max_tokens=6)) for name in ("bad", "good")]
        with pytest.raises(Broken):
            replies[0].text()
        assert tokens(replies[1]) == want["1"]
        assert torch.is_grad_enabled()
    pool.close()
