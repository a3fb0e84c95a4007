"""Adapters of encoders without a training: their numbers are drawn."""

import torch

import undula
from tests.support.numbers import shake
from undula.train import Run
from undula.train.base import open_model


def drawn(path, base, task, method=None, where="all-linear", seed=0, full=(), dtype=torch.float64, **rules):
    """The directory of an adapter for `task` over `base`, as a training would leave it."""
    model, _ = open_model(base, task, dtype, 0)
    in_full = (*task.head(model), *full)
    torch.manual_seed(seed)
    adapter = shake(undula.attach(model, method or undula.LoRA(r=2), where, full=in_full, **rules), 0.2)
    adapter.save(path, base, task.peft)
    Run(model=base, data="", task=task, out=path, method=method or undula.LoRA(r=2), dtype=dtype).save(None)
    return path
