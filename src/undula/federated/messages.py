"""What travels between a server and its clients: named arrays of the numbers that train, and counts; nothing else.

    "layer.factor", "name"    a factor, a parameter in full      in its own type (bfloat16 as float32)
    "packed"                  of FLASC: all of them in one       uint8, see `wire`
    "frozen"                  down only: 32 bytes that tell the factors that stay from others    uint8

Down go the numbers that clients train, and those that the server makes anew (FedSVD's A); up those that clients train.
What is received is checked before anything is made of it: names, types, shapes, that numbers are finite.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.adapter import Adapter
from .aggregation import Aggregation
from .flat import flat, unflat
from .part import WHOLE, Part
from .wire import packed, unpacked

Arrays = dict[str, np.ndarray]
Counts = dict[str, int | float]
PACKED, FROZEN, ROWS = "packed", "frozen", "num-examples"
FAILED, WHY = "failed", "why"  # what a record says of a client that has failed, so no name of a count
MOST = 100  # counts of one client


@dataclass(frozen=True)
class Failure:
    """A client from which nothing came that counts, and why.  kind: "error" (it says so), "absent" (no answer), "late",
    "refused" (what it sent is not what was asked for)."""

    kind: str
    why: str


Reply = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]  # (arrays, counts), as they came


def named(adapter: Adapter) -> dict[str, Tensor]:
    """{name: tensor} of factors and parameters in full, each tensor once, under the first of its names.  Raises
    ValueError where two have one name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in _all(adapter):
        if id(t) in seen:
            continue
        if name in found or name in (PACKED, FROZEN):
            raise ValueError(f"two tensors of this adapter would be called {name!r} in a message")
        found[name] = t
        seen.add(id(t))
    return found


def _all(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for site, factor, t in adapter.tensors():
        yield f"{site}.{factor}", t
    yield from adapter.full.items()


def filled(like: Adapter, numbers: Mapping[str, Tensor]) -> Adapter:
    """A value made as `like` is, with these numbers by their names; what is not among them stays."""
    made = {
        id(t): numbers[name].detach().to(t.dtype, copy=True).requires_grad_(t.requires_grad)
        for name, t in named(like).items()
        if name in numbers
    }
    kept: dict[int, Tensor] = {}

    def of(t: Tensor) -> Tensor:
        if id(t) in made:
            return made[id(t)]
        return kept.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad))

    parts = {f.name: getattr(like, f.name) for f in fields(Adapter)}
    parts["factors"] = {site: {k: of(t) for k, t in f.items()} for site, f in like.factors.items()}
    parts["full"] = {name: of(t) for name, t in like.full.items()}
    return Adapter(**parts)


def taken_over(like: Adapter, made: Adapter) -> Adapter:
    """What an aggregation has made, in the form of the adapter that rounds began with.  Raises TypeError where it is of
    other methods or sizes, with which clients could not go on."""
    for site, method in like.methods.items():
        if made.methods[site] != method or any(
            made.factors[site][k].shape != t.shape for k, t in like.factors[site].items()
        ):
            raise TypeError(
                f"{site} would become {made.methods[site]!r}, and clients have {method!r} there: rounds go on with one "
                "method. Take FedIT, which averages any, or a method of the aggregation's own kind"
            )
    return filled(like, dict(_all(made)))


def brief(
    adapter: Adapter, how: Aggregation, base: str = "", part: Part = WHOLE, first: Adapter | None = None
) -> Arrays:
    """What goes down to clients of the server's adapter, of those that have a part of it the part; `base` tells its
    base model from others, `first` is what the rounds began with (without: the adapter)."""
    first = adapter if first is None else first
    numbers = part.of(how.told(adapter, first))
    told = {FROZEN: np.frombuffer(digest(part.of(first), how, base), np.uint8)}
    if how.sparse:
        return {PACKED: np.frombuffer(packed(flat(numbers)), np.uint8), **told}
    return {**{name: array(t) for name, t in _down(numbers, how).items()}, **told}


def briefed(arrays: Any, like: Adapter, how: Aggregation, base: str = "", who: str = "the server") -> Adapter:
    """What a client begins its round with; `like` is its own adapter, made as the server's, as the rounds begin.
    Raises ValueError for what is no brief, and where the factors that stay, or that start, are not the server's."""
    rest = dict(_arrays(arrays, who))
    told = rest.pop(FROZEN, None)
    if how.sparse:
        numbers = _unpacked(rest, like, who)
        made = unflat(like, flat(like) + numbers if how.knows_start else numbers)
    else:
        made = _filled(rest, like, _down(like, how), who)
    if told is None or told.dtype != np.uint8 or told.tobytes() != digest(like, how, base):
        raise ValueError(
            f"{who} has other frozen factors, or another base model: numbers of one mean nothing to the other. Give "
            "all parties the same file, base and version of undula and torch"
        )
    return made


