"""Numbers that a seed rebuilds: the hash in plain Python, pinned values, and loose statistics."""

import hashlib
import random

import numpy as np
import pytest
import torch

from undula import Site
from undula.host.views import outline
from undula.kernels import frozen

WORD = 0xFFFFFFFF


def plain(seed, key, i):
    """Number i of a stream, in Python's unbounded integers."""
    digest = hashlib.sha256(repr((seed, key)).encode()).digest()
    step, offset = int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:8], "little")
    h = (step * i + offset) & WORD
    h ^= h >> 16
    h = h * 0x7FEB352D & WORD
    h ^= h >> 15
    h = h * 0x846CA68B & WORD
    return h ^ h >> 16


def unsigned(t):
    return [v & WORD for v in t.tolist()]


@pytest.mark.parametrize("start", [0, 1, 1000, 2**31 - 3, 2**31, 2**32 - 2, 2**33 + 5])
@pytest.mark.parametrize("key", [("x",), ("NOLA", "A", "model.layers.0"), (3, "y")])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**40])
def test_products_wrap_as_they_do_in_python(seed, key, start):
    want = [plain(seed, key, start + i) for i in range(50)]
    assert unsigned(frozen.bits(seed, key, start, 50)) == want
    words = torch.tensor(frozen.words(seed, key), dtype=torch.int32)
    assert unsigned(frozen.numbers(words, start, 50)) == want


def test_the_stream_is_the_published_one():
    """Adapters on disk depend on these numbers: they never change."""
    assert unsigned(frozen.bits(0, ("x",), 0, 4)) == [0xBA033919, 0x32E44060, 0xDF9EB5BA, 0xFD6EAA72]
    far = frozen.bits(7, ("NOLA", "A", "model.layers.0"), 2**31 - 2, 4)
    assert unsigned(far) == [0xCAFF8079, 0x8CB317CF, 0x40ACA31C, 0xB9BEE1CD]
    assert (frozen.uniform(0, ("x",), (3,)) * 2**23).tolist() == [-4586695, 3335232, -2122059]
    assert frozen.permutation(3, ("p",), 10).tolist() == [9, 3, 2, 1, 4, 5, 6, 8, 7, 0]
    assert frozen.integers(3, ("i",), (2, 4), 1000).tolist() == [[987, 231, 56, 723], [397, 812, 310, 91]]
    assert frozen.words(0, ("x",)) == (-1475942459, 1531222828)
    assert frozen.checksum(torch.arange(4)) == "a1e03200f1f82ad2"
    assert frozen.checksum(torch.linspace(0, 1, 3)) == "e3f6e33972cfb3a2"


def test_blocks_are_the_whole():
    whole = frozen.uniform(2, ("w",), (1000,))
    assert torch.equal(torch.cat([frozen.uniform(2, ("w",), (250,), start=250 * i) for i in range(4)]), whole)
    assert torch.equal(frozen.uniform(2, ("w",), (20, 50)).flatten(), whole)
    assert torch.equal(frozen.bits(2, ("w",), 2**32, 9), frozen.bits(2, ("w",), 0, 9))  # the period


def test_every_32_bit_pattern_is_as_likely():
    n = 1 << 18
    words = frozen.bits(1, ("u",), 0, n).numpy().view(np.uint32)
    for shift in range(32):
        ones = int((words >> shift & 1).sum())
        assert abs(ones - n / 2) < 5 * (n / 4) ** 0.5
    for shift in (0, 8, 16, 24):
        counts = np.bincount(words >> shift & 0xFF, minlength=256)
        chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert 255 - 5 * 510**0.5 < chi2 < 255 + 5 * 510**0.5
    assert len(np.unique(words)) == n  # the hash is a bijection: nothing repeats within the period


def test_uniform_fills_its_interval_on_a_grid():
    u = frozen.uniform(1, ("u",), (1 << 18,)).double()
    assert -1 <= float(u.min()) < -0.9999
    assert 0.9999 < float(u.max()) < 1
    assert torch.equal(u * 2**23, (u * 2**23).round())
    n = len(u)
    assert abs(float(u.mean())) < 5 / (3 * n) ** 0.5
    assert float(u.square().mean()) == pytest.approx(1 / 3, abs=5 * (4 / 45 / n) ** 0.5)


@pytest.mark.parametrize("other", [(1, ("u",)), (0, ("v",)), (0, ("u", 0)), (0, ("u", 1)), (-1, ("u",))], ids=repr)
def test_streams_are_independent(other):
    """Other seeds and keys, and a stream against itself some steps later."""
    n = 1 << 17
    a = frozen.uniform(0, ("u",), (n,)).double()
    b = frozen.uniform(*other, (n,)).double()
    assert abs(float((a * b).mean() * 3)) < 5 / n**0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((b[:-lag] * b[lag:]).mean() * 3)) < 5 / (n - lag) ** 0.5


def test_integers_and_permutations():
    drawn = frozen.integers(0, ("i",), (1 << 16,), 7)
    counts = torch.bincount(drawn, minlength=7).double()
    assert len(counts) == 7
    n = len(drawn) / 7
    assert float((counts - n).abs().max()) < 5 * n**0.5
    largest = frozen.integers(0, ("i",), (1 << 12,), 2**31)
    assert 0 <= int(largest.min()) < 2**21
    assert 2**31 - 2**21 < int(largest.max()) < 2**31
    orders = torch.stack([frozen.permutation(seed, ("p",), 8) for seed in range(400)])
    assert torch.equal(orders.sort(1).values, torch.arange(8).expand(400, 8))
    first = torch.bincount(orders[:, 0], minlength=8)
    assert int(first.min()) > 50 - 5 * 50**0.5
    assert int(first.max()) < 50 + 5 * 50**0.5


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    a = frozen.uniform(0, ("g",), (10,)), frozen.permutation(0, ("g",), 10), frozen.integers(0, ("g",), (10,), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(123)
    b = frozen.uniform(0, ("g",), (10,)), frozen.permutation(0, ("g",), 10), frozen.integers(0, ("g",), (10,), 5)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_site_scales_once_and_widens_after():
    """What a float64 site gets is what float32 gets: its checksum is the same."""
    where = outline("l", (4, 3))
    narrow, wide = (
        Site("l", where.layer, (4, 3), dtype, torch.device("cpu")).frozen(5, "a", shape=(50,), bound=0.3)
        for dtype in (torch.float32, torch.float64)
    )
    assert wide.dtype == torch.float64
    assert torch.equal(wide, narrow.double())
    assert frozen.checksum(wide) == frozen.checksum(narrow)
    by_hand = np.float32(0.3) * frozen.uniform(5, ("a",), (50,)).numpy()
    assert (narrow.numpy() == by_hand).all()
    assert where.frozen(5, "a", shape=(50,)).device.type == "meta"


def test_checksums_tell_tensors_apart():
    t = frozen.uniform(0, ("c",), (40,))
    assert frozen.checksum(t) == frozen.checksum(t.double()) == frozen.checksum(t.view(8, 5).T.contiguous().T)
    changed = t.clone()
    changed[17] = torch.nextafter(changed[17], torch.tensor(2.0))
    assert frozen.checksum(changed) != frozen.checksum(t)
    assert frozen.checksum(torch.arange(5)) == frozen.checksum(torch.arange(5, dtype=torch.int32))
