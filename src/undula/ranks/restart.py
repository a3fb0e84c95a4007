"""Merge and restart: what ReLoRA, LoRASC, XGBLoRA and SRLoRA have in common.

A restart moves the trained pair of a site into the frozen past of `Restarted` and lets the trained factors begin again;
they stay the parameters that they were.  The base is never written to.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.choice import Choice
from ..core.method import Factors, LowRank
from ..core.ranges import Share
from ..host.build import peers_of
from ..host.host import change
from ..host.views import site
from ..kernels import frozen, svd
from ..methods.restarted import Restarted
from .allocator import Allocator
from .memory import begin_again, moments
from .procedure import Course, Place
from .surgery import live_layers


class Moments(Choice):
    """What an optimiser still remembers of a parameter that has begun again."""

    @abc.abstractmethod
    def __call__(self, optimizer: torch.optim.Optimizer, p: Tensor) -> None: ...


@Moments.register
@dataclass(frozen=True)
class Cleared(Moments):
    """Nothing, not even the count of its steps: Adam's bias correction begins again too."""

    def __call__(self, optimizer: torch.optim.Optimizer, p: Tensor) -> None:
        optimizer.state.pop(p, None)


@Moments.register
@dataclass(frozen=True)
class Pruned(Moments):
    """The entries where the first moment is largest, in every moment; a `share` of all is set to zero (Lialin et al.
    2023: 0.99).

    Their code prunes each moment by itself.  Adam then divides some kept first moments by second moments of zero, and
    the gradients of A do not fill these up, being zero themselves while B = 0: the step is m / eps.
    """

    share: Share = 0.99

    def __call__(self, optimizer: torch.optim.Optimizer, p: Tensor) -> None:
        found = list(moments(optimizer, p).values())
        if not found:
            return
        kept = found[0].abs().flatten().topk(round((1 - self.share) * p.numel())).indices
        mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device).index_fill_(0, kept, True).view(p.shape)
        begin_again(optimizer, p, ~mask)


def check_cycles(cycles: int | None, every: int | None) -> None:
    """Raises ValueError for a division of the steps that is given twice or is none."""
    if cycles is not None and every is not None:
        raise ValueError(f"give the number of cycles or their length, not both; found {cycles} and every={every}")
    given = cycles if every is None else every
    if given is not None and given < 1:
        raise ValueError(f"there is at least one cycle, of at least one update; found {given}")


def ends(steps: int, cycles: int | None, every: int | None) -> list[int]:
    """How many updates are done when each cycle ends: `every` of them, or equal parts (4 where neither is given).
    Raises ValueError where there are fewer."""
    if every is None:
        parts = 4 if cycles is None else cycles
        found = [round(steps * k / parts) for k in range(1, parts + 1)]
    else:
        found = [*range(every, steps, every), steps]
    if (len(found) if every is None else every) > steps:
        asked = f"{len(found)} cycles" if every is None else f"a cycle of {every} updates"
        raise ValueError(f"{asked} in {steps} updates: train longer, or restart less")
    return found


def last_begins(steps: int, cycles: int | None, every: int | None) -> int:
    """The number of updates after which the last cycle has trained at all; 0 where there is one cycle."""
    found = ends(steps, cycles, every)
    return 0 if len(found) == 1 else min(steps, found[-2] + 1)


def inner_of(place: Place) -> LowRank:
    """The method that trains at a place."""
    method = place.method.inner if isinstance(place.method, Restarted) else place.method
    assert isinstance(method, LowRank)
    return method


