"""Parameters that are cut over several processes (FSDP2's and tensor parallel's DTensors)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter

PARALLEL = (
    "{} is adapted, and tensor parallel (parallelize_module) would cut its weight and not know what to do with the "
    "adapter. Use fully_shard (FSDP2) or DistributedDataParallel; or merge the adapter (undula.merge, undula.detach) "
    "and parallelize what is left"
)


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor: torch's module for these is not imported before there is one."""
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 keeps the parameters of the model or of a part: it gives such a module a class of its own."""
    return any(c.__name__ == "FSDPModule" for m in model.modules() for c in type(m).__mro__)


def check_whole(tensors: Iterable[Tensor], doing: str) -> None:
    """Raises TypeError for parameters in shards."""
    if any(is_sharded(t) for t in tensors):
        raise TypeError(
            f"{doing} is not possible on parameters that are sharded (FSDP2, tensor parallel). Save the adapter "
            "(adapter.save gathers it), and do this with it on an unsharded model"
        )


def gathered(adapter: Adapter) -> Adapter:
    """The adapter with whole tensors.  A collective operation: all processes have to take part."""
    once: dict[int, Tensor] = {}

    def whole(t: Any) -> Tensor:
        if id(t) not in once:
            once[id(t)] = t.full_tensor().detach().requires_grad_(t.requires_grad) if is_sharded(t) else t
        return once[id(t)]

    factors = {s: {k: whole(t) for k, t in f.items()} for s, f in adapter.factors.items()}
    return replace(adapter, factors=factors, full={k: whole(t) for k, t in adapter.full.items()})


def writes(adapter: Adapter) -> bool:
    """Whether this process is the one that writes what all of them have gathered."""
    every = [t for _, _, t in adapter.tensors()] + list(adapter.full.values())
    return not any(is_sharded(t) for t in every) or torch.distributed.get_rank() == 0
