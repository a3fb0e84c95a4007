"""Autocast must not reach into hand-written backward passes: they compute in the types of what they saved."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider: what nonlinear functions are computed in."""
    return torch.promote_types(dtype, torch.float32)


def casts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, products are computed in their operands' types, whatever autocast says outside."""
    if not casts(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def hand_written() -> bool:
    """Whether the hand-written backwards apply: not under a compiler, a trace or `torch.func`, which differentiate the
    plain law by themselves and cannot follow ours."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def exact_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `Function.backward`: not twice differentiable (a second backward raises), autocast off inside."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor) -> Any:
        with exact(gradients[0].device):
            return once(ctx, *gradients)

    return run
