"""Factors as integers of 8 or 4 bits with a scale for each group: half and a quarter of what 16 bits take.

    x_i ~ s q_i,   |q| <= 127 or 7,   s = c max |x| / 127 or 7 over a group of numbers, rounded to bfloat16

A group runs along the longest axis of a tensor: along I in A, along O in B, so that no rank shares its scale with
another.  c is 1 in 8 bits; in 4 bits the c of 0.7 ... 1 with the least square error.  The integers stand under the
factor's own key (int8, or two to a byte), the scales (rows, groups) under KEY.undula_scale; the configuration says
bits, group and type under `quantised`.  Reading makes numbers of that type again.

A safetensors file has no type of 4 bits, and torchao's quantised tensors are subclasses that only torchao rebuilds:
hence plain integers, which need no package to be read.  Small tensors (a gate, DoRA's magnitudes, the constants of a
bend) stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.given import Checked
from ..core.ranges import Bits, Few

SCALE = ".undula_scale"
LARGEST = {8: 127, 4: 7}
CUTS = {8: (1.0,), 4: tuple(c / 100 for c in range(100, 69, -3))}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Packing(metaclass=Checked):
    """How factors are stored: integers of so many bits, `group` of which share a scale; `dtype` is what they are read
    as."""

    bits: Bits = 8
    group: Few = 64
    dtype: torch.dtype = torch.float32

    def encode(self) -> dict[str, Any]:
        """As JSON values."""
        return {"bits": self.bits, "group": self.group, "dtype": str(self.dtype).removeprefix("torch.")}

    @staticmethod
    def decode(said: Any, path: str) -> Packing:
        """The inverse.  Raises ValueError."""
        known = {"bits", "group", "dtype"}
        if not isinstance(said, dict) or set(said) != known or said["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: `quantised` is {{bits, group, dtype}} with a dtype of {', '.join(DTYPES)}; found {said!r:.80}"
            )
        try:
            return Packing(said["bits"], said["group"], DTYPES[said["dtype"]])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: `quantised`: {error}") from None

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"integers of {self.bits} bits in groups of {self.group} with a scale each, read as {kind}"

    def pack(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(integers, scales) of a tensor."""
        rows, length, groups = self._sizes(t.shape)
        group = min(self.group, length)
        x = _in_rows(t.detach().float()).reshape(rows, length)
        x = torch.nn.functional.pad(x, (0, groups * group - length)).view(rows, groups, group)
        largest = LARGEST[self.bits]
        most = x.abs().amax(2) / largest
        best = scale = torch.zeros_like(most)
        for cut in CUTS[self.bits]:
            tried = (cut * most).bfloat16().float()
            missed = (x - tried[..., None] * _rounded(x, tried, largest)).square().sum(2)
            better = missed < best if cut < 1 else torch.ones_like(missed, dtype=torch.bool)
            scale, best = torch.where(better, tried, scale), torch.where(better, missed, best)
        q = _rounded(x, scale, largest).view(rows, -1)[:, :length].to(torch.int8)
        return q if self.bits == 8 else _halves(q.flatten()), scale.bfloat16()

    def unpack(self, q: Tensor, scale: Tensor, shape: torch.Size, what: str) -> Tensor:
        """The tensor of that shape.  Raises ValueError where the two have not the sizes that it takes."""
        rows, length, groups = self._sizes(shape)
        wanted = ((rows, length), torch.int8) if self.bits == 8 else ((-(-rows * length // 2),), torch.uint8)
        if (tuple(q.shape), q.dtype) != wanted or (tuple(scale.shape), scale.dtype) != ((rows, groups), torch.bfloat16):
            raise ValueError(
                f"{what}: {tuple(q.shape)} {q.dtype} with scales {tuple(scale.shape)} {scale.dtype} are no {self.bits} "
                f"bits in groups of {self.group} for a tensor {tuple(shape)}"
            )
        if q.is_meta:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        whole = q if self.bits == 8 else _whole(q)[: rows * length].view(rows, length)
        each = scale.float().repeat_interleave(min(self.group, length), 1)[:, :length]
        axis = _longest(shape)
        moved = [n for i, n in enumerate(shape) if i != axis] + [length]
        return (whole.float() * each).view(moved).movedim(-1, axis).to(self.dtype).contiguous()

    def _sizes(self, shape: torch.Size) -> tuple[int, int, int]:
        """(rows, numbers of a row, groups of a row)."""
        length = shape[_longest(shape)]
        return math.prod(shape) // length, length, -(-length // self.group)


def is_packed(t: Tensor, shape: tuple[int, int]) -> bool:
    """Whether a factor of a layer (O, I) is worth it: matrices of a layer's size, and lists of entries."""
    if not t.is_floating_point() or not t.numel():
        return False
    return t.numel() >= min(shape) if t.ndim > 1 else t.numel() > max(shape)


def unpacked(
    f: Mapping[str, Tensor], wanted: Mapping[str, Tensor], said: Any, path: str, once: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The factors of a site with numbers in the place of integers and scales; `wanted` has their shapes, `once` what
    was made of integers that sites share, and that live as long as it.  Raises ValueError."""
    scaled = [name for name in f if name.endswith(SCALE)]
    if not scaled:
        return dict(f)
    how = Packing.decode(said, path)
    found = {name: t for name, t in f.items() if not name.endswith(SCALE)}
    for name in scaled:
        factor = name.removesuffix(SCALE)
        if factor not in found or factor not in wanted:
            raise ValueError(f"{path}: {name} holds the scales of a factor that is not there")
        q = found[factor]
        if id(q) not in once:
            once[id(q)] = how.unpack(q, f[name], wanted[factor].shape, f"{path}: {factor}")
        found[factor] = once[id(q)]
    return found


def _longest(shape: torch.Size) -> int:
    return max(range(len(shape)), key=lambda i: shape[i])


def _in_rows(t: Tensor) -> Tensor:
    return t.movedim(_longest(t.shape), -1)


def _rounded(x: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The integers of x at these scales."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (x * inverse[..., None]).round().clamp(-largest, largest)


def _halves(q: Tensor) -> Tensor:
    """Integers of 4 bits, two to a byte: the first in the low half."""
    even = torch.nn.functional.pad(q + 8, (0, len(q) % 2)).to(torch.uint8).view(-1, 2)
    return even[:, 0] | (even[:, 1] << 4)


def _whole(q: Tensor) -> Tensor:
    return torch.stack([q & 15, q >> 4], 1).flatten().to(torch.int8) - 8
