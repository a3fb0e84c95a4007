"""Where: choosing layers by name, and seeing each as a matrix W (O x I).

Linear, GPT-2's Conv1D (stored transposed), Conv2d (one row per output channel, I = C_in/groups * kh * kw) and
Embedding (W = table', the input a one-hot vector).
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bases, masters
from .kernels import reference
from .method import Factors, Outline, Reweight, Site

Where = str | re.Pattern[str] | Iterable[str]


class LinearView:
    """An `nn.Linear` (or a quantised layer that acts as one) as a `Layer`."""

    channel = -1
    kernel: tuple[int, ...] | None = None  # see `Adapter.kernels`
    also: tuple[str, ...] = ()  # the other names of a module that stands at several places

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
        bases.check_gradient(self.module, x, y)
        return y

    @functools.cached_property
    def product(self) -> bool:
        """Whether the module computes W x + b (a convolution, a look-up), as far as examples can tell: of stock layers
        and quantised ones it is known.  An adapter goes through the own forward of any other, see `adapted`."""
        weight = self.module.weight
        if (self.override is None or "_hf_hook" in self.module.__dict__) and _is_stock(self):
            return True
        return not bases.is_plain(weight) or weight.is_meta or _multiplies(self)

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
    def training(self) -> bool:
        return self.module.training

    @property
    def plain(self) -> bool:
        stock = self.call is nn.Linear.forward and self.override is None and self.more is None
        return stock and bases.is_plain(self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        return weight if bases.is_plain(weight) else bases.dense(self.module)

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
        return bases.stored(self.module, self.oriented(W_OI))

    def example(self) -> Tensor:
        """Some input of the module."""
        return torch.randn(2, self.weight.shape[1], generator=_generator()).to(self.weight)

    def through(self, x: Tensor, M_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the module's own forward makes of x with another matrix, and no bias or another."""
        more, named = self.more or ((), {})
        return self.call(_with_weight(self.cls, self.module, self.oriented(M_OI), bias), x, *more, **named)


class Conv1DView(LinearView):
    """transformers' Conv1D: a linear layer whose weight is stored (I x O)."""

    plain = False  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        return bases.dense(self.module).T

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous()


