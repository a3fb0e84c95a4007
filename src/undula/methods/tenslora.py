"""TensLoRA (Marmoret, Bensaid, Lys, Gripon, Leduc-Primeau 2025, arXiv:2509.19391, ICASSP 2026).

The updates of several matrices are stacked into a tensor with the modes inputs, outputs, and, where they are stacked,
heads, kinds (query, key, value) and depth; the tensor is factorised.  A site is a slice of it:

    Tucker  dW[(q, j), i] = s sum_abcde G[a, b, c, d, e] A[i, a] B[j, b] H[q, c] K[kind, d] L[layer, e]
    CP      dW[(q, j), i] = s sum_a                      A[i, a] B[j, a] H[q, a] K[kind, a] L[layer, a]

The seven stackings are `Att`, `QKV`, `Depth`, `AttQKV`, `AttDepth`, `QKVDepth`, `AttQKVDepth`; what is not stacked gets
tensors of its own, one for each layer or kind.  The small modes are sliced first: no tensor is ever made.  Tucker
starts with G = 0 and orthogonal factors, CP with A = 0 and the others uniform within 1/sqrt(r).

The paper's matrices are square projections of attention, (inputs, outputs).  Here they are (O, I) of any shape, each
shape with tensors of its own, and the kinds are those that occur at that shape: this extends the paper.  Heads are
contiguous parts of the outputs, as attention has them; the official code unfolds them interleaved (output j h + q).
Its dropout inside the tensor is left out: see `Dropout`.

A site has its own rows of K and L only, each a tensor that it shares with the sites of that kind or layer.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, LowRank, Site
from ..core.ranges import Count, NotZero, Rank
from ._stacks import by_head, divisor, place, places

Modes = Mapping[str, int]  # of a factor: its length at one site, or its rank


class Stacking(Choice):
    """Which modes are stacked besides inputs and outputs."""

    heads: ClassVar[bool] = False
    kinds: ClassVar[bool] = False
    depth: ClassVar[bool] = False

    def modes(self, O: int, I: int, heads: int) -> dict[str, int]:
        """Rows of the factors A, B, H, K, L at one site; of K and L it has one."""
        h = divisor(O, heads) if self.heads else 1
        every = {"A": (True, I), "B": (True, O // h), "H": (self.heads, h), "K": (self.kinds, 1), "L": (self.depth, 1)}
        return {name: rows for name, (stacked, rows) in every.items() if stacked}


@Stacking.register
@dataclass(frozen=True)
class Att(Stacking):
    """Heads: a tensor for every matrix."""

    heads = True


@Stacking.register
@dataclass(frozen=True)
class QKV(Stacking):
    """Kinds of matrix: a tensor for every layer."""

    kinds = True


@Stacking.register
@dataclass(frozen=True)
class Depth(Stacking):
    """Layers: a tensor for every kind."""

    depth = True


@Stacking.register
@dataclass(frozen=True)
class AttQKV(Stacking):
    """Heads and kinds: a tensor for every layer."""

    heads = kinds = True


@Stacking.register
@dataclass(frozen=True)
class AttDepth(Stacking):
    """Heads and layers: a tensor for every kind."""

    heads = depth = True


@Stacking.register
@dataclass(frozen=True)
class QKVDepth(Stacking):
    """Kinds and layers: one tensor."""

    kinds = depth = True


@Stacking.register
@dataclass(frozen=True)
class AttQKVDepth(Stacking):
    """Heads, kinds and layers: one tensor."""

    heads = kinds = depth = True


class Factorisation(Choice):
    """How the tensor is written, and where that begins."""

    @abc.abstractmethod
    def ranks(self, r: int, modes: Modes) -> dict[str, int]:
        """The rank of each mode."""

    @abc.abstractmethod
    def numbers(self, r: int, modes: Modes) -> int:
        """How many numbers it has, the factors having these rows."""

    @abc.abstractmethod
    def draw(self, site: Site, name: str, rows: int, rank: int) -> Tensor:
        """The factor `name` at the start: (rows, rank)."""

    def core(self, ranks: Modes) -> tuple[int, ...] | None:
        """The shape of the core, which starts at 0, where there is one."""
        return None

    @abc.abstractmethod
    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        """(B (O, R), A (R, I)) of the slice, K and L being rows."""


@Factorisation.register
@dataclass(frozen=True)
class Tucker(Factorisation):
    """A rank for each mode and a core.  That of the inputs is the method's r; that of the outputs too, where
    `r_outputs` is None.  Ranks above a mode's length are allowed and gain nothing."""

    r_outputs: Rank | None = None
    r_heads: Rank = 4
    r_kinds: Rank = 3
    r_depth: Rank = 4

    def ranks(self, r: int, modes: Modes) -> dict[str, int]:
        every = {"A": r, "B": self.r_outputs or r, "H": self.r_heads, "K": self.r_kinds, "L": self.r_depth}
        return {name: every[name] for name in modes}

    def numbers(self, r: int, modes: Modes) -> int:
        ranks = self.ranks(r, modes)
        return sum(rows * ranks[name] for name, rows in modes.items()) + math.prod(ranks.values())

    def draw(self, site: Site, name: str, rows: int, rank: int) -> Tensor:
        return torch.nn.init.orthogonal_(site.zeros(rows, rank))

    def core(self, ranks: Modes) -> tuple[int, ...]:
        return tuple(ranks.values())

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        core = f["G"]
        for name in ("L", "K"):  # from the last mode on
            if name in f:
                core = core @ f[name]
        if "H" not in f:
            return f["B"] @ core.T, f["A"].T
        return torch.einsum("jb,abq->qja", f["B"], core @ f["H"].T).flatten(0, 1), f["A"].T


