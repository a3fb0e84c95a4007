"""Grouped sparsity after SparseJEPA (Hartman, Varshney 2025, arXiv:2504.16140): an interpretation.

    R = sum over heads h and ranks j of |B[h, j]|

The paper adds a penalty after oi-VAE (Ainsworth et al. 2018): the weights of a latent to a group of features are zero
together, so that each latent serves few groups.  Of an adapter the latents are the ranks, the groups of features the
heads of a layer: column j of B is cut into pieces of a head's size.  Its weights and schedule were not to be had.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.ranges import NotNegative, PartShare
from .group_lasso import GroupLasso
from .groups import Groups, HeadRanks
from .penalty import Penalty


@Penalty.register
@dataclass(frozen=True)
class SparseGroups(GroupLasso):
    """Group lasso over the pieces of B that one rank writes into one head: each rank serves few heads."""

    source = "Hartman, Varshney 2025, arXiv:2504.16140 (SparseJEPA)"
    grade = "interpretation"

    weight: NotNegative = 1e-3
    groups: Groups = HeadRanks()
    after: PartShare = 0.0
