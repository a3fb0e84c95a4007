"""BQPO, the first stage of GQSA: block by block, what is kept learns to give what the block gave.

    min over w, s of   mean_t |y_t - y^_t|^2 / |y_t|^2,   y = block(x; W),  y^ = block(x^; W^(w, s))

W^ through round by the straight-through estimator.  x are the block's inputs in the model as it was, x^ those behind
the blocks that are compressed already.  Two streams of hidden states are kept, and one block is dense at a time.

Settled here (interpretation): what is kept of each layer begins at its least squares (`refit`), since groups that
merely go leave an error that many steps do not take away; each token counts by its own size, since the first one of a
text may be far larger than all others; Adam, 1e-3 for weights and 1e-3 of each scale's own size, zeros stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gqsa as kernel
from ..observe import padding
from ..observe.listen import Batch, evaluating, moved
from .gqsa import (
    TOP,
    Compressed,
    Form,
    check_fits,
    chosen,
    mean_bits,
    packed,
    put,
    quantised,
    ranges,
    rounded_up,
)
from .refit import refitted

PLAIN = "compress it without data"
TINY = 1e-12


@dataclass(frozen=True)
class Learning:
    """How a block learns: `steps` of Adam, each on one calibration batch; 0 leaves it at the least squares, rounded."""

    steps: int = 40
    lr: float = 1e-3
    scale_lr: float = 1e-3  # of a scale's own size


class _Learned(nn.Module):
    """A linear layer while its block learns: groups in float, rounded on the way (straight through)."""

    def __init__(self, layer: nn.Linear, form: Form, H_II: Tensor):
        super().__init__()
        self.layer, self.form = [layer], form  # in a list: it is no part of what trains
        W_OI, told = layer.weight.detach().float(), bool(H_II.any())  # of a layer that nothing came to W alone tells
        self.index = chosen(W_OI, form, H_II.diagonal() if told else None)
        whole = form.kept(layer.in_features) == layer.in_features // form.group
        w = kernel.gathered(W_OI, self.index, form.group)
        if told and not whole:
            w = refitted(W_OI, H_II, self.index, form.group)
        s, z = ranges(w)
        self.w, self.more = nn.Parameter(w.clone()), nn.Parameter(torch.zeros_like(s))
        self.s, self.z = s, z

    def scale(self) -> Tensor:
        """A positive scale, whose step is a share of itself."""
        return self.s * self.more.exp()

    def forward(self, x: Tensor) -> Tensor:
        s, z = self.scale()[..., None], self.z[..., None]
        u = self.w / s + z
        q = (u + (u.round() - u).detach()).clamp(0, TOP)
        W_OI = kernel.spread((q - z) * s, self.index, self.layer[0].in_features)
        return F.linear(x, W_OI.to(x.dtype), self.layer[0].bias)

    def stored(self) -> Any:
        s = rounded_up(self.scale().detach())
        return packed(self.w.detach(), self.index, s, self.z, self.layer[0].in_features)


@dataclass(frozen=True)
class _Call:
    """What a block is called with beside its hidden states, of one batch; `kept` (flat) says which of these are no
    padding."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: Tensor | None

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        return _hidden(block(x, *self.args, **self.kwargs))


@dataclass
class _Streams:
    """The inputs of the next block: in the model as it was, and behind what is compressed."""

    before: list[Tensor]
    after: list[Tensor] = field(default_factory=list)


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of equal modules, one after another: the layers of a transformer.  Raises TypeError."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(each) for each in m}) == 1
    ]
    if not lists:
        raise TypeError(f"{type(model).__name__} has no list of blocks: {PLAIN}")
    return max(lists, key=lambda found: len(found[1]))


def calibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    form: Form = Form(),
    learning: Learning = Learning(),
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Compressed:
    """Stores the layers of a model in 4-bit groups, in place, each block learning on `batches` (dicts of the model's
    inputs) what it gave before.  `progress(done, of)` is called after each block.

    Raises ValueError that names the layer where one does not fit, TypeError where the model is no chain of blocks
    (nothing is changed then), ValueError where a block gives what is not finite.
    """
    layers = check_fits(model, form, exclude)
    name, blocks = blocks_of(model)
    errors: dict[str, float] = {}
    with evaluating(model):
        streams, calls = _first(model, blocks, list(batches))
        for i, block in enumerate(blocks):
            start = f"{name}.{i}."
            inside = {n: m for n, m in layers.items() if n.startswith(start)}
            errors |= _block(model, block, inside, form, learning, streams, [each[i] for each in calls])
            progress(i + 1, len(blocks))
        with torch.no_grad():
            for n, layer in layers.items():
                if n not in errors:
                    errors[n] = put(model, n, layer, form, quantised(layer.weight, form))
    return Compressed(errors, mean_bits(layers.values(), form))


