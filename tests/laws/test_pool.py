"""The pool of a server: whatever happens in whatever order, the right weights under the right name, within a budget."""

import contextlib
import itertools
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import undula
from undula.io.outline import Head
from undula.serve.folder import register_folder
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
    "gates": undula.Fusion(),
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
    assert pool.stats().bytes == version.bytes == undula.adapters(model)[name].nbytes  # what it really takes
    with undula.rows(model, [name, None, name]):
        found_NO = model(x_NI)
    assert torch.allclose(found_NO[::2], wanted_NO[::2], atol=1e-5)
    assert torch.allclose(found_NO[1], base_NO[1], atol=1e-6)
    assert not torch.allclose(found_NO[0], base_NO[0], atol=1e-3)


def test_what_takes_more_than_its_tensors_waits_until_there_is_room_for_it(model, tmp_path):
    """Some laws keep more on the model than their file holds, which only reading tells: the budget holds all the same,
    and others of the form ask for the right room from the beginning."""
    for seed, name in enumerate("abc"):
        trained(model, undula.DoRA(undula.LoRA(r=1)), seed).save(tmp_path / name)
    large = Pool(model, 10**6)
    size = large.register("a", tmp_path / "a").bytes
    large.register("b", tmp_path / "b")
    first = large.version([Part("a")])
    ready(large, first)
    assert first.bytes > size
    assert large.version([Part("b")]).bytes == first.bytes
    large.unregister("a")
    large.release(first)
    small = Pool(model, 2 * size, clock=Clock())
    a, b = (small.register(name, tmp_path / name) for name in "ab")
    for version in (a, b):
        ready(small, version)
        assert small.stats().bytes <= 2 * size
        small.release(version)
    assert small.stats().evictions == 1
    tiny = Pool(model, size)
    with pytest.raises(Broken, match=f"takes {first.bytes:,} bytes; the pool's budget is {size:,}"):
        ready(tiny, tiny.register("c", tmp_path / "c"))
    with pytest.raises(Refused, match="budget"):
        tiny.version([Part("c")])


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


def spoiled_at_registering(path):
    """{what: (what happens to a directory, what the refusal says)}."""
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    return {
        "cut weights": (lambda: weights.write_bytes(weights.read_bytes()[:-4]), "cut or damaged"),
        "no header": (lambda: weights.write_bytes(b"\x00" * 64), "no safetensors file"),
        "no weights": (weights.unlink, "adapter_model.safetensors is missing"),
        "no config": (config.unlink, "adapter_config.json is missing"),
        "a config that is no JSON": (lambda: config.write_text("{"), "is not JSON"),
        "nothing": (lambda: shutil.rmtree(path), "no such directory"),
        "another method": (lambda: config.write_text(config.read_text().replace('"LoRA"', '"LaRA"')), "LaRA"),
        "another rank": (lambda: config.write_text(config.read_text().replace('"r": 2', '"r": 3')), "factor"),
    }


@pytest.mark.parametrize("what", spoiled_at_registering(Path()))
def test_what_is_broken_is_refused_when_it_is_registered(pool, made, tmp_path, what):
    """Of a directory that cannot be served nobody should hear first from a request."""
    shutil.copytree(made[1][0], tmp_path / "a")
    spoil, said = spoiled_at_registering(tmp_path / "a")[what]
    spoil()
    with pytest.raises((ValueError, LookupError, FileNotFoundError), match=said):
        pool.register("a", tmp_path / "a")
    assert pool.names() == []
    pool.register("a", made[1][0])
    assert ready(pool, pool.version([Part("a")]))


@pytest.mark.parametrize("what", ["other shapes", "other sites", "a head"])
def test_an_adapter_for_another_model_is_refused_when_it_is_registered(pool, tmp_path, what):
    """By its header alone: no weight is read for it."""
    other = nn.Sequential(nn.Linear(7 if what == "other shapes" else 6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4))
    sites = ["3"] if what == "other sites" else ["0"]
    adapter = undula.attach(other, undula.LoRA(r=2), where=sites, full=["2"] if what == "a head" else ())
    adapter.save(tmp_path / "a")
    said = {"other shapes": r"\(5, 6\).*\(5, 7\)", "other sites": "has not: 3", "a head": "2.weight.* in full"}[what]
    with pytest.raises(ValueError, match=said):
        pool.register("a", tmp_path / "a")


