"""Models in 4-bit groups as transformers' own format: `from_pretrained` opens them, `save_pretrained` writes them.

Importing this module tells transformers of the format.  Where that is not imported, transformers refuses such a folder:
its weights have other shapes than the architecture's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compress.gqsa import METHOD, Form, GQSALinear, compressed_layers, dense_of


class GQSAConfig(QuantizationConfigMixin):
    """The form, and the layers that have it."""

    def __init__(self, sparsity: float = 0.5, group: int = 16, layers: Any = (), **_: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.sparsity, self.group, self.layers = sparsity, group, sorted(layers)

    @property
    def form(self) -> Form:
        """Raises ValueError for what is none."""
        return Form(float(self.sparsity), int(self.group))


class GQSAQuantizer(HfQuantizer):
    """Opens and writes them."""

    quantization_config: GQSAConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("a model is brought into this form by `undula gqsa`, and opened as it is saved")
        if not self.quantization_config.layers or not all(isinstance(n, str) for n in self.quantization_config.layers):
            raise ValueError("the configuration names no layers that are in 4-bit groups: the folder is not whole")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        there = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
        form = self.quantization_config.form
        for said in self.quantization_config.layers:
            if (name := next((n for n in _called(model, said) if n in there), None)) is None:
                raise ValueError(f"{type(model).__name__} has no linear layer {said}, which the configuration names")
            layer = there[name]
            with torch.device("meta"):
                new = GQSALinear(layer.out_features, layer.in_features, form, layer.bias, layer.weight.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantised(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Scales and zeros in 16 bits."""
        short = {f"{n}.{leaf}" for n in compressed_layers(model) for leaf in ("scale", "zero")}
        return {k: t.half() if k in short else t for k, t in model.state_dict().items()}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _called(model: Any, name: str) -> tuple[str, ...]:
    """What a layer may be called here: with a head on the base model, and without."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def register() -> None:
    """Tells transformers of the format, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(GQSAConfig)
        register_quantizer(METHOD)(GQSAQuantizer)


register()


def marked(model: Any, form: Form) -> Any:
    """A model whose layers have been compressed, as transformers knows it: its configuration says so."""
    config = GQSAConfig(form.sparsity, form.group, compressed_layers(model))
    model.hf_quantizer = GQSAQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def dequantised(model: Any) -> Any:
    """The model with ordinary dense layers of the same numbers, in place."""
    for name, layer in compressed_layers(model).items():
        W = dense_of(layer)
        with torch.device("meta"):
            new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.weight = nn.Parameter(W, requires_grad=False)
        new.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model
