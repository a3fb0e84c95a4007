"""Layers as matrices W (O x I), and what an adapted one computes.

Linear, GPT-2's Conv1D (stored transposed), Conv1d, Conv2d and Conv3d (one row per output channel, I = C_in/groups times
the kernel's size) and Embedding (W = table', the input a one-hot vector).
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.layer import Outline
from ..core.method import Factors, Reweight, Site
from . import masters, quantised
from .product import CONVOLUTIONS, generator, is_stock, multiplies


class LinearView:
    """An `nn.Linear` (or a quantised layer that acts as one) as a `Layer`."""

    channel = -1
    kernel: tuple[int, ...] | None = None  # see `Adapter.kernels`
    also: tuple[str, ...] = ()  # the other names of a module that stands at several places
    reader: str | None = None  # the class that reads the weight, where no layer is called (see `weights`)

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.cls = type(module)
        self.call: Callable[..., Tensor] = self.cls.forward
        # accelerate and others replace `forward` on the instance: keep what they put there
        self.override: Callable[..., Tensor] | None = module.__dict__.get("forward")
        self.more: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # what the module is called with beside x
        self.inside: set[int] = set()  # threads that are in `override`, which may call the adapted layer itself

    def __call__(self, x: Tensor) -> Tensor:
        more, named = self.more or ((), {})
        if self.override is None:
            y = self.call(self.module, x, *more, **named)
        else:
            thread = threading.get_ident()
            self.inside.add(thread)
            try:
                y = self.override(x, *more, **named)
            finally:
                self.inside.discard(thread)
        quantised.check_gradient(self.module, x, y)
        return y

    @functools.cached_property
    def product(self) -> bool:
        """Whether the module computes W x + b (a convolution, a look-up), as far as examples can tell: of stock layers
        and quantised ones it is known.  An adapter goes through the own forward of any other, see `adapted`."""
        weight = self.module.weight
        if (self.override is None or "_hf_hook" in self.module.__dict__) and is_stock(self):
            return True
        return not quantised.is_plain(weight) or weight.is_meta or multiplies(self)

    @property
    def computes_weight(self) -> bool:
        """Whether the class has a property for a weight, which no other can be put in the place of."""
        return isinstance(inspect.getattr_static(_without_computing(self.cls), "weight", None), property)

    def with_more(self, more: tuple[Any, ...], named: dict[str, Any]) -> LinearView:
        """The layer as it is called with something beside x, or with nothing."""
        other = copy.copy(self)
        other.more = (more, named) if more or named else None
        return other

    @property
    def owner(self) -> nn.Module:
        """The module of the model that has the weight."""
        return self.module

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def plain(self) -> bool:
        stock = self.call is nn.Linear.forward and self.override is None and self.more is None
        return stock and quantised.is_plain(self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        return weight if quantised.is_plain(weight) else quantised.dense(self.module)

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return F.linear(x, M_KI)

    def kept(self, x: Tensor, y: Tensor) -> Tensor:
        """y, an adapted output, but for inputs that no adapter may touch: the padding of an embedding."""
        return y

    def stays(self, W_OI: Tensor, new_OI: Tensor) -> Tensor:
        """The adapted W, but for what `kept` keeps."""
        return new_OI

    def oriented(self, W_OI: Tensor) -> Tensor:
        """W as the module stores it."""
        return W_OI

    def put(self, W_OI: Tensor) -> nn.Parameter:
        """W as the parameter that the module would store."""
        return quantised.stored(self.module, self.oriented(W_OI))

    def reread(self, weight: nn.Parameter) -> Tensor:
        """W as it would be with another parameter in the module."""
        parameters: dict = self.module._parameters
        own, parameters["weight"] = parameters["weight"], weight
        try:
            return self.weight
        finally:
            parameters["weight"] = own

    def example(self) -> Tensor:
        """Some input of the module."""
        return torch.randn(2, self.weight.shape[1], generator=generator(), device="cpu").to(self.weight)

    def through(self, x: Tensor, M_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the module's own forward makes of x with another matrix, and no bias or another."""
        more, named = self.more or ((), {})
        other = _with_weight(self.cls, self.module, self.oriented(M_OI), bias)
        before = None if torch.compiler.is_compiling() else dict(other.__dict__)
        y = self.call(other, x, *more, **named)
        if before is not None:  # what the forward writes on itself (a loss, a count) is the module's
            written = {k: v for k, v in other.__dict__.items() if k not in before or before[k] is not v}
            self.module.__dict__.update({k: v for k, v in written.items() if k not in ("weight", "bias")})
        return y