@torch.no_grad()
def _first(model: nn.Module, blocks: nn.ModuleList, batches: list[Batch]) -> tuple[_Streams, list[list[_Call]]]:
    """What comes to the first block, and what each block is called with beside, by batch."""
    if not batches:
        raise ValueError("calibration needs batches: found none")
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{type(model).__name__} is an encoder and a decoder, no one chain of blocks: {PLAIN}")
    device = next(model.parameters()).device
    quiet = {"use_cache": False} if hasattr(config, "use_cache") else {}
    first, calls = [], []
    for batch in batches:
        given = moved({k: v for k, v in batch.items() if k != "labels"}, device)  # type: ignore[union-attr]
        seen = _heard(model, blocks, given | quiet)
        first.append(seen[0][0])
        mask = padding.masks_of(given)[0]
        kept = None if mask is None or mask.all() else padding.matched(mask, first[-1].shape[:-1])
        calls.append([_Call(args, kwargs, kept) for _, args, kwargs in seen])
    return _Streams(first, list(first)), calls


def _heard(model: nn.Module, blocks: nn.ModuleList, given: dict[str, Any]) -> list[tuple[Tensor, Any, Any]]:
    """(hidden states, arguments, keywords) that each block is called with.  Raises TypeError for what is no chain."""
    seen: list[tuple[Any, Any, Any]] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else None, args[1:], kwargs))

    hooks = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(lambda _, args, y: outputs.append(_hidden(y))) for b in blocks]
    try:
        model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    states = [x for x, _, _ in seen]
    chained = all(isinstance(x, Tensor) and torch.equal(x, y) for x, y in zip(states[1:], outputs, strict=False))
    if len(seen) != len(blocks) or not isinstance(states[0], Tensor) or not chained:
        raise TypeError(f"the blocks of {type(model).__name__} are no chain, each reading what the last gave: {PLAIN}")
    return seen


def _hidden(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _block(
    model: nn.Module,
    block: nn.Module,
    layers: dict[str, nn.Linear],
    form: Form,
    learning: Learning,
    streams: _Streams,
    calls: list[_Call],
) -> dict[str, float]:
    """Compresses one block; the streams go on behind it."""
    with torch.no_grad():
        targets = [call(block, x) for x, call in zip(streams.before, calls, strict=True)]
        products = _products(block, layers, streams.after, calls)
        learned = {n: _Learned(layer, form, products.pop(n)) for n, layer in layers.items()}
    for n, each in learned.items():
        parent, _, leaf = n.rpartition(".")
        setattr(model.get_submodule(parent), leaf, each)
    if learning.steps and learned:
        _learn(block, list(learned.values()), learning, streams.after, targets, calls)
    with torch.no_grad():
        errors = {n: put(model, n, each.layer[0], form, each.stored()) for n, each in learned.items()}
        streams.before = targets
        streams.after = [call(block, x) for x, call in zip(streams.after, calls, strict=True)]
    if bad := [n for n in layers if not all(x.isfinite().all() for x in streams.after)]:
        raise ValueError(f"the block of {bad[0]} gives what is not finite: lower the rate (lr={learning.lr:g})")
    return errors


def _products(
    block: nn.Module, layers: dict[str, nn.Linear], inputs: list[Tensor], calls: list[_Call]
) -> dict[str, Tensor]:
    """sum_t x_t x_t' (I, I) of the inputs of each layer; zero where nothing came to it."""
    sums = {n: layer.weight.new_zeros((layer.in_features,) * 2, dtype=torch.float32) for n, layer in layers.items()}
    kept: Tensor | None = None

    def hear(n: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            whole = kept is None or args[0][..., 0].numel() != kept.numel()
            x_TI = padding.kept(args[0].float(), None if whole else kept)
            sums[n].addmm_(x_TI.T, x_TI)

        return add

    hooks = [layer.register_forward_pre_hook(hear(n)) for n, layer in layers.items()]
    try:
        for x, call in zip(inputs, calls, strict=True):
            kept = call.kept
            call(block, x)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _learn(
    block: nn.Module,
    learned: list[_Learned],
    learning: Learning,
    inputs: list[Tensor],
    targets: list[Tensor],
    calls: list[_Call],
) -> None:
    groups = [
        {"params": [m.w for m in learned], "lr": learning.lr},
        {"params": [m.more for m in learned], "lr": learning.scale_lr},
    ]
    optimizer, parameters = torch.optim.Adam(groups), [p for m in learned for p in (m.w, m.more)]
    with torch.enable_grad():
        for step in range(learning.steps):
            i = step % len(inputs)
            for group, rate in zip(optimizer.param_groups, (learning.lr, learning.scale_lr), strict=True):
                group["lr"] = rate * (1 - step / learning.steps)
            found, want = (padding.kept(y, calls[i].kept) for y in (calls[i](block, inputs[i]), targets[i]))
            loss = ((found - want).square().sum(-1) / want.square().sum(-1).clamp_min(TINY)).mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g  # the block's own parameters get none
            optimizer.step()
