"""-log softmax(logits)[target] of each row, without a second and third copy of rows x vocabulary.

    losses(logits, targets)                    the logits are there: float32 is made of a part of them at a time
    through(hidden, weight, bias, targets)     the head is a plain linear layer: the logits themselves never are

Both give one number for each row, so that rows may weigh what they like.  Of a row its own loss alone has a gradient:
d loss_k / d logits_k = softmax(logits_k) - onehot(target_k), which `through` takes to the hidden states in the same
pass (Liger, arXiv 2410.10989): one product with the weight forward and one back, as the plain step has.
A target below 0 is none: its loss and its gradient are 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import exact, exact_backward, hand_written, wide

CHUNK = 2**24  # logits that are there at once in float32: 64 MB
FEWEST = 64  # rows of a product, of however large a vocabulary: below it the weight is read for little


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (K, V), targets (K,) -> (K,), in float32 or wider."""
    return _OfLogits.apply(logits, targets) if hand_written() else _plain(logits, targets)


def through(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`losses` of F.linear(hidden, weight, bias), of which the hidden states (K, d) alone get a gradient."""
    if not hand_written():
        return _plain(F.linear(hidden, weight, bias), targets)
    return _OfHidden.apply(hidden, weight, bias, targets)


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = targets.clamp(min=0)
    found = F.cross_entropy(logits.to(wide(logits.dtype)), wanted, reduction="none")
    return found.masked_fill(targets < 0, 0.0)


def parts(rows: int, width: int) -> list[slice]:
    """Equal parts of so many rows, none of more than CHUNK numbers."""
    number = -(-rows // max(FEWEST, CHUNK // max(width, 1)))
    size = -(-rows // max(number, 1))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, max(size, 1))]


def _told(logs: Tensor, targets: Tensor) -> Tensor:
    """The losses of rows of log softmax."""
    return -logs.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets < 0, 0.0)


def _gradient(logs: Tensor, targets: Tensor) -> Tensor:
    """softmax - onehot, in place of log softmax; 0 for rows without a target."""
    found = logs.exp_()
    found.scatter_add_(1, targets.clamp(min=0)[:, None], found.new_full((len(found), 1), -1.0))
    return found.masked_fill_((targets < 0)[:, None], 0.0)


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        out = logits.new_empty(len(logits), dtype=wide(logits.dtype))
        for rows in parts(*logits.shape):
            out[rows] = _told(torch.log_softmax(logits[rows], -1, dtype=out.dtype), targets[rows])
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in parts(*logits.shape):
            logs = torch.log_softmax(logits[rows], -1, dtype=gradient.dtype)
            found[rows] = _gradient(logs, targets[rows]).mul_(gradient[rows, None]).to(found.dtype)
        return found, None


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        out = hidden.new_empty(len(hidden), dtype=wide(hidden.dtype))
        back = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with exact(hidden.device):
            for rows in parts(len(hidden), len(weight)):
                logs = torch.log_softmax(F.linear(hidden[rows], weight, bias), -1, dtype=out.dtype)
                out[rows] = _told(logs, targets[rows])
                if back is not None:
                    back[rows] = _gradient(logs, targets[rows]).to(weight.dtype) @ weight
        ctx.save_for_backward(*(() if back is None else (back,)))
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return back * gradient[:, None].to(back.dtype), None, None, None
