"""The updates of several adapters at one layer, and what a combination of them becomes: a plain LoRA where that says
all of it, or as much as the asked rank holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Additive, Factors, LowRank, Method
from ..kernels import svd
from ..kernels.svd import without
from ..methods.lora import LoRA
from ..methods.sum import added, as_pair

Rows = Callable[[slice], Tensor]
BLOCK = 1 << 22  # numbers of a block of rows, of all adapters together
WHOLE = 1 << 28  # numbers that may be held where rows come all together or not at all
HELD = 1 << 24  # numbers of a combination that are kept; of a larger one each product computes them anew


@dataclass(frozen=True)
class Term:
    """dW of one adapter at a layer; `number` is its place among the adapters, its factors are float32 or wider.
    `padding` is the column of an embedding's update that stays the base's, and so is none of it."""

    number: int
    method: Additive
    factors: Factors
    padding: int | None = None

    @property
    def rank(self) -> int | None:
        """The rank that its factors have; None where there are none."""
        return self.pair()[1].shape[0] if isinstance(self.method, LowRank) else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B (O, R), A (R, I)): its factors, or of an update without factors its own singular triples."""
        if isinstance(self.method, LowRank):
            B_OR, A_RI = self.method.pair(self.factors)
            return B_OR, without(A_RI, self.padding)
        dW_OI = without(self.method.delta(self.factors), self.padding)
        return svd.halves(*svd.exact(dW_OI, min(dW_OI.shape)))

    def rows(self, some: slice) -> Tensor:
        """Those rows of dW."""
        return without(self.method.rows(self.factors, some), self.padding)


@dataclass(frozen=True)
class Layer:
    """One layer of a combination: the terms of the adapters that have one there, all weights, and what the result is
    to be called."""

    site: str
    shape: tuple[int, int]
    terms: tuple[Term, ...]
    weights: tuple[float, ...]
    like: Adapter  # of one site: what it says beside
    kept: torch.dtype  # the type of the result's factors

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 over float64 factors."""
        return torch.promote_types(self.kept, torch.float32)

    @property
    def device(self) -> torch.device:
        return next(iter(self.terms[0].factors.values())).device

    @property
    def rank(self) -> int:
        """The sum of the terms' ranks, the layer's where one has none."""
        ranks = [term.rank for term in self.terms]
        return min(*self.shape, *([] if None in ranks else [sum(r for r in ranks if r is not None)]))

    def of(self, values: Sequence[float]) -> list[float]:
        """Those of the adapters that have a term here."""
        return [values[term.number] for term in self.terms]


@dataclass(frozen=True)
class Made:
    """An adapter of one layer, and how much of what it stands for it misses: `missed` is |miss|^2, `whole` |dW|^2."""

    part: Adapter
    missed: float = 0.0
    whole: float = 0.0


def layer_of(site: str, parts: Sequence[Adapter | None], weights: Sequence[float]) -> Layer:
    """The updates at one layer.  Raises TypeError below the Additive rung."""
    there = [part for part in parts if part is not None]
    kernels = _kernels(site, there)
    padding = kernels[-1][0] if kernels and len(kernels[-1]) == 1 else None
    terms, types = [], []
    for number, part in enumerate(parts):
        if part is not None:
            floats = [t.dtype for t in part.factors[site].values() if t.is_floating_point()]
            kind = _promoted(floats or [torch.float32])
            wide = torch.promote_types(kind, torch.float32)
            f = {k: _wide(t, wide) for k, t in part.factors[site].items()}
            terms.append(Term(number, part.additive(site), f, padding))
            types.append(kind)
    like = replace(
        there[0],
        kernels={site: kernels[-1]} if kernels else {},
        apart={s: why for part in there for s, why in part.apart.items()},
    )
    return Layer(site, there[0].shapes[site], tuple(terms), tuple(weights), like, _promoted(types))


def _kernels(site: str, there: Sequence[Adapter]) -> list[tuple[int, ...]]:
    """What the adapters say of the layer beside its shape, the one that says most last.  Raises ValueError."""
    kernels = sorted({part.kernels[site] for part in there if site in part.kernels}, key=len)
    tables = all(len(kernel) < 2 for kernel in kernels)  # of embeddings some may say which row is padding
    if any(site not in part.kernels for part in there) and kernels or (len(kernels) > 1 and not tables):
        raise ValueError(f"the adapters are for different models: {site} is another kind of layer in some of them")
    return kernels


def _wide(t: Tensor, wide: torch.dtype) -> Tensor:
    """A factor to compute with; whether it trains stays, for what of it stands in the result."""
    return t.detach().to(wide).requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _promoted(types: Sequence[torch.dtype]) -> torch.dtype:
    kind = types[0]
    for other in types[1:]:
        kind = torch.promote_types(kind, other)
    return kind


def linear(layer: Layer, c: Sequence[float], rank: int | None) -> Made:
    """sum_i c_i dW_i over the terms.  Without `rank` exact: of low-rank terms the factors below and beside one another,
    of others a `Sum`; with it the nearest update of that rank."""
    if all(isinstance(term.method, LowRank) for term in layer.terms):
        pairs = [term.pair() for term in layer.terms]
        B_OR = torch.cat([w * B for w, (B, _) in zip(c, pairs, strict=True)], 1)
        return truncated(layer, B_OR, torch.cat([A for _, A in pairs], 0), rank)
    if rank is None:
        weighted = [(w, term.method, term.factors) for w, term in zip(c, layer.terms, strict=True)]
        method, f = added(weighted, layer.shape)
        return Made(_named(layer, method, f))

    def rows(some: slice) -> Tensor:
        return torch.stack([w * term.rows(some) for w, term in zip(c, layer.terms, strict=True)]).sum(0)

    return compressed(layer, rows, rank)


def truncated(layer: Layer, B_OR: Tensor, A_RI: Tensor, rank: int | None) -> Made:
    """B A as a plain LoRA: as it is, or the nearest of this rank; from the factors, O x I is never formed.  One of more
    rank than the layer has is a pair of the layer's own rank."""
    if rank is None or rank >= B_OR.shape[1]:
        if B_OR.shape[1] > min(layer.shape):
            return Made(_named(layer, *as_pair(B_OR @ A_RI)))
        return Made(as_lora(layer, B_OR, A_RI))
    U, s, V = svd.factored(B_OR, A_RI)
    B, A = svd.halves(U[:, :rank], s[:rank], V[:, :rank])
    return Made(as_lora(layer, B, A), float(s[rank:].square().sum()), float(s.square().sum()))


