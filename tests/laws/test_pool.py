"""The pool of a server: whatever happens in whatever order, the right weights under the right name, within a budget."""

import contextlib
import itertools
import random
import shutil
import time

import pytest
import torch
from torch import nn

import undula
from undula.serve.pool import Pool
from undula.serve.request import Broken, Part, Refused, Unknown
from undula.serve.room import State

SITES = ("0", "2")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    return made.requires_grad_(False)


def trained(model, method, seed=0):
    """An adapter with numbers of its own everywhere."""
    twin = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    twin.load_state_dict(model.state_dict())
    adapter = undula.attach(twin, method, where=list(SITES))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    return undula.detach(twin).copy()


def ready(pool, version, seconds=20.0):
    """`acquire` until it succeeds."""
    until = time.monotonic() + seconds
    while (name := pool.acquire(version)) is None:
        assert time.monotonic() < until, "it never came in"
        time.sleep(0.001)
    return name


def idle(pool):
    """Waits until the loader has nothing to do."""
    until = time.monotonic() + 20
    while any(held.state is State.LOADING for held in list(pool._room.held.values())):
        assert time.monotonic() < until
        time.sleep(0.0005)


def deltas(adapter):
    return torch.cat([adapter.delta(site).flatten() for site in SITES])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(directory, update) of forty adapters."""
    root = tmp_path_factory.mktemp("made")
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    found = []
    for seed in range(40):
        adapter = trained(base, undula.LoRA(r=1 + seed % 3), seed)
        adapter.save(root / str(seed))
        found.append((root / str(seed), deltas(adapter)))
    return found


class Driven:
    """A pool that random operations are done to, and beside it what it must do, without memory, threads and files:
    which content lies where and is meant by what name, who waits for it and who computes with it."""

    BUDGET, NAMES = 900, "abcdef"

    def __init__(self, model, made, root, seed):
        self.rng, self.clock, self.made, self.model = random.Random(seed), Clock(), made, model
        self.pool = Pool(model, self.BUDGET, patience=2.0, lapse=5.0, clock=self.clock)
        self.paths = [root / f"d{i}" for i in range(12)]
        self.content = {}  # {path: the number of what lies there now}
        self.names = {}  # {name: (path, the number of what was there when it was registered)}
        self.waiting, self.using = [], []  # (version, {number: weight}, {path: number})
        self.numbers, self.served = itertools.count(), 0

    def update(self, number):
        return self.made[number % len(self.made)][1]

    def write(self, path):
        number = self.content[path] = next(self.numbers)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.made[number % len(self.made)][0], path)
        return number

    def register(self):
        name, path = self.rng.choice(self.NAMES), self.rng.choice(self.paths)
        number = self.write(path)
        if name in self.names:
            with pytest.raises(FileExistsError, match=name):
                self.pool.register(name, path)
        with self.allowed(ValueError):  # beside what is pinned it does not fit
            self.pool.register(name, path, replace=True)
            self.names[name] = (path, number)

    def unregister(self):
        name = self.rng.choice(self.NAMES)
        if self.names.pop(name, None):
            self.pool.unregister(name)
        else:
            with pytest.raises(Unknown):
                self.pool.unregister(name)

    def pin(self):
        for name in self.names:
            self.pool.pin(name, on=False)
        if self.names:
            self.pool.pin(self.rng.choice(sorted(self.names)))

    def wait(self):
        names = self.rng.choices(sorted(self.names) or "x", k=self.rng.choice([1, 1, 2]))
        parts = [Part(name, self.rng.choice([1.0, 1.0, 0.5, -2.0, 0.0])) for name in names]
        if not self.names:
            with pytest.raises(Unknown):
                self.pool.version(parts)
            return
        terms = {}
        for part in parts:
            number = self.names[part.name][1]
            terms[number] = terms.get(number, 0.0) + part.scale
        with self.allowed(Refused):
            version = self.pool.version(parts)
            if version is None:
                assert not any(terms.values())
            else:
                self.waiting.append((version, terms, dict(self.names[part.name] for part in parts)))

    @contextlib.contextmanager
    def allowed(self, kind):
        """Where it does not fit, that is said."""
        try:
            yield
        except kind as error:
            if "the pool's budget is 900" not in str(error):
                raise

    def poll(self):
        if self.waiting:
            self.asked(self.rng.choice(self.waiting))

    def asked(self, item):
        version, _, where = item
        try:
            name = self.pool.acquire(version)
        except Broken:
            assert any(self.content.get(path) != number for path, number in where.items())
            self.waiting.remove(item)
            return
        if name is not None:
            assert name == version.id
            self.waiting.remove(item)
            self.using.append(item)
            self.served += 1

    def release(self):
        if self.using:
            self.pool.release(self.using.pop(self.rng.randrange(len(self.using)))[0])

    def prefetch(self):
        if self.waiting:
            self.pool.prefetch(self.rng.choice(self.waiting)[0])

    def cancel(self):
        if self.waiting:
            self.pool.withdraw(self.waiting.pop(self.rng.randrange(len(self.waiting)))[0])

    def spoil(self):
        path = self.rng.choice(self.paths)
        if self.rng.random() < 0.5:
            self.write(path)
        elif self.content.pop(path, None) is not None:
            shutil.rmtree(path)

    def check(self):
        idle(self.pool)
        on_model = undula.adapters(self.model)
        assert self.pool.stats().bytes <= self.BUDGET
        assert sum(t.numel() * 4 for a in on_model.values() for _, _, t in a.tensors()) <= self.BUDGET
        for version, terms, _ in self.using:
            wanted = sum(weight * self.update(number) for number, weight in terms.items())
            assert torch.allclose(deltas(on_model[version.id]), wanted, atol=1e-5)
        assert self.pool.names() == sorted(self.names)


OFTEN = ["register", "wait", "wait", "wait", "poll", "poll", "poll", "poll", "release", "release", "prefetch"]
SELDOM = ["unregister", "spoil", "pin", "cancel"]


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_agree_with_a_plain_reference(model, made, tmp_path, seed):
    """Never more than the budget, nothing in use evicted, and every name computes what it stood for when the request
    came, or the request hears that the files changed."""
    driven = Driven(model, made, tmp_path, seed)
    for _ in range(200):
        driven.clock.now += driven.rng.random()
        getattr(driven, driven.rng.choice(SELDOM if driven.rng.random() < 0.12 else OFTEN))()
        driven.check()
    while driven.waiting or driven.using:  # everyone who still waits comes in, or hears why not
        driven.clock.now += 0.5
        for item in list(driven.waiting):
            driven.asked(item)
        driven.check()
        driven.release()
        assert driven.clock.now < 1000, "somebody waits for ever"
    assert driven.served > 5
    driven.pool.close()


@pytest.fixture
def pool(model):
    made = Pool(model, 10**6, clock=Clock())
    yield made
    made.close()


METHODS = {  # on every rung, and around them
    "LowRank": undula.LoRA(r=2),
    "frozen bases": undula.VeRA(r=4),
    "Additive": undula.LoRAN(r=2),
    "sparse": undula.SHiRA(),
    "Reweight": undula.DoRA(undula.LoRA(r=2)),
    "Method": undula.AuroRA(r=2),
    "around": undula.Dropout(undula.DoRA(undula.LoRA(r=2))),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_every_rung_is_served_as_it_computes_alone(model, pool, tmp_path, method):
    """A pool that knew pairs alone would refuse most adapters, or change what they compute."""
    adapter = trained(model, method)
    adapter.save(tmp_path / "a")
    x_NI = torch.randn(3, 6)
    undula.attach(model, adapter)
    wanted_NO = model(x_NI)
    undula.detach(model)
    base_NO = model(x_NI)
    pool.register("a", tmp_path / "a")
    version = pool.version([Part("a")])
    assert version.bytes == sum({id(t): t.numel() * t.element_size() for _, _, t in adapter.tensors()}.values())
    name = ready(pool, version)
    with undula.rows(model, [name, None, name]):
        found_NO = model(x_NI)
    assert torch.allclose(found_NO[::2], wanted_NO[::2], atol=1e-5)
    assert torch.allclose(found_NO[1], base_NO[1], atol=1e-6)
    assert not torch.allclose(found_NO[0], base_NO[0], atol=1e-3)


@torch.no_grad()
def test_a_weighted_sum_of_adapters_is_a_version_of_its_own(model, pool, tmp_path):
    """W' = W + sum of s_i dW_i; a name given twice counts with the sum, 0 with nothing; what cancels is the base."""
    updates = {}
    for seed, name in enumerate("abc"):
        adapter = trained(model, undula.LoRA(r=2) if name < "c" else undula.LoRAN(r=2), seed)
        adapter.save(tmp_path / name)
        pool.register(name, tmp_path / name)
        updates[name] = deltas(adapter)
    for given, terms in (
        ([("a", 0.5), ("b", -2.0)], {"a": 0.5, "b": -2.0}),
        ([("b", -2.0), ("a", 0.25), ("a", 0.25)], {"a": 0.5, "b": -2.0}),
        ([("a", 0.5), ("c", 1.0)], {"a": 0.5, "c": 1.0}),
        ([("c", 3.0)], {"c": 3.0}),
        ([("b", 0.0), ("a", 1.0)], {"a": 1.0}),
        ([("a", 0.5), ("a", 0.5)], {"a": 1.0}),
    ):
        version = pool.version([Part(name, scale) for name, scale in given])
        name = ready(pool, version)
        wanted = sum(weight * updates[n] for n, weight in terms.items())
        assert torch.allclose(deltas(undula.adapters(model)[name]), wanted, atol=1e-5)
    one, other = (pool.version([Part("a", 0.5), Part("b", -2.0)][::way]) for way in (1, -1))
    assert one is other
    assert pool.version([Part("a", 0.5), Part("a", 0.5)]) is pool.version([Part("a")])
    for nothing in ([], [Part("a", 0.0)], [Part("a", 1.0), Part("a", -1.0)]):
        assert pool.version(nothing) is None


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, True])
def test_a_scale_that_is_no_number_is_refused(model, pool, made, scale):
    """NaN would make every number of the reply NaN."""
    pool.register("a", made[0][0])
    with pytest.raises(Refused, match="finite number"):
        pool.version([Part("a", scale)])


@pytest.mark.parametrize("rung", ["Reweight", "Method"])
def test_what_has_no_update_is_refused_in_a_sum_by_its_rung(model, pool, tmp_path, made, rung):
    """Scaling a DoRA has no meaning that two people would agree on: alone with the scale 1 it is served."""
    trained(model, METHODS[rung]).save(tmp_path / "a")
    pool.register("a", tmp_path / "a")
    pool.register("b", made[0][0])
    for parts in ([Part("a", 0.5)], [Part("a"), Part("b")]):
        with pytest.raises(Refused, match=f"'a' is served alone.*rung {rung}"):
            pool.version(parts)
    assert pool.version([Part("a"), Part("b", 0.0)]) is pool.version([Part("a")])
