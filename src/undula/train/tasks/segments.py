"""Attention of rows that stand behind each other in one: each is attended to by itself, in its own length.

A mask over the whole row would have tokens x tokens entries, most of them hidden, and all would be multiplied.  Here a
model's mask code is asked for the mask of each segment, and its own attention (sdpa or eager, with its windows, soft
caps, sinks and grouped heads) is called for each group of segments of one length.  So what a model does within a row
is done by its own code; what holds for packed rows alone is here.

    with kept_apart(model):                  the model's attention asks whether there are segments; else it is its own
        with segments((7, 3, 3)):            of this one row of 13 tokens
            model(input_ids=..., position_ids=..., use_cache=False)
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import attention as kernel
from ...kernels.holes import few

LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)  # of the segments of the forward
PREFIX = "undula_segments_"  # of the names of these attentions among transformers': the model's own follows
KNOWN = ("sdpa", "eager")
LOCK = threading.RLock()
HELD: Counter[int] = Counter()  # how many are at a configuration, by its id


@contextlib.contextmanager
def segments(lengths: Sequence[int] | None) -> Iterator[None]:
    """Within, a forward is of one row, of segments of these lengths; None: of rows as they are."""
    token = LENGTHS.set(None if lengths is None else tuple(lengths))
    try:
        yield
    finally:
        LENGTHS.reset(token)


@dataclass(frozen=True)
class Group:
    """`count` segments of `length` tokens each, from `at` on.  mask: (count, 1, length, length), as the model's own
    attention takes it; causal, full: whether it hides what is later and nothing else, or nothing."""

    at: int
    count: int
    length: int
    mask: Tensor
    causal: bool
    full: bool

    def of(self, x: Tensor) -> Tensor:
        """Its part of (1, heads, tokens, d), as (count, heads, length, d)."""
        part = x[0, :, self.at : self.at + self.count * self.length]
        return part.unflatten(1, (self.count, self.length)).transpose(0, 1)

    def hides(self, module: nn.Module, said: bool | None) -> Tensor | None:
        """The mask, or None where this module's attention makes it by itself."""
        return None if (self.causal if _causal(module, said) else self.full) else self.mask


def _causal(module: nn.Module, said: bool | None) -> bool:
    """Whether this module's attention hides what is later, where there is no mask."""
    return bool(getattr(module, "is_causal", True) if said is None else said)


@dataclass(frozen=True)
class Groups:
    """What stands for the mask of a row of segments."""

    members: tuple[Group, ...]


def masks(own: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """The mask function of such an attention; `own`: that of the model's."""

    def made(*, batch_size: int, q_length: int, kv_length: int, **given: Any) -> Tensor | Groups | None:
        lengths = LENGTHS.get()
        if lengths is None:
            return own(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **given)
        if (batch_size, q_length, kv_length) != (1, sum(lengths), sum(lengths)):
            raise RuntimeError(
                f"a row of segments of {sum(lengths)} tokens in all has a mask for {batch_size} rows of {q_length} "
                f"tokens that see {kv_length}: this model cannot be trained on packed rows. Leave packing out"
            )
        given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "batch_size": 1}
        blocks, at = [], 0
        for n in lengths:
            blocks.append(own(q_length=n, kv_length=n, **given | {"q_offset": at, "kv_offset": at}))
            at += n
        return _grouped(lengths, blocks)

    return made


def _grouped(lengths: Sequence[int], blocks: Sequence[Any]) -> Groups:
    """Neighbours of one length together, with what their masks are."""
    found, at, first = [], 0, 0
    parts = [(n, len(list(same))) for n, same in groupby(lengths)]
    for n, count in parts:
        mask = torch.cat([b.expand(1, -1, n, n) for b in blocks[first : first + count]])
        kind = [(mask == mask.new_ones(n, n).tril()).all(), mask.all()] if mask.dtype == torch.bool else []
        found.append((at, count, n, mask, kind))
        at, first = at + n * count, first + count
    told = torch.stack([flag for *_, kind in found for flag in kind]).tolist() if any(f[-1] for f in found) else []
    flags = iter(told)
    return Groups(tuple(
        Group(at, count, n, mask, next(flags) if kind else False, next(flags) if kind else False)
        for at, count, n, mask, kind in found
    ))  # fmt: skip


