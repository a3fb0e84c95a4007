"""LoRA-GGPO (arXiv:2502.14538v1; its successor is `mgpo`): noise on the adapted weights while they train.

    y = W x + s B A x + E x,     E (O, I), of row i the numbers of variance c_i^2
    c_i = (sigma w_i + beta g_i^2) / sqrt(O),   w_i^2 = w^2 + |(s B A)_i|^2,   g_i = |s (B g_A + g_B A)_i|

w is the mean length of W's rows, g_i is of the step before (0 at first), and no gradient goes through E.  Long rows are
disturbed more, and so are those that are still moving.

Here E = diag(c) U V / sqrt(k) with normal U (O, k) and V (k, I): its numbers have the mean, the variance and the
covariance 0 of independent ones, and E x costs what a LoRA of rank k costs, where a dense E is a second model in memory
and twice the base's arithmetic.  It is drawn once an update, from the number of the update and `seed`: batches of one
update, a forward pass that is computed again and all processes have the same.  Evaluations have none.

Interpretation: of v1 the port in kohya's sd-scripts was at hand (dense E, sigma 0.03, beta 0.01; there s is lost from
B A by a slip).  Served: linear layers with one pair each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host.state import host_of
from ..host.views import Conv1DView, LinearView
from .allora import of_products
from .paired import UNSEEN, Paired, Params, computes_in, gradients, kind_of
from .pairs import Stacked, alike


class LoRAGGPO(Paired):
    """See the module.  rank: k."""

    def __init__(
        self,
        params: Params,
        adapted: nn.Module,
        *,
        sigma: float = 0.03,
        beta: float = 0.01,
        rank: int = 4,
        seed: int = 0,
        **options: Any,
    ):
        if not sigma >= 0 or not beta >= 0 or rank < 1:
            raise ValueError(f"LoRAGGPO takes sigma >= 0, beta >= 0 and rank >= 1, found {sigma=}, {beta=}, {rank=}")
        self.sigma, self.beta, self.rank, self.seed = sigma, beta, rank, seed
        self.steps = 0
        self.norms: dict[str, Tensor] = {}  # g (O) of sites
        self.drawn: dict[str, tuple[Tensor, Tensor]] = {}  # (diag(c) U / sqrt(k), V) of this update
        self.disturbed: set[str] = set()  # sites, in this update
        super().__init__(params, adapted, **options)
        host, me = host_of(adapted), weakref.ref(self)
        self.lengths: dict[str, float] = {}  # w of sites
        hooks = []
        for pair in self.pairs():
            layer = host.slots[pair.site.partition("#")[0]].layer
            if type(layer) not in (LinearView, Conv1DView) or "#" in pair.site:
                what = "several products" if "#" in pair.site else f"a {kind_of(layer.owner)}"
                raise TypeError(
                    f"LoRAGGPO disturbs linear layers with one product each; at {pair.site} stands {what}. Take "
                    "another optimiser, such as LoRAMGPO"
                )
            self.lengths[pair.site] = float(layer.weight.detach().float().norm(dim=1).mean())
            hooks.append(layer.owner.register_forward_hook(_disturbing(me, pair.site, computes_in(adapted))))
        for hook in hooks:
            weakref.finalize(self, hook.remove)

    @property
    def strength(self) -> float:
        """0: nothing is disturbed."""
        return self.sigma + self.beta

    @torch.no_grad()
    def noise(self, site: str) -> tuple[Tensor, Tensor]:
        """(diag(c) U / sqrt(k), V) of a site in this update."""
        if not self.drawn:
            found = self.pairs()
            sizes = [(p.B.shape[0], p.A.shape[1]) for p in found]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
            numbers = torch.randn(self.rank * sum(map(sum, sizes)), generator=generator)
            parts = dict(zip((p.site for p in found), numbers.split([self.rank * sum(s) for s in sizes]), strict=True))
            for those in alike(found):
                rows = of_products(Stacked.of(those))[1][..., 0]
                for p, norm in zip(those, rows, strict=True):
                    O, g = p.B.shape[0], self.norms.get(p.site, norm.new_zeros(())).to(norm)
                    c = (self.sigma * (self.lengths[p.site] ** 2 + norm.square()).sqrt() + self.beta * g**2) / O**0.5
                    U, V = parts[p.site].to(c).split([self.rank * O, self.rank * p.A.shape[1]])
                    both = (U.view(O, -1) * (c / self.rank**0.5)[:, None], V.view(self.rank, -1))
                    self.drawn[p.site] = both
        return self.drawn[site]

    def adjust(self) -> None:
        if not self.strength:
            return
        found = self.following()
        if odd := [p.site for p in found if p.site not in self.disturbed]:
            raise RuntimeError(
                f"LoRAGGPO disturbs the adapted layers while they compute, in training mode, and {odd[0]} was not "
                f"called since the last step: {UNSEEN}"
            )
        for those in alike(found):
            pair, (g_A, g_B) = Stacked.of(those), gradients(those)
            B, A = pair.left, pair.right
            crossed = ((B @ (g_A @ A.mT)) * g_B).sum(2)
            squares = ((B @ (g_A @ g_A.mT)) * B).sum(2) + 2 * crossed + ((g_B @ (A @ A.mT)) * g_B).sum(2)
            rows = pair.scale[:, 0].abs() * squares.clamp_min(0).sqrt()
            self.norms |= {p.site: row for p, row in zip(those, rows, strict=True)}

    def moved(self) -> None:
        self.drawn = {}
        self.disturbed = set()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "noise": {"steps": self.steps, "norms": dict(self.norms)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError for a state without that of the noise, which is another optimiser's, ValueError for another
        adapter's."""
        if odd := sorted(set(state_dict["noise"]["norms"]) - set(self.lengths)):
            raise ValueError(f"this is the state of an adapter of {odd[0]}, which is no layer of this one")
        super().load_state_dict(state_dict)
        self.steps, self.norms = state_dict["noise"]["steps"], dict(state_dict["noise"]["norms"])
        self.drawn = {}


def _disturbing(me: Any, site: str, computes: Callable[[], bool]) -> Any:
    """The hook of a layer, for passes in which the adapter computes."""

    def after(module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
        optimizer = me()
        trains = module.training and torch.is_grad_enabled() and computes()
        if optimizer is None or not optimizer.strength or not trains:
            return None
        if not given:
            raise TypeError(f"LoRAGGPO sees the inputs that {site} is given by position, and it is called by keywords")
        U, V = optimizer.noise(site)
        optimizer.disturbed.add(site)
        x = given[0]
        return output + F.linear(F.linear(x, V.to(x)), U.to(x)).to(output.dtype)

    return after
