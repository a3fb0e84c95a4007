"""Whether a method's factors of zero leave a layer as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.method import Additive, Method, Reweight


@torch.no_grad()
def zero_is_base(method: Method, f: Mapping[str, Tensor], shape: tuple[int, int]) -> bool:
    """Whether the layer is the base's where all trained factors are zero, seen at one layer of this shape."""
    method = method.undropped()
    zero = {k: torch.zeros_like(t) if t.requires_grad else t.detach() for k, t in f.items()}
    first = next(iter(f.values()))
    if isinstance(method, Additive):
        return not method.delta(zero).any()
    kind = first.dtype if first.is_floating_point() else torch.float32
    layer = Plain(torch.linspace(-1, 1, shape[0] * shape[1], dtype=kind, device=first.device).view(shape))
    if isinstance(method, Reweight):
        return torch.equal(method.weight(layer.weight, zero), layer.weight)
    x = torch.linspace(-1, 1, 2 * shape[1], dtype=kind, device=first.device).view(2, -1)
    return torch.equal(method.forward(x, layer, zero), layer(x))


class Plain:
    """A linear layer without anything else."""

    training, channel, plain, bias = False, -1, True, None

    def __init__(self, W_OI: Tensor):
        self.weight = W_OI

    def __call__(self, x: Tensor) -> Tensor:
        return self.project(x, self.weight)

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return x @ M_KI.T
