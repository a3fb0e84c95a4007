"""y = (W + s f(B A)) x + b for an elementwise f, keeping only x, A and B for the backward pass.

Autograd would keep two or three (O, I) tensors per layer (1.5 times LoRA's memory on a 7B model).  Here forward and
backward walk over blocks of rows: rebuild X = B A, bend it, use it, forget it.  On a CPU the blocks live in one piece
of memory per thread that is kept: taking fresh pages from the system cost as much as all sines.

    G = s gy' x (the weight-gradient product), dX = G * f'(X), dB = dX A', dA = B' dX, dx = gy (W + s f(X))

Without W (dropout, a quantised or low-precision base) it is y = s f(B A) x, to be added to the frozen layer's output.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import Function

from . import compiled
from .autocast import exact, exact_backward, wide

BLOCK = 1 << 20  # elements of W per block: 4 MiB in float32
AWAY = 64  # times as many on an accelerator, whose products are slow where they are small: 256 MiB in float32
LEAST_ROWS = 64  # thinner blocks make slow products

_kept = threading.local()


def blocks(O: int, I: int, device: torch.device | None = None) -> Iterator[slice]:
    """Even row ranges of at most about BLOCK elements; on an accelerator of AWAY times as many."""
    size = BLOCK if device is None or device.type == "cpu" else BLOCK * AWAY
    count = math.ceil(O / max(LEAST_ROWS, size // I))
    rows = math.ceil(O / count)
    return (slice(i, min(i + rows, O)) for i in range(0, O, rows))


def under_mode() -> bool:
    """Whether something else than torch itself sees the operations: a dispatch mode, or a trace."""
    return _len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()


def scratch(count: int, rows: slice, like: Tensor) -> tuple[Tensor, ...]:
    """`count` tensors (rows, I) whose contents nobody needs after this block."""
    m, I = rows.stop - rows.start, like.shape[1]
    # other devices have allocators that keep memory; tensors of a mode (fake ones) must not outlive it
    if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter) or under_mode():
        return like.new_empty(count, m, I).unbind()
    memory: Tensor | None = getattr(_kept, "memory", None)
    size = count * m * I * like.element_size()
    if memory is None or memory.numel() < size:
        memory = _kept.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(like.dtype).view(count, m, I).unbind()


class Curve(Protocol):
    """An elementwise f, see `methods.activations.Activation`."""

    def __call__(self, u: Tensor, c: Mapping[str, Any]) -> Tensor: ...

    def bend(self, u: Tensor, c: Mapping[str, Any], spare: Tensor) -> Tensor: ...

    def pull(
        self, u: Tensor, g: Tensor, c: Mapping[str, Any], spare: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]: ...

    def wave(self) -> tuple[float, float, float, float] | None: ...


def bent(f: Curve, scale: float, B_OR: Tensor, A_RI: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """s f(B A), the reference: the product and f in float32 at least, whatever autocast says."""
    dtype = wide(A_RI.dtype)
    with exact(A_RI.device):
        return scale * f(B_OR.to(dtype) @ A_RI.to(dtype), constants)


class _Bent(Function):
    @staticmethod
    def forward(ctx, x_TI, W_OI, bias, A_RI, B_OR, f, scale, names, *constants):
        ctx.f, ctx.scale, ctx.names, ctx.folded = f, scale, names, W_OI is not None
        ctx.save_for_backward(x_TI, A_RI, B_OR, W_OI, *constants)
        c = dict(zip(names, constants, strict=True))
        O, I = B_OR.shape[0], A_RI.shape[1]
        parts = ((rows, _rows(W_OI, rows, A_RI, B_OR, f, c, scale)) for rows in blocks(O, I, A_RI.device))
        return product(x_TI, parts, O, bias)

    @staticmethod
    @exact_backward
    def backward(ctx, g_TO):
        x_TI, A_RI, B_OR, W_OI, *constants = ctx.saved_tensors
        c = dict(zip(ctx.names, constants, strict=True))
        dx = torch.empty_like(x_TI) if ctx.needs_input_grad[0] else None
        dA, dB_RO, dc = torch.zeros_like(A_RI), torch.empty_like(B_OR.t()), [torch.zeros_like(t) for t in constants]
        for rows in blocks(B_OR.shape[0], A_RI.shape[1], A_RI.device):
            M, dX, parts = _pulled(W_OI, rows, A_RI, B_OR, g_TO, x_TI, ctx.f, c, ctx.scale)
            dB_RO[:, rows] = torch.mm(A_RI, dX.t())
            dA.addmm_(B_OR[rows].t(), dX)
            for total, part in zip(dc, parts, strict=True):
                total.add_(part)
            if dx is not None:
                dx.addmm_(g_TO[:, rows], M, beta=0 if rows.start == 0 else 1)
        scaled = (ctx.scale * t for t in (dA, dB_RO.t(), *dc))  # s of G, applied where it is cheap
        dA, dB, *dc = scaled
        return dx, None, None, dA, dB, None, None, None, *dc


def _wave(A_RI: Tensor, f: Curve, c: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """The numbers of f for the kernels in Triton; None where torch's are taken."""
    return None if c or A_RI.dtype != torch.float32 or not compiled.chosen(A_RI.device) else f.wave()


