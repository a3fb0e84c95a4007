"""Several adapters as one: (adapters, weights) -> adapter.

    combine.named("ties", density=0.2)([a, b, c])           # by a name that people know
    combine.Merge(DARE(0.5), Elect())([a, b, c], [1, 1, 2]) # or by its two axes

Sums and averages are there at once (`0.5 * a + 0.5 * b`); the rest is loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .weighted import combined

if TYPE_CHECKING:
    from .combiner import Combiner, Missing
    from .consensus import Average, Consensus, Elect, Sum
    from .folders import Combined, combine_directories
    from .fusing import fused
    from .lego import LEGO, Balanced, Principal
    from .merge import Aligned, Merge, Space, Update
    from .names import NAMED, named
    from .regmean import RegMean, grams
    from .slerp import Slerp
    from .sparsify import DARE, DELLA, Breadcrumbs, Everything, Magnitude, Sparsify

__all__ = ["DARE", "DELLA", "LEGO", "NAMED", "Aligned", "Average", "Balanced", "Breadcrumbs", "Combined", "Combiner",
           "Consensus", "Elect", "Everything", "Magnitude", "Merge", "Missing", "Principal", "RegMean", "Slerp",
           "Space", "Sparsify", "Sum", "Update", "combine_directories", "combined", "fused", "grams",
           "named"]  # fmt: skip

WHERE = {
    "combiner": ("Combiner", "Missing"),
    "consensus": ("Average", "Consensus", "Elect", "Sum"),
    "folders": ("Combined", "combine_directories"),
    "fusing": ("fused",),
    "lego": ("LEGO", "Balanced", "Principal"),
    "merge": ("Aligned", "Merge", "Space", "Update"),
    "names": ("NAMED", "named"),
    "regmean": ("RegMean", "grams"),
    "slerp": ("Slerp",),
    "sparsify": ("DARE", "DELLA", "Breadcrumbs", "Everything", "Magnitude", "Sparsify"),
}
PLACES = {name: module for module, names in WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
    return found
