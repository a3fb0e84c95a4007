"""A base with 8-bit products, for CPUs without fast narrow floats: serving's option for speed.

    W_oi ~ s_o q_oi,   x_i ~ t p_i,   y_o = s_o t sum_i q_oi p_i + b_o,   s_o = max_i |W_oi| / 63,   t = max |x| / 127

q by output channel in seven bits, p by token in eight, so that the sum of two products fits into the 16 bits that AVX2
has for it.  Each token has its own scale: what one row of a batch gets does not depend on the others, as it does where
all have one (torch's dynamic quantisation).  The products are fbgemm's (Khudia et al. 2021, arXiv:2101.05615).  Not
differentiable.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS, TOKENS = 63, 127  # the largest q and p; the other way round, outliers of tokens cost three times as much


class Int8Linear(nn.Linear):
    """A linear layer whose weight is int8 by output channel."""

    scale: Tensor

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.weight.shape
        scale = (layer.weight.detach().float().abs().amax(1) / WEIGHTS).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (layer.weight.detach().float() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale, persistent=True)
        self.format = _Format(layer.weight.dtype)
        self._packed: Any = None
        self.training = layer.training

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # an object of the library's own

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = _packed(self.weight, self.scale)
        x_TI = x.detach().reshape(-1, self.in_features).float()
        most_T1 = x_TI.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y_TO = product(x_TI / most_T1, 1 / TOKENS, TOKENS + 1, self._packed).mul_(most_T1)
        if self.bias is not None:
            y_TO.add_(self.bias)
        return y_TO.view(*x.shape[:-1], self.out_features).to(x.dtype)


class _Format:
    """How the host reads the weight of such a layer, see `host.quantised`."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def outline(self, module: nn.Module) -> Tensor:
        return torch.empty(module.weight.shape, dtype=self.dtype, device="meta")  # type: ignore[arg-type]

    def dense(self, module: nn.Module) -> Tensor:
        return (module.weight * module.scale[:, None]).to(self.dtype)  # type: ignore[operator,index]

    def stored(self, module: nn.Module, W: Tensor) -> nn.Parameter:
        raise TypeError("nothing is merged into a base in int8: merge into the base as it was, then make that int8")


def int8(model: nn.Module) -> int:
    """Puts 8-bit layers in the place of the model's `nn.Linear` ones, in place.  Returns how many.

    Before adapters are attached; they compute in float beside the 8-bit products.  Weights that other modules share (a
    head with the embedding) are kept there in float too.  Raises RuntimeError where this machine or torch has no such
    products, ValueError for a model that is not on a CPU, has adapters or no such layers (GPT-2's are Conv1D).
    """
    if "_undula" in model.__dict__:
        raise ValueError("adapters are attached to this model: make the base int8 first")
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layers, which int8 products are for")
    elsewhere = sorted({str(m.weight.device) for m in layers.values() if m.weight.device.type != "cpu"})
    if elsewhere:
        raise ValueError(f"int8 products are for CPUs; layers of this model are on {', '.join(elsewhere)}")
    _try()
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Int8Linear(layer))
    return len(layers)


def _packed(weight: Tensor, scale: Tensor) -> Any:
    zeros = torch.zeros(len(scale), dtype=torch.int64, device="cpu")
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        torch.backends.quantized.engine = "fbgemm"
        try:
            whole = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(whole, None)
        finally:
            torch.backends.quantized.engine = engine


def _try() -> None:
    """Raises RuntimeError where such products are not to be had."""
    try:
        layer, x = nn.Linear(64, 8, bias=False), torch.linspace(-1, 1, 128).view(2, 64)
        with torch.no_grad():
            off = (Int8Linear(layer)(x) - layer(x)).norm() / layer(x).norm()
    except Exception as error:
        raise RuntimeError(
            f"int8 products are not to be had here (torch {torch.__version__}): {error}. Serve the base in float32"
        ) from error
    if not off < 0.1:
        raise RuntimeError(f"int8 products are off by {off:.0%} on this machine. Serve the base in float32")