@Factorisation.register
@dataclass(frozen=True)
class CP(Factorisation):
    """One rank for all modes, no core: Tucker with the identity as its core."""

    def ranks(self, r: int, modes: Modes) -> dict[str, int]:
        return dict.fromkeys(modes, r)

    def numbers(self, r: int, modes: Modes) -> int:
        return r * sum(modes.values())

    def draw(self, site: Site, name: str, rows: int, rank: int) -> Tensor:
        return site.uniform(rows, rank, bound=0.0 if name == "A" else rank**-0.5)

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        B_OR = f["B"]
        for name in ("K", "L"):
            if name in f:
                B_OR = B_OR * f[name]
        return by_head(f["H"], B_OR) if "H" in f else B_OR, f["A"].T


@dataclass(frozen=True)
class TensLoRA(LowRank):
    """W' = W + a slice of a factorised tensor of stacked updates."""

    formula = "W' = W + s T[layer, kind], T = G x1 A x2 B x3 H x4 K x5 L (Tucker), those of the modes that are stacked"
    parameters = "factorisation.numbers(r, stacking.modes(O, I, heads))"
    source = "Marmoret et al. 2025, arXiv:2509.19391"

    r: Rank = 8
    scale: NotZero = 1.0
    heads: Count = 12  # attention heads of the model
    stacking: Stacking = QKVDepth()
    factorisation: Factorisation = Tucker()

    def init(self, site: Site) -> dict[str, Tensor]:
        stacked, here, peers = self.stacking, place(site.name), places(site)
        modes = stacked.modes(*site.shape, self.heads)
        ranks, draw = self.factorisation.ranks(self.r, modes), self.factorisation.draw
        # the sites that share a tensor, and all that they share, are known by this
        tensor = (self, site.shape, None if stacked.depth else here.layer, None if stacked.kinds else here.kind)

        def once(*key: str | int, make: Callable[[], Tensor]) -> Tensor:
            return site.once((*tensor, *key), lambda: make().requires_grad_())

        def row(name: str, mine: str | int, every: set[str] | set[int]) -> Tensor:
            """One row of a factor whose rows are drawn together: what is orthogonal is its columns."""
            among = sorted(every)
            factor = site.once((*tensor, name, tuple(among)), lambda: draw(site, name, len(among), ranks[name]))
            return once(name, mine, make=factor[among.index(mine)].clone)

        f = {n: once(n, make=partial(draw, site, n, modes[n], ranks[n])) for n in modes if n in "ABH"}
        if stacked.kinds:
            f["K"] = row("K", here.kind, {p.kind for p in peers if stacked.depth or p.layer == here.layer})
        if stacked.depth:
            f["L"] = row("L", here.layer, {p.layer for p in peers if stacked.kinds or p.kind == here.kind})
        core = self.factorisation.core(ranks)
        return f if core is None else {**f, "G": once("G", make=lambda: site.zeros(*core))}

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        B_OR, A_RI = self.factorisation.pair(f)
        return self.scale * B_OR, A_RI
