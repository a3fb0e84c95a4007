"""Matrices of one shape as slices of a tensor: where a site stands in it, and its attention heads.

Not a method: what those that stack the matrices of a model have in common.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..core.method import Site


class Place(NamedTuple):
    """Which layer of the model, and which kind of matrix there.  No two sites of a model have one place."""

    layer: int
    kind: str


def place(name: str) -> Place:
    """`model.layers.3.mlp.up` is the kind `model.layers.*.mlp.up` of layer 3.

    The first part of the name that is a number counts; a further number (an expert's, a block's within a stage) stays
    in the kind.  A name without numbers is of layer 0.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return Place(int(part), ".".join([*parts[:i], "*", *parts[i + 1 :]]))
    return Place(0, name)


def places(site: Site) -> list[Place]:
    """The places of the peers of this site's shape, itself included."""
    return [place(name) for name, shape in site.peers.items() if shape == site.shape]


def divisor(size: int, heads: int) -> int:
    """The largest divisor of `size` that is not above `heads`: an axis that heads do not divide has fewer."""
    small = [h for h in range(1, math.isqrt(size) + 1) if size % h == 0]
    return max(h for h in (*small, *(size // h for h in small)) if h <= heads)


def by_head(H_hR: Tensor, B_ER: Tensor) -> Tensor:
    """(h E, R): row E q + j is H[q] * B[j] (the Khatri-Rao product), the E rows of a head next to each other."""
    return (H_hR[:, None] * B_ER).flatten(0, 1)
