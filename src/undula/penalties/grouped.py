"""The groups of an adapter as numbers: their norms, and what scales each of them.  See `groups` for what one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A factor, and the number of the group of each of its entries, as far as it broadcasts."""

    tensor: Tensor
    index: Tensor  # of integers; each of its sizes is the factor's or 1


@dataclass(frozen=True)
class Grouped:
    """An adapter's groups, numbered from 0."""

    parts: tuple[Part, ...]
    sizes: Tensor  # how many numbers each group has
    names: tuple[str, ...]  # of groups, or of what single entries lie in

    @staticmethod
    def of(parts: tuple[Part, ...], names: tuple[str, ...]) -> Grouped:
        """The groups of these parts, a name for each."""
        kind = torch.promote_types(max((p.tensor.dtype for p in parts), key=lambda d: d.itemsize), torch.float32)
        sizes = torch.zeros(len(names), dtype=kind, device=parts[0].tensor.device)
        for part in parts:
            _added(sizes, part, torch.ones_like(part.tensor, dtype=kind))
        return Grouped(parts, sizes, names)

    @property
    def count(self) -> int:
        return len(self.sizes)

    def squares(self) -> Tensor:
        """|x_g|^2 of every group, in float32 at least."""
        found = torch.zeros_like(self.sizes)
        for part in self.parts:
            _added(found, part, _wide(part.tensor.detach()).square())
        return found

    def norms(self) -> Tensor:
        """|x_g| of every group."""
        return self.squares().sqrt()

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """x_g <- factors_g x_g.  A factor of zero gives zeros, whatever was there."""
        for part in self.parts:
            by = factors.to(part.tensor.device)[part.index]
            part.tensor.copy_(torch.where(by == 0, 0.0, _wide(part.tensor) * by))

    def spread(self, values: Mapping[int, float]) -> Tensor:
        """What is known of each factor (by its id), for each group.  Raises ValueError where a group's factors
        differ in it."""
        least, most = torch.full_like(self.sizes, torch.inf), torch.full_like(self.sizes, -torch.inf)
        for part in self.parts:
            at, value = part.index.flatten().to(least.device), values[id(part.tensor)]
            least[at], most[at] = least[at].clamp(max=value), most[at].clamp(min=value)
        if (odd := (least != most).nonzero()).numel():
            g = int(odd[0])
            raise ValueError(
                f"the factors of {self.names[g] if g < len(self.names) else 'a group'} step at different rates, "
                f"{float(least[g]):g} and {float(most[g]):g}, and a group is drawn to zero at one: leave out b_ratio, "
                "or take groups that lie within one factor, such as Filters() or Entries()"
            )
        return least


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _added(found: Tensor, part: Part, values: Tensor) -> None:
    """Adds to each group the sum of its entries' values."""
    over = [d for d, n in enumerate(part.index.shape) if n == 1 and values.shape[d] > 1]
    values = values.sum(over, keepdim=True) if over else values
    found.index_add_(0, part.index.flatten().to(found.device), values.flatten().to(found))
