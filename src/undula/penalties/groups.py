"""Which numbers of an adapter are switched off together.

A `Groups` gives every trained number of an adapter that it concerns one group; `grouped` computes with them.  A group
is told by numbers alone, an index for each factor that broadcasts over it: of a rank (1, R) over B (O, R) and (R, 1)
over A (R, I), so that norms of all groups are one pass over the adapter.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.ranges import Rank
from ..host.where import inner
from .grouped import Grouped, Part
from .penalty import trained_factors

Numbered = Iterator[tuple[str, Tensor, Tensor, list[str]]]  # (site, factor, index within this turn, names)


class Groups(Choice):
    """What one group is."""

    def of(self, model: nn.Module, adapter: Adapter) -> Grouped:
        """The groups of an adapter on its model.  Raises TypeError for methods that have no such groups, with their
        rung; ValueError where sites share a factor that would lie in several groups."""
        numbers: dict[str, int] = {}
        parts: dict[int, Part] = {}
        for site, t, index, names in self.numbered(inner(model), adapter):
            at = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], device=t.device)
            made = Part(t, at[index.to(t.device)])
            other = parts.setdefault(id(t), made)
            if not torch.equal(other.index, made.index):
                raise ValueError(
                    f"{site} shares a factor with other sites, which {self!r} puts into several groups: take "
                    "groups that hold all of its sites, or a method whose sites have factors of their own"
                )
        if not parts:
            raise ValueError(f"{self!r} finds no trained factor in this adapter: there is nothing to penalise")
        return Grouped.of(tuple(parts.values()), tuple(numbers))

    @abc.abstractmethod
    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        """(site, factor, index into names, names of groups) of every factor that lies in groups."""


def _whole(t: Tensor) -> Tensor:
    """The index of a factor that lies in one group."""
    return torch.zeros([1] * t.ndim, dtype=torch.long)


def _along(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """An index along one dimension of a factor."""
    return index.view([-1 if d == dim % t.ndim else 1 for d in range(t.ndim)])


def pairs(adapter: Adapter, what: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(site, B (O, R), A (R, I)) of the live factors.  Raises TypeError for a method whose update is not s B A of two
    factors as they are."""
    for site, f in adapter.factors.items():
        method = adapter.methods[site]
        plain = getattr(method, "plain", lambda: None)()
        if plain is None:
            raise TypeError(
                f"{what!r} needs factors B and A with dW = s B A (LoRA); {method!r} at {site} stands on the rung "
                f"{method.rung()} and has {', '.join(f)}"
            )
        yield site, f[plain[1]], f[plain[2]]


def block_of(site: str) -> str:
    """The block of a model that a site lies in: its name up to the first number, and those that follow at once; a site
    without a number is its own."""
    found = re.match(r"(?:.*?\.)??\d+(?:\.\d+)*(?=\.|$)", site)
    return found.group() if found else site


@Groups.register
@dataclass(frozen=True)
class Blocks(Groups):
    """All factors in one block of the model (`encoder.layer.3`), as GS-LoRA has it."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, _, t in trained_factors(adapter):
            yield site, t, _whole(t), [block_of(site)]


@Groups.register
@dataclass(frozen=True)
class Adapters(Groups):
    """All factors of one site."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, _, t in trained_factors(adapter):
            yield site, t, _whole(t), [site]


@Groups.register
@dataclass(frozen=True)
class Matrices(Groups):
    """One factor of one site."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, name, t in trained_factors(adapter):
            yield site, t, _whole(t), [f"{site}.{name}"]


@Groups.register
@dataclass(frozen=True)
class Ranks(Groups):
    """One rank of one site: column j of B with row j of A."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, B_OR, A_RI in pairs(adapter, self):
            index = torch.arange(A_RI.shape[0])
            names = [f"{site}[{j}]" for j in range(A_RI.shape[0])]
            for t, dim in ((B_OR, 1), (A_RI, 0)):
                if t.requires_grad:
                    yield site, t, _along(t, dim, index), names


