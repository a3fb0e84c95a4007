"""RegMean (Jin, Ren, Preotiuc-Pietro, Cheng 2023, arXiv:2212.09849): the update that does to each adapter's own inputs
what that adapter does, as nearly as one can.

    min_dW sum_i w_i |X_i dW' - X_i dW_i'|^2:   dW = (sum_i w_i dW_i G_i) (sum_i w_i G_i)^-1,   G_i = X_i' X_i (I, I)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..core.method import LowRank
from ..core.ranges import Rank, Share
from ..host.host import layer_at
from ..observe.listen import Batch, live
from ..observe.probe import Probe
from .combiner import Combiner
from .update import Layer, Made, as_lora, compressed, linear, truncated

Gram = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RegMean(Combiner):
    """`grams[i][site]` is G_i of adapter i: see `grams`.  What lies beside its diagonal is multiplied by `shrink` (1:
    the minimum itself; less is more robust).  Of low-rank updates the result is of the rank of all together, from the
    factors (A_i becomes A_i G_i (sum G)^-1); with `rank` it is the minimum of that rank: dW L is cut by its singular
    values, L L' = sum_i w_i G_i.  What a rank misses is told of dW L too, on the inputs.  Weights are not negative.

    Raises ValueError where an adapter has no Gram matrix at one of its layers.
    """

    grams: Sequence[Gram] = field(repr=False)
    shrink: Share = 0.9
    rank: Rank | None = None

    def weights(self, weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
        given = super().weights(weights, number)
        if len(self.grams) != number:
            raise ValueError(f"{number} adapters take the Gram matrices of {number}, found those of {len(self.grams)}")
        if min(given) < 0 or not sum(given):
            raise ValueError(f"RegMean takes weights that are not negative, and not all 0, found {list(given)}")
        return tuple(w / sum(given) for w in given)

    def at(self, layer: Layer) -> Made:
        grams = [self._gram(layer, i) for i in range(len(self.grams))]
        if not any(w for w, G in zip(layer.weights, grams, strict=True) if G is not None):
            return linear(layer, [0.0] * len(layer.terms), None)  # of those that count none knows the layer
        total_II = torch.stack([w * G for w, G in zip(layer.weights, grams, strict=True) if G is not None]).sum(0)
        root_II = _root(total_II)
        maps = {}
        for term in layer.terms:
            own = grams[term.number]
            assert own is not None
            maps[term.number] = torch.cholesky_solve(layer.weights[term.number] * own, root_II)
        kind, wide = layer.dtype, replace(layer, kept=torch.float64)  # dW_i G_i S^-1 = dW_i (S^-1 G_i)'
        if all(isinstance(term.method, LowRank) for term in layer.terms):
            pairs = [term.pair() for term in layer.terms]
            B_OR = torch.cat([B for B, _ in pairs], 1)
            A_RI = torch.cat([A.double() @ maps[t.number].T for (_, A), t in zip(pairs, layer.terms, strict=True)])
            if self.rank is None or self.rank >= B_OR.shape[1]:
                return truncated(layer, B_OR, A_RI.to(kind), None)
            return _back(layer, truncated(wide, B_OR.double(), A_RI @ root_II, self.rank), root_II)

        def rows(some: slice) -> Tensor:
            return torch.stack([t.rows(some).double() @ maps[t.number].T for t in layer.terms]).sum(0)

        rank = layer.rank if self.rank is None else self.rank
        if rank >= min(layer.shape):
            return compressed(layer, lambda some: rows(some).to(kind), rank)
        return _back(layer, compressed(wide, lambda some: rows(some) @ root_II, rank), root_II)

    def _gram(self, layer: Layer, number: int) -> Tensor | None:
        try:
            G = self.grams[number][layer.site]
        except LookupError:
            if number not in {term.number for term in layer.terms}:
                return None  # it says nothing of a layer that it does not change
            raise ValueError(
                f"adapter {number + 1} has an update at {layer.site} and no Gram matrix of its inputs there: measure "
                "them (undula.combine.grams(model, batches))"
            ) from None
        I = layer.shape[1]
        if G.shape != (I, I):
            raise ValueError(
                f"the Gram matrix of adapter {number + 1} at {layer.site} is {tuple(G.shape)}, not {(I, I)}"
            )
        G = G.detach().to(layer.device, torch.float64)
        return self.shrink * G + (1 - self.shrink) * torch.diag(G.diagonal())


def _back(layer: Layer, made: Made, L_II: Tensor) -> Made:
    """dW of a LoRA that is dW L."""
    f = made.part.factors[layer.site]
    A_RI = torch.linalg.solve_triangular(L_II, f["A"].detach().double(), upper=False, left=False)
    return Made(as_lora(layer, f["B"].detach(), A_RI), made.missed, made.whole)


def _root(S_II: Tensor) -> Tensor:
    """L with L L' = S, or nearly where inputs do not span all dimensions."""
    ridge, one = 0.0, torch.eye(len(S_II), dtype=S_II.dtype, device=S_II.device)
    while True:
        L_II, failed = torch.linalg.cholesky_ex(S_II + ridge * S_II.diagonal().mean() * one)
        if not failed and L_II.isfinite().all():
            return L_II
        ridge = 10 * ridge or 1e-12
        if not ridge < 1:
            raise ValueError("the Gram matrices are no sums of x x' of inputs that differ from 0: look at the batches")


@dataclass(frozen=True)
class Measured(Mapping[str, Tensor]):
    """The Gram matrices of a model's layers, measured when one is asked for, as many at a time as a probe holds."""

    sites: tuple[str, ...]
    moments: Callable[[str], tuple[Tensor, Tensor, int]]

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise KeyError(site)
        return self.moments(site)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def grams(model: nn.Module, batches: Iterable[Batch], hold: int = 1 << 28) -> Gram:
    """{layer: sum of x x' (I, I)} of the inputs of the layers that a model's selected adapter adapts, with it at work;
    padding does not count.  Layers are measured as many at a time as fit into `hold` bytes, so `batches` is a list
    or another thing that can be gone through again.  Raises RuntimeError where no adapter is selected."""
    sites = tuple(live(model, "measuring Gram matrices").factors)
    probe = Probe(batches, hold=hold).on(model, {site: layer_at(model, site) for site in sites})
    return Measured(sites, probe.moments)
