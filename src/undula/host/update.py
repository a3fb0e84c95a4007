"""What an adapter changes at a layer of a model, as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.method import Additive, Factors, Method, Reweight
from .host import layer_at


def update(site: str, m: Method, f: Factors, model: nn.Module | None) -> Tensor:
    """dW (O, I) of a mergeable method; below the Additive rung it is W' - W, which needs the model."""
    if isinstance(m, Additive):
        return m.delta(f)
    assert isinstance(m, Reweight)
    assert model is not None
    layer = layer_at(model, site)
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    W_OI = layer.weight.to(wide)
    return m.weight(W_OI, f) - W_OI
