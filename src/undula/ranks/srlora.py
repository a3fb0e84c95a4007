"""SRLoRA, subspace recomposition (2025, arXiv:2505.12433): after a summary of that paper, interpretation.

    start:   s B A = U_r S_r V_r' of W, counted out: W' = W + s B A - s B_0 A_0
    switch:  the r' = share r pairs of least importance stay as they are, frozen; their slots begin again along the next
             r' singular directions of W, counted out in the same way

Importance of a pair: the mean of I_bar U_bar over its column of B plus the mean over its row of A, with the smoothed
sensitivity I = |w dL/dw| and its smoothed deviation |I - I_bar|, as in AdaLoRA.  N = (target - r) / r' switches; the
summary puts them N_steps / N apart, the last at the end of training, where its directions would never train: here they
cut the steps into N + 1 equal parts.  Optimiser state of the slots that begin again is cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.ranges import PartShare, Rank, SomeShare
from ..host.views import site
from ..kernels import svd
from ..methods.lora import LoRA
from ..methods.restarted import Restarted
from .allocator import Allocator
from .memory import forget
from .procedure import Course, Place, Quality, places_of
from .restart import inner_of, push
from .surgery import live_layers


@Allocator.register
@dataclass(frozen=True)
class SRLoRA(Allocator):
    """Sends LoRA's r slots along `target` singular directions of W in turn.  Of the same rank r at every site."""

    works_on = (LoRA, Restarted)
    source = "after arXiv:2505.12433"
    grade = "interpretation"

    target: Rank = 16  # directions used in all
    share: SomeShare = 0.5  # of the slots, begun again at each switch
    beta1: PartShare = 0.85
    beta2: PartShare = 0.85

    def counts_from(self, steps: int, adapter: Adapter | None = None) -> int:
        found = range(1, self.target) if adapter is None else {inner_of(p).r for p in places_of(adapter)}  # type: ignore[attr-defined]
        return max((self.plan(r, steps)[1][-1] + 1 for r in found if self._fits(r, steps)), default=0)

    def _fits(self, r: int, steps: int) -> bool:
        count, rest = divmod(self.target - r, max(1, round(self.share * r)))
        return not rest and 1 <= count < steps

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> Course:
        return _SRLoRA(self, model, optimizer, steps)

    def plan(self, r: int, steps: int) -> tuple[int, list[int]]:
        """(slots per switch, the numbers of updates after which there is a switch).  Raises ValueError."""
        slots = max(1, round(self.share * r))
        count, rest = divmod(self.target - r, slots)
        if not self._fits(r, steps):
            raise ValueError(
                f"from r={r} to target={self.target} by {slots} slots at a time: found {count} switches and a rest of "
                f"{rest} for {steps} updates. Choose target = r + k * {slots} with 1 <= k < {steps}"
            )
        return slots, [round(steps * k / (count + 1)) for k in range(1, count + 1)]


