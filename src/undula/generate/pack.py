"""An adapter as one vector, and back: what a generator learns and writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the numbers of an adapter stand in one vector (D,): its factors that train, each once, in the adapter's
    order of sites and factors.  What does not train (frozen bases) is `like`'s.

    pack and unpack are a bijection between such adapters and vectors, to the bit: the vector is float64 where a factor
    is, else float32.
    """

    like: Adapter
    keys: tuple[tuple[str, str], ...]  # (site, factor) of each tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, adapter: Adapter, name: str = "the adapter") -> Layout:
        """Raises ValueError for an adapter whose state is no flat set of factors: nothing that trains, or parameters
        that train in full, a head's above all, which mean something for one task alone."""
        if adapter.full:
            raise ValueError(
                f"{name} trains {', '.join(list(adapter.full)[:3])} in full, which belongs to its own task: no "
                "generator could make it for another one. Train experts without a head of their own: "
                "DescribedClassification (--task described-classification), and no --full"
            )
        first: dict[int, tuple[str, str]] = {}
        for site, factor, t in adapter.tensors():
            if t.requires_grad:
                first.setdefault(id(t), (site, factor))
        if not first:
            raise ValueError(f"{name} has no factor that trains: there is nothing to generate")
        wide = any(adapter.factors[s][f].dtype == torch.float64 for s, f in first.values())
        return cls(adapter.copy(), tuple(first.values()), torch.float64 if wide else torch.float32)

    @property
    def size(self) -> int:
        """D."""
        return sum(self.like.factors[s][f].numel() for s, f in self.keys)

    @torch.no_grad()
    def pack(self, adapter: Adapter, name: str = "the adapter") -> Tensor:
        """(D,).  Raises ValueError for an adapter that differs in more than its numbers, see `check`."""
        self.check(adapter, name)
        return torch.cat([adapter.factors[s][f].detach().to(self.dtype).flatten() for s, f in self.keys])

    @torch.no_grad()
    def unpack(self, vector: Tensor) -> Adapter:
        """An adapter with these numbers, which shares no memory with the vector.  Raises ValueError for another
        length."""
        if vector.shape != (self.size,):
            raise ValueError(f"a vector of {self.size} numbers makes such an adapter; found {tuple(vector.shape)}")
        sizes = [self.like.factors[s][f].numel() for s, f in self.keys]
        new = {}
        for (site, factor), part in zip(self.keys, vector.split(sizes), strict=True):
            old = self.like.factors[site][factor]
            new[id(old)] = part.detach().reshape(old.shape).to(old.dtype, copy=True).requires_grad_()

        def filled(f: Factors) -> Factors:
            return {name: new.get(id(t), t) for name, t in f.items()}

        return replace(self.like, factors={s: filled(f) for s, f in self.like.factors.items()})

    def check(self, adapter: Adapter, name: str) -> None:
        """Raises ValueError that says in what `adapter` differs from these: sites, methods, shapes, what is frozen."""
        own = self.like
        if adapter.full:
            Layout.of(adapter, name)
        if odd := sorted(set(own.methods) ^ set(adapter.methods)):
            raise ValueError(f"{name} adapts other layers than the others of the library: {', '.join(odd[:3])}")
        for site, method in own.methods.items():
            if adapter.methods[site] != method:
                raise ValueError(f"{name} has {adapter.methods[site]!r} at {site}, the others {method!r}")
            for factor, t in own.factors[site].items():
                other = adapter.factors[site].get(factor)
                if other is None or other.shape != t.shape:
                    found = None if other is None else tuple(other.shape)
                    raise ValueError(f"{name}: {factor} at {site} is {found}, that of the others {tuple(t.shape)}")
                if not t.requires_grad and not torch.equal(other, t):
                    raise ValueError(
                        f"{name}: {factor} at {site}, which does not train, has other numbers than that of the others: "
                        "train all experts with one seed"
                    )


def digest(vector: Tensor) -> str:
    """SHA-256 of a vector's bytes, in hex: of a start what tells whether two experts began at one."""
    return hashlib.sha256(vector.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def moments(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean (D,), variance (D,)) of vectors: of the points that there are, so one has variance 0.  Computed in
    float64."""
    X = torch.stack(list(rows))
    wide = X.double()
    return wide.mean(0).to(X.dtype), wide.var(0, correction=0).to(X.dtype)
