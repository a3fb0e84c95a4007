"""A warning where a library saves a model with a live adapter in a form that it will not read back.

`save_pretrained` of transformers, diffusers and what builds on them writes the adapter's factors as `*.undula.*` among
the model's own keys; `from_pretrained` drops what its class does not know, and what is loaded is the bare base.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

SAVE = "save_pretrained"
BELOW = ".undula."  # in the keys of an adapter's factors
TOLD = (
    "save_pretrained of a model with a live adapter: the adapter's factors are written as '*.undula.*', which "
    "from_pretrained drops without an error, so that what is loaded is the bare base. Save the adapter "
    "(adapter.save(path), put back by undula.attach(model, undula.Adapter.load(path))), or merge it first "
    "(undula.merge(model)) and save the model"
)


class Guard:
    """Stands in for a module's `save_pretrained`: warns, and saves as it always did."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **options: Any) -> Any:
        state = options.get("state_dict")
        keys = self.module.state_dict(keep_vars=True) if state is None else state
        if any(BELOW in f".{key}" for key in keys):
            warnings.warn(TOLD, UserWarning, stacklevel=2)
        return getattr(type(self.module), SAVE)(self.module, *args, **options)


def guard(model: nn.Module) -> None:
    """Puts a Guard on the model and on all parts of it that save themselves."""
    for module in model.modules():
        if hasattr(type(module), SAVE) and SAVE not in module.__dict__:
            module.__dict__[SAVE] = Guard(module)


def unguard(model: nn.Module) -> None:
    """Takes the Guards away."""
    for module in model.modules():
        if isinstance(module.__dict__.get(SAVE), Guard):
            del module.__dict__[SAVE]