def test_an_adapter_that_names_another_base_is_refused(model, made, tmp_path):
    """Its shapes may fit all the same, and what it computes would be noise."""
    undula.Adapter.load(made[0][0]).save(tmp_path / "a", base="somebody/else-7b")
    pool = Pool(model, 10**6, bases=["bundled:smollm2"])
    with pytest.raises(ValueError, match=r"somebody/else-7b.*bundled:smollm2"):
        pool.register("a", tmp_path / "a")
    Pool(model, 10**6, bases=["bundled:smollm2", "somebody/else-7b"]).register("a", tmp_path / "a")
    pool.register("b", made[0][0])  # which names none


def altered(path, change):
    """Writes other numbers into the file of an adapter, in its place and as long as it was."""
    file = path / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4:] = change
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("what", "said"),
    [("NaN", "changed after it was registered"), ("gone", "are gone"), ("other numbers", "changed after")],
)
def test_files_that_changed_since_they_were_registered_are_no_adapter(pool, made, tmp_path, what, said):
    """A reply through what lies there now would be another adapter's; to register it again says that it is meant."""
    path = tmp_path / "secret-place"
    shutil.copytree(made[0][0], path)
    pool.register("a", path)
    pool.register("b", made[1][0])
    version = pool.version([Part("a")])
    if what == "gone":
        shutil.rmtree(path)
    else:
        altered(path, b"\x00\x00\xc0\x7f" if what == "NaN" else b"\x00\x00\x00\x3f")
    with pytest.raises(Broken, match=said) as error:
        ready(pool, version)
    assert "secret-place" not in str(error.value)
    assert ready(pool, pool.version([Part("b")]))  # the pool goes on
    if what == "other numbers":
        ready(pool, pool.register("a", path, replace=True))


def test_what_only_reading_can_tell_is_said_to_the_request_without_paths(pool, made, tmp_path):
    """NaN among the weights: no header shows it."""
    path = tmp_path / "secret-place"
    shutil.copytree(made[0][0], path)
    altered(path, b"\x00\x00\xc0\x7f")
    pool.register("a", path)
    version = pool.version([Part("a")])
    with pytest.raises(Broken, match=r"'a' cannot be loaded.*NaN") as error:
        ready(pool, version)
    assert "secret-place" not in str(error.value)
    assert pool.stats().failures == 1
    shutil.copytree(made[1][0], tmp_path / "b")
    pool.register("a", tmp_path / "b", replace=True)
    assert ready(pool, pool.version([Part("a")]))


def test_what_could_not_be_loaded_is_tried_again_after_a_while(pool, made, tmp_path):
    """A full table of open files, a disk that was away: such things pass, and nobody should have to register again."""
    shutil.copytree(made[0][0], tmp_path / "a")
    version = pool.register("a", tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "away")
    with pytest.raises(Broken, match="gone"):
        ready(pool, version)
    (tmp_path / "away").rename(tmp_path / "a")
    with pytest.raises(Broken, match="gone"):  # for so long nobody reads it at every step
        pool.acquire(version)
    assert pool.stats().failures == 1
    pool._clock.now += 6
    assert ready(pool, version)


@torch.no_grad()
def test_a_name_that_is_registered_anew_serves_new_requests_and_old_ones_finish(model, pool, made, tmp_path):
    """In place: the running ones compute with what they began with, whatever lies in the file now."""
    path = tmp_path / "a"
    shutil.copytree(made[0][0], path)
    old = pool.register("a", path)
    ready(pool, old)
    shutil.rmtree(path)
    shutil.copytree(made[1][0], path)
    new = pool.register("a", path, replace=True)
    assert pool.version([Part("a")]) is new
    ready(pool, new)
    assert old.id != new.id
    assert old.digest != new.digest
    found = {version: deltas(undula.adapters(model)[version.id]) for version in (old, new)}
    assert torch.allclose(found[old], made[0][1])
    assert torch.allclose(found[new], made[1][1])
    pool.release(old)  # the last that used it
    assert set(undula.adapters(model)) == {new.id}
    with pytest.raises(Broken, match="exchanged or removed while this request waited"):
        ready(pool, old)


