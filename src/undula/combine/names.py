"""Ways to combine by the names that people know them by: points on the two axes of `Merge`, and those that are their
own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..core.choice import plain
from ..core.options import changed
from .combiner import Combiner
from .consensus import Elect, Sum
from .lego import LEGO
from .merge import Aligned, Merge
from .slerp import Slerp
from .sparsify import DARE, DELLA, Breadcrumbs, Magnitude

SIGNED = Elect(Sum())
NAMED: dict[str, Combiner] = {
    "average": Merge(),
    "linear": Merge(),
    "stack": Merge(consensus=Sum()),
    "task-arithmetic": Merge(consensus=Sum()),
    "svd": Merge(consensus=Sum()),
    "ties": Merge(Magnitude(), Elect()),
    "magnitude": Merge(Magnitude(), Sum()),
    "dare": Merge(DARE(), Sum()),
    "dare-ties": Merge(DARE(), SIGNED),
    "della": Merge(DELLA(), SIGNED),
    "della-linear": Merge(DELLA(), Sum()),
    "breadcrumbs": Merge(Breadcrumbs(), Sum()),
    "breadcrumbs-ties": Merge(Breadcrumbs(), SIGNED),
    "knots": Merge(Magnitude(), Elect(), Aligned()),
    "knots-dare": Merge(DARE(), SIGNED, Aligned()),
    "slerp": Slerp(),
    "lego": LEGO(),
}


def named(
    name: str,
    options: Iterable[str] = (),
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Combiner:
    """The way to combine of that name, with options as texts (`consensus.then=sum`) and those that have an own name.
    Raises LookupError that lists the names, ValueError for an option that this way does not have or lacks."""
    known = {plain(each): combiner for each, combiner in NAMED.items()}
    if plain(name) not in known:
        raise LookupError(f"no way to combine is called {name!r}; there are: {', '.join(NAMED)}, regmean, gates")
    made: Any = changed(known[plain(name)], options)
    if density is not None:
        kind = getattr(made, "sparsify", None)
        if kind is None or not hasattr(kind, "density"):
            raise ValueError(
                f"{name} leaves nothing out, so it has no density; ties, dare, della, breadcrumbs have one"
            )
        made = dataclasses.replace(made, sparsify=dataclasses.replace(kind, density=density))
    for option, value in (("rank", rank), ("seed", seed)):
        if value is not None:
            if not hasattr(made, option):
                raise ValueError(f"{name} draws nothing: it has no {option}")
            made = dataclasses.replace(made, **{option: value})
    if plain(name) == "svd" and made.rank is None:
        raise ValueError("svd is the sum, cut to a rank: say which (--rank 16; rank=16)")
    return made
