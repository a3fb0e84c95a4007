"""Random numbers that a seed rebuilds, bit for bit, on any machine, device and version of torch.

torch's generators differ between devices and may change between releases; a frozen basis that no file holds must not.
Here number i of the stream (seed, key) is a hash of i: 32-bit integer arithmetic, the same everywhere (the mixing is
that of Wellons' `lowbias32`).  Any block of a stream can be made without the ones before it, the global generators are
never touched, and floating-point numbers lie on a grid of 2^-24, so that their scaling rounds once.
"""

from __future__ import annotations

import ctypes
import hashlib
import math

import torch
from torch import Tensor

Key = str | int


def words(seed: int, key: tuple[Key, ...]) -> tuple[int, int]:
    """(step, offset) of the stream (seed, key), signed 32-bit integers: all that `numbers` needs to know of it."""
    digest = hashlib.sha256(repr((seed, key)).encode()).digest()
    return _signed(int.from_bytes(digest[:4], "little") | 1), _signed(int.from_bytes(digest[4:8], "little"))


def bits(seed: int, key: tuple[Key, ...], start: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers start, start + 1, ... start + n - 1 of the stream (seed, key): int32, uniform over all 32-bit values."""
    return numbers(torch.tensor(words(seed, key), dtype=torch.int32, device=device), start, n)


def numbers(words_2: Tensor, start: int, n: int) -> Tensor:
    """`bits` of the stream with these words, an int32 tensor: what a method can keep as a factor."""
    step, offset = words_2.unbind()
    h = torch.arange(n, dtype=torch.int32, device=words_2.device)
    h.mul_(step).add_(step * _signed(start) + offset)
    _shifted(h, 16)
    h.mul_(_signed(0x7FEB352D))
    _shifted(h, 15)
    h.mul_(_signed(0x846CA68B))
    return _shifted(h, 16)


def _signed(word: int) -> int:
    """The low 32 bits of `word` as a signed integer: products and sums wrap, as unsigned ones do."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(h: Tensor, by: int) -> Tensor:
    """h ^= h >> by, in place, shifting in zeros."""
    return h.bitwise_xor_((h >> by).bitwise_and_((1 << (32 - by)) - 1))


def uniform(
    seed: int, key: tuple[Key, ...], shape: tuple[int, ...], device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Numbers of the stream from `start` on, uniform in [-1, 1), float32; their standard deviation is 1/sqrt(3)."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, device=device)
    return floats(bits(seed, key, start, math.prod(shape), device)).view(shape)


def floats(drawn: Tensor) -> Tensor:
    """Drawn bits as float32 numbers in [-1, 1)."""
    return (drawn >> 8).float().mul_(2.0**-23)


def integers(seed: int, key: tuple[Key, ...], shape: tuple[int, ...], high: int) -> Tensor:
    """Integers uniform in 0 .. high - 1, int64, on the CPU; `high` is at most 2^31."""
    wide = bits(seed, key, 0, math.prod(shape)).long().bitwise_and_(0xFFFFFFFF)
    return (wide * high >> 32).view(shape)


def permutation(seed: int, key: tuple[Key, ...], n: int) -> Tensor:
    """A random order of 0 .. n - 1, int64, on the CPU."""
    return torch.sort(bits(seed, key, 0, n), stable=True).indices


def subset(seed: int, key: tuple[Key, ...], n: int, k: int) -> Tensor:
    """k different numbers of 0 .. n - 1 in rising order, all such sets equally likely, int64, on the CPU.  Work and
    memory follow k."""
    if 2 * k > n:
        return permutation(seed, key, n)[:k].sort().values
    draws = k + k // 2 + 64  # enough of them are different almost always
    while True:
        number, when = torch.sort(integers(seed, key, (draws,), n), stable=True)
        first = torch.ones_like(number, dtype=torch.bool)
        first[1:] = number[1:] != number[:-1]
        number, when = number[first], when[first]
        if len(number) >= k:  # the first k different ones, however many were drawn
            return number[when <= when.kthvalue(k).values]
        draws *= 2


def checksum(t: Tensor) -> str:
    """Sixteen hexadecimal digits that tell whether a rebuilt tensor is the one that was saved.  Floating-point numbers
    count as float32."""
    t = t.detach().cpu()
    t = t.float() if t.is_floating_point() else t.long()
    t = t.contiguous()
    held = (ctypes.c_char * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""
    return hashlib.sha256(held).hexdigest()[:16]
