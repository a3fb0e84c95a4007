"""What a model's gradients and activations say before anything is trained: the data of data-driven starts.

    undula.attach(model, Centred(LoRA(), LoRAGA()), probe=undula.Probe(batches))

Full gradients dL/dW are as large as the layers.  They are accumulated for a few layers at a time, handed to the start
and freed: `hold` bounds their bytes, and the batches are gone through once for each group of layers.  Nothing of the
model changes, and quantised bases work as well: the gradient is that of the matrix that they stand for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..host import quantised
from ..host.views import EmbeddingView, LinearView, check_product, site
from ..kernels import reference
from .listen import Batch, batches, moved, run
from .padding import kept, watching

Loss = Callable[[nn.Module, Any], Tensor]
Backward = Callable[[Tensor], None]  # is given dL/dy
OnInput = Callable[[str, LinearView, Tensor], Backward | None]  # (site, layer, x) of a call y = layer(x)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss that Hugging Face models return: batches are mappings with `labels`.  Raises TypeError without one."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model returned a {type(out).__name__} without a loss: batches are mappings with `labels`, or give "
            "Probe a loss of your own, as in Probe(batches, loss=lambda model, batch: ...)"
        )
    return loss


@dataclass(frozen=True, eq=False)
class Probe:
    """Gradients and activations over `batches`, in evaluation mode.  They are gone through when a method first asks.

    `loss(model, batch)` is averaged over the batches; the default takes `.loss` of what the model returns.  Activations
    need no loss: with the default one, batches without `labels` will do for them.  Of layers that share a parameter,
    each has the gradient of its own calls.  `hold` is the most bytes of gradients (or of second moments of activations)
    at a time; what one layer needs is always held.  With hold=0 it is one layer's: the batches are gone through once
    for each layer.
    """

    batches: Iterable[Batch] = field(repr=False)
    loss: Loss = loss_of
    hold: int = 1 << 28

    def on(self, model: nn.Module, layers: Mapping[str, LinearView]) -> BoundProbe:
        """The probe as the `Evidence` of these layers of a model."""
        quantised.keep_gradients(model)
        return BoundProbe(self, model, layers)


class BoundProbe:
    """A probe of one model's layers.  Layers are asked for in the model's order; what is measured for one that is never
    asked for is dropped with its group."""

    def __init__(self, probe: Probe, model: nn.Module, layers: Mapping[str, LinearView]):
        self.probe, self.model, self.layers = probe, model, dict(layers)
        self._gradients = _Store()
        self._moments = _Store()

    @functools.cached_property
    def data(self) -> tuple[Batch, ...]:
        """The batches.  Nobody makes them before something is measured: most methods never ask."""
        data = tuple(self.probe.batches)
        if not data:
            raise ValueError(
                "the probe has no batches (an iterator gives them once, so a second attach finds it empty: give a list)"
            )
        return data

    def gradient(self, name: str) -> Tensor:
        """dL/dW (O, I), averaged over the batches, float32 (float64 over a float64 base).  Raises RuntimeError where
        the loss does not depend on W, or is not finite."""
        if name not in self._gradients:
            group = self._group(name, list(self.layers), lambda O, I, size: size * O * I)
            self._gradients.clear()  # first, so that two groups are never held
            self._gradients.fill(self._measure_gradients(group))
        if name not in self._gradients:
            raise RuntimeError(
                f"no gradient of the loss reaches {name}: the loss does not depend on it (is the layer used, does the "
                "model run it under torch.no_grad, are there labels that count?). Leave it out of `where`"
            )
        G_OI: Tensor = self._gradients.take(name)
        if not G_OI.isfinite().all():
            raise RuntimeError(
                f"the gradient at {name} is not finite: look at the loss of each batch (no label that counts gives "
                "nan), or probe in a wider type than the model's"
            )
        return G_OI

    def moments(self, name: str) -> tuple[Tensor, Tensor, int]:
        """(sum of x x' (I, I), sum of x (I), count) of the layer's inputs, float64; padding does not count."""
        if name not in self._moments:
            able = [n for n, layer in self.layers.items() if n == name or has_directions(layer)]
            group = self._group(name, able, lambda O, I, size: 8 * I * (I + 1))
            self._moments.clear()
            self._moments.fill(self._measure_moments(group))
        if name not in self._moments:
            raise RuntimeError(f"{name} did not compute on these batches. Leave it out of `where`")
        return self._moments.take(name)

    def _group(self, first: str, names: list[str], size: Callable[[int, int, int], int]) -> dict[str, LinearView]:
        """Those of `names` from `first` on whose sizes (of O, I and the bytes of a number) fit into `hold`, at least
        one."""
        group: dict[str, LinearView] = {}
        held = 0
        for name in names[names.index(first) :]:
            where = site(name, self.layers[name])
            held += size(*where.shape, where.dtype.itemsize)
            if group and held > self.probe.hold:
                break
            group[name] = self.layers[name]
        return group

    def _measure_gradients(self, group: Mapping[str, LinearView]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def hear(name: str, layer: LinearView, x: Tensor) -> Backward:
            version = x._version

            def add(g: Tensor) -> None:
                if x._version != version:
                    raise RuntimeError(f"the model changed the input of {name} in place, so dL/dW there is lost")
                part = weight_gradient(layer, x, g)
                sums[name] = sums[name].add_(part) if name in sums else part

            return add

        anchor = torch.zeros((), device="cpu", requires_grad=True)
        with recording(self.model, group, hear, anchor):
            for batch in batches(self.data, self._doing("gradients", group)):
                loss = self.probe.loss(self.model, self._on_device(batch))
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise TypeError(f"the probe's loss(model, batch) returns one number as a tensor; found {found}")
                if loss.requires_grad:
                    loss.sum().backward(inputs=[anchor])  # no other leaf gets a .grad
        return {name: total.div_(len(self.data)) for name, total in sums.items()}

    def _measure_moments(self, group: Mapping[str, LinearView]) -> dict[str, tuple[Tensor, Tensor, int]]:
        found: dict[str, tuple[Tensor, Tensor, int]] = {}

        def hear(name: str, layer: LinearView, x: Tensor) -> None:
            x_TI = kept(inputs(layer, x), watch.of(name, x, layer.channel)).double()
            if name not in found:
                I = x_TI.shape[1]
                found[name] = x_TI.new_zeros(I, I), x_TI.new_zeros(I), 0
            xx_II, x_I, n = found[name]
            found[name] = xx_II.addmm_(x_TI.T, x_TI), x_I.add_(x_TI.sum(0)), n + len(x_TI)

        forward = run if self.probe.loss is loss_of else self.probe.loss
        with watching(self.model) as watch, recording(self.model, group, hear), torch.no_grad():
            for batch in batches(self.data, self._doing("activations", group)):
                watch.begin(batch)
                forward(self.model, self._on_device(batch))
        return found

    def _doing(self, what: str, group: Mapping[str, LinearView]) -> str:
        """What a progress bar says."""
        first = list(self.layers).index(next(iter(group)))
        return f"{what} of layers {first + 1}-{first + len(group)} of {len(self.layers)}"

    def _on_device(self, batch: Batch) -> Any:
        return moved(batch, next(iter(self.layers.values())).device)


class _Store:
    """Measurements by layer.  One that was taken stays until another is taken: two starts at one layer ask twice."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._taken: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def clear(self) -> None:
        self._values.clear()

    def fill(self, values: Mapping[str, Any]) -> None:
        self._values, self._taken = dict(values), None

    def take(self, name: str) -> Any:
        if self._taken != name:
            self._values.pop(self._taken, None)  # type: ignore[arg-type]
        self._taken = name
        return self._values[name]


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_directions(layer: LinearView) -> bool:
    """Whether the layer's inputs are vectors of one space: neither indices nor, group by group, different channels."""
    return not isinstance(layer, EmbeddingView) and getattr(layer.module, "groups", 1) == 1


def inputs(layer: LinearView, x: Tensor) -> Tensor:
    """The vectors that the layer's matrix multiplies (..., I): x itself, or the patches of a convolution.  Raises
    TypeError for an embedding, ValueError for a convolution in groups."""
    if isinstance(layer, EmbeddingView):
        raise TypeError("an embedding's inputs are indices, which have no directions: leave it out of `where`")
    groups = getattr(layer.module, "groups", 1)
    if groups > 1:
        raise ValueError(f"a convolution in {groups} groups: its groups see different inputs, leave it out of `where`")
    if layer.channel == -1:
        return torch.atleast_2d(wide(x))
    I = layer.weight.shape[1]
    return layer.project(wide(x), torch.eye(I, device=x.device, dtype=wide(x).dtype))


def weight_gradient(layer: LinearView, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW (O, I) of one call y = layer(x) from g = dL/dy."""
    if layer.channel == -1 and x.is_floating_point():
        return wide(g).reshape(-1, g.shape[-1]).T @ wide(x).reshape(-1, x.shape[-1])
    Z_OI = torch.zeros(layer.weight.shape, dtype=wide(g).dtype, device=g.device, requires_grad=True)
    with torch.enable_grad():
        y = reference.restore(layer.project(wide(x) if x.is_floating_point() else x, Z_OI), layer)
    G_OI = torch.autograd.grad(y, Z_OI, wide(g))[0]
    return layer.stays(torch.zeros_like(G_OI), G_OI)  # an embedding's padding row gets no gradient


class _Tap(torch.autograd.Function):
    """(y, anchor, back) -> y; on the way back `back` hears dL/dy.  The anchor makes the loss depend on something that
    takes a gradient, where no parameter does."""

    @staticmethod
    def forward(ctx, y, anchor, back):
        ctx.back, ctx.zero = back, anchor.detach()
        return y.clone()  # what follows may change it in place

    @staticmethod
    def backward(ctx, g):
        ctx.back(g)
        ctx.back = None  # frees the layer's input
        return g, ctx.zero, None


@contextlib.contextmanager
def recording(
    model: nn.Module, group: Mapping[str, LinearView], hear: OnInput, anchor: Tensor | None = None
) -> Iterator[None]:
    """Calls `hear(site, layer, x)` when a layer of the group computes; what it returns is called with dL/dy when the
    loss goes back to `anchor`.  The model is in evaluation mode and none of its parameters takes a gradient meanwhile;
    afterwards, whatever happened, all is as it was."""
    modes = {m: m.training for m in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        model.requires_grad_(False)
        model.eval()
        for name, layer in group.items():
            check_product(name, layer)
            hook = _hook(name, layer, hear, anchor)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        for p in trained:
            p.requires_grad_(True)


def _hook(name: str, layer: LinearView, hear: OnInput, anchor: Tensor | None) -> Callable[..., Tensor | None]:
    def after(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor | None:
        x = arguments[0] if arguments else next(iter(named.values()))
        back = hear(name, layer, x.detach())
        return None if back is None else _Tap.apply(y, anchor, back)

    return after
