"""BQPO, the first stage of GQSA: block by block, what is kept learns to give what the block gave.

    min over w, s of   |block(x; W) - block(x^; W^(w, s))|^2,     W^ through round by the straight-through estimator

x are the block's inputs in the model as it was, x^ those behind the blocks that are compressed already.  Two streams of
hidden states are kept, and one block is dense at a time.  Rates and steps are settled here (interpretation): Adam, 1e-4
for weights and 1e-3 of each scale's own size, zeros stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gqsa as kernel
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


@dataclass(frozen=True)
class Learning:
    """How a block learns: `steps` of Adam, each on one calibration batch; 0 leaves it at what rounding gave."""

    steps: int = 40
    lr: float = 1e-4
    scale_lr: float = 1e-3  # of a scale's own size


class _Learned(nn.Module):
    """A linear layer while its block learns: groups in float, rounded on the way (straight through)."""

    def __init__(self, layer: nn.Linear, form: Form, h_I: Tensor):
        super().__init__()
        self.layer, self.form = [layer], form  # in a list: it is no part of what trains
        W_OI = layer.weight.detach().float()
        self.index = chosen(W_OI, form, h_I)
        w = kernel.gathered(W_OI, self.index, form.group)
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
        raise TypeError(f"{type(model).__name__} has no list of blocks: compress it without data")
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
def _first(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Batch]
) -> tuple[_Streams, list[list[dict[str, Any]]]]:
    """What comes to the first block, and what each block is called with beside, by batch."""
    if not batches:
        raise ValueError("calibration needs batches: found none")
    device = next(model.parameters()).device
    first, calls = [], []
    for batch in batches:
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        hooks = [
            b.register_forward_pre_hook(lambda _, a, kw, s=seen: s.append((a[0], kw)), with_kwargs=True) for b in blocks
        ]
        outputs: list[Tensor] = []
        hooks += [b.register_forward_hook(lambda _, a, y, o=outputs: o.append(_hidden(y))) for b in blocks]
        try:
            model(**moved({k: v for k, v in batch.items() if k != "labels"}, device), use_cache=False)  # type: ignore
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(blocks) or any(not torch.equal(x, y) for (x, _), y in zip(seen[1:], outputs, strict=False)):
            raise TypeError(f"the blocks of {type(model).__name__} are no chain, each reading what the last gave")
        first.append(seen[0][0])
        calls.append([kw for _, kw in seen])
    return _Streams(first, list(first)), calls


def _hidden(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _block(
    model: nn.Module,
    block: nn.Module,
    layers: dict[str, nn.Linear],
    form: Form,
    learning: Learning,
    streams: _Streams,
    calls: list[dict[str, Any]],
) -> dict[str, float]:
    """Compresses one block; the streams go on behind it."""
    with torch.no_grad():
        targets = [_hidden(block(x, **kw)) for x, kw in zip(streams.before, calls, strict=True)]
        moments = _moments(block, layers, streams.after, calls)
    learned = {n: _Learned(layer, form, moments[n]) for n, layer in layers.items()}
    for n, each in learned.items():
        parent, _, leaf = n.rpartition(".")
        setattr(model.get_submodule(parent), leaf, each)
    if learning.steps and learned:
        _learn(block, list(learned.values()), learning, streams.after, targets, calls)
    with torch.no_grad():
        errors = {n: put(model, n, each.layer[0], form, each.stored()) for n, each in learned.items()}
        streams.before = targets
        streams.after = [_hidden(block(x, **kw)) for x, kw in zip(streams.after, calls, strict=True)]
    if bad := [n for n in layers if not all(x.isfinite().all() for x in streams.after)]:
        raise ValueError(f"the block of {bad[0]} gives what is not finite: lower the rate (lr={learning.lr:g})")
    return errors


def _moments(
    block: nn.Module, layers: dict[str, nn.Linear], inputs: list[Tensor], calls: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """The mean square of each input of each layer."""
    sums = {n: layer.weight.new_zeros(layer.in_features, dtype=torch.float32) for n, layer in layers.items()}

    def hear(n: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[n].add_(args[0].float().flatten(0, -2).square().mean(0))

        return add

    hooks = [layer.register_forward_pre_hook(hear(n)) for n, layer in layers.items()]
    try:
        for x, kw in zip(inputs, calls, strict=True):
            block(x, **kw)
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
    calls: list[dict[str, Any]],
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
            loss = F.mse_loss(_hidden(block(inputs[i], **calls[i])), targets[i])
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g  # the block's own parameters get none
            optimizer.step()