def test_equal_contents_have_one_digest_under_any_name_and_scale_and_number_change_it(pool, made, tmp_path):
    """What salts blocks of a prefix: known before anything was computed, and nothing else's."""
    shutil.copytree(made[0][0], tmp_path / "copy")
    versions = [pool.register("a", made[0][0]), pool.register("b", tmp_path / "copy"), pool.register("c", made[3][0])]
    versions += [pool.version([Part("a", 2.0)]), pool.version([Part("a", 2.0), Part("c", 0.5)])]
    assert versions[0].digest is None
    for version in versions:
        ready(pool, version)
    digests = [version.digest for version in versions]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert len({version.id for version in versions}) == 5


def test_nothing_is_evicted_that_is_pinned_and_nothing_is_pinned_that_does_not_fit(model, made):
    """A budget that pins alone could break would not be one."""
    size = pool_bytes(model, made)
    pool = Pool(model, 2 * size, clock=Clock())
    pool.register("kept", made[0][0], pin=True)
    versions = [pool.register(name, made[3 * (i + 1)][0]) for i, name in enumerate("abc")]
    idle(pool)
    for version in versions:
        ready(pool, version)
        pool.release(version)
    assert [d.state for d in pool.describe() if d.name == "kept"] == ["loaded"]
    assert pool.stats().evictions == 2
    pool.pin("a")
    with pytest.raises(ValueError, match=f"'b' takes {size:,} bytes; the pool's budget is {2 * size:,}, of which"):
        pool.pin("b")
    with pytest.raises(Refused, match="budget"):
        pool.version([Part("b")])
    pool.pin("kept", on=False)
    assert ready(pool, versions[1])


def pool_bytes(model, made):
    """What the first adapter of `made` takes, and every third after it."""
    return Pool(model, 10**6).register("a", made[0][0]).bytes


@pytest.mark.parametrize("room", [0, 1])
def test_what_can_never_fit_is_refused_with_numbers(model, made, room):
    """Not queued for ever."""
    size = pool_bytes(model, made)
    pool = Pool(model, size * room)
    if room:
        pool.register("a", made[0][0])
        pool.register("b", made[3][0])
        with pytest.raises(Refused, match=f"'a' \\+ 'b' takes {2 * size:,} bytes; the pool's budget is {size:,}"):
            pool.version([Part("a"), Part("b")])
    else:
        with pytest.raises(ValueError, match=f"'a' takes {size:,} bytes; the pool's budget is 0"):
            pool.register("a", made[0][0])


def test_who_waits_for_room_comes_in_although_others_keep_the_room_in_use(model, made):
    """Requests for adapters in memory that come all the time would starve all others: after `patience` those take no
    new ones until who waits is in."""
    size, clock = pool_bytes(model, made), Clock()
    pool = Pool(model, 2 * size, patience=2.0, lapse=10.0, clock=clock)
    a, b, c = (pool.register(name, made[3 * i][0]) for i, name in enumerate("abc"))
    using = {version: [(ready(pool, version), clock.now + 1.0)] for version in (a, b)}
    came_in = None
    for _ in range(100):
        clock.now += 0.1
        idle(pool)
        for version, ends in using.items():  # each request takes a second, and another one always waits
            for end in [e for e in ends if e[1] <= clock.now]:
                ends.remove(end)
                pool.release(version)
            if len(ends) < 2 and pool.acquire(version) is not None:
                ends.append((version.id, clock.now + 1.0))
        if pool.acquire(c) is not None:
            came_in = clock.now
            break
    assert came_in is not None
    assert came_in < 4.0  # the patience, the longest request, the reading
    assert pool.stats().bytes <= 2 * size


