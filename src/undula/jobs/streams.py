"""Dropout whose random numbers are each row's own.

A row of a job's step draws from a generator seeded by (the job's seed, the number of the row in the job's course).  So
what it draws depends neither on the rows beside it, of its own job or of others, nor on which micro-batch it comes in,
and a resumed job needs no state of a generator: only how many rows it has had.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..kernels.draws import drawing
from ..methods.dropout import LEVELS, noise, stays

_current_backward = torch._C._current_graph_task_id  # -1 outside of a backward
BLOCK = 1 << 13  # of 64 bits, that a row draws at a time
PLAIN = (F.dropout, torch.dropout, torch.dropout_)
OTHERS = (F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout)


@dataclass(frozen=True)
class Stretch:
    """One row of a batch: `length` tokens from `at` on, of the flat batch or of its own padded row."""

    name: str
    at: int
    length: int
    draws: Draws


class Draws:
    """Random numbers of 16 bits of one row of a job, in the order in which they are asked for.  They are drawn many at
    a time: a layer asks for few."""

    def __init__(self, seed: int, number: int, device: torch.device):
        self.seed, self.number, self.device = seed, number, device
        self.generator: torch.Generator | None = None
        self.left = torch.empty(0, dtype=torch.int16, device=device)

    def take(self, count: int) -> Tensor:
        """The next numbers (count,)."""
        if count > len(self.left):
            self.generator = self.generator or generator_of(self.seed, self.number, self.device)
            more = noise(max(BLOCK, -(-count // 4)), self.device, self.generator)
            self.left = torch.cat([self.left, more])
        found, self.left = self.left[:count], self.left[count:]
        return found


def generator_of(seed: int, number: int, device: torch.device) -> torch.Generator:
    """The stream of one row of a job."""
    told = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(told[:8], "little") >> 1)


class Streams:
    """The streams of a batch's rows.  `width`: that of padded rows; None: the batch is flat."""

    def __init__(self, stretches: Sequence[Stretch], width: int | None):
        self.every, self.width = list(stretches), width
        self.here = self.every
        self.drawn = False  # whether anything was
        self._next = 0  # of the rows whose attention comes one by one

    @contextlib.contextmanager
    def among(self, name: str) -> Iterator[None]:
        """Within, tensors are of the rows of one job alone."""
        before = self.here
        self.here = [s for s in self.every if s.name == name]
        try:
            yield
        finally:
            self.here = before

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Inverted dropout of x, whose entries are of the rows that are here.  Raises TypeError where it is not told
        which entry is of which row, RuntimeError for activations that are computed again."""
        if _current_backward() != -1:
            raise RuntimeError(
                "gradient_checkpointing computes dropout again, which would draw other numbers: leave out the one or "
                "the other"
            )
        self.drawn = True
        level = round(p * LEVELS)
        return torch.where(self._kept(x, p), x * (LEVELS / (LEVELS - level)), 0.0)

    def _kept(self, x: Tensor, p: float) -> Tensor:
        total = sum(s.length for s in self.here)
        wide = total if self.width is None else self.width
        if x.ndim == 4 and x.shape[2:] == (wide, wide):
            return self._pairs(x, p)
        if x.ndim == 4 and self.width is None and x.shape[2] == x.shape[3]:
            return self._some(x, p)
        if self.width is None and (x.shape[:1] == (total,) or x.shape[:2] == (1, total)):
            rest = x.shape[1:] if x.shape[0] == total else x.shape[2:]
            each = math.prod(rest)
            return self._of([s.draws.take(s.length * each) for s in self.here], x.shape, p)
        if len(x) == len(self.here) and x.ndim > 2 and x.shape[1] == self.width:
            found = torch.ones(x.shape, dtype=torch.bool, device=x.device)
            for i, s in enumerate(self.here):
                place = found[i, s.at : s.at + s.length]
                place.copy_(self._of([s.draws.take(place.numel())], place.shape, p))
            return found
        if len(x) == len(self.here) and (x.ndim == 2 or x.shape[1] == 1):  # a vector of each row
            return self._of([s.draws.take(x[0].numel()) for s in self.here], x.shape, p)
        raise TypeError(
            f"dropout of a tensor {tuple(x.shape)}: it is not told which of its entries are of which of the "
            f"{len(self.here)} rows of this batch"
        )

    def _pairs(self, x: Tensor, p: float) -> Tensor:
        """Of probabilities (N, heads, T, T): those of a row's tokens for each other."""
        found = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        for i, s in enumerate(self.here):
            n, own = (0 if self.width is None else i), slice(s.at, s.at + s.length)
            shape = x.shape[1], s.length, s.length
            found[n, :, own, own] = self._of([s.draws.take(math.prod(shape))], shape, p)
        return found

    def _some(self, x: Tensor, p: float) -> Tensor:
        """Of probabilities (n, heads, L, L) of the next n rows of the flat batch, which all have L tokens: an attention
        that takes rows by their lengths goes through all of them in turn."""
        mine = self.here[self._next : self._next + len(x)]
        if len(mine) != len(x) or any(s.length != x.shape[2] for s in mine):
            raise TypeError(f"dropout of probabilities {tuple(x.shape)}: it is not told which rows' these are")
        self._next = (self._next + len(x)) % len(self.here)
        return self._of([s.draws.take(x[0].numel()) for s in mine], x.shape, p)

    @staticmethod
    def _of(drawn: Sequence[Tensor], shape: Sequence[int], p: float) -> Tensor:
        """Which entries of a tensor of this shape these numbers keep."""
        return stays(drawn[0] if len(drawn) == 1 else torch.cat(list(drawn)), p).view(tuple(shape))

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Within, dropout of adapters and of the base draws from these streams.  Raises RuntimeError where something
        else of the model has drawn from the global generator: rows would depend on each other."""
        before = torch.get_rng_state()
        with drawing(self), Streamed(self):
            yield
        if not torch.equal(before, torch.get_rng_state()):
            raise RuntimeError(
                "the model draws random numbers that are no dropout (noise in a router, layers that are left out by "
                "chance): what a job gets would depend on the jobs beside it. Train such jobs one by one"
            )


class Streamed(TorchFunctionMode):
    """Turns torch's dropouts into those of streams."""

    def __init__(self, streams: Streams):
        super().__init__()
        self.streams = streams

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in PLAIN:
            return self._plain(func, args, named)
        if func is F.scaled_dot_product_attention:
            asked = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            asked |= named
            if asked.get("dropout_p", 0.0) > 0:
                return self._attention(**asked)
        if func in OTHERS and (args[2] if len(args) > 2 else named.get("training", func is not F.alpha_dropout)):
            raise TypeError(f"{func.__name__} is no dropout of single entries: train the jobs of this model one by one")
        return func(*args, **named)

    def _plain(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        asked: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
        names = ("input", "p", "training", "inplace") if func is F.dropout else ("input", "p", "train")
        asked |= dict(zip(names, args, strict=False)) | named
        x, p = asked["input"], asked["p"]
        if not asked.get("train", asked["training"]) or p == 0:
            return x
        return x * 0.0 if p == 1 else self.streams.drop(x, p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
        return self.streams.drop(scores.softmax(-1), dropout_p) @ value
