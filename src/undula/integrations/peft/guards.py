"""Layers that a model never calls as layers: an adapter there would have no effect, and no error would say so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...host.readers import readers
from ...host.slots import never_called
from ...host.where import barriers

MAMBAS = ("mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1", "nemotron_h", "zamba2", "bamba", "granitemoehybrid")


def check_called(model: nn.Module, sites: Iterable[str]) -> None:
    """Raises ValueError for sites on which no adapter can act: layers that the model never calls, for one."""
    reading = {n: f"{type(m).__name__} reads its weight without calling it" for n, m in readers(model).items()}
    barred = {**reading, **barriers(model)}
    found = [s for s in sites if s in barred]
    if found:
        leaves = sorted({s.rpartition(".")[2] for s in found})
        kind = getattr(getattr(model, "config", None), "model_type", None)
        mamba = kind in MAMBAS  # PEFT's own words, which its users may look for
        what = f"Mamba-based models (model_type='{kind}')" if mamba else "adapters"
        raise ValueError(
            f"Module '{found[0]}' is incompatible with {what}: {barred[found[0]]}. {len(found)} of the chosen layers "
            f"are such; leave them out with exclude_modules={leaves}"
        )


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
