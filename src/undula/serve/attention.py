"""Attention over a paged cache in which each request of a flat batch attends to its own keys alone.

transformers' continuous batching multiplies every query with the keys of all requests and masks most of them ("sdpa"):
its cost per step grows with the square of the requests.  Here it is their sum.  What a step needs to know of the cache
is told once, by a `Plan`, for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.extras import needs

NAME = "undula_by_request"  # of this function among transformers' attentions

NEAR = 2**18  # numbers of gathered keys: 1 MB in float32, as many of values


@dataclass(frozen=True)
class Stretch:
    """Where one request's tokens stand in a flat batch: `past` of its tokens are in the cache, `new` are in the batch
    from `at` on."""

    at: int
    new: int
    past: int


@dataclass(frozen=True)
class Decoded:
    """Requests of one new token each, with similarly many keys: one product.  rows (R, L): where in the cache each
    one's keys are, padded to the longest; mask (R, 1, 1, L), None where all have equally many."""

    at: Tensor
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A prompt or a part of one.  rows: where in the cache its earlier keys are, None where there are none; mask
    (new, keys), None: each token sees itself and all before it."""

    span: slice
    rows: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Layers:
    """The plan of those layers that share one form of cache."""

    write: Tensor
    decoded: tuple[Decoded, ...]
    chunks: tuple[Chunk, ...]


class Plan:
    """What the attention of one step reads and writes, for all layers of a model."""

    def __init__(self, cache: Any, stretches: Sequence[Stretch], rows: Sequence[tuple[list[int], list[int]]]):
        """rows: for each kind of layers where the batch's tokens are written, and where each request's earlier keys are
        read, in turn."""
        self.cache, self.called = cache, 0
        kinds = cache.cache_allocators.values()
        self.kinds = [self._layers(kind, stretches, *r) for kind, r in zip(kinds, rows, strict=True)]

    def _layers(self, kind: Any, stretches: Sequence[Stretch], write: list[int], read: list[int]) -> Layers:
        device, window = self.cache.device, getattr(kind, "sliding_window", None)
        write_to, read_from = (torch.tensor(t, device=device, dtype=torch.long) for t in (write, read))
        decoded, chunks, first = [], [], 0
        width = kind.num_key_value_heads * kind.head_dim
        for s in stretches:
            kept = s.past if window is None else min(s.past, window - 1)
            if s.new == 1 and s.past:
                decoded.append((kept, first, s.at))
            else:
                rows = read_from[first : first + kept] if kept else None
                chunks.append(Chunk(slice(s.at, s.at + s.new), rows, _band(s.new, kept, window, device)))
            first += kept
        return Layers(write_to, tuple(self._decoded(decoded, read_from, write_to, width)), tuple(chunks))

    def _decoded(
        self, decoded: list[tuple[int, int, int]], read: Tensor, write: Tensor, width: int
    ) -> Iterator[Decoded]:
        """Groups in which nobody is padded to more than twice its keys: the cost stays that of their sum.  On a CPU
        they are small enough that what is gathered of the cache is still near when it is multiplied."""
        decoded.sort(reverse=True)
        while decoded:
            longest = decoded[0][0]
            most = len(decoded) if read.device.type != "cpu" else max(1, NEAR // ((longest + 1) * width))
            group = [d for d in decoded[:most] if 2 * d[0] >= longest]
            decoded = decoded[len(group) :]
            kept, first, at = torch.tensor(group, device=read.device).unbind(1)
            place = torch.arange(longest, device=read.device)
            past = read[torch.minimum(first[:, None] + place, (first + kept - 1)[:, None])]
            mask = None
            if group[-1][0] != longest:
                hidden = torch.cat([place >= kept[:, None], torch.zeros_like(kept[:, None], dtype=torch.bool)], 1)
                mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=read.device)
                mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
            yield Decoded(at, torch.cat([past, write[at][:, None]], 1), mask)


def _band(new: int, kept: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `kept` earlier keys and of the new ones each of the new tokens sees: those up to itself, of which the
    last `window`."""
    if not kept and (window is None or new <= window):
        return None
    key = torch.arange(kept + new, device=device)
    query = torch.arange(kept, kept + new, device=device)[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def by_request(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling) V of each request, of a flat batch: query (1, heads, T, d), key and value
    (1, key heads, T, d) -> (1, T, heads, d); the new keys and values go into the plan's cache.

    With a softcap c the scores are c tanh(scores / c); with sinks (s_aux, or the module's own) each head has one more
    score that takes its part of the softmax and has no value.
    """
    if plan is None:
        raise RuntimeError("this model is being served: its forward belongs to the engine until that is stopped")
    plan.called += 1
    layer = module.layer_idx
    kind = plan.cache.layer_to_allocator[layer]
    layers = plan.kinds[kind.index]
    keys, values = kind._kv_token_views[layer]
    q, k, v = query[0], key[0].transpose(0, 1), value[0].transpose(0, 1)  # (heads, T, d), (T, key heads, d)
    # a window's cache is a ring: what a chunk sees of it is read before its own tokens overwrite that
    chunks = [(_with_past(keys, c, k), _with_past(values, c, v)) for c in layers.chunks]
    keys.index_copy_(0, layers.write, k)
    values.index_copy_(0, layers.write, v)
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    out = q.new_empty(q.shape[1], q.shape[0], v.shape[-1])
    for c, (mine, its) in zip(layers.chunks, chunks, strict=True):
        y = _attend(q[None, :, c.span], mine, its, c.mask, True, scaling, softcap, sinks)
        out[c.span] = y[0].transpose(0, 1)
    for d in layers.decoded:
        R, L = d.rows.shape
        mine, its = (
            t.index_select(0, d.rows.flatten()).view(R, L, *t.shape[1:]).transpose(1, 2) for t in (keys, values)
        )
        asked = q.index_select(1, d.at).transpose(0, 1)[:, :, None]  # (R, heads, 1, d)
        out.index_copy_(0, d.at, _attend(asked, mine, its, d.mask, False, scaling, softcap, sinks)[:, :, 0])
    return out[None], None


def _with_past(cached: Tensor, chunk: Chunk, new: Tensor) -> Tensor:
    """A chunk's keys or values after those of the cache: (1, key heads, keys, d)."""
    mine = new[chunk.span]
    if chunk.rows is not None:
        mine = torch.cat([cached.index_select(0, chunk.rows), mine])
    return mine.transpose(0, 1)[None]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q (R, heads, n, d), k and v (R, key heads, m, d) -> (R, heads, n, d); `causal` counts where there is no mask."""
    R, heads, n, d = q.shape
    groups = heads // k.shape[1]
    if softcap is None and sinks is None:
        if n == 1:  # the queries of one key head stand beside each other: no key is repeated
            y = F.scaled_dot_product_attention(q.reshape(R, -1, groups, d), k, v, attn_mask=mask, scale=scale)
            return y.reshape(R, heads, 1, -1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=groups > 1
        )
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and n > 1:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(R, -1, n, 1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


@contextlib.contextmanager
def attending(configs: Sequence[Any]) -> Iterator[None]:
    """Within, the models of these configs attend by request; after it they are what they were."""
    before = [c._attn_implementation for c in configs]
    for c in configs:
        c._attn_implementation = NAME
    try:
        yield
    finally:
        for c, name in zip(configs, before, strict=True):
            c._attn_implementation = name


@needs("hf")
def register() -> None:
    """Makes `by_request` known to transformers under its own name; "sdpa" and others stay what they are."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, by_request)
