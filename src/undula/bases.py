"""Quantised bases: reading a layer's matrix densely, and writing one back with the rounding it costs.

Served: ordinary weights of any floating type, torchao's quantised tensors (int8, int4 ...) and bitsandbytes' 4- and
8-bit layers.  Reading needs none of these packages imported here; writing requantises with the layer's own scheme.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDE = (torch.float32, torch.float64)


def is_plain(weight: Tensor) -> bool:
    """An ordinary dense floating-point tensor (not quantised, not a subclass with a layout of its own)."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def dense(module: nn.Module) -> Tensor:
    """The module's weight as an ordinary tensor, in the module's own orientation."""
    weight = module.weight
    if is_plain(weight):
        return weight
    if hasattr(weight, "quant_state"):  # bitsandbytes, 4 bit
        return _bnb().functional.dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # bitsandbytes, 8 bit: rows scaled by their absolute maximum
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * (scale.float()[:, None] / 127)
    if hasattr(weight, "dequantize"):  # torchao
        return weight.dequantize()
    raise TypeError(
        f"cannot read a weight of type {type(weight).__name__} ({weight.dtype}) as numbers; "
        "known are dense floats, torchao and bitsandbytes"
    )


def stored(module: nn.Module, W: Tensor) -> nn.Parameter:
    """`W` as a parameter in the form in which the module stores its weight (same type, same quantisation)."""
    weight = module.weight
    if is_plain(weight):
        return nn.Parameter(W.to(weight.dtype), requires_grad=False)
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        fresh = type(weight)(
            W.to(state.dtype).cpu(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,
        )
        return fresh.to(weight.device)
    if hasattr(weight, "SCB"):
        return type(weight)(W.to(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    return _torchao_like(weight, W)


def _bnb():
    import bitsandbytes

    return bitsandbytes


def _torchao_like(weight: Tensor, W: Tensor) -> nn.Parameter:
    """A torchao tensor made of W by the recipe of `weight`."""
    from torchao.quantization import Int8Tensor

    if not isinstance(weight, Int8Tensor):
        raise TypeError(
            f"undula cannot requantise a {type(weight).__name__}: merge into a dense copy of the base instead "
            "(`undula merge --dense`), or keep the adapter apart"
        )
    like = Int8Tensor.from_hp(W.to(weight.dtype), granularity=_granularity(weight))
    return nn.Parameter(like, requires_grad=False)


def _granularity(weight: Tensor):
    from torchao.quantization import PerRow, PerTensor

    return PerTensor() if weight.scale.numel() == 1 else PerRow()