def blocks(layer: Layer, rows: Rows, together: int = 1) -> svd.Blocks:
    """An update of this layer by its rows, in blocks of which `together` are held at once.  Where a method's rows come
    with all others, all are taken at once, unless that would be too many."""
    O, I = layer.shape
    step = max(1, BLOCK // (I * together))
    if any(type(t.method).rows is Additive.rows for t in layer.terms) and O * I * together <= WHOLE:
        step = O
    return svd.Blocks(layer.shape, rows, step, layer.device, layer.dtype)


def compressed(layer: Layer, rows: Rows, rank: int) -> Made:
    """The update that `rows(slice)` computes, as a plain LoRA of this rank; where the layer has no more, all of it."""
    M = blocks(layer, rows, len(layer.terms))
    if rank >= min(layer.shape):
        return Made(_named(layer, *as_pair(M.whole())))
    if layer.shape[0] * layer.shape[1] <= HELD:
        M = M.held()
    told = f"at {layer.site} the combination is beyond what {layer.dtype} holds: has an adapter diverged?"
    try:
        B, A = svd.halves(*M.leading(rank, 16, 4, 0))
    except torch.linalg.LinAlgError:
        raise ValueError(told) from None
    missed = whole = 0.0
    for some, block in M.each():
        missed += float((block - B[some] @ A).square().sum())
        whole += float(block.square().sum())
    if not math.isfinite(whole):
        raise ValueError(told)
    return Made(as_lora(layer, B, A), missed, whole)


def as_lora(layer: Layer, B_OR: Tensor, A_RI: Tensor) -> Adapter:
    r = B_OR.shape[1]
    f = {"A": A_RI.to(layer.kept).contiguous(), "B": B_OR.to(layer.kept).contiguous()}
    return _named(layer, LoRA(r=r, alpha=float(r)), {k: t.requires_grad_() for k, t in f.items()})


def _named(layer: Layer, method: Method, f: Factors) -> Adapter:
    like = layer.like
    kept = {k: t.to(layer.kept).requires_grad_(t.requires_grad) if t.is_floating_point() else t for k, t in f.items()}
    return Adapter(
        {layer.site: method}, {layer.site: kept}, {layer.site: layer.shape}, {}, like.kernels, {}, like.apart
    )


def inner(one: Term, other: Term) -> float:
    """<dW_1, dW_2> = tr(B_1' B_2 A_2 A_1'), from the factors."""
    (B, A), (C, D) = one.pair(), other.pair()
    return float(((B.double().T @ C.double()) * (A.double() @ D.double().T)).sum())


def norm(term: Term) -> float:
    """|dW|, from the factors, without the cancellation of a product."""
    return math.sqrt(float(svd.factored_values(*term.pair()).square().sum()))
