"""Opacus's hooks on an adapted model: `p.grad_sample` of all that trains, or the norms alone (ghost clipping).

Opacus hears modules that have parameters of their own, and calls the layer's own class again where it does not know
it.  The factors of an adapter belong to no such module, so at the host's layers the adapter's laws are heard (see
`gradients`), and what they give goes the way that Opacus's own goes: summed over a parameter's uses, then clipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import Factors, Method
from ...host.slots import Slot
from ...host.state import host_of
from ...host.views import LinearView
from .accounting import quiet
from .gradients import Heard, Law, multiplied, pulled

with quiet():
    from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
    from opacus.grad_sample.grad_sample_module import create_or_accumulate_grad_sample, promote_current_grad_sample
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import create_norm_sample

LEFT = ("_current_grad_sample", "_norm_sample")


class AtLayers:
    """Mixed into Opacus's hooks.  `law`: how gradients of rows are found at adapted layers."""

    law: Law
    norms = False  # whether gradients of rows are forgotten once their norms are known

    def __init__(self, model: nn.Module, law: Law, **options: Any):
        self.law, self.rows = law, 0
        self.slots = [s for s in host_of(model).slots.values() if any(p.requires_grad for p in s.parameters())]
        super().__init__(model, loss_reduction="sum", **options)  # type: ignore[call-arg]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.methods = [slot.method for slot in self.slots]
        for slot in self.slots:
            slot.method = Heard(slot.method, self.hear)  # type: ignore[assignment,arg-type]

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """What Opacus itself hears: what trains in full."""
        for m in module.modules():
            if not isinstance(m, Slot) and any(p.requires_grad for p in m.parameters(recurse=False)):
                yield m

    def hear(self, method: Method, x: Tensor, y: Tensor, layer: LinearView, f: Factors, masks: list[Tensor]) -> Tensor:
        if not self.hooks_enabled or not y.requires_grad:  # type: ignore[attr-defined]
            return y
        if x.shape[0] != self.rows or y.shape[0] != self.rows or layer.more is not None:
            raise ValueError(
                f"{method!r} sees an input of shape {tuple(x.shape)} where the batch has {self.rows} rows: whose is "
                "what there cannot be told, so no row can be clipped. Leave that layer out (`exclude`)"
            )
        own = [t for t in f.values() if t.requires_grad]
        for p in own:
            p._forward_counter += 1  # type: ignore[attr-defined]
        x, version = x.detach(), x._version

        def back(g: Tensor) -> None:
            if not self.hooks_enabled:  # type: ignore[attr-defined]
                return
            if x._version != version:
                raise RuntimeError("the model changed the input of an adapted layer in place: its gradients are lost")
            for name, rows in self.law(method, layer, x, g.detach(), f, masks).items():
                create_or_accumulate_grad_sample(param=f[name], grad_sample=rows, max_batch_len=self.rows)
            for p in own:
                p._forward_counter -= 1  # type: ignore[attr-defined]
                if p._forward_counter == 0:  # type: ignore[attr-defined]
                    self._complete(p)

        y.register_hook(back)
        return y

    def _complete(self, p: Any) -> None:
        promote_current_grad_sample(p)
        if self.norms:
            create_norm_sample(param=p, grad_sample=p.grad_sample, max_batch_len=self.rows)
            p.grad_sample = None

    def begin(self, rows: int) -> None:
        """Before the forward pass of so many rows."""
        self.rows = rows
        for p in self.trained:
            p._forward_counter = 0  # type: ignore[attr-defined]
            for name in LEFT:
                if hasattr(p, name):
                    delattr(p, name)

    def finish(self) -> None:
        """After the backward pass: what the loss does not depend on has the gradient zero.  Raises ValueError where a
        gradient has other rows than the batch."""
        for p in self.trained:
            if hasattr(p, "_current_grad_sample"):
                self._complete(p)
            found = getattr(p, "_norm_sample", None) if self.norms else p.grad_sample  # type: ignore[attr-defined]
            if found is None:
                shape = (self.rows,) if self.norms else (self.rows, *p.shape)
                setattr(p, "_norm_sample" if self.norms else "grad_sample", p.new_zeros(shape))
            elif len(found) != self.rows:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} that trains in full sees {len(found)} rows where the batch "
                    f"has {self.rows}: whose is what there cannot be told. Leave it out (`full`)"
                )
            if self.norms and p.grad is None:
                p.grad = torch.zeros_like(p)

    def close(self) -> None:
        """Leaves the model as it was."""
        for slot, method in zip(self.slots, self.methods, strict=True):
            slot.method = method
        self.cleanup()  # type: ignore[attr-defined]
        for p in self.trained:
            if hasattr(p, "summed_grad"):
                del p.summed_grad


class Hooks(AtLayers, GradSampleHooks):
    """Gradients of rows."""


class Ghost(AtLayers, GradSampleHooksFastGradientClipping):
    """Norms of the gradients of rows; one layer's are in memory at a time."""

    norms = True

    def get_norm_sample(self) -> Tensor:
        self.finish()
        return super().get_norm_sample()


def hooks(model: nn.Module, mode: str, clip: float) -> Any:
    """mode: "hooks", "ghost" or "functorch", as Opacus calls them."""
    if mode == "ghost":
        return Ghost(model, multiplied, max_grad_norm=clip)
    return Hooks(model, pulled if mode == "functorch" else multiplied, force_functorch=mode == "functorch")