def _with_weight(cls: type[nn.Module], module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """`module` with another weight, and no bias or another, for its own forward: subclasses that pad a convolution or
    scale an embedding by themselves stay right.  A weight that is computed is not computed here."""
    other = object.__new__(_without_computing(cls))
    other.__dict__.update(module.__dict__, _parameters={"weight": weight, "bias": bias})
    for computed in ("weight", "bias"):
        other.__dict__.pop(computed, None)  # a plain attribute, as torch.nn.utils.weight_norm leaves it
    return other


def _without_computing(cls: type[nn.Module]) -> type[nn.Module]:
    """The class without what masters and torch.nn.utils.parametrize put above it."""
    cls = masters.parts(cls)[0]
    return cls.__mro__[1] if cls.__name__.startswith("Parametrized") and cls.__module__.startswith("torch.") else cls


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class EmbeddingView(LinearView):
    """An `nn.Embedding`: x holds indices, W = table'."""

    plain = False  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    @property
    def kernel(self) -> tuple[int, ...]:  # type: ignore[override]
        return () if self.module.padding_idx is None else (self.module.padding_idx,)

    @property
    def weight(self) -> Tensor:
        return bases.dense(self.module).T

    def kept(self, x: Tensor, y: Tensor) -> Tensor:
        padding = self.module.padding_idx
        return y if padding is None else torch.where((x == padding).unsqueeze(-1), self(x), y)

    def stays(self, W_OI: Tensor, new_OI: Tensor) -> Tensor:
        padding = self.module.padding_idx
        if padding is None:
            return new_OI
        at = torch.tensor([padding % W_OI.shape[1]], device=W_OI.device)
        return new_OI.index_copy(1, at, W_OI.index_select(1, at).to(new_OI.dtype))

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        if self.call is nn.Embedding.forward:
            return F.embedding(x, M_KI.T)
        return self.through(x, M_KI)

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous()

    def example(self) -> Tensor:
        return torch.arange(min(2, self.module.weight.shape[0]), device=self.module.weight.device)


class Conv2dView(LinearView):
    """An `nn.Conv2d`: W is the kernel, flattened to (C_out, C_in/groups * kh * kw)."""

    channel = -3
    plain = False  # type: ignore[assignment]

    @property
    def kernel(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.module.weight.shape[1:])  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        return bases.dense(self.module).flatten(1)

    def project(self, x: Tensor, M_KI: Tensor) -> Tensor:
        return self.through(x, M_KI).movedim(-3, -1)

    def example(self) -> Tensor:
        conv = self.module
        sides = (d * (k - 1) + 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return torch.randn(1, conv.in_channels, *sides, generator=_generator()).to(conv.weight)

    def oriented(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(W_OI.shape[0], *self.module.weight.shape[1:])


def view(module: nn.Module) -> LinearView | None:
    """The module as a matrix, or None where it is not one."""
    if isinstance(module, nn.Embedding):
        return EmbeddingView(module)
    if isinstance(module, nn.Conv2d):
        return Conv2dView(module)
    if isinstance(module, nn.Linear):
        return LinearView(module)
    if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):  # transformers, not imported here
        return Conv1DView(module)
    return None


def aliases(model: nn.Module) -> dict[str, str]:
    """{other name: the first} of the modules that stand at several places: it is the first that counts."""
    first: dict[nn.Module, str] = {}
    return {n: first[m] for n, m in model.named_modules(remove_duplicate=False) if first.setdefault(m, n) != n}


def views(model: nn.Module) -> dict[str, LinearView]:
    """Every module that is a matrix, by its first name."""
    found = {n: v for n, m in model.named_modules() if (v := view(m)) is not None}
    for other, n in aliases(model).items():
        if n in found:
            found[n].also += (other,)
    return found


STOCK = (nn.Linear.forward, nn.Embedding.forward, nn.Conv2d.forward)


def _is_stock(layer: LinearView) -> bool:
    """Whether the class computes as torch's or transformers' own does."""
    padded = getattr(layer.cls, "_conv_forward", nn.Conv2d._conv_forward)
    own = padded is not nn.Conv2d._conv_forward or layer.computes_weight
    return not own and (layer.call in STOCK or layer.call.__module__ == "transformers.pytorch_utils")


@torch.no_grad()
def _multiplies(layer: LinearView) -> bool:
    """Whether layer(x) is W x + b, and W + M gives M x more, for small and large examples."""
    W_OI = layer.weight
    eps = torch.finfo(W_OI.dtype).eps
    allowed = 32 * eps if W_OI.dtype in bases.WIDE else 8 * eps
    bias = 0 if layer.bias is None else reference.channels(layer.bias, layer)
    w, m = torch.randn(2, W_OI.shape[0], 1, generator=_generator()).to(W_OI)
    flat_OI, more_OI = w.expand(W_OI.shape), m.expand(W_OI.shape)  # matrices of no size
    try:
        for scale in (1, 1000):
            x = layer.example()
            x = scale * x if x.is_floating_point() else x
            found, wanted = layer(x), reference.restore(layer.project(x, W_OI), layer) + bias
            both, first = (layer.through(x, M, layer.bias) for M in (flat_OI + more_OI, flat_OI))
            change, extra = both - first, reference.restore(layer.project(x, more_OI), layer)
            if found.shape != wanted.shape or (found - wanted).norm() > allowed * wanted.norm():
                return False
            if (change - extra).norm() > allowed * both.norm().clamp(min=extra.norm()):
                return False
    except Exception:  # of a class that asks for something else, or gives something else
        return False
    return True


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
    return layer.kept(x, method.forward(x, layer, f))


def check_product(name: str, layer: LinearView) -> None:
    """Raises TypeError where a layer's inputs and outputs tell nothing of its weight."""
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
    shape.module = SimpleNamespace(weight=bases.outline(layer.module))  # type: ignore[assignment]
    W_OI = shape.weight
    dtype = torch.float64 if W_OI.dtype == torch.float64 else torch.float32
    return Site(name, layer, (W_OI.shape[0], W_OI.shape[1]), dtype, layer.device, {} if shared is None else shared)


def outline(name: str, shape: tuple[int, int]) -> Site:
    """A `Site` that has a shape and no numbers: tells which factors a method would make there."""
    return Site(name, Outline(shape, torch.float32), shape, torch.float32, torch.device("meta"))


def inner(model: nn.Module) -> nn.Module:
    """The model within wrappers that put a prefix before all names: `torch.compile`'s, those for several devices."""
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def choose(model: nn.Module, where: Where, exclude: Where = ()) -> dict[str, LinearView]:
    """The layers that `where` names and `exclude` does not, in the model's order.

    `where` is `"all-linear"` (every linear layer of the model's body: not its output head), a glob over full names
    (`"*.q_proj"`), a compiled regular expression (full match), or a list of names, suffixes (`"q_proj"`) or globs;
    `exclude` is such a name, glob, expression or list.  A module that stands at several places is one layer, under its
    first name, and may be named by any.  Raises LookupError that lists what exists when a pattern matches nothing,
    TypeError when all that it matches is of a kind that cannot be adapted; warns of such layers beside others.
    """
    barred = barriers(model)
    layers = {n: v for n, v in views(model).items() if n not in barred}
    candidates = [n for n, _ in model.named_modules() if n in layers or n in barred]
    called = {n: n for n in candidates} | {other: n for other, n in aliases(model).items() if n in candidates}
    if where == "all-linear":
        asked, odd = _all_linear(model, layers)
        barred |= odd
    else:
        asked = _asked(where, called)
    if exclude:
        asked = _without(asked, _asked(exclude, called), candidates)
    _say_left_out(asked, barred)
    return _checked({pattern: names - set(barred) for pattern, names in asked.items()}, layers, model)


def _all_linear(model: nn.Module, layers: Mapping[str, LinearView]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The linear layers of the body, and {name: why} of those among them that compute something else than W x + b."""
    body = _body(model)
    linear = {n for n, m in model.named_modules() if n in body and n not in layers and isinstance(m, nn.Linear)}
    linear |= {n for n, m in model.named_modules() if n in body and _is_stack(m)}
    own = {n for n, v in layers.items() if n in body and type(v) in (LinearView, Conv1DView)}
    odd = {n: OWN.format(layers[n].call.__qualname__) for n in own if not layers[n].product}
    return {"'all-linear'": linear | own}, odd


def _is_stack(module: nn.Module) -> bool:
    """Whether the module holds stacked matrices, as the experts of a mixture are in transformers 5."""
    conv = isinstance(module, nn.modules.conv._ConvNd)
    return not conv and any(
        p is not None and p.ndim == 3 and p.numel() > p.shape[-1] for p in module._parameters.values()
    )


def _without(
    asked: Mapping[str, set[str]], excluded: Mapping[str, set[str]], candidates: Iterable[str]
) -> dict[str, set[str]]:
    """What was asked for but for what is excluded.  Raises LookupError where that is nothing, on either side."""
    for pattern, names in excluded.items():
        if not names:
            raise LookupError(_nothing(pattern, list(candidates), "exclude"))
    left = {p: names.difference(*excluded.values()) for p, names in asked.items()}
    if any(asked.values()) and not any(left.values()):
        raise LookupError(f"exclude={', '.join(excluded)} leaves nothing of where={', '.join(asked)}")
    return {p: names for p, names in left.items() if names or not asked[p]}


def _asked(where: Where, called: Mapping[str, str]) -> dict[str, set[str]]:
    """{pattern: the layers that it names}, of layers by all of their names."""
    if isinstance(where, re.Pattern):
        return {repr(where.pattern): {n for name, n in called.items() if where.fullmatch(name)}}
    patterns = [where] if isinstance(where, str) else list(where)
    return {repr(p): {n for name, n in called.items() if matches(name, p)} for p in patterns}


OWN = "{} is not W x + b: an adapter goes through it where the layer is named in `where`"

# What fused kernels, or the model itself, read as `self.<name>.weight` (transformers 5; PEFT's own list for LoRA has
# out_proj and conv1d of five of these).
_MIXER = ("out_proj", "conv1d")
READ = {
    "mamba": ("x_proj", "dt_proj", *_MIXER),
    "falcon_mamba": ("x_proj", "dt_proj", *_MIXER),
    "jamba": ("dt_proj", "conv1d"),
    "mamba2": _MIXER,
    "falcon_h1": _MIXER,
    "nemotron_h": _MIXER,
    "zamba2": _MIXER,
    "bamba": _MIXER,
    "granitemoehybrid": _MIXER,
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "deberta": ("in_proj",),
}


def barriers(model: nn.Module) -> dict[str, str]:
    """{name: why} of the modules with a matrix of their own that no adapter can act on."""
    barred = {}
    parents = dict(model.named_modules())
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    for name, module in parents.items():
        if name.rpartition(".")[2] in READ.get(kind, ()):
            barred[name] = f"the model (model_type='{kind}') reads its weight without calling it"
            continue
        parent = parents.get(name.rpartition(".")[0]) if name else None
        if isinstance(parent, nn.MultiheadAttention) and parent.out_proj is module and _reads_weights(parent):
            barred[name] = "nn.MultiheadAttention computes from its weight and never calls it"
        elif name.rpartition(".")[2] == "shared" and isinstance(module, nn.Embedding) and _looked_up(module, parents):
            barred[name] = "encoder and decoder look up in embeddings of their own, which are tied to it"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            barred[name] = f"an embedding with max_norm={module.max_norm:g} rescales the rows that it looks up"
        elif view(module) is None and any(p.ndim > 1 for p in module._parameters.values() if p is not None):
            barred[name] = f"no adapter acts on a {type(module).__name__}"
    return barred


def _looked_up(shared: nn.Embedding, modules: Mapping[str, nn.Module]) -> bool:
    """Whether other embeddings hold the weight of this one."""
    return any(m is not shared and isinstance(m, nn.Embedding) and m.weight is shared.weight for m in modules.values())


def _reads_weights(attention: nn.MultiheadAttention) -> bool:
    """Whether attention goes by torch's own function: of a class with another forward and a layer of its own we assume
    that it calls the layer."""
    return type(attention).forward is nn.MultiheadAttention.forward or type(attention.out_proj) is not nn.Linear


def _say_left_out(asked: Mapping[str, set[str]], barred: Mapping[str, str]) -> None:
    """TypeError where a pattern names only layers that cannot be adapted, a warning where it names others too."""
    for pattern, names in asked.items():
        if names and names <= set(barred):
            raise TypeError(f"where={pattern} names only layers that cannot be adapted: {_reasons(names, barred)}")
    left = {n for names in asked.values() for n in names if n in barred}
    if left:
        warnings.warn(f"left out of where={', '.join(asked)}: {_reasons(left, barred)}", stacklevel=5)


def _reasons(names: Iterable[str], barred: Mapping[str, str]) -> str:
    sites: dict[str, list[str]] = {}
    for name in sorted(names):
        sites.setdefault(barred[name], []).append(name)
    return "; ".join(
        f"{', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''} ({why})" for why, n in sites.items()
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a full name fits a pattern: itself, its last parts, or a glob over the whole."""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def _checked(
    found: Mapping[str, set[str]], layers: Mapping[str, LinearView], model: nn.Module
) -> dict[str, LinearView]:
    empty = [pattern for pattern, names in found.items() if not names]
    if empty or not found:
        named = [n for n, _ in model.named_parameters() for p in empty if matches(n, p.strip("'"))]
        more = f" It names parameters ({named[0]}), which no adapter acts on: `full` trains them." if named else ""
        raise LookupError(_nothing(", ".join(empty) or "[]", list(layers)) + more)
    chosen = set().union(*found.values())
    return {n: v for n, v in layers.items() if n in chosen}


def _nothing(pattern: str, names: list[str], option: str = "where") -> str:
    leaves = sorted({n.rpartition(".")[2] for n in names})
    close = difflib.get_close_matches(pattern.strip("'*"), leaves, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{option}={pattern} matches none of the {len(names)} layers that can be adapted: {some} "
        f"(last parts: {', '.join(leaves)}).{hint}"
    )


def _body(model: nn.Module) -> set[str]:
    """Names of modules in the body: Hugging Face models name their body, what stands outside is a head; others have
    what they return as their output embeddings or, as timm's models, as their classifier."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    inside = isinstance(body, nn.Module)
    heads = [getattr(model, f"get_{what}", lambda: None)() for what in ("output_embeddings", "classifier")]
    heads = [h for head in heads for h in (head if isinstance(head, tuple | list) else [head])]
    return {n for n, m in model.named_modules() if m not in heads and (not inside or n.startswith(prefix + "."))}
