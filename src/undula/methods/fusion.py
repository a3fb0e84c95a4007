"""Fusion: adapters side by side, each behind a gate that sees the layer's output and its own (AutoLoRA 2025,
arXiv:2508.02107).

    y = o + sum_i w_out * g_i * l_i,   g_i = sigmoid(w_o * LN(o) + w_l * LN(l_i) + w_ol * LN(o) * LN(l_i) + b)

o is the frozen layer's output, l_i what adapter i adds to it, LN takes mean and deviation out over the O features, and
products are entry by entry.  The five vectors (O) are the same for all adapters, so their number and order do not
count, and one that adds nothing changes nothing.  They start at w = 0, b = 0, w_out = 2: every gate is half open and
the function is that of the sum.  (diffsynth starts at w_out = 1 and random gates: at half the sum.)

    fused = undula.combine.fused([a, b, c])      # values in, value out; the adapters' own factors are frozen in it
    adapter = undula.attach(model, fused)        # what trains are the gates
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.method import Additive, Factors, Layer, Method, Site
from ..kernels import reference
from .lora import LoRA
from .sum import apart, together

GATES = ("w_o", "w_l", "w_ol", "b", "w_out")
OPEN = 2.0  # of w_out: half a gate is the whole adapter


class _Silent:
    """A layer that adds nothing itself: what a method on the Additive rung gives is the change alone."""

    plain = False  # no fused product computes the layer's own

    def __init__(self, layer: Layer, o: Tensor):
        self._layer, self._o = layer, o
        self.training, self.channel, self.bias = layer.training, layer.channel, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.zeros_like(self._o, dtype=torch.promote_types(self._o.dtype, torch.float32))

    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return self._layer.project(x, M_KI)


@dataclass(frozen=True)
class Fusion(Method):
    """`parts` (any methods) behind trained gates."""

    formula = "y = o + sum_i w_out g(o, l_i) l_i"
    parameters = "sum(parts) + 5*O"
    source = "AutoLoRA 2025, arXiv:2508.02107 (DiffSynth-Studio)"
    beside = ()

    parts: tuple[Method, ...] = (LoRA(r=2), LoRA(r=2))

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a Fusion needs at least one part")

    def init(self, site: Site) -> dict[str, Tensor]:
        gates = {name: site.zeros(site.shape[0]) for name in GATES}
        gates["w_out"] = gates["w_out"] + OPEN
        return together(m.init(site) for m in self.parts) | {k: t.requires_grad_() for k, t in gates.items()}

    def again(self, site: Site, f: Factors) -> dict[str, Tensor]:
        own = zip(self.parts, apart(f, len(self.parts)), strict=True)
        gates = {k: t for k, t in self.init(site).items() if k in GATES}
        return together(m.again(site, part) for m, part in own) | gates

    def rebuilt(self, site: Site) -> dict[str, Tensor]:
        return together(m.rebuilt(site) for m in self.parts)

    def check(self, site: Site, f: Factors) -> None:
        for method, own in zip(self.parts, apart(f, len(self.parts)), strict=True):
            method.check(site, own)

    @property
    def bottleneck(self) -> bool:
        return any(m.bottleneck for m in self.parts)

    @property
    def drops(self) -> bool:
        return any(m.drops for m in self.parts)

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        o = layer(x)
        change = None
        silent, n_o = _Silent(layer, o), _normed(o, layer, f["w_o"].dtype)
        for method, own in zip(self.parts, apart(f, len(self.parts)), strict=True):
            part = method.forward(x, silent, own) if isinstance(method, Additive) else method.forward(x, layer, own) - o
            l_TO = part.movedim(layer.channel, -1).to(n_o.dtype)
            n_l = F.layer_norm(l_TO, l_TO.shape[-1:])
            gate = torch.sigmoid(f["w_o"] * n_o + f["w_l"] * n_l + f["w_ol"] * (n_o * n_l) + f["b"])
            term = f["w_out"] * gate * l_TO
            change = term if change is None else change + term
        assert change is not None
        return reference.added(o, reference.restore(change, layer))


def _normed(o: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """LN(o), channels last, in the gates' type or a wider one."""
    o_TO = o.movedim(layer.channel, -1)
    return F.layer_norm(o_TO.to(torch.promote_types(o.dtype, dtype)), o_TO.shape[-1:])
