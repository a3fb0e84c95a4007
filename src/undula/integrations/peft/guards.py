"""Layers that a model never calls as layers: an adapter there would have no effect, and no error would say so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...host import never_called
from ...sites import _reads_weights

# What fused kernels, or the model itself, read as `self.<name>.weight` (transformers 5; PEFT's own list for LoRA has
# out_proj and conv1d of five of these).
_MIXER = ("out_proj", "conv1d")
READ = {
    "mamba": ("x_proj", "dt_proj", *_MIXER),
    "falcon_mamba": ("x_proj", "dt_proj", *_MIXER),
    "jamba": ("dt_proj", "conv1d"),
    "mamba2": _MIXER,
    "falcon_h1": _MIXER,
    "nemotron_h": _MIXER,
    "zamba2": _MIXER,
    "bamba": _MIXER,
    "granitemoehybrid": _MIXER,
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "deberta": ("in_proj",),
}


def check_called(model: nn.Module, sites: Iterable[str]) -> None:
    """Raises ValueError for sites whose weight the model reads without calling the layer."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = [s for s in sites if s.rpartition(".")[2] in READ.get(str(kind), ()) or _inside_attention(model, s)]
    if found:
        leaves = sorted({s.rpartition(".")[2] for s in found})
        what = f"Mamba-based models (model_type='{kind}')" if kind in READ and "conv1d" in READ[kind] else "this model"
        raise ValueError(
            f"Module '{found[0]}' is incompatible with {what}: its weight is read without the layer being called (by "
            f"fused kernels, or by the module around it), so an adapter there would have no effect. "
            f"{len(found)} of the chosen layers are such; leave them out with exclude_modules={leaves}"
        )


def _inside_attention(model: nn.Module, site: str) -> bool:
    parent, _, leaf = site.rpartition(".")
    if leaf != "out_proj":
        return False
    attention = model.get_submodule(parent)
    return isinstance(attention, nn.MultiheadAttention) and _reads_weights(attention)


def keep_slow(model: nn.Module, kind: type[nn.Module]) -> None:
    """torch's encoder layers have a fast path in evaluation that reads weights; one with a hook below it is called,
    and must not be given the nested tensors of that path."""
    for encoder in [m for m in model.modules() if isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer)]:
        below = [m for m in encoder.modules() if isinstance(m, kind)]
        for layer in below:
            if not layer._forward_hooks:
                layer.register_forward_hook(never_called)
        if below and isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False
