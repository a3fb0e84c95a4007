"""Which rows or columns of W train: the sides and selections of S2FT (Yang et al. 2024, arXiv:2412.06289)."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choice import Choice
from ..core.method import Site
from ..core.ranges import Seed
from ..kernels import frozen

# The last parts of the names of layers that read what heads or channels made.
READERS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "output.dense",
    "self_attention.dense",
    "dense_4h_to_h",
    "attn.proj",
    "fc2",
    "linear2",
    "o",
    "wo",
    "w2",
    "lin2",
    "out_lin",
)


class Side(Choice):
    """Whether rows of W (output channels) or columns (input channels) are selected."""

    @abc.abstractmethod
    def rows(self, name: str) -> bool:
        """True: rows.  `name` is the site's."""


@Side.register
@dataclass(frozen=True)
class Outputs(Side):
    """Rows everywhere: what layers such as q, k, v, up and gate make."""

    def rows(self, name: str) -> bool:
        return True


@Side.register
@dataclass(frozen=True)
class Inputs(Side):
    """Columns everywhere: what layers such as o and down read."""

    def rows(self, name: str) -> bool:
        return False


@Side.register
@dataclass(frozen=True)
class ByName(Side):
    """Columns of the layers whose names end in one of `readers`, rows of all others."""

    readers: tuple[str, ...] = READERS

    def rows(self, name: str) -> bool:
        return not any(name == reader or name.endswith("." + reader) for reader in self.readers)


def block(name: str) -> str:
    """The attention or MLP that a layer belongs to: its name up to the last number, and which of the two.

    `model.layers.3.self_attn.v_proj` and `...o_proj` are of `model.layers.3 attention`.
    """
    numbered = re.match(r"(?:.*\.)?\d+(?=\.)", name)
    stem = numbered.group() if numbered else name.rpartition(".")[0]
    part = name[len(stem) :].lower()
    return f"{stem} {'attention' if 'att' in part else 'mlp'}"


class Extreme(Choice):
    """Which end of the scores is kept."""

    descending: ClassVar[bool]


@Extreme.register
@dataclass(frozen=True)
class Largest(Extreme):
    """The largest scores."""

    descending = True


@Extreme.register
@dataclass(frozen=True)
class Smallest(Extreme):
    """The smallest scores."""

    descending = False


class Selection(Choice):
    """An order of the units (heads or channels) of a layer: the first ones are selected."""

    seeded: ClassVar[bool] = False  # configuration, name and shape determine the order: no file holds it

    @abc.abstractmethod
    def __call__(self, site: Site, rows: bool, unit: int) -> Tensor:
        """(units,) int64; unit i has the channels i unit ... (i + 1) unit - 1."""


@Selection.register
@dataclass(frozen=True)
class Random(Selection):
    """A random order (S2FT-R), the same for all layers of a block that have as many units."""

    seeded = True
    seed: Seed = 0

    def __call__(self, site: Site, rows: bool, unit: int) -> Tensor:
        units = site.shape[0 if rows else 1] // unit
        return frozen.permutation(self.seed, ("S2FT", block(site.name)), units).to(site.device)


class _Scored(Selection):
    """By a score of the channels, summed over a unit.  The first layer of a block (in the model's order) decides for
    all that have as many units."""

    keep: Extreme

    @abc.abstractmethod
    def score(self, site: Site, rows: bool) -> Tensor:
        """One number per row (O) or per column (I) of W."""

    def __call__(self, site: Site, rows: bool, unit: int) -> Tensor:
        def order() -> Tensor:
            score = self.score(site, rows).view(-1, unit).sum(1)
            return torch.sort(score, descending=self.keep.descending, stable=True).indices

        return site.once(("S2FT", self, block(site.name), site.shape[0 if rows else 1] // unit), order)


@Selection.register
@dataclass(frozen=True)
class Weight(_Scored):
    """The norms of rows or columns of W, squared (S2FT-W)."""

    keep: Extreme = Largest()

    def score(self, site: Site, rows: bool) -> Tensor:
        return site.W.square().sum(1 if rows else 0)


@Selection.register
@dataclass(frozen=True)
class Activation(_Scored):
    """The channels' mean squares over the batches of a probe: of (W x)_o for rows, of x_i for columns (S2FT-A)."""

    keep: Extreme = Largest()

    def score(self, site: Site, rows: bool) -> Tensor:
        xx_II, _, n = site.moments()
        W_OI = site.W.double()
        return ((W_OI @ xx_II) * W_OI).sum(1) / n if rows else xx_II.diagonal() / n


@Selection.register
@dataclass(frozen=True)
class WeightActivation(_Scored):
    """|W| times the root mean square of its input, summed over a row or column (S2FT-S; after Wanda's score)."""

    keep: Extreme = Largest()

    def score(self, site: Site, rows: bool) -> Tensor:
        xx_II, _, n = site.moments()
        return (site.W.abs() * (xx_II.diagonal() / n).sqrt()).sum(1 if rows else 0)


@Selection.register
@dataclass(frozen=True)
class Gradient(_Scored):
    """The norms of rows or columns of dL/dW, squared (S2FT-G)."""

    keep: Extreme = Largest()

    def score(self, site: Site, rows: bool) -> Tensor:
        return site.gradient().square().sum(1 if rows else 0)
