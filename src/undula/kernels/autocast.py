"""Autocast must not reach into hand-written backward passes: they compute in the types of what they saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def exact_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `Function.backward`: not twice differentiable (a second backward raises), autocast off inside."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor) -> Any:
        device = gradients[0].device.type
        if not torch.is_autocast_enabled(device):
            return once(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return once(ctx, *gradients)

    return run
