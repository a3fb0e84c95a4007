"""Weighted sums of adapters, and the averages among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import ABOVE, Adapter, Live
from ..core.method import Factors, Method
from ..methods.sum import added

Terms = Sequence[tuple[float, Adapter]]


def combined(terms: list[tuple[float, Adapter]]) -> Adapter:
    """The weighted sum of adapters.  Sums of sums are one sum, with each part once; where its rank passes that of the
    layer it becomes the layer's own, so that no chain of averages grows without end.  Parameters in full are averaged,
    see `Adapter.weight`."""
    values = {id(a): a.copy() if isinstance(a, Live) else a for _, a in terms}
    terms = [(w, values[id(a)]) for w, a in terms]
    factors: dict[str, Factors] = {}
    methods: dict[str, Method] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for site in dict.fromkeys(s for _, a in terms for s in a.factors):
        found = {a.shapes[site] for _, a in terms if site in a.factors}
        if len(found) > 1:
            raise ValueError(f"the adapters are for different models: {site} is {' and '.join(map(str, found))} (O, I)")
        shapes[site] = found.pop()
        parts = [(w, a.additive(site), a.factors[site]) for w, a in terms if site in a.factors]
        methods[site], factors[site] = added(parts, shapes[site])
    kernels = {site: kernel for _, a in terms for site, kernel in a.kernels.items()}
    apart = {site: why for _, a in terms for site, why in a.apart.items()}
    weight = sum(w * a.weight for w, a in terms)
    return Adapter(methods, factors, shapes, averaged(terms), kernels, agreed([a for _, a in terms]), apart, weight)


def agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all of them say of themselves."""
    return {k: v for k, v in adapters[0].about.items() if all(k in a.about and a.about[k] == v for a in adapters)}


def averaged(terms: Terms) -> dict[str, Tensor]:
    """`full` of a combination.  Raises ValueError where it is on the way to no average."""
    weight = sum(w * a.weight for w, a in terms)
    names = sorted({n for _, a in terms for n in a.full})
    lacking = [n for n in names if any(n not in a.full for _, a in terms)]
    if lacking or (names and not 0 < weight < 1 + 1e-6):
        raise ValueError(
            f"adapters that train parameters in full cannot be added: {', '.join(lacking[:5] or names[:5])}. They have "
            "an average, of adapters that all have them and with weights that sum to 1 (0.5 * a + 0.5 * b); else drop "
            "`full` first (dataclasses.replace(adapter, full={}); undula combine --drop-full)"
        )
    orders = {tuple(a.about["classes"]) for _, a in terms if a.full and "classes" in a.about}
    if len(orders) > 1:
        raise ValueError(
            "the adapters' heads answer other classes, or the same in another order: "
            f"{' and '.join(str(list(order)[:8]) for order in sorted(orders))}. Train them with the same names "
            "(Classification(names=...)), or drop `full` first (dataclasses.replace(adapter, full={}); undula combine "
            "--drop-full)"
        )
    for n in names:
        shapes = dict.fromkeys(tuple(a.full[n].shape) for _, a in terms)
        if len(shapes) > 1:
            raise ValueError(
                f"{n} is {' and '.join(map(str, shapes))} in the adapters, which has no average: heads of tasks that "
                "answer other things. Drop `full` first (dataclasses.replace(adapter, full={}); undula combine "
                "--drop-full)"
            )
    return {n: mixed((w, a.full[n]) for w, a in terms) for n in names}


@torch.no_grad()
def mixed(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i t_i, computed in float32 or wider and rounded once, to the widest type of them; one is held at a time.
    It trains where the first does."""
    total, kind, trains = None, None, False
    for w, t in parts:
        kind = t.dtype if kind is None else torch.promote_types(kind, t.dtype)
        wide = torch.promote_types(kind, torch.float32)
        trains = t.requires_grad if total is None else trains
        total = w * t.to(wide) if total is None else total.to(wide) + w * t.to(wide)
    assert total is not None
    return total.to(kind).requires_grad_(trains)


ABOVE["combined"] = combined
