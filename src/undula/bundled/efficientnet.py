"""EfficientNet-Lite (Liu 2020, after Tan, Le 2019, arXiv:1905.11946) as a transformers model.

EfficientNet without squeeze-and-excitation and with ReLU6, so transformers' own EfficientNet does not fit its weights.
`register` makes transformers' Auto classes know it; whatever opens a model in undula calls it first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

TYPE = "undula-efficientnet-lite"
# (blocks, channels, kernel, stride of the first block, expansion) of the seven stages of Lite0
LITE0 = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """The widths and depths of a network; the defaults are those of Lite0."""

    model_type = TYPE

    def __init__(
        self, stem: int = 32, stages: Sequence[Sequence[int]] = LITE0, top: int = 1280, eps: float = 1e-3, **common: Any
    ):
        self.stem, self.top, self.eps = stem, top, eps
        self.stages = [list(stage) for stage in stages]
        super().__init__(**common)  # what all models have: labels, dtype ...


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads 'SAME': to ceil(input / stride), what is odd to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (self._pad(n, axis) for axis, n in enumerate(x.shape[-2:]))
        return super().forward(F.pad(x, (left, right, top, bottom)))

    def _pad(self, n: int, axis: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        missing = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        return missing // 2, missing - missing // 2


class Block(nn.Module):
    """Inverted residual: 1x1 convolution to more channels, depthwise convolution, 1x1 convolution back."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int, eps: float):
        super().__init__()
        wide = inner * expansion
        self.residual = stride == 1 and inner == outer
        self.expand = SameConv(inner, wide, 1, bias=False) if expansion > 1 else None
        self.expand_norm = nn.BatchNorm2d(wide, eps) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(wide, eps)
        self.project = SameConv(wide, outer, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(outer, eps)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = F.relu6(self.expand_norm(self.expand(y)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


class EfficientNetLitePreTrained(PreTrainedModel):
    """What the body and the classifier share."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"


class EfficientNetLiteModel(EfficientNetLitePreTrained):
    """The body: images (N, 3, H, W) to features (N, top, H/32, W/32), and to their mean (N, top)."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv(3, config.stem, 3, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(config.stem, config.eps)
        blocks, inner = [], config.stem
        for repeat, outer, kernel, stride, expansion in config.stages:
            for i in range(repeat):
                blocks.append(Block(inner, outer, kernel, stride if i == 0 else 1, expansion, config.eps))
                inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.top = SameConv(inner, config.top, 1, bias=False)
        self.top_norm = nn.BatchNorm2d(config.top, config.eps)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        x = F.relu6(self.stem_norm(self.stem(pixel_values.to(self.dtype))))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.top_norm(self.top(x)))
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean((2, 3)))


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrained):
    """The body with a linear classifier over the mean of its features."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.efficientnet = EfficientNetLiteModel(config)
        self.classifier = nn.Linear(config.top, self.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.efficientnet(pixel_values).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def register() -> None:
    """Makes `AutoModel`, `AutoModelForImageClassification` and `AutoConfig` open such folders in this process."""
    AutoConfig.register(TYPE, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
    AutoModelForImageClassification.register(
        EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True
    )


def renamed(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the PyTorch port (`_blocks.0._bn1.weight`) with the names used here.  A block that does not
    expand has no _bn0 there: its norms are numbered as if it had one."""
    inside = {"_expand_conv": "expand", "_bn0": "expand_norm", "_depthwise_conv": "depthwise",
              "_bn1": "depthwise_norm", "_project_conv": "project", "_bn2": "project_norm"}  # fmt: skip
    outside = {"_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "top", "_bn1": "top_norm"}
    state = {}
    for name, tensor in checkpoint.items():
        first, *rest = name.split(".")
        if first == "_fc":
            state[f"classifier.{rest[0]}"] = tensor
        elif first == "_blocks":
            number, part, leaf = rest
            state[f"efficientnet.blocks.{number}.{inside[part]}.{leaf}"] = tensor
        else:
            state[f"efficientnet.{outside[first]}.{rest[0]}"] = tensor
    return state
