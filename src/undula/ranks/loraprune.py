"""LoRAPrune (Zhang, Chen, Shen, Yang, Ou, Yu, Zhuang 2023, arXiv:2305.18403, ACL Findings 2024): the base is pruned
while an adapter on it trains, by what the adapter's gradients tell.

    Ghat = g_B A + B g_A - g_B g_A        the change of B A under an SGD step of rate 1, up to its sign
    I    = |Ghat * (W + s B A)|           per entry; no gradient of W is needed

I is summed over each structure (an attention head, a channel of the FFN: rows of some matrices, columns of the one that
reads them), divided by the norm over all structures of a matrix, summed over the matrices that go together, and
averaged over updates: score <- 0.9 score + 0.1 new.  Ghat is as in the authors' code, without the scale and the
learning rate.  Every `every` updates the lowest structures of each layer are closed, up to

    sparsity(t) = s (1 - (1 - (t - 0.1 T) / 0.8 T)^3),   0 before 0.1 T, s from 0.9 T on

What is closed stays closed.  The mask stands on the inputs of the matrix that reads the structures (`Masked`), which is
the function that the smaller model has.

Two things are this project's: each layer loses the same number of structures, the first and the last too (the authors
spare those), since the configuration of a plain transformer says one number for all; and `sparsity` is the share of the
entries of these matrices, heads taking what whole heads can and channels the rest (the authors take that share of each
kind, which for three groups of heads and 20 % is none).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import Choice
from ..core.method import LowRank, Method
from ..core.ranges import Count, Range, Seed
from ..host import quantised
from ..host.coupled import HEADS, KINDS, Coupled, coupled, resized
from ..host.host import change
from ..kernels import frozen
from ..methods.masked import Masked
from .allocator import Allocator
from .procedure import Course, Place, Quality
from .surgery import live_layers

KEPT = 0.9  # of a score, at each update
BEGINS, ENDS = 0.1, 0.9  # of all updates: when the first structure may go, and when the last has gone
TINY = 1e-8


def ghat(B_OR: Tensor, A_RI: Tensor, gB_OR: Tensor, gA_RI: Tensor) -> Tensor:
    """g_B A + B g_A - g_B g_A (O, I) = B A - (B - g_B)(A - g_A)."""
    return torch.cat([gB_OR, B_OR], 1) @ torch.cat([A_RI - gA_RI, gA_RI])


def sparsity_at(step: int, steps: int, final: float) -> float:
    """The share that is gone after `step` of `steps` updates: 0 at a tenth of them, `final` at nine tenths."""
    through = min(max((step - BEGINS * steps) / ((ENDS - BEGINS) * steps), 0.0), 1.0)
    return final * (1 - (1 - through) ** 3)


@dataclass(frozen=True)
class Matrix:
    """One matrix among those that go together, as a score sees it."""

    W: Tensor  # (O, I), frozen
    place: Place | None  # the adapter there

    def parts(self) -> tuple[float, Tensor, Tensor] | None:
        """(s, B, A) of the adapter."""
        if self.place is None:
            return None
        method = inner_of(self.place.method)
        s, B, A = method.plain() or (1.0, "B", "A")
        return s, self.place.f[B], self.place.f[A]

    def now(self) -> Tensor:
        """W + s B A."""
        found = self.parts()
        return self.W if found is None else torch.addmm(self.W.to(found[1].dtype), found[1], found[2], alpha=found[0])


class Scores(Choice):
    """How much the structures of one layer matter: the lowest go first."""

    @abc.abstractmethod
    def __call__(self, part: Coupled, matrices: Mapping[str, Matrix]) -> Tensor:
        """A number (count) per structure, from the matrices by name, their gradients being there."""


@Scores.register
@dataclass(frozen=True)
class Gradients(Scores):
    """The paper's: |Ghat * (W + s B A)|, over the matrices that an adapter trains on."""

    def __call__(self, part: Coupled, matrices: Mapping[str, Matrix]) -> Tensor:
        return _summed(part, {name: found for name, m in matrices.items() if (found := _importance(m)) is not None})