def test_two_that_do_not_fit_together_come_in_one_after_the_other(model, made):
    """Each is read for the other's room: neither may throw the other out before it was used."""
    pool = Pool(model, pool_bytes(model, made), clock=Clock())
    a, b = pool.register("a", made[0][0]), pool.register("b", made[3][0])
    order = []
    for _ in range(200):
        idle(pool)
        for version in (a, b):
            if version not in order and pool.acquire(version):
                order.append(version)
                pool.release(version)
        if len(order) == 2:
            break
    assert order == [a, b]
    assert pool.stats().loads == 2


def test_threads_that_ask_for_one_version_have_it_read_once(pool, made):
    """`prefetch` comes from any thread, as often as requests come."""
    version = pool.register("a", made[0][0])
    threads = [threading.Thread(target=pool.prefetch, args=(version,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ready(pool, version) == ready(pool, version)
    stats = pool.stats()
    assert (stats.loads, stats.misses, stats.hits) == (1, 1, 1)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a\\b", "a:b", " a", "a\n", "a" * 201, None, "\ud800"])
def test_a_name_is_no_path_and_no_address(pool, made, name):
    """`model:adapter` names an adapter, and a folder's names become names of adapters."""
    with pytest.raises(ValueError, match="is no name for an adapter"):
        pool.register(name, made[0][0])


def test_a_folder_registers_what_it_holds_and_says_what_not(model, pool, made, tmp_path):
    """Never silently fewer than lie there; no link leads out of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    for name in ("a", "b", "late"):
        shutil.copytree(made[0][0], root / name)
    shutil.copytree(made[1][0], outside)
    (root / "late").rename(tmp_path / "late")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    (root / "out").symlink_to(outside)
    (root / "inside").symlink_to(root / "a")
    (root / "sly").mkdir()
    for file in outside.iterdir():
        (root / "sly" / file.name).symlink_to(file)
    found = register_folder(pool, root, pin=["b"])
    assert found.registered == ["a", "b", "inside"] == pool.names()
    assert set(found.left_out) == {"empty", "notes.txt", ".hidden", "out", "sly"}
    assert "leads out of the folder" in found.left_out["out"]
    assert "leads out of the folder" in found.left_out["sly"]
    assert "is no directory" in found.left_out["notes.txt"]
    assert [d.pinned for d in pool.describe()] == [False, True, False]
    (tmp_path / "late").rename(root / "late")
    altered(root / "b", b"\x00\x00\x00\x3f")
    again = register_folder(pool, root)
    assert (again.registered, again.kept) == (["late"], ["a", "inside"])
    assert "registered already" in again.left_out["b"]
    (tmp_path / "second").mkdir()
    shutil.copytree(made[1][0], tmp_path / "second" / "a")
    assert f"served from {root} already: rename one" in register_folder(pool, tmp_path / "second").left_out["a"]
    shutil.rmtree(root / "a")
    last = register_folder(pool, root, replace=True)
    assert (last.registered, last.gone) == (["b"], ["a"])
    with pytest.raises(LookupError, match=r"keep in memory.*lost: there is no such directory"):
        register_folder(pool, root, pin=["lost"])
    with pytest.raises(NotADirectoryError):
        register_folder(pool, root / "nowhere")


def test_adapters_of_one_form_are_looked_at_once_and_asking_does_not_look_at_all_of_them(pool, made, monkeypatch):
    """A thousand registered adapters cost a step what one costs: what is counted is how often forms are made and how
    many sources a request looks at."""
    outlines = []
    whole = Head.outline
    monkeypatch.setattr(Head, "outline", lambda self: outlines.append(self.path) or whole(self))
    for i in range(30):
        pool.register(f"n{i}", made[i][0])
    assert len(outlines) == 3  # of three ranks
    looked = []

    class Counted(dict):
        def __getitem__(self, name):
            looked.append(name)
            return super().__getitem__(name)

        def values(self):
            raise AssertionError("it went through all of them")

        items = __iter__ = values

    pool._catalog.sources = Counted(pool._catalog.sources)
    version = pool.version([Part("n7")])
    name = ready(pool, version)
    pool.release(version)
    assert (name, set(looked)) == (version.id, {"n7"})
