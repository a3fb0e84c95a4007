"""A refused call leaves the model as it was, also where PEFT notices a fault only after it has replaced layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Puts modules, `requires_grad`, active adapters and `model.peft_config` back where an error leaves the block."""
    children = [(m, dict(m._modules)) for m in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    active = [(m, m.__dict__.get("_active_adapter")) for m in model.modules()]
    configs = dict(model.__dict__.get("peft_config") or {})
    try:
        yield
    except BaseException:
        for m, own in children:
            m._modules.clear()
            m._modules.update(own)
        for p, flag in trained:
            p.requires_grad_(flag)
        for m, names in active:
            if names is None:
                m.__dict__.pop("_active_adapter", None)
            else:
                m.__dict__["_active_adapter"] = names
        _configured(model, configs)
        raise


def _configured(model: nn.Module, configs: dict) -> None:
    there = model.__dict__.get("peft_config")
    if there is not None:
        there.clear()
        there.update(configs)
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        model.__dict__.pop("peft_config", None)
        if "_hf_peft_config_loaded" in model.__dict__:  # transformers says so before it tries
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
