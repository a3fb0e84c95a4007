"""Quantised bases: reading a layer's matrix as numbers, and writing one back with the rounding that it costs.

Served, besides ordinary weights: bitsandbytes' 4-bit (nf4, fp4) and 8-bit layers, and torchao's weight-only tensors
(`Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`, `Float8WeightOnlyConfig`).  The frozen product is always the layer's
own; a matrix is dequantised where a method needs one (DoRA's norms, a merge), and requantised in its own format.
Neither package is imported before one of its layers is met.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

WIDE = (torch.float32, torch.float64)
SHARD = (
    "is one process's shard (a DTensor: tensor parallel, FSDP2), and an adapter stands on whole weights. Load the "
    "model whole (without tp_plan, before parallelize_module or fully_shard) and attach to it; then fully_shard cuts "
    "base and adapter, or DistributedDataParallel spreads the rows"
)


PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # the last two: the same under `torch.export`


class Format(Protocol):
    """How a module holds its weight."""

    def outline(self, module: nn.Module) -> Tensor:
        """A tensor with the matrix's shape and type, as the module has it; its numbers may be on no device."""

    def dense(self, module: nn.Module) -> Tensor:
        """The matrix as an ordinary tensor."""

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        """Another matrix in this format, with the module's own settings."""


def is_plain(weight: Tensor) -> bool:
    """An ordinary dense floating-point tensor (not quantised, not a subclass with a layout of its own)."""
    return type(weight) in PLAIN and weight.is_floating_point()


def outline(module: nn.Module) -> Tensor:
    """A tensor that has the shape and type of the module's matrix, perhaps without its numbers: costs nothing."""
    return format_of(module).outline(module)


def dense(module: nn.Module) -> Tensor:
    """The module's weight as an ordinary tensor, in the module's own orientation."""
    return format_of(module).dense(module)


def stored(module: nn.Module, W: Tensor) -> nn.Parameter:
    """`W` as a parameter in the form in which the module stores its weight (same type, same quantisation)."""
    return format_of(module).stored(module, W)


