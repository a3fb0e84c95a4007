"""Where: choosing layers by name, and seeing each as a matrix W (O x I).

Linear, GPT-2's Conv1D (stored transposed), Conv2d (one row per output channel, I = C_in/groups * kh * kw) and
Embedding (W = table', the input a one-hot vector).
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bases
from .method import Outline, Site

Where = str | re.Pattern[str] | Iterable[str]


class LinearView:
    """An `nn.Linear` (or a quantised layer that acts as one) as a `Layer`."""

    channel = -1
    kernel: tuple[int, ...] | None = None  # see `Adapter.kernels`
    also: tuple[str, ...] = ()  # the other names of a module that stands at several places

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.call: Callable[[nn.Module, Tensor], Tensor] = type(module).forward
        # accelerate and others replace `forward` on the instance: keep what they put there
        self.override = module.__dict__.get("forward")

    def __call__(self, x: Tensor) -> Tensor:
        y = self.call(self.module, x) if self.override is None else self.override(x)
        bases.check_gradient(self.module, x, y)
        return y

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def plain(self) -> bool:
        return self.override is None and self.call is nn.Linear.forward and bases.is_plain(self.module.weight)

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

    def put(self, W_OI: Tensor) -> nn.Parameter:
        """W as the parameter that the module would store."""
        return bases.stored(self.module, W_OI)

    def example(self) -> Tensor:
        """Some input of the module."""
        weight = self.module.weight
        return torch.randn(2, weight.shape[1], generator=_generator()).to(weight)

    def through(self, x: Tensor, M_OI: Tensor) -> Tensor:
        """What the module's own forward makes of x with another matrix and no bias."""
        return self.call(_with_weight(self.module, M_OI), x)


class Conv1DView(LinearView):
    """transformers' Conv1D: a linear layer whose weight is stored (I x O)."""

    plain = False  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        return bases.dense(self.module).T

    def put(self, W_OI: Tensor) -> nn.Parameter:
        return bases.stored(self.module, W_OI.T.contiguous())


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """`module` with another weight and no bias, for its own forward: subclasses that pad a convolution or scale an
    embedding by themselves stay right."""
    kind, own = type(module), {"weight": weight, "bias": None}
    if any(name in module.__dict__ or isinstance(getattr(kind, name, None), property) for name in own):
        other = object.__new__(_unhidden(kind))  # type: ignore[arg-type]
        other.__dict__.update(module.__dict__, **own)
    else:
        other = object.__new__(kind)
        other.__dict__.update(module.__dict__, _parameters=own)
    return other


@functools.cache
def _unhidden(kind: type[nn.Module]) -> type[nn.Module]:
    """The class for a module whose weight is computed, or a plain attribute for a while (`weight_norm`, FSDP with
    `use_orig_params`): a property or attribute of that name would be found before a parameter."""
    return type(kind.__name__, (kind,), {"weight": None, "bias": None})


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

    def put(self, W_OI: Tensor) -> nn.Parameter:
        return bases.stored(self.module, W_OI.T.contiguous())

    def example(self) -> Tensor:
        return torch.arange(min(2, self.module.weight.shape[0]), device=self.module.weight.device)

    def through(self, x: Tensor, M_OI: Tensor) -> Tensor:
        return self.call(_with_weight(self.module, M_OI.T), x)


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

    def through(self, x: Tensor, M_OI: Tensor) -> Tensor:
        conv = self.module
        return self.call(_with_weight(conv, M_OI.reshape(M_OI.shape[0], *conv.weight.shape[1:])), x)

    def put(self, W_OI: Tensor) -> nn.Parameter:
        return bases.stored(self.module, W_OI.reshape(self.module.weight.shape))


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


@torch.no_grad()
def check_writable(name: str, layer: LinearView) -> None:
    """Raises TypeError where no weight written into the module gives the adapted layer: the module computes its weight
    from something else, or uses it otherwise than as the matrix of a product."""
    module = layer.module
    if module._parameters.get("weight") is None:
        others = ", ".join(n for n, _ in module.named_parameters() if not n.startswith("undula") and n != "bias")
        raise TypeError(
            f"{name}: its weight is no parameter but computed ({others or 'from nothing'}), so that nothing can be "
            "written into it. Take the parametrisation off first (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm), leave that layer out of `where`, or keep the adapter apart"
        )
    if (
        layer.call in STOCK
        or layer.call.__module__ == "transformers.pytorch_utils"
        or not bases.is_plain(module.weight)
    ):
        return
    if not _adds_up(layer):
        raise TypeError(
            f"{name}: {layer.call.__qualname__} does not add up over weights as W x does (it scales, normalises or "
            "rounds W), so that no weight written into it gives the adapted layer. Leave that layer out of `where`, or "
            "keep the adapter apart"
        )


