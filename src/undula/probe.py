"""What a model's gradients and activations say before anything is trained: the data of data-driven starts.

    undula.attach(model, Centred(LoRA(), LoRAGA()), probe=undula.Probe(batches))

Full gradients dL/dW are as large as the layers.  They are accumulated for a few layers at a time, handed to the start
and freed at once: `hold` bounds their bytes, and the batches are gone through once for each group of layers.  Nothing
of the model changes, and quantised bases work as well: the gradient is that of the matrix that they stand for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import bases
from .kernels import reference
from .observe import Batch, batches, kept, mask_of, moved
from .sites import EmbeddingView, LinearView, site

Loss = Callable[[nn.Module, Any], Tensor]
Hear = Callable[[str, LinearView, Tensor], Callable[[Tensor], None] | None]  # (site, layer, x) -> what hears dL/dy


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss that Hugging Face models return: batches are mappings with `labels`.  Raises TypeError without one."""
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model returned a {type(out).__name__} without a loss: batches are mappings with `labels`, or give "
            "Probe a loss of your own, as in Probe(batches, loss=lambda model, batch: ...)"
        )
    return loss


@dataclass(frozen=True, eq=False)
class Probe:
    """Gradients and activations over `batches` (each is gone through at least once), in evaluation mode.

    `loss(model, batch)` is averaged over the batches; the default takes `.loss` of what the model returns.  `hold` is
    the most bytes of gradients (or of second moments of activations) at a time; what one layer needs is always held.
    With hold=0 it is one layer's, and the batches are gone through once for each layer.
    """

    batches: Iterable[Batch] = field(repr=False)
    loss: Loss = loss_of
    hold: int = 1 << 28

    def on(self, model: nn.Module, layers: Mapping[str, LinearView]) -> Bound:
        """The probe as the `Evidence` of these layers of a model."""
        bases.keep_gradients(model)
        return Bound(self, model, layers, tuple(self.batches))


class Bound:
    """A probe of one model's layers."""

    def __init__(self, probe: Probe, model: nn.Module, layers: Mapping[str, LinearView], data: tuple[Batch, ...]):
        if not data:
            raise ValueError("the probe has no batches")
        self.probe, self.model, self.layers, self.data = probe, model, dict(layers), data
        self._gradients: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def gradient(self, name: str) -> Tensor:
        """dL/dW (O, I), averaged over the batches, float32 (float64 over a float64 base)."""
        if name not in self._gradients:
            self._gradients = self._measure_gradients(self._group(name, lambda O, I: O * I))
        return self._gradients.pop(name)

    def moments(self, name: str) -> tuple[Tensor, Tensor, int]:
        """(sum of x x' (I, I), sum of x (I), count) of the layer's inputs; padding does not count."""
        if name not in self._moments:
            self._moments = self._measure_moments(self._group(name, lambda O, I: I * I))
        return self._moments.pop(name)

    def _group(self, first: str, numbers: Callable[[int, int], int]) -> dict[str, LinearView]:
        """The layers from `first` on whose numbers fit into `hold` bytes, at least one."""
        names = list(self.layers)
        group: dict[str, LinearView] = {}
        held = 0
        for name in names[names.index(first) :]:
            where = site(name, self.layers[name])
            held += numbers(*where.shape) * where.dtype.itemsize
            if group and held > self.probe.hold:
                break
            group[name] = self.layers[name]
        return group

    def _measure_gradients(self, group: Mapping[str, LinearView]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def hear(name: str, layer: LinearView, x: Tensor) -> Callable[[Tensor], None]:
            def add(g: Tensor) -> None:
                part = weight_gradient(layer, x, g)
                sums[name] = sums[name].add_(part) if name in sums else part

            return add

        with listening(self.model, group, hear):
            for batch in batches(self.data, f"gradients of {len(group)} layers"):
                loss = self.probe.loss(self.model, self._on_device(batch))
                if loss.requires_grad:
                    loss.backward()
        missing = [name for name in group if name not in sums]
        if missing:
            raise RuntimeError(
                f"no gradient of the loss reaches {', '.join(missing[:5])}: the loss does not depend on it"
            )
        return {name: total / len(self.data) for name, total in sums.items()}

    def _measure_moments(self, group: Mapping[str, LinearView]) -> dict[str, tuple[Tensor, Tensor, int]]:
        found: dict[str, tuple[Tensor, Tensor, int]] = {}
        mask: Tensor | None = None

        def hear(name: str, layer: LinearView, x: Tensor) -> None:
            if isinstance(layer, EmbeddingView):
                raise TypeError(f"{name} is an embedding: its inputs are indices, which have no directions")
            x_TI = kept(inputs(layer, x), mask).flatten(0, -2)
            xx_II, x_I, n = found.get(name, (0, 0, 0))
            found[name] = xx_II + x_TI.T @ x_TI, x_I + x_TI.sum(0), n + len(x_TI)

        with listening(self.model, group, hear), torch.no_grad():
            for batch in batches(self.data, f"activations of {len(group)} layers"):
                mask = mask_of(batch)
                self.probe.loss(self.model, self._on_device(batch))
        missing = [name for name in group if name not in found]
        if missing:
            raise RuntimeError(f"{', '.join(missing[:5])} did not compute on these batches")
        return found

    def _on_device(self, batch: Batch) -> Any:
        return moved(batch, next(iter(self.layers.values())).device)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inputs(layer: LinearView, x: Tensor) -> Tensor:
    """The vectors that the layer's matrix multiplies (..., I): x itself, or the patches of a convolution."""
    if layer.channel == -1:
        return wide(x)
    I = layer.weight.shape[1]
    return layer.project(wide(x), torch.eye(I, device=x.device, dtype=wide(x).dtype))


def weight_gradient(layer: LinearView, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW (O, I) of one call y = layer(x) from g = dL/dy."""
    if layer.channel == -1 and x.is_floating_point():
        return wide(g).flatten(0, -2).T @ wide(x).flatten(0, -2)
    outline = layer.weight
    Z_OI = torch.zeros(outline.shape, dtype=wide(g).dtype, device=g.device, requires_grad=True)
    with torch.enable_grad():
        y = reference.restore(layer.project(wide(x) if x.is_floating_point() else x, Z_OI), layer)
    return torch.autograd.grad(y, Z_OI, wide(g))[0]


@contextlib.contextmanager
def listening(model: nn.Module, group: Mapping[str, LinearView], hear: Hear) -> Iterator[None]:
    """Calls `hear(site, layer, x)` when a layer of the group computes; what it returns is called with dL/dy.  The model
    is in evaluation mode and none of its parameters takes a gradient meanwhile."""
    modes = {m: m.training for m in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [layer.module.register_forward_hook(_hook(name, layer, hear)) for name, layer in group.items()]
    model.requires_grad_(False)
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        for p in trained:
            p.requires_grad_(True)


def _hook(name: str, layer: LinearView, hear: Hear) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def after(module: nn.Module, arguments: Any, y: Tensor) -> Tensor | None:
        back = hear(name, layer, arguments[0].detach())
        if back is None:
            return None
        y = (y if y.requires_grad else y.detach().requires_grad_()).clone()  # what follows may change it in place
        y.register_hook(back)  # type: ignore[no-untyped-call]
        return y

    return after
