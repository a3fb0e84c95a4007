"""Adapters behind trained gates: see `undula.methods.fusion`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.adapter import Adapter, Live
from ..core.method import Factors, Method
from ..io.sites import walk
from ..methods.fusion import GATES, OPEN, Fusion
from ..methods.sum import together
from .combiner import LARGEST, Missing, SameBase, check_one_base, equal_names, missing, one_each
from .weighted import agreed, averaged


def fused(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    same_base: SameBase = equal_names,
    *,
    share: float = 1.0,
) -> Adapter:
    """The adapters side by side behind gates that do not move the function yet: that of their sum, or of this `share`
    of it (1 / len(adapters): their average).  Of any rung.

    What trains are the gates, five vectors (O) at each layer; the adapters' own factors are frozen.  A layer that only
    some adapt has gates over those alone, with a `Missing` warning.  Parameters in full are averaged by `weights`,
    which are for these alone (default: equal); they train on.

    Raises ValueError for no adapters, a share that is not above 0, weights where nothing is in full, and adapters of
    other bases, or whose parameters in full have no average.
    """
    if not 0 < share <= LARGEST:
        raise ValueError(f"share is how much of the adapters' sum gates begin with, above 0; found {share!r}")
    shares = one_each([1 / len(adapters)] * len(adapters) if weights is None else weights, len(adapters))
    values = [a.copy() if isinstance(a, Live) else a for a in adapters]
    if weights is not None and not any(a.full for a in values):
        raise ValueError(
            "weights are for what adapters train in full, and these train nothing so: gates weigh the adapters "
            "themselves. Leave the weights out"
        )
    full = averaged(list(zip(shares, values, strict=True)))
    check_one_base(values, same_base)
    for told in missing(values):
        warnings.warn(told, Missing, stacklevel=2)
    methods: dict[str, Method] = {}
    factors: dict[str, Factors] = {}
    shapes: dict[str, tuple[int, int]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    apart: dict[str, str] = {}
    for site, parts in walk(values):
        there = [part for part in parts if part is not None]
        own = together(part.factors[site] for part in there)
        gates = _gates(own, there[0].shapes[site][0], share)
        methods[site] = Fusion(tuple(part.methods[site] for part in there))
        factors[site] = {k: t.detach() for k, t in own.items()} | gates
        shapes[site] = there[0].shapes[site]
        for part in there:
            kernels |= part.kernels
            apart |= part.apart
    return Adapter(methods, factors, shapes, full, kernels, agreed(values), apart)


def _gates(own: Factors, O: int, share: float) -> dict[str, Tensor]:
    """Gates (O) that let through this share of the sum of the parts that have these factors."""
    kind = next(t.dtype for t in own.values() if t.is_floating_point())
    wide, device = torch.promote_types(kind, torch.float32), next(iter(own.values())).device
    begin = {name: share * OPEN if name == "w_out" else 0.0 for name in GATES}
    return {name: torch.full((O,), b, dtype=wide, device=device, requires_grad=True) for name, b in begin.items()}
