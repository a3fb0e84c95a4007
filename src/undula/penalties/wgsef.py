"""WGSEF, the weighted group sparse envelope (Refael, Arbel, Huleihel 2022, arXiv:2212.12921): at most k groups are not
zero, k chosen in advance.

    f(x) = 1/2 sum of d_g |x_g|^2 where at most k groups are not zero, else infinite;   R = f**, its convex envelope

    f*(y)   = 1/2 sum of the k largest |y_g|^2 / d_g
    f**(x)  = min over 0 <= u <= 1, sum u <= k, of 1/2 sum d_g |x_g|^2 / u_g
    prox_l  : x_g = v_g u_g / (u_g + l d_g),   u_g = clip(sqrt(l d_g) |v_g| t - l d_g, 0, 1),   t from sum u = k

With d = 1 it is half the squared k-support norm of groups.  The closed forms are derived, not copied, and checked by
minimisation; how the paper weighs groups is not known here (d_g = size_g ** power), so the weights are an
interpretation.  An envelope alone leaves more than k groups: after the share `settle` of the updates the k with the
largest |x_g|^2 / d_g stay (what prox_l keeps as l grows), the others are zero from there on, and what stays trains on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.ranges import NotNegative, PartShare, Share, SomeShare
from ..ranks.procedure import Quality
from .grouped import Grouped
from .groups import Groups, Ranks
from .penalty import Penalty
from .proximal import Settling, SettlingCourse


def levels(a: Tensor, c: Tensor, k: float) -> Tensor:
    """u = clip(a t - c, 0, 1) with t > 0 from sum u = k; where fewer than k of a are not zero, 1 for each of those.

    sum u is monotone and linear between the 2 G points c / a and (1 + c) / a, so t is found exactly.
    """
    there = a > 0
    if int(there.sum()) <= k:
        return there.to(a)
    a_g, c_g = a[there].double(), c[there].double()
    points, order = torch.cat((c_g / a_g, (1 + c_g) / a_g)).sort()
    slopes = torch.cat((a_g, -a_g))[order].cumsum(0)  # of sum u, after each point
    sums = torch.cat((points.new_zeros(1), (slopes[:-1] * points.diff()).cumsum(0)))  # at each point
    i = int((sums < k).sum()) - 1  # the last point before k is reached
    t = points[i] + (k - sums[i]) / slopes[i] if i >= 0 else points[0]
    found = torch.zeros_like(a)
    found[there] = (a_g * t - c_g).clamp(0, 1).to(a)
    return found


def envelope(norms: Tensor, d: Tensor, k: int) -> Tensor:
    """f** of groups of these sizes."""
    u = levels(d.sqrt() * norms, torch.zeros_like(norms), k)
    return torch.where(u > 0, d * norms.square() / u.clamp_min(torch.finfo(u.dtype).tiny), 0.0).sum() / 2


def conjugate(norms: Tensor, d: Tensor, k: int) -> Tensor:
    """f*."""
    return (norms.square() / d).topk(min(k, len(norms))).values.sum() / 2


def factors(norms: Tensor, d: Tensor, k: int, step: Tensor) -> Tensor:
    """What prox_l multiplies each group by; 1 where l is 0."""
    if k == 0:
        return torch.zeros_like(norms)
    ld = step * d
    u = levels(ld.sqrt() * norms, ld, k)
    return torch.where(ld > 0, u / (u + ld).clamp_min(torch.finfo(u.dtype).tiny), 1.0)


@Penalty.register
@dataclass(frozen=True)
class WGSEF(Settling):
    """The envelope of having `sparsity` of all groups at zero, and from the share `settle` of the updates on exactly
    so many.  It begins after the share `after`."""

    source = "Refael, Arbel, Huleihel 2022, arXiv:2212.12921"
    grade = "interpretation"

    weight: NotNegative = 1e-2
    sparsity: PartShare = 0.5
    groups: Groups = Ranks()
    power: Share = 0.0  # d_g = (size_g / mean size) ** power
    after: PartShare = 0.0
    settle: SomeShare = 0.75

    @property
    def fixed(self) -> bool:
        return True

    def kept(self, groups: int) -> int:
        """k: how many of so many groups stay."""
        return groups - round(self.sparsity * groups)

    def weights(self, grouped: Grouped) -> Tensor:
        """d."""
        return (grouped.sizes / grouped.sizes.mean()) ** self.power

    def value(self, grouped: Grouped) -> Tensor:
        return envelope(grouped.norms(), self.weights(grouped), self.kept(grouped.count))

    def factors(self, grouped: Grouped, norms: Tensor, step: Tensor) -> Tensor:
        return factors(norms, self.weights(grouped), self.kept(grouped.count), step)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, quality: Quality | None = None
    ) -> WGSEFCourse:
        return WGSEFCourse(self, model, optimizer, steps)


class WGSEFCourse(SettlingCourse):
    """The k largest groups stay."""

    how: WGSEF

    def staying(self, grouped: Grouped) -> Tensor:
        size = grouped.squares() / self.how.weights(grouped)
        stays = torch.zeros_like(size)
        stays[size.topk(self.how.kept(grouped.count)).indices] = 1.0
        return stays