def reply(sent: Adapter, trained: Adapter, how: Aggregation) -> Arrays:
    """What goes up: where a client has come to from what it was sent."""
    answer = how.reply(sent, trained)
    if how.sparse:
        return {PACKED: np.frombuffer(packed(flat(answer) - flat(sent)), np.uint8)}
    return {name: array(t) for name, t in _trains(answer).items()}


def replied(arrays: Any, sent: Adapter, how: Aggregation, who: str) -> Adapter:
    """The client's adapter in what came from it.  Raises ValueError that names the client and the array."""
    found = _arrays(arrays, who)
    if how.sparse:
        return unflat(sent, flat(sent) + _unpacked(found, sent, who))
    return _filled(found, sent, _trains(sent), who)


def _trains(adapter: Adapter) -> dict[str, Tensor]:
    found = {name: t for name, t in named(adapter).items() if t.requires_grad}
    if not found:
        raise ValueError("nothing in this adapter trains, so there is nothing to send")
    return found


def _down(adapter: Adapter, how: Aggregation) -> dict[str, Tensor]:
    return named(adapter) if how.remakes else _trains(adapter)


def digest(adapter: Adapter, how: Aggregation, base: str) -> bytes:
    """32 bytes that tell what is in no message: the base, and the factors that stay, or that start."""
    made, sent = hashlib.sha256(base.encode()), set() if how.knows_start else set(_down(adapter, how))
    for name, t in named(adapter).items():
        if name not in sent:
            made.update(name.encode() + np.ascontiguousarray(array(t)).tobytes())
    return made.digest()


def array(t: Tensor) -> np.ndarray:
    """The numbers of a tensor, as numpy's own."""
    t = t.detach().to("cpu", copy=True)
    return (t.float() if t.dtype == torch.bfloat16 else t).contiguous().numpy()


def size(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of the numbers, without names and frames."""
    return sum(a.nbytes for a in arrays.values())


def counted(counts: Any, who: str, least: int = 1) -> Counts:
    """What a client says of its training: numbers by name, its rows among them.  Raises ValueError."""
    if not isinstance(counts, Mapping) or not all(isinstance(name, str) for name in counts):
        raise ValueError(f"{who} sent no counts: numbers by name, found {counts!r:.80}")
    if len(counts) > MOST or not counts.keys().isdisjoint((FAILED, WHY)):
        raise ValueError(f"{who}: counts are {MOST} at most, none of them {FAILED!r} or {WHY!r}; found {len(counts)}")
    for name, value in counts.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and abs(value) <= sys.float_info.max):  # also of whole numbers that no float holds
            raise ValueError(f"{who}: {name:.80} is a finite number, found {_shown(value)}")
    if not isinstance(rows := counts.get(ROWS), int) or not least <= rows < 1 << 31:
        raise ValueError(f"{who}: {ROWS} is a whole number of rows, {least} or more, found {rows!r:.80}")
    return dict(counts)


def _shown(value: Any) -> str:
    """Whole numbers of thousands of digits Python refuses to write."""
    return "one that no float holds" if isinstance(value, int) and value.bit_length() > 1024 else f"{value!r:.80}"


def _arrays(given: Any, who: str) -> Mapping[str, np.ndarray]:
    if not isinstance(given, Mapping) or not all(
        isinstance(name, str) and isinstance(a, np.ndarray) for name, a in given.items()
    ):
        raise ValueError(f"{who} sent no arrays by name, found {given!r:.80}")
    return given


def _filled(arrays: Mapping[str, np.ndarray], like: Adapter, wanted: Mapping[str, Tensor], who: str) -> Adapter:
    told = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("lacks", sorted(set(wanted) - set(arrays))), ("has", sorted(set(arrays) - set(wanted))))
        if names
    ]
    if told:
        raise ValueError(f"{who} sent other arrays than were asked for: it {' and '.join(told):.400}")
    for name, t in wanted.items():
        a, kind = arrays[name], array(t.flatten()[:1]).dtype
        if a.shape != tuple(t.shape) or a.dtype != kind:
            raise ValueError(f"{who}: {name} is {kind} {tuple(t.shape)}, found {a.dtype!s:.40} {a.shape!s:.80}")
        if bad := int((~np.isfinite(a)).sum()):
            raise ValueError(f"{who}: {bad} of {a.size} numbers in {name} are not finite")
    return filled(like, {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})


def _unpacked(arrays: Mapping[str, np.ndarray], like: Adapter, who: str) -> Tensor:
    """The vector in "packed", in float64."""
    a = arrays.get(PACKED)
    if set(arrays) != {PACKED} or a is None or a.ndim != 1 or a.dtype != np.uint8:
        raise ValueError(f"{who}: one array {PACKED!r} of bytes was asked for, found {', '.join(arrays):.200}")
    try:
        return unpacked(a.tobytes(), sum(t.numel() for t in _trains(like).values())).double()
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
