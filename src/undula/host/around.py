"""What a model is part of: libraries that hold it, and know it in their own way."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .where import inner

APART = (
    "this model is in a DistributedDataParallel already, which knows the parameters that were there when it was "
    "made: the processes would train this adapter apart. Attach and select first, wrap afterwards"
)


def in_parallel(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether a DistributedDataParallel holds the model that does not know these parameters; () are new ones."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel)]
    known = [{id(p) for p in w._module_parameters} for w in wrappers if inner(w) is inner(model)]
    new = {id(p) for p in parameters} or {0}
    return bool(known) and not any(new <= each for each in known)


def of_sentences(model: nn.Module) -> str | None:
    """What to say of a SentenceTransformer, whose own adapters are those of the model that is its first part."""
    kinds = {c.__name__ for c in type(model).__mro__}
    if "SentenceTransformer" not in kinds or getattr(next(iter(model.children()), None), "auto_model", None) is None:
        return None
    return (
        "this is a SentenceTransformer: its load_adapter, and all that reads an exported LoRA, call layers as the "
        "transformer within does, without '0.' before. Attach to model[0].auto_model where the adapter is to leave "
        "undula"
    )
