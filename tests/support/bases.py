"""Quantised models of every kind, from plain ones."""

import bitsandbytes as bnb
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerTensor,
    quantize_,
)

from undula.host.quantised import keep_gradients


def torchao(config):
    def make(model):
        quantize_(model, config)
        return model

    return make


def bits(layer, **options):
    """Every Linear of a Sequential as a bitsandbytes layer, quantised from the same weights."""

    def make(model):
        for i, m in enumerate(model):
            if isinstance(m, nn.Linear):
                new = layer(m.in_features, m.out_features, bias=m.bias is not None, **options)
                new.load_state_dict(m.state_dict())
                model[i] = new.to("cpu")
        keep_gradients(model)  # as `attach` does: the other product, of some CPUs, differs in rounding
        return model

    return make


FOUR = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
BASES = {
    "torchao int8": torchao(Int8WeightOnlyConfig()),
    "torchao int8, one scale": torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
    "torchao int4": torchao(IntxWeightOnlyConfig(**FOUR)),
    "torchao int4, shifted": torchao(IntxWeightOnlyConfig(**FOUR, mapping_type=MappingType.ASYMMETRIC)),
    "torchao float8": torchao(Float8WeightOnlyConfig()),
    "bitsandbytes nf4": bits(bnb.nn.Linear4bit, quant_type="nf4"),
    "bitsandbytes fp4": bits(bnb.nn.Linear4bit, quant_type="fp4", compress_statistics=False),
    "bitsandbytes int8": bits(bnb.nn.Linear8bitLt, has_fp16_weights=False),
}