def _rows(W_OI, rows, A_RI, B_OR, f, c, scale) -> Tensor:
    """Rows of W + s f(B A), or of s f(B A)."""
    if (wave := _wave(A_RI, f, c)) is not None:
        from .triton_elementwise import fold

        return fold(None if W_OI is None else W_OI[rows], A_RI, B_OR[rows], wave, scale)
    X, spare = scratch(2, rows, A_RI)
    return folded(W_OI, rows, f.bend(torch.mm(B_OR[rows], A_RI, out=X), c, spare), scale)


def _pulled(W_OI, rows, A_RI, B_OR, g_TO, x_TI, f, c, scale) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of some rows: (W + s f(B A) or s f(B A), G f'(B A), the gradients of f's constants), G = g' x."""
    if (wave := _wave(A_RI, f, c)) is not None:
        from .triton_elementwise import pull

        G = torch.mm(g_TO[:, rows].t(), x_TI)
        return pull(None if W_OI is None else W_OI[rows], A_RI, B_OR[rows], wave, scale, G), G, []
    X, G, *spare = scratch(4, rows, A_RI)
    torch.mm(g_TO[:, rows].t(), x_TI, out=G)
    F, dX, parts = f.pull(torch.mm(B_OR[rows], A_RI, out=X), G, c, spare)
    return folded(W_OI, rows, F, scale), dX, parts


def product(x_TI: Tensor, parts: Iterable[tuple[slice, Tensor]], O: int, bias: Tensor | None) -> Tensor:
    """M x + b for a matrix (O, I) that comes in parts, (which rows, those rows of M)."""
    y_TO = x_TI.new_empty(x_TI.shape[0], O)
    for rows, M in parts:
        if bias is None:
            torch.mm(x_TI, M.t(), out=y_TO[:, rows])
        else:
            torch.addmm(bias[rows], x_TI, M.t(), out=y_TO[:, rows])
    return y_TO


def folded(W_OI: Tensor | None, rows: slice, F: Tensor, scale: float) -> Tensor:
    """Rows of W + s F, or of s F; F may be overwritten."""
    return F.mul_(scale) if W_OI is None else torch.add(W_OI[rows], F, alpha=scale, out=F)


def elementwise(
    x: Tensor,
    W_OI: Tensor | None,
    bias: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    f: Curve,
    scale: float,
    constants: dict[str, Tensor],
) -> Tensor:
    """(W + s f(B A)) x + b, or s f(B A) x where W is None; x (..., I), all of one dtype of 32 bits or more.  Equal to
    the product with `bent`; trained `constants` of f get gradients.  Not twice differentiable."""
    law = (W_OI, bias, A_RI, B_OR, f, scale, tuple(constants), *constants.values())
    return _Bent.apply(x.reshape(-1, x.shape[-1]), *law).view(*x.shape[:-1], B_OR.shape[0])
