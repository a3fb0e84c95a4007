"""One file, one penalty: what a training lowers beside its loss.  Each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .penalty import Penalty

if TYPE_CHECKING:
    from .ba_lora import NLG, NLU, BALoRA
    from .group_lasso import GroupLasso
    from .groups import Adapters, Blocks, Entries, Filters, Gates, Groups, HeadRanks, Heads, Matrices, Ranks
    from .kl_to_base import KLToBase
    from .l1 import L1
    from .orthogonal import Orthogonal
    from .orthogonal_to_earlier import OrthogonalToEarlier
    from .sparse_groups import SparseGroups
    from .wgsef import WGSEF

__all__ = [
    "L1",
    "NLG",
    "NLU",
    "WGSEF",
    "Adapters",
    "BALoRA",
    "Blocks",
    "Entries",
    "Filters",
    "Gates",
    "GroupLasso",
    "Groups",
    "HeadRanks",
    "Heads",
    "KLToBase",
    "Matrices",
    "Orthogonal",
    "OrthogonalToEarlier",
    "Penalty",
    "Ranks",
    "SparseGroups",
]

PLACES = {
    "ba_lora": ("NLG", "NLU", "BALoRA"),
    "group_lasso": ("GroupLasso",),
    "groups": (
        "Adapters",
        "Blocks",
        "Entries",
        "Filters",
        "Gates",
        "Groups",
        "HeadRanks",
        "Heads",
        "Matrices",
        "Ranks",
    ),
    "kl_to_base": ("KLToBase",),
    "l1": ("L1",),
    "orthogonal": ("Orthogonal",),
    "orthogonal_to_earlier": ("OrthogonalToEarlier",),
    "sparse_groups": ("SparseGroups",),
    "wgsef": ("WGSEF",),
}
FILE = {name: file for file, names in PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in FILE:
        raise AttributeError(f"module {__name__} has no {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{FILE[name]}"), name)