def format_of(module: nn.Module) -> Format:
    """The format of the module's weight.  Raises TypeError for one that cannot be read as numbers."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_plain(weight):
        return _Plain()
    if "format" in module.__dict__:  # of one that tells its own
        return module.__dict__["format"]
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        if weight.is_floating_point():
            raise TypeError(
                f"this {type(module).__name__} is not quantised yet: bitsandbytes does it when the model is moved to "
                "its device. Call model.to('cpu') (or 'cuda') first"
            )
        return _Bits4() if hasattr(weight, "quant_state") else _Bits8()
    if type(weight).dequantize is not Tensor.dequantize and getattr(weight, "act_pre_scale", None) is None:
        return _TorchAO()
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"the weight of this {type(module).__name__} {SHARD}")
    raise TypeError(
        f"undula cannot read a weight of type {type(weight).__name__} ({weight.dtype}) as numbers; it reads dense "
        "floats, bitsandbytes' 4- and 8-bit and torchao's weight-only tensors. Leave that layer out of `where`"
    )


class _Plain:
    def outline(self, module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    dense = outline

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        return nn.Parameter(W.to(module.weight.dtype), requires_grad=False)  # type: ignore[arg-type]


class _Bits4:
    """bitsandbytes' Params4bit: packed integers, and a `quant_state` that tells shape, type, blocks and scales."""

    def _packed(self, module: nn.Module) -> tuple[Tensor, Any]:
        """(data, state) in the portable packing.  On CPUs with AVX512-BF16 the layer repacks itself in evaluation."""
        weight: Any = module.weight
        state = weight.quant_state if weight.quant_state is not None else module.quant_state
        if not getattr(state, "packing_format_for_cpu", False):
            return weight.data, state
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state = copy.copy(state)  # the function writes into it
        return _convert_weight_packed_for_cpu_inverse(weight.data, state)  # type: ignore[arg-type]

    def outline(self, module: nn.Module) -> Tensor:
        state = self._packed(module)[1]
        return torch.empty(state.shape, dtype=state.dtype, device="meta")

    def dense(self, module: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self._packed(module))

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        weight: Any = module.weight
        state = self._packed(module)[1]
        fresh = type(weight)(
            W.to(state.dtype).cpu(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,
        )
        return fresh.to(weight.device)


class _Bits8:
    """bitsandbytes' Int8Params: rows of int8, each with its largest magnitude (`SCB`)."""

    def outline(self, module: nn.Module) -> Tensor:
        return torch.empty(module.weight.shape, dtype=torch.float32, device="meta")  # type: ignore[arg-type]

    def dense(self, module: nn.Module) -> Tensor:
        weight: Any = module.weight
        if weight.SCB is None:
            # The layer's first forward moves the scales from the weight into its state.  Back on the weight, they go
            # where it goes (`unmerge` puts it back), and the next forward moves them again.
            weight.CB, weight.SCB = weight.data, module.state.SCB  # type: ignore[union-attr]
        return weight.data.float() * (weight.SCB.float()[:, None] / 127)

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        weight: Any = module.weight
        return type(weight)(W.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)


class _TorchAO:
    """torchao's tensor subclasses: they tell their own shape and type and dequantise themselves."""

    def outline(self, module: nn.Module) -> Tensor:
        return torch.empty(module.weight.shape, dtype=module.weight.dtype, device="meta")  # type: ignore[arg-type]

    def dense(self, module: nn.Module) -> Tensor:
        return module.weight.dequantize()  # type: ignore[operator]

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        weight: Any = module.weight
        again = REQUANTISE.get(type(weight).__name__)
        if again is None:
            raise TypeError(
                f"undula cannot write into a {type(weight).__name__}; it can into {', '.join(REQUANTISE)} and "
                "bitsandbytes' layers. Keep the adapter apart, or merge it into a dense copy of the base"
            )
        return nn.Parameter(again(weight, W.to(weight.dtype)), requires_grad=False)


def _int8(weight: Any, W: Tensor) -> Tensor:
    from torchao.quantization import PerBlock

    return type(weight).from_hp(
        W,
        PerBlock(tuple(weight.block_size)),
        _mapping(weight),
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        reduce_range=weight.reduce_range,
    )


def _intx(weight: Any, W: Tensor) -> Tensor:
    kept = {"mapping_type": _mapping(weight), "activation_quantization": weight.activation_quantization}
    return type(weight).from_hp(W, weight.block_size, weight.target_dtype, **kept)


def _float8(weight: Any, W: Tensor) -> Tensor:
    from torchao.quantization import PerBlock

    return type(weight).from_hp(
        W,
        weight.qdata.dtype,
        PerBlock(tuple(weight.block_size)),
        weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _mapping(weight: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC


REQUANTISE = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Float8Tensor": _float8}

# Quantised activations: such a layer is no differentiable function of its input.

CUT = (
    "no gradient passes through {what}, which quantises activations too: adapters below it would not learn. Train over "
    "weight-only quantisation (torchao's Int8WeightOnlyConfig, IntxWeightOnlyConfig, Float8WeightOnlyConfig, or "
    "bitsandbytes)"
)


def check_gradient(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raises RuntimeError where a gradient is wanted for x and y = module(x) has lost it."""
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        what = f"this {type(module).__name__} with a {type(module.weight).__name__}"
        raise RuntimeError(CUT.format(what=what) + "; for inference use torch.no_grad()")


def keep_gradients(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers in the packing whose product has a gradient.

    bitsandbytes repacks such a layer on its first evaluation on a CPU with AVX512-BF16.  The repacked product has no
    gradient: adapters below it would not learn (torch warns), or training ends with an error at the layer's bias.
    Repacked layers are put back; their scales stay rounded to bfloat16.
    """
    repacking: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in repacking:
        if layer.weight.quant_state is not None:
            layer.weight.data, layer.weight.quant_state = _Bits4()._packed(layer)
        layer.support_avx512bf16_for_cpu = False


def warn_where_cut(model: nn.Module) -> None:
    """Warns where layers, adapted or not, quantise their activations."""
    quantised = ("act_quant_kwargs", "activation_quantization")
    weights = {n: m.__dict__.get("_parameters", {}).get("weight") for n, m in model.named_modules()}
    cut = [n for n, w in weights.items() if any(getattr(w, a, None) is not None for a in quantised)]
    if cut:
        warnings.warn(CUT.format(what=f"{len(cut)} layers of this model (the first is {cut[0]})"), stacklevel=3)