@Scores.register
@dataclass(frozen=True)
class Magnitude(Scores):
    """For comparison: |W + s B A|, which no data speak in."""

    def __call__(self, part: Coupled, matrices: Mapping[str, Matrix]) -> Tensor:
        return _summed(part, {name: m.now().abs() for name, m in matrices.items()})


@Scores.register
@dataclass(frozen=True)
class Random(Scores):
    """For comparison: numbers that (seed, layer, kind) alone determine."""

    seed: Seed = 0

    def __call__(self, part: Coupled, matrices: Mapping[str, Matrix]) -> Tensor:
        device = next(iter(matrices.values())).W.device
        return 1 + frozen.uniform(self.seed, ("prune", part.kind, part.layer), (part.count,), device)


def _importance(m: Matrix) -> Tensor | None:
    found = m.parts()
    if found is None or found[1].grad is None or found[2].grad is None:
        return None
    return ghat(found[1], found[2], found[1].grad, found[2].grad).mul_(m.now()).abs_()  # as large as W: few copies


def _summed(part: Coupled, entries: Mapping[str, Tensor]) -> Tensor:
    """The entries (O, I) of each matrix summed by structure, over their norm, over all matrices."""
    sums = []
    for name, each in entries.items():
        if name == part.columns:
            sums.append(each.sum(0).view(part.count, part.width).sum(1))
        else:
            sums.append(each.sum(1).view(part.count, part.rows[name]).sum(1))
    return torch.stack([v / (v.norm() + TINY) for v in sums]).sum(0) if sums else torch.zeros(part.count)


def inner_of(method: Method) -> LowRank:
    """The method that trains, without the mask."""
    inner = method.inner if isinstance(method, Masked) else method
    assert isinstance(inner, LowRank)
    return inner


@dataclass(frozen=True)
class LoRAPrune(Allocator):
    """Closes heads and channels of the base until `sparsity` of the matrices' entries are gone; see the module.

    structures: "heads", "channels" or both; scores: by what they are chosen; every: updates between two masks.
    """

    works_on = (LowRank,)
    source = "Zhang et al. 2023, arXiv:2305.18403; the same number in each layer: interpretation"
    grade = "interpretation"

    sparsity: Annotated[float, Range(above=0, below=1)] = 0.5
    structures: tuple[str, ...] = KINDS
    scores: Scores = Gradients()
    every: Count = 10

    def __post_init__(self) -> None:
        if not self.structures or set(self.structures) - set(KINDS) or len(set(self.structures)) < len(self.structures):
            raise ValueError(f"structures are {' and '.join(KINDS)}, or one of them; found {list(self.structures)}")

    @classmethod
    def public(cls) -> type:
        return cls  # known to files by `procedure.LATER`

    @property
    def entrywise(self) -> bool:
        return False

    def serves(self, method: Method) -> bool:
        inner = method.inner if isinstance(method, Masked) else method
        return isinstance(inner, LowRank) and inner.plain() is not None

    def refusal(self, method: Method | None) -> str:
        return f"{self!r} reads the two factors of a LoRA, which {method!r} has not: train with LoRA()"

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        return math.ceil(ENDS * steps)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> LoRAPruneCourse:
        return LoRAPruneCourse(self, model, optimizer, steps)


