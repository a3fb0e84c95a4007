"""From gated ranks to a plain LoRA without the closed ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.adapter import Adapter
from ..core.method import LowRank, Method
from ..methods.dropout import Dropout
from ..methods.lora import Fixed, LoRA
from .gates import gate_of


@torch.no_grad()
def prune(adapter: Adapter) -> Adapter:
    """A detached copy without the ranks whose gate is exactly zero: plain LoRA sites, the gate taken into B, the scale
    that of the ranks there were.  Sites without a rank left are dropped, sites without a gate stay as they are.

    The function is the same: to the bit where the scale is a power of two, elsewhere to rounding.  Raises TypeError
    where nothing has a gate.
    """
    gated = {s: name for s, m in adapter.methods.items() if (name := gate_of(m)) is not None}
    if not gated:
        raise TypeError(
            f"{adapter.method!r} has no gate to prune by: GatedLoRA, SoRA and AdaLoRA have. "
            "collapse(Truncate(r)) cuts any adapter with an update dW to the rank r"
        )
    adapter = adapter.copy()
    methods, factors = dict(adapter.methods), dict(adapter.factors)
    pairs: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}  # sites that share one go on sharing it
    for site, name in gated.items():
        method, f = methods.pop(site), factors.pop(site)
        alive = f[name] != 0
        if not alive.any():
            continue
        if not isinstance(method, LowRank):
            raise TypeError(f"{method!r} at {site} has a gate, but no pair (B, A) to prune: it is on no LowRank rung")
        B_OR, A_RI = method.pair(f)
        s = getattr(method.undropped(), "scale", 1.0)
        pair = {"A": A_RI[alive].requires_grad_(), "B": (B_OR[:, alive] / s).requires_grad_()}
        factors[site] = pairs.setdefault(tuple(id(t) for t in f.values()), pair)
        methods[site] = _around(method, LoRA(r=int(alive.sum()), alpha=1.0, scaling=Fixed(s)))
    order = [s for s in adapter.methods if s in methods]
    return replace(
        adapter,
        methods={s: methods[s] for s in order},
        factors={s: factors[s] for s in order},
        shapes={s: adapter.shapes[s] for s in order},
        kernels={s: k for s, k in adapter.kernels.items() if s in methods},
        apart={s: why for s, why in adapter.apart.items() if s in methods},
    )


def _around(method: Method, lora: LoRA) -> Method:
    """`lora` inside the dropout that was around the gated method."""
    return replace(method, inner=_around(method.inner, lora)) if isinstance(method, Dropout) else lora
