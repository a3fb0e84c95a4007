"""Where: choosing the layers of a model by name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from .views import Conv1DView, LinearView, view

Where = str | re.Pattern[str] | Iterable[str]


def inner(model: nn.Module) -> nn.Module:
    """The model within wrappers that put a prefix before all names: `torch.compile`'s, those for several devices."""
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


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
    return not conv and any(p is not None and p.ndim == 3 and p.shape[0] > 1 for p in module._parameters.values())


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
        if "undula" in module._modules:
            barred[name] = "adapted already, by an adapter on a part of this model or on a model around it"
            continue
        if name.rpartition(".")[2] in READ.get(kind, ()):
            barred[name] = f"the model (model_type='{kind}') reads its weight without calling it"
            continue
        parent = parents.get(name.rpartition(".")[0]) if name else None
        if isinstance(module, nn.modules.conv._ConvNd) and _reads(parent, name.rpartition(".")[2]):
            barred[name] = f"{type(parent).__name__} reads its weight without calling it"
            continue
        if isinstance(parent, nn.MultiheadAttention) and parent.out_proj is module and _reads_weights(parent):
            barred[name] = "nn.MultiheadAttention computes from its weight and never calls it"
        elif name.rpartition(".")[2] == "shared" and isinstance(module, nn.Embedding) and _looked_up(module, parents):
            barred[name] = "encoder and decoder look up in embeddings of their own, which are tied to it"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            barred[name] = f"an embedding with max_norm={module.max_norm:g} rescales the rows that it looks up"
        elif view(module) is None and any(p.ndim > 1 for p in module._parameters.values() if p is not None):
            barred[name] = f"no adapter acts on a {type(module).__name__}"
    return barred


@functools.cache
def _reading(parent: type[nn.Module]) -> frozenset[str]:
    """The parts that a class reads by `self.<name>.weight`, as hybrid language models do with their convolutions for
    kernels of their own; none where there is no source."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", source))


def _reads(parent: nn.Module | None, leaf: str) -> bool:
    return parent is not None and leaf in _reading(type(parent))  # type: ignore[arg-type]


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