def to_close(parts: list[Coupled], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """{kind: structures of each layer that go} for a share of the entries; `sizes` are those of one structure.

    Heads go as far as whole ones can, rounded down, and channels make up for the rest.  Raises ValueError for a share
    that takes all of a kind, or none of anything.
    """
    counts = {part.kind: part.count for part in parts}
    whole = sum(sizes[kind] * count for kind, count in counts.items())
    gone: dict[str, int] = {}
    for kind, count in counts.items():
        if len(counts) > 1 and kind == HEADS:
            gone[kind] = int(count * sparsity)
        else:
            rest = sparsity * whole - sum(sizes[k] * n for k, n in gone.items())
            gone[kind] = round(rest / sizes[kind])
        if gone[kind] >= count:
            raise ValueError(f"sparsity={sparsity:g} would leave none of the {count} {kind} of a layer: ask for less")
    if not any(gone.values()):
        raise ValueError(
            f"sparsity={sparsity:g} is less than one of the structures of a layer ({counts}): ask for more"
        )
    return gone


class LoRAPruneCourse(Course):
    """At work.  `gone` says how many structures of each kind a layer loses in the end."""

    def __init__(self, how: LoRAPrune, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(how, model, optimizer, steps)
        self.how = how
        kinds = tuple(kind for kind in KINDS if kind in how.structures)
        self.parts = coupled(self.model, kinds)
        self._check_sites()
        self.first = {kind: next(part for part in self.parts if part.kind == kind) for kind in kinds}
        sizes = {kind: part.weights(self.model) for kind, part in self.first.items()}
        self.gone = to_close(list(self.first.values()), sizes, how.sparsity)
        resized(self.model, self.parts, {kind: part.count - self.gone[kind] for kind, part in self.first.items()})
        self.scores: dict[str, Tensor] = {}

    def _check_sites(self) -> None:
        adapter = self.adapter
        if missing := [part.columns for part in self.parts if part.columns not in adapter.methods]:
            raise ValueError(
                f"{self.name} closes structures where {missing[0]} reads them ({len(missing)} such layers), and no "
                'adapter is there: train with where="all-linear", or name these layers too'
            )
        for part in self.parts:
            for name in (*part.rows, part.columns):
                if not quantised.is_plain(self.model.get_submodule(name).weight):  # type: ignore[arg-type]
                    raise TypeError(
                        f"{name} is quantised: rows and columns are taken from dense weights, so without bits"
                    )

    @torch.no_grad()
    def on_begin(self) -> None:
        layers = live_layers(self.model)
        for part in self.parts:
            site = part.columns
            method, f = self.adapter.methods[site], self.adapter.factors[site]
            if not isinstance(method, Masked):
                A = f[inner_of(method).plain()[2]]  # type: ignore[index]
                mask = torch.ones(layers[site].weight.shape[1], dtype=A.dtype, device=A.device)
                change(self.model, site, Masked(method), {**f, "mask": mask})

    @torch.no_grad()
    def on_gradients(self) -> None:
        if self._closed() == self.gone:
            return
        places, layers = {place.site: place for place in self.places()}, live_layers(self.model)
        for part in self.parts:
            matrices = {}
            for name in (*part.rows, part.columns):
                W: Any = layers[name].weight if name in layers else self.model.get_submodule(name).weight
                matrices[name] = Matrix(W.detach(), places.get(name))
            new = self.how.scores(part, matrices)
            old = self.scores.get(_key(part), torch.zeros_like(new))
            self.scores[_key(part)] = KEPT * old + (1 - KEPT) * new

    def on_update(self) -> None:
        if self.step % self.how.every == 0 or self.step == math.ceil(ENDS * self.steps):
            self.close(sparsity_at(self.step, self.steps, 1.0))

    def on_end(self) -> None:
        self.close(1.0)

    @torch.no_grad()
    def close(self, share: float) -> None:
        """Closes, in each layer, this share of what goes in the end.  Raises RuntimeError where nothing tells which."""
        for part in self.parts:
            number, mask = int(self.gone[part.kind] * share + 1e-9), self.mask(part)
            if number <= int((~mask).sum()):
                continue
            score = self.scores.get(_key(part))
            if score is None or not score.any():
                raise RuntimeError(
                    f"no gradient has told anything of the {part.kind} of {part.layer or 'the model'}: train for more "
                    f"updates ({self.step} were made of which none counts), at a rate at which they stay finite"
                )
            score = score.to(mask.device).masked_fill(~mask, -1.0)  # what is closed goes first: it stays closed
            mask[score.argsort(stable=True)[:number]] = False
            place = self.adapter.factors[part.columns]["mask"]
            place.copy_(mask.repeat_interleave(part.width).to(place))

    def mask(self, part: Coupled) -> Tensor:
        """Which structures are open (count)."""
        return self.adapter.factors[part.columns]["mask"].view(part.count, part.width)[:, 0] != 0

    def _closed(self) -> dict[str, int]:
        """{kind: how many are closed}, in the layer where they are fewest."""
        return {kind: min(int((~self.mask(p)).sum()) for p in self.parts if p.kind == kind) for kind in self.first}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.scores, super().state()[1]

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        self.scores = dict(tensors)


def _key(part: Coupled) -> str:
    return f"{part.kind}.{part.layer}"
