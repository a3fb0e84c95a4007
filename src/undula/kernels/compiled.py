"""Kernels in Triton: optional, on cuda alone, and only where they are asked for.

    with undula.kernels.compiled.asked(): ...          # or UNDULA_TRITON=1

They equal the kernels of torch beside them, which stay the default: none of them was measured on a GPU, so nothing says
that one is faster.  Under TRITON_INTERPRET=1 they run on the CPU too, statement by statement, which is how they are
tested.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from ..core.extras import needs

_asked: ContextVar[bool] = ContextVar("undula.triton", default=os.environ.get("UNDULA_TRITON", "0") not in ("", "0"))


@needs("triton")
def asked() -> contextlib.AbstractContextManager[None]:
    """Within, kernels in Triton are used where there are some.  Raises ModuleNotFoundError without Triton."""
    import triton  # noqa: F401

    return _within()


@contextlib.contextmanager
def _within() -> Iterator[None]:
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def _there() -> bool:
    return importlib.util.find_spec("triton") is not None


def chosen(device: torch.device) -> bool:
    """Whether tensors of this device go through kernels in Triton."""
    if not _asked.get() or torch.compiler.is_compiling() or not _there():
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1")


def width(n: int) -> int:
    """The power of two that holds n, 16 at least: the smallest side of a product."""
    return max(16, 1 << (n - 1).bit_length())