def attention(own: Callable[[nn.Module], Callable[..., Any]], fused: bool = False) -> Callable[..., Any]:
    """Such an attention; `own`: the model's, of one of its modules.  fused: the model's computes softmax(s q k') v with
    dropout, so that all rows may be computed at once."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        call = own(module)
        if not isinstance(attention_mask, Groups):
            if LENGTHS.get() is not None:
                raise RuntimeError(
                    f"{type(module).__name__} attends by a mask of its own, which says nothing of segments: this model "
                    "cannot be trained on packed rows. Leave packing out"
                )
            return call(module, query, key, value, attention_mask, *args, **given)
        if fused and not args and (y := _at_once(module, query, key, value, attention_mask, given)) is not None:
            return y, None
        found = []
        for group in attention_mask.members:
            mask = group.hides(module, given.get("is_causal"))
            y, _ = call(module, *(group.of(x) for x in (query, key, value)), mask, *args, **given)
            found.append(y.flatten(0, 1))  # (count, length, heads, d)
        return torch.cat(found)[None], None

    return attend


OTHERWISE = ("softcap", "position_bias", "cache", "output_attentions")  # what is said of another attention


def _at_once(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, groups: Groups, given: Mapping[str, Any]
) -> Tensor | None:
    """(1, tokens, heads, d), the answer to all rows, where what they see is what is before them, or all; else None."""
    said, rate, scale = given.get("is_causal"), given.get("dropout", 0.0), given.get("scaling")
    if any(group.hides(module, said) is not None for group in groups.members):
        return None
    if any(given.get(name) is not None and given[name] is not False for name in OTHERWISE):
        return None
    if not kernel.applies(query, key, value) or (rate and not few(query, rate)):
        return None
    lengths = [group.length for group in groups.members for _ in range(group.count)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return kernel.attended(query, key, value, lengths, scale, _causal(module, said), rate)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file in which a module's forward is written, or the forward that it goes on with.
    Raises RuntimeError where there is none."""
    for kind in type(module).__mro__:
        written = inspect.unwrap(kind.__dict__.get("forward", _eager))
        found = getattr(written, "__globals__", {}).get("eager_attention_forward")
        if found is not None:
            return found
    raise RuntimeError(f"no eager attention is known of {type(module).__name__}. Leave packing out")


def _register() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]  # transformers', or what someone put in its place
    for name, call, fused in (("sdpa", lambda module: sdpa, sdpa is sdpa_attention_forward), ("eager", _eager, False)):
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, attention(call, fused))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, masks(ALL_MASK_ATTENTION_FUNCTIONS[name]))


def served(model: nn.Module) -> bool:
    """Whether the attention of each part of the model is one that can be asked so."""
    names = {getattr(config, "_attn_implementation", None) for config in _configs(model)}
    return bool(names) and names <= {*KNOWN, *(PREFIX + name for name in KNOWN)}


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "model_type")}
    return list(found.values())


@contextlib.contextmanager
def kept_apart(model: nn.Module) -> Iterator[None]:
    """Within, `segments` hold for this model; a forward outside of them is what it was.  Of models that share a
    configuration, as in several threads, the last to end puts back what it said."""
    with LOCK:
        _register()
        own = [(config, config._attn_implementation.removeprefix(PREFIX)) for config in _configs(model)]
        for config, name in own:
            config._attn_implementation = PREFIX + name
        HELD.update(id(config) for config, _ in own)
    try:
        yield
    finally:
        with LOCK:
            HELD.subtract(id(config) for config, _ in own)
            for config, name in own:
                if not HELD[id(config)]:
                    del HELD[id(config)]
                    config._attn_implementation = name