class _SRLoRA(Course):
    def __init__(self, allocator: SRLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(allocator, model, optimizer, steps)
        self.allocator = allocator
        kinds = {type(inner_of(place)).__name__: place for place in self.places()}
        ranks = {inner_of(place).r: place for place in self.places() if isinstance(inner_of(place), LoRA)}  # type: ignore[attr-defined]
        if set(kinds) != {"LoRA"} or len(ranks) != 1:
            raise TypeError(f"SRLoRA works on LoRA of one rank; found {', '.join(kinds)} of ranks {sorted(ranks)}")
        self.r = next(iter(ranks))
        self.slots, self.switches = allocator.plan(self.r, steps)
        small = {s: shape for s, shape in self.adapter.shapes.items() if min(shape) < allocator.target}
        if small:
            at, shape = next(iter(small.items()))
            raise ValueError(f"{at} {shape} (O, I) has fewer singular directions than target={allocator.target}")
        self.directions: dict[str, tuple[Tensor, Tensor]] = {}  # (B (O, target), A (target, I)), s B A = U S V'
        self.mean, self.deviation = ([torch.zeros_like(p) for p in self._trained()] for _ in range(2))

    def _trained(self) -> list[Tensor]:
        """A and B of every site, in turn."""
        return [place.f[k] for place in self.places() for k in "AB"]

    @torch.no_grad()
    def on_begin(self) -> None:
        layers = live_layers(self.model)
        for place in list(self.places()):
            B_OR, A_RI = inner_of(place).pair(place.f)
            if B_OR.any():  # trained before: what it learnt stays
                push(self.model, place, B_OR, A_RI.clone())
            where = site(place.site, layers[place.site])
            U, S, V = svd.randomised(where.W, self.allocator.target, oversample=16, iterations=4, seed=0)
            method = inner_of(place)
            half = (S / method.scaling(method.r, method.alpha)).sqrt()  # type: ignore[attr-defined]
            self.directions[place.site] = ((U * half).contiguous(), (V * half).T.contiguous())
        for place in list(self.places()):
            self._along(place, torch.arange(self.r, device="cpu"), 0)

    @torch.no_grad()
    def _along(self, place: Place, slots: Tensor, first: int) -> None:
        """Begins these slots again along the directions from `first` on, and counts them out."""
        B_OT, A_TI = self.directions[place.site]
        slots = slots.to(A_TI.device)
        B_OK, A_KI = B_OT[:, first : first + len(slots)], A_TI[first : first + len(slots)]
        place.f["B"].index_copy_(1, slots, B_OK)
        place.f["A"].index_copy_(0, slots, A_KI)
        scaled, _ = inner_of(place).pair({"B": B_OK, "A": A_KI})
        push(self.model, place, -scaled, A_KI)

    @torch.no_grad()
    def on_gradients(self) -> None:
        trained = self._trained()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        sensitivity = torch._foreach_mul(trained, gradients)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(self.mean, sensitivity, 1 - self.allocator.beta1)
        torch._foreach_sub_(sensitivity, self.mean)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(self.deviation, sensitivity, 1 - self.allocator.beta2)

    def scores(self) -> list[Tensor]:
        """The importance of every pair (R), site by site."""
        entries = torch._foreach_mul(self.mean, self.deviation)
        return [a.mean(1) + b.mean(0) for a, b in zip(entries[::2], entries[1::2], strict=True)]

    @torch.no_grad()
    def on_update(self) -> None:
        if self.step not in self.switches:
            return
        first = self.r + self.slots * self.switches.index(self.step)
        for place, score in zip(list(self.places()), self.scores(), strict=True):
            least = torch.argsort(score, stable=True)[: self.slots]
            B_OR, A_RI = inner_of(place).pair(place.f)
            push(self.model, place, B_OR[:, least], A_RI[least])
            now = Place(place.site, self.adapter.methods[place.site], self.adapter.factors[place.site])
            self._along(now, least, first)
            forget(self.optimizer, place.f["A"], least, 0)
            forget(self.optimizer, place.f["B"], least, 1)
        torch._foreach_zero_([*self.mean, *self.deviation])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state()
        names = [f"{place.site}.{k}" for place in self.places() for k in "AB"]
        for kind, kept in {"mean": self.mean, "deviation": self.deviation}.items():
            tensors |= {f"{kind}.{name}": t for name, t in zip(names, kept, strict=True)}
        for s, (B_OT, A_TI) in self.directions.items():
            tensors |= {f"directions.{s}.B": B_OT, f"directions.{s}.A": A_TI}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore(tensors, values)
        places = list(self.places())
        for kind, kept in {"mean": self.mean, "deviation": self.deviation}.items():
            names = [f"{kind}.{place.site}.{k}" for place in places for k in "AB"]
            for t, name in zip(kept, names, strict=True):
                t.copy_(tensors[name])
        if self.begun:
            self.directions = {
                place.site: tuple(tensors[f"directions.{place.site}.{k}"].to(place.f["A"]) for k in "BA")  # type: ignore[misc]
                for place in places
            }