@Groups.register
@dataclass(frozen=True)
class Filters(Groups):
    """One output of a layer (a convolution's filter): row i of B.  A row of zeros leaves that output the base's."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, B_OR, _ in _trained_B(adapter, self):
            names = [f"{site}[{i}]" for i in range(B_OR.shape[0])]
            yield site, B_OR, _along(B_OR, 0, torch.arange(B_OR.shape[0])), names


@Groups.register
@dataclass(frozen=True)
class Heads(Groups):
    """One head of an attention's outputs (query, key, value): `size` rows of B; None: as the model's configuration
    says.  Other layers are named in `where`, not here: a site of no multiple of `size` is refused."""

    size: Rank | None = None

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        size = head_size(model, self) if self.size is None else self.size
        for site, B_OR, _ in _trained_B(adapter, self):
            index = torch.arange(B_OR.shape[0]) // pieces(site, B_OR, size, self)
            yield site, B_OR, _along(B_OR, 0, index), [f"{site}[{h}]" for h in range(B_OR.shape[0] // size)]


@Groups.register
@dataclass(frozen=True)
class HeadRanks(Groups):
    """One rank in one head: column j of B cut into pieces of `size` rows; None: of a head, by the model's
    configuration."""

    size: Rank | None = None

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        size = head_size(model, self) if self.size is None else self.size
        for site, B_OR, _ in _trained_B(adapter, self):
            O, R = B_OR.shape
            index = torch.arange(O)[:, None] // pieces(site, B_OR, size, self) * R + torch.arange(R)
            yield site, B_OR, index, [f"{site}[{h}, {j}]" for h in range(O // size) for j in range(R)]


@Groups.register
@dataclass(frozen=True)
class Gates(Groups):
    """One number of a trained gate, which switches a rank of a site off: S2-LoRA's e, SoRA's g."""

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        for site, f in adapter.factors.items():
            name = adapter.methods[site].undropped().gate
            if name is None or not f[name].requires_grad:
                raise TypeError(f"{self!r} needs a gate that trains, and {adapter.methods[site]!r} at {site} has none")
            count = len(f[name])
            yield site, f[name], torch.arange(count), [f"{site}[{j}]" for j in range(count)]


@Groups.register
@dataclass(frozen=True)
class Entries(Groups):
    """Every number by itself."""

    def of(self, model: nn.Module, adapter: Adapter) -> Grouped:
        """Numbered without a name for each."""
        parts, first, names = {}, 0, []
        for site, name, t in trained_factors(adapter):
            if id(t) not in parts:
                parts[id(t)] = Part(t, torch.arange(first, first + t.numel(), device=t.device).view(t.shape))
                first += t.numel()
                names.append(f"{site}.{name}")
        if not parts:
            raise ValueError(f"{self!r} finds no trained factor in this adapter: there is nothing to penalise")
        kind = torch.promote_types(next(iter(parts.values())).tensor.dtype, torch.float32)
        sizes = torch.ones(first, dtype=kind, device=next(iter(parts.values())).tensor.device)
        return Grouped(tuple(parts.values()), sizes, tuple(names))

    def numbered(self, model: nn.Module, adapter: Adapter) -> Numbered:
        raise NotImplementedError("see `of`")


def _trained_B(adapter: Adapter, what: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    for site, B_OR, A_RI in pairs(adapter, what):
        if not B_OR.requires_grad:
            raise TypeError(f"{what!r} switches rows of B off, and that of {adapter.methods[site]!r} does not train")
        yield site, B_OR, A_RI


def pieces(site: str, B_OR: Tensor, size: int, what: Any) -> int:
    """`size`.  Raises ValueError where a site's outputs are no multiple of it."""
    if B_OR.shape[0] % size:
        raise ValueError(
            f"{what!r} cuts outputs into heads of {size}, and {site} has {B_OR.shape[0]}: adapt the layers of heads "
            "alone (where), or name the size that fits"
        )
    return size


def head_size(model: nn.Module, what: Any) -> int:
    """The size of an attention head, by the model's configuration.  Raises ValueError where it does not say."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    size, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(size, int) and isinstance(hidden, int) and isinstance(heads, int) and heads:
        size = hidden // heads
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{what!r}: {type(model).__name__} does not say how large its heads are; say it: size=64")
    return size