class Conv1DView(LinearView):
    """transformers' Conv1D: a linear layer whose weight is stored (I x O)."""

    plain = False

    @property
    def weight(self) -> Tensor:
        return quantised.dense(self.module).T

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous()


def _with_weight(cls: type[nn.Module], module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """`module` with another weight, and no bias or another, for its own forward: subclasses that pad a convolution or
    scale an embedding by themselves stay right.  A weight that is computed is not computed here."""
    other = object.__new__(_without_computing(cls))
    own = {**module._parameters, "weight": weight, "bias": bias}  # a gain that a class has beside them stays
    other.__dict__.update(module.__dict__, _parameters=own)
    for computed in ("weight", "bias"):
        other.__dict__.pop(computed, None)  # a plain attribute, as torch.nn.utils.weight_norm leaves it
    return other


def _without_computing(cls: type[nn.Module]) -> type[nn.Module]:
    """The class without what masters and torch.nn.utils.parametrize put above it."""
    cls = masters.parts(cls)[0]
    return cls.__mro__[1] if cls.__name__.startswith("Parametrized") and cls.__module__.startswith("torch.") else cls


class EmbeddingView(LinearView):
    """An `nn.Embedding`: x holds indices, W = table'."""

    plain = False
    bias = None

    @property
    def kernel(self) -> tuple[int, ...]:  # type: ignore[override]
        return () if self.module.padding_idx is None else (self.module.padding_idx,)

    @property
    def weight(self) -> Tensor:
        return quantised.dense(self.module).T

    def kept(self, x: Tensor, y: Tensor) -> Tensor:
        padding = self.module.padding_idx
        return y if padding is None else torch.where((x == padding).unsqueeze(-1), self(x), y)

    def stays(self, W_OI: Tensor, new_OI: Tensor) -> Tensor:
        padding = self.module.padding_idx
        if padding is None:
            return new_OI
        at = padding % W_OI.shape[1]
        return new_OI.slice_scatter(W_OI[:, at : at + 1].to(new_OI.dtype), 1, at, at + 1)

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        if self.call is nn.Embedding.forward:
            return F.embedding(x, M_KI.T)
        return self.through(x, M_KI)

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous()

    def example(self) -> Tensor:
        return torch.arange(min(2, self.module.weight.shape[0]), device=self.module.weight.device)


class ConvView(LinearView):
    """An `nn.Conv1d`, `Conv2d` or `Conv3d`: W is the kernel, flattened to (C_out, C_in/groups * its size)."""

    plain = False

    @property
    def channel(self) -> int:  # type: ignore[override]
        return -1 - len(self.module.kernel_size)

    @property
    def kernel(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.module.weight.shape[1:])

    @property
    def weight(self) -> Tensor:
        return quantised.dense(self.module).flatten(1)

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return self.through(x, M_KI).movedim(self.channel, -1)

    def example(self) -> Tensor:
        conv = self.module
        sides = (d * (k - 1) + 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return torch.randn(1, conv.in_channels, *sides, generator=generator(), device="cpu").to(conv.weight)

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(W_OI.shape[0], *self.module.weight.shape[1:])


class TransposedView(LinearView):
    """An `nn.ConvTranspose1d`, `2d` or `3d`, stored (C_in, C_out/groups, its size): W has a row for each output channel
    and place in the kernel, I = C_in.  An adapter goes through the own forward, see `adapted`."""

    plain, product = False, False

    @property
    def channel(self) -> int:  # type: ignore[override]
        return -1 - len(self.module.kernel_size)

    @property
    def weight(self) -> Tensor:
        return quantised.dense(self.module).flatten(1).T

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.reshape(self.module.weight.shape)


def view(module: nn.Module) -> LinearView | None:
    """The module as a matrix, or None where it is not one."""
    if isinstance(module, nn.Embedding):
        return EmbeddingView(module)
    if isinstance(module, CONVOLUTIONS):
        return ConvView(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return TransposedView(module)
    if isinstance(module, nn.Linear):
        return LinearView(module)
    if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):  # transformers, not imported here
        return Conv1DView(module)
    return None


class Acts(Protocol):
    """A method, or what stands in the place of one: the rows of a mixed batch."""

    def forward(self, x: Tensor, layer: Any, f: Factors) -> Tensor: ...


def adapted(method: Acts, layer: LinearView, f: Factors, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What an adapted layer computes of x, its first argument: the method's forward.  A layer that does something else
    with its weight than W x + b, or is called with more than x, computes by its own forward with the adapted weight, as
    if it were merged; for methods without a weight what it is called with goes to the base alone."""
    if not args:
        args = (named.pop(list(inspect.signature(layer.call).parameters)[1]),)
    x, *more = args
    if layer.product and not more and not named:
        return layer.kept(x, method.forward(x, layer, f))
    layer = layer.with_more(tuple(more), named)
    if isinstance(method, Reweight):
        W_OI = layer.weight
        return layer.through(x, layer.stays(W_OI, method.weight(W_OI, f)).to(W_OI.dtype), layer.bias)
    y = method.forward(x, layer, f)
    return layer.kept(x, y) if layer.product else y  # else x does not tell which row is looked up


def check_product(name: str, layer: LinearView) -> None:
    """Raises TypeError where a layer's inputs and outputs tell nothing of its weight."""
    if layer.reader is not None:
        raise TypeError(
            f"{name} is a weight that {layer.reader} reads: what it is multiplied with cannot be seen, and "
            "is needed here. Leave it out (`exclude`), or take what works on weights alone (Truncate, the start PiSSA, "
            "LoRASC with noise=0)"
        )
    if not layer.product:
        raise TypeError(
            f"{name}: {layer.call.__qualname__} is not W x + b, which is needed here. Leave it out (`exclude`), "
            "or take what works on weights alone (Truncate, the start PiSSA, LoRASC with noise=0)"
        )


def check_writable(name: str, layer: LinearView) -> None:
    """Raises TypeError where the module computes its weight, so that none can be written into it."""
    module = layer.module
    if module._parameters.get("weight") is None:
        others = ", ".join(n for n, _ in module.named_parameters() if not n.startswith("undula") and n != "bias")
        raise TypeError(
            f"{name}: its weight is no parameter but computed ({others or 'from nothing'}), so that nothing can be "
            "written into it. Take the parametrisation off first (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm), leave that layer out of `where`, or keep the adapter apart"
        )


def site(name: str, layer: LinearView, shared: dict | None = None) -> Site:
    """The `Site` of one layer.  Factors live in float32, or in float64 over a float64 base."""
    shape = copy.copy(layer)  # seen over an outline of the weight, so that nothing is dequantised
    shape.module = SimpleNamespace(weight=quantised.outline(layer.module))
    W_OI = shape.weight
    dtype = torch.float64 if W_OI.dtype == torch.float64 else torch.float32
    return Site(name, layer, (W_OI.shape[0], W_OI.shape[1]), dtype, layer.device, {} if shared is None else shared)


def outline(name: str, shape: tuple[int, int]) -> Site:
    """A `Site` that has a shape and no numbers: tells which factors a method would make there."""
    return Site(name, Outline(shape, torch.float32), shape, torch.float32, torch.device("meta"))