def _adds_up(layer: LinearView) -> bool:
    """Whether W + M gives what W gives plus `project(x, M)`; True where the module's forward refuses to be tried."""
    O, I = layer.weight.shape
    w, m = torch.randn(2, O, 1, generator=_generator()).to(layer.weight)
    W_OI, M_OI = w.expand(O, I), m.expand(O, I)  # matrices of no size
    try:
        x = layer.example()
        first, again = layer.through(x, W_OI), layer.through(x, W_OI)
        both, more = layer.through(x, (w + m).expand(O, I)), layer.project(x, M_OI)
    except Exception:  # of a class that asks for more than a layer's input
        return True
    if not torch.equal(first, again):  # noise of its own
        return True
    change = both.movedim(layer.channel, -1) - first.movedim(layer.channel, -1)
    allowed = 1e-3 if layer.module.weight.dtype in bases.WIDE else 0.1
    return bool((change - more).norm() <= allowed * both.norm())


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


def choose(model: nn.Module, where: Where) -> dict[str, LinearView]:
    """The layers that `where` names, in the model's order.

    `where` is `"all-linear"` (every linear layer of the model's body: not its output head), a glob over full names
    (`"*.q_proj"`), a compiled regular expression (full match), or a list of names, suffixes (`"q_proj"`) or globs.
    A module that stands at several places is one layer, under its first name, and may be named by any.  Raises
    LookupError that lists what exists when a pattern matches nothing, TypeError when all that it matches is of a kind
    that cannot be adapted; warns of such layers beside others.
    """
    modules = dict(model.named_modules())
    barred = barriers(model)
    layers = {n: v for n, v in views(model).items() if n not in barred}
    candidates = [n for n in modules if n in layers or n in barred]
    called = {n: n for n in candidates} | {other: n for other, n in aliases(model).items() if n in candidates}
    if isinstance(where, re.Pattern):
        asked = {repr(where.pattern): {n for name, n in called.items() if where.fullmatch(name)}}
    elif where == "all-linear":
        body, kinds = _body(model), (LinearView, Conv1DView)
        linear = {
            n for n in candidates if (type(layers[n]) in kinds if n in layers else isinstance(modules[n], nn.Linear))
        }
        asked = {repr(where): linear & body}
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        asked = {repr(p): {n for name, n in called.items() if matches(name, p)} for p in patterns}
    _say_left_out(asked, barred)
    return _checked({pattern: names - set(barred) for pattern, names in asked.items()}, layers)


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
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            barred[name] = f"an embedding with max_norm={module.max_norm:g} rescales the rows that it looks up"
        elif view(module) is None and any(p.ndim > 1 for p in module._parameters.values() if p is not None):
            barred[name] = f"no adapter acts on a {type(module).__name__}"
    return barred


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


def _checked(found: Mapping[str, set[str]], layers: Mapping[str, LinearView]) -> dict[str, LinearView]:
    empty = [pattern for pattern, names in found.items() if not names]
    if empty or not found:
        raise LookupError(_nothing(", ".join(empty) or "[]", list(layers)))
    chosen = set().union(*found.values())
    return {n: v for n, v in layers.items() if n in chosen}


def _nothing(pattern: str, names: list[str]) -> str:
    leaves = sorted({n.rpartition(".")[2] for n in names})
    close = difflib.get_close_matches(pattern.strip("'*"), leaves, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"where={pattern} matches none of the {len(names)} layers that can be adapted: {some} "
        f"(last parts: {', '.join(leaves)}).{hint}"
    )


def _body(model: nn.Module) -> set[str]:
    """Names of modules in the body: Hugging Face models name their body, what stands outside is a head."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output()
    inside = isinstance(inner, nn.Module)
    return {n for n, m in model.named_modules() if m is not head and (not inside or n.startswith(prefix + "."))}
