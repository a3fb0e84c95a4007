"""What an adapter must not be attached to, or hold: every refusal names the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.method import Factors, LowRank, Method, Reweight
from .quantised import SHARD
from .sharded import is_sharded
from .views import LinearView

if TYPE_CHECKING:
    pass


def check_padding(path: str, layer: LinearView, method: Method, f: Factors, kernel: tuple[int, ...] | None) -> None:
    """Raises ValueError for an adapter from where no row stays (PEFT's files; a base without padding) that moves what
    is padding here."""
    if kernel != () or layer.kernel == () or not isinstance(method, Reweight):
        return
    (row,) = layer.kernel or (0,)
    if isinstance(method, LowRank):
        _, A_RI = method.pair(f)
        moves = bool(A_RI[:, row].norm() > 1e-5 * A_RI.norm())
    else:
        W_OI = layer.weight
        moved_O = method.weight(W_OI, f)[:, row] - W_OI[:, row]
        moves = bool(moved_O.norm() > 1e-5 * W_OI[:, row].norm())
    if moves:
        raise ValueError(
            f"{path}: row {row} of this embedding is padding (padding_idx), which undula leaves as it is, and the "
            "adapter moves it. To compute with it moved, as PEFT does, set the layer's padding_idx to None before "
            "attaching; to leave it alone, set that column of the adapter's A (lora_embedding_A) to zero"
        )


def check_range(path: str, t: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where numbers would be infinite in the model's type."""
    if not (t.is_floating_point() and dtype.is_floating_point and t.numel()) or t.is_meta:
        return
    largest = torch.finfo(dtype).max
    if torch.finfo(t.dtype).max > largest and t.detach().abs().max() > largest:
        raise ValueError(f"the adapter's {path} holds numbers beyond the range of {dtype}, this model's type")


def check_layer(path: str, layer: LinearView, method: Method) -> None:
    """Raises an error where the method cannot act on what this layer computes."""
    check_there(path, layer)
    check_acts(path, layer, method)


def check_acts(path: str, layer: LinearView, method: Method) -> None:
    """`check_layer` of a layer that was seen by `check_there` before."""
    _check_groups(path, layer, method)
    _check_own_forward(path, layer, method)


def check_there(path: str, layer: LinearView) -> None:
    """Raises ValueError for a layer whose weight is not here, or not real."""
    if "undula" in layer.owner._modules:
        raise ValueError(
            f"{path} is adapted already, by an adapter on a part of this model or on a model around it: detach that "
            "one first, or attach both to the same model"
        )
    if nn.parameter.is_lazy(layer.module.weight):
        raise ValueError(
            f"{path} is a {type(layer.module).__name__} that has not seen an input: its weight has no shape yet. Call "
            "the model once, then attach"
        )
    if is_sharded(layer.module.weight):
        raise TypeError(f"the weight of {path} {SHARD}")
    if layer.module.weight.is_complex():
        raise ValueError(f"{path} has a complex weight, factors are real: leave that layer out (`exclude`)")
    if not layer.module.weight.is_meta:
        return
    if "_hf_hook" in layer.owner.__dict__:
        raise ValueError(
            f"the weight of {path} is offloaded: between its calls it is nowhere. Load the model without offloading "
            "(a device_map without 'cpu' and 'disk', more memory or fewer bits), or leave that layer out (`exclude`)"
        )
    raise ValueError(
        f"the weight of {path} is on the meta device, without numbers: load the model's weights first, attach then"
    )


def _check_own_forward(path: str, layer: LinearView, method: Method) -> None:
    """Raises TypeError where a method cannot go through the layer's own forward, see `adapted`."""
    if layer.product:
        return
    if layer.reader is not None:
        _check_read(path, layer, method)
        return
    what = f"{path}: {layer.call.__qualname__} is not W x + b"
    if layer.override is not None:
        raise TypeError(
            f"{what} (`forward` was replaced on the object), and no other weight can be given to it. Put it back, or "
            "leave that layer out (`exclude`)"
        )
    if layer.computes_weight:
        raise TypeError(
            f"{path}: {layer.cls.__name__} computes its weight: no other can be put in its place. Leave it out"
        )
    if not isinstance(method, Reweight):
        raise TypeError(
            f"{what}: only a method with an adapted weight can go through it, and {method!r} stands on the rung "
            f"{method.rung()}. Give that layer another by `overrides`, or leave it out (`exclude`)"
        )
    if method.drops:
        raise TypeError(
            f"{what}, and dropout acts beside W x alone. Give that layer a method without dropout by `overrides`, or "
            "leave it out (`exclude`)"
        )


def _check_read(path: str, layer: LinearView, method: Method) -> None:
    """Raises TypeError where a method names no weight for those who read it."""
    if isinstance(method, Reweight) and not method.drops:
        return
    why = "drops out beside W x" if isinstance(method, Reweight) else f"stands on the rung {method.rung()}"
    raise TypeError(
        f"{path} is a weight that {layer.reader} reads and no layer that it calls: only a method with an adapted "
        f"weight acts there (the rungs Reweight and above without dropout: LoRA, LoRAN, DoRA, SHiRA, AuroRAStatic "
        f"...), and {method!r} {why}. Give that site another by `overrides`, or leave it out (`exclude`)"
    )


def _check_groups(path: str, layer: LinearView, method: Method) -> None:
    """Raises ValueError for a method with a bottleneck A x on a convolution in groups: each group sees other inputs, so
    no x is common to them.  A full update dW acts on it as on any other."""
    groups = getattr(layer.module, "groups", 1)
    if groups > 1 and method.bottleneck:
        raise ValueError(
            f"{path} is a convolution in {groups} groups without a common bottleneck: {method!r} cannot act on it. "
            "Give it a method with a full update (LoRAN, SHiRA) by `overrides`, or leave it out of `where`"
        )


def check_shapes(path: str, found: Factors, wanted: Factors) -> None:
    """Raises ValueError where names, shapes or types differ from what the method makes for this site.  Of
    floating-point numbers any width will do."""
    if set(found) != set(wanted):
        raise ValueError(f"{path}: the method has the factors {sorted(wanted)}, the adapter has {sorted(found)}")
    for k, t in found.items():
        if t.shape != wanted[k].shape:
            raise ValueError(
                f"{path}: factor {k} is {tuple(t.shape)} in the adapter; on this model's layer the method has "
                f"{tuple(wanted[k].shape)}"
            )
        if t.dtype != wanted[k].dtype and not (t.is_floating_point() and wanted[k].is_floating_point()):
            raise ValueError(f"{path}: factor {k} is {t.dtype} in the adapter; the method has {wanted[k].dtype}")
