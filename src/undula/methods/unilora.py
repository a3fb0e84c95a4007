"""Uni-LoRA (Li, Han, Ji 2025, arXiv:2506.00799, NeurIPS 2025): one vector for the whole model.

    W' = W + B A,   (A, B of every layer, end to end) = P theta,   P (D x d),  P' P = 1

P has one entry in each row: entry j of A or B is theta[i(j)] / sqrt(n_i), n_i counting how often i occurs in the whole
model.  The layers come in the model's order, A before B.  There is no alpha / r.  The seed rebuilds the indices; they
depend on which layers are adapted.

theta starts uniform within `bound`, so the update is not zero at the start (theta = 0 has no gradient).
"""

from __future__ import annotations

import abc
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Factors, LowRank, Site, check_within
from ..core.ranges import Count, Positive, Rank, Seed
from ..kernels import frozen

DEAD = "theta = 0 has no gradient, so it could never learn"


class Assignment(Choice):
    """(seed, D, d) -> which of the d numbers each of the D entries is: int32, on the CPU."""

    @abc.abstractmethod
    def __call__(self, seed: int, D: int, d: int) -> Tensor: ...


@Assignment.register
@dataclass(frozen=True)
class Balanced(Assignment):
    """Each number is used D/d times, rounded down or up, in a random order (the authors' code; PEFT)."""

    def __call__(self, seed: int, D: int, d: int) -> Tensor:
        return (frozen.permutation(seed, ("UniLoRA", "balanced"), D) % d).int()


@Assignment.register
@dataclass(frozen=True)
class Independent(Assignment):
    """Each entry chooses uniformly among the d numbers (the paper).  A few of them may remain unused."""

    def __call__(self, seed: int, D: int, d: int) -> Tensor:
        return frozen.integers(seed, ("UniLoRA", "independent"), (D,), d).int()


@dataclass(frozen=True)
class UniLoRA(LowRank):
    """W' = W + B A, all entries of all A and B gathered from one trained vector theta of length d."""

    formula = "W' = W + B A, (A, B) = P theta"
    parameters = "d"  # of the whole model, not of each site
    source = "Li, Han, Ji 2025, arXiv:2506.00799"
    starts_at_base = False
    size = "d"

    r: Rank = 4
    d: Count = 256
    bound: Annotated[Positive, DEAD] = 0.02  # of theta at the start
    seed: Seed = 0
    assignment: Assignment = Balanced()

    def most(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        return sum(self.r * (O + I) for O, I in shapes.values())  # the entries of all A and B

    def init(self, site: Site) -> dict[str, Tensor]:
        theta_d = site.once((*self._of_all(site), "theta"), lambda: self._start(site))
        return {**self.rebuilt(site), "theta": theta_d}

    def _of_all(self, site: Site) -> tuple[object, ...]:
        """The key of what the sites of one attach share."""
        return ("UniLoRA", self, tuple(site.peers))

    def _start(self, site: Site) -> Tensor:
        D = self.most(site.peers)
        if self.d > D and site.device.type != "meta":
            warnings.warn(
                f"{self!r} has more numbers than the {D} entries of all factors: {self.d - D} at least remain unused. "
                f"Choose a smaller d",
                stacklevel=2,
            )
        return site.uniform(self.d, bound=self.bound).requires_grad_()

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        """int32 indices, and 1 / sqrt(n), rounded once to float32."""
        (O, I), r = site.shape, self.r
        if site.device.type == "meta":
            index = torch.empty(r * (O + I), dtype=torch.int32, device="meta")
            scale_d = site.zeros(self.d)
        else:

            def starts() -> dict[str, int]:
                ends = itertools.accumulate((r * (o + i) for o, i in site.peers.values()), initial=0)
                return dict(zip(site.peers, ends, strict=False))

            every = site.once(
                (*self._of_all(site), "index"), lambda: self.assignment(self.seed, self.most(site.peers), self.d)
            )
            first = site.once((*self._of_all(site), "starts"), starts)[site.name]  # type: ignore[arg-type, index]
            index = every[first : first + r * (O + I)].to(site.device)

            def scale() -> Tensor:
                n_d = torch.bincount(every, minlength=self.d).clamp(min=1)
                return (1 / n_d.double().sqrt()).float().to(site.device, site.dtype)

            scale_d = site.once((*self._of_all(site), "scale", site.dtype, site.device), scale)
        index_A, index_B = index.split([r * I, r * O])
        return {"scale": scale_d, "index_A": index_A.view(r, I).clone(), "index_B": index_B.view(O, r).clone()}

    def check(self, site: Site, f: Factors) -> None:
        for name in ("index_A", "index_B"):
            check_within(f"{site.name}.{name}", f[name], 0, self.d - 1)

    def pair(self, f: Factors) -> tuple[Tensor, Tensor]:
        scaled_d = f["scale"] * f["theta"]
        A, B = (scaled_d.index_select(0, f[k].flatten()).view(f[k].shape) for k in ("index_A", "index_B"))
        return B, A