@torch.no_grad()
def push(model: nn.Module, place: Place, B_OK: Tensor, A_KI: Tensor, own: Factors | None = None) -> None:
    """Adds the pair (B, A) to the frozen past of a place; `own` are the inner method's factors from now on.  A past
    that outgrew min(O, I) is written anew, with the same product, at a rank of at most that."""
    if own is None:
        own = {k: t for k, t in place.f.items() if k not in ("A_past", "B_past")}
    if "A_past" in place.f:
        B_OK, A_KI = torch.cat([place.f["B_past"], B_OK], 1), torch.cat([place.f["A_past"], A_KI])
    if len(A_KI) > min(len(B_OK), A_KI.shape[1]):
        U, s, V = svd.factored(B_OK, A_KI)
        rank = int((s > s[0] * torch.finfo(torch.float64).eps * len(A_KI)).sum())
        B_OK, A_KI = (t.to(B_OK.dtype) for t in (U[:, :rank] * s[:rank].sqrt(), (V[:, :rank] * s[:rank].sqrt()).T))
    past = {"A_past": A_KI.contiguous(), "B_past": B_OK.contiguous()} if len(A_KI) else {}
    change(model, place.site, Restarted(inner_of(place), len(A_KI)), {**own, **past})


def begun_again(course: Course, places: list[Place], seed: int, number: int) -> dict[str, Factors]:
    """Fresh factors of the inner methods of these places: the live parameters, with the numbers of restart `number`."""
    inner = {place.site: inner_of(place) for place in course.places()}
    layers, shared = live_layers(course.model), {}  # type: ignore[var-annotated]
    peers = peers_of(inner, course.adapter.shapes)
    once: dict[int, tuple[Tensor, nn.Parameter]] = {}
    fresh: dict[str, Factors] = {}
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # a method draws from the global generators
        for place in places:
            where = replace(site(place.site, layers[place.site], shared), peers=peers[inner[place.site]])
            torch.manual_seed(int(frozen.integers(seed, ("restart", number, place.site), (1,), 1 << 31)))
            fresh[place.site] = {k: _renewed(place.f[k], t, once) for k, t in inner[place.site].init(where).items()}
    return fresh


def _renewed(live: Tensor, new: Tensor, once: dict[int, tuple[Tensor, nn.Parameter]]) -> Tensor:
    """The live parameter with new numbers; a frozen one that others share, or that has changed, is another object."""
    if live.requires_grad:
        return live.copy_(new.detach())
    if torch.equal(live, new):
        return live
    return once.setdefault(id(new), (new, nn.Parameter(new.detach(), requires_grad=False)))[1]


class Cycles(Course):
    """A course in cycles.  At the end of each but the last, `turn` restarts."""

    def __init__(
        self,
        allocator: Allocator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        cycles: int | None,
        every: int | None,
    ):
        super().__init__(allocator, model, optimizer, steps)
        self.ends = ends(steps, cycles, every)
        for place in self.places():
            if not inner_of(place).starts_at_base:
                raise TypeError(f"a restart begins at the base; {inner_of(place)!r} at {place.site} does not")
        firsts = {inner_of(place): place for place in self.places()}
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            for method, place in firsts.items():  # one that needs data to begin is better refused now than then
                method.init(site(place.site, live_layers(model)[place.site]))

    @property
    def cycle(self) -> int:
        """The number of the cycle that the next update belongs to, from 0."""
        return min(bisect.bisect_right(self.ends, self.step), len(self.ends) - 1)

    def on_update(self) -> None:
        if self.step in self.ends[:-1]:
            self.turn(self.ends.index(self.step))

    @abc.abstractmethod
    def turn(self, cycle: int) -> None:
        """What happens at the end of `cycle`."""

    @torch.no_grad()
    def restart(self, places: Iterable[Place], seed: int, number: int, forgets: Moments, portion: float = 1.0) -> None:
        """Adds `portion` of what these places have trained to their past, and lets them begin again."""
        chosen = list(places)
        trained = {place.site: inner_of(place).pair(place.f) for place in chosen}
        trained = {s: (portion * B_OR, A_RI.clone()) for s, (B_OR, A_RI) in trained.items()}
        for (s, own), place in zip(begun_again(self, chosen, seed, number).items(), chosen, strict=True):
            B_OR, A_RI = trained[s]
            moved = B_OR.any(0)  # columns of zeros add nothing but cost
            push(self.model, place, B_OR[:, moved], A_RI[moved], own)
        for p in {id(t): t for place in chosen for t in place.f.values() if t.requires_grad}.values():
            forgets(self.optimizer, p)
