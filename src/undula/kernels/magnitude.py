"""Order statistics of matrices that are computed block by block, and never held as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DIGITS = {torch.float32: (torch.int32, (16, 15)), torch.float64: (torch.int64, (16, 16, 16, 15))}  # bits at a time


def kth_largest(blocks: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> float:
    """The k-th largest |entry| (k from 1) of all that `blocks()` gives, which gives the same every time, as float32 or
    float64.  Exact, in the memory of a block: numbers that are not negative are ordered as their bits are, so the
    answer's bits are found from the highest, some at a time, by counting."""
    integer, digits = DIGITS[dtype]
    prefix, below = 0, sum(digits)
    for digit in digits:
        shift, counts_K = below - digit, torch.zeros(1 << digit, dtype=torch.int64)
        for block in blocks():
            bits = block.to(dtype).abs().contiguous().view(integer).flatten()
            mine = bits[bits >> below == prefix] >> shift
            counts_K += torch.bincount(mine & ((1 << digit) - 1), minlength=1 << digit).cpu()
        from_above = counts_K.flip(0).cumsum(0)
        place = int((from_above < k).sum())
        k -= int(from_above[place - 1]) if place else 0
        prefix, below = prefix << digit | ((1 << digit) - 1 - place), shift
    return float(torch.tensor([prefix], dtype=integer).view(dtype))
