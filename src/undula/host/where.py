"""Where: choosing the layers of a model by name."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..core.method import Method
from . import quantised
from .matrices import aliases, has_plain_weight, is_stack, layers_at, own_matrices, stacks, views
from .readers import readers
from .views import Conv1DView, LinearView, view
from .weights import Matrix

Where = str | re.Pattern[str] | Iterable[str]


def inner(model: nn.Module) -> nn.Module:
    """The model within wrappers that put a prefix before all names: `torch.compile`'s, those for several devices.
    Raises TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(_no_model(model))
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _no_model(found: Any) -> str:
    """What to say of something else in a model's place."""
    if isinstance(found, Method) or type(found).__name__ in ("Adapter", "Live"):
        hint = ": the model comes first, as in undula.attach(model, undula.LoRA())"
    elif isinstance(found, str):
        hint = f": open it before, as in transformers.AutoModel.from_pretrained({found!r:.60})"
    elif isinstance(getattr(found, "model", None), nn.Module):
        hint = ": its .model is one"
    else:
        hint = ""
    kind = f"the class {found.__name__}" if isinstance(found, type) else f"{found!r:.80}"
    return f"a model is a torch.nn.Module; found {kind}{hint}"


def choose(model: nn.Module, where: Where, exclude: Where = ()) -> dict[str, LinearView]:
    """The layers that `where` names and `exclude` does not, in the model's order.

    `where` is `"all-linear"` (every linear layer of the model's body: not its output head), a glob over full names
    (`"*.q_proj"`), a compiled regular expression (full match), or a list of names, suffixes (`"q_proj"`) or globs, with
    `"all-linear"` among them or not;
    `exclude` is such a name, glob, expression or list.  A module that stands at several places is one layer, under its
    first name, and may be named by any.  Raises LookupError that lists what exists when a pattern matches nothing,
    TypeError when all that it matches is of a kind that cannot be adapted; warns of such layers beside others.
    """
    barred = barriers(model)
    layers = {n: v for n, v in views(model).items() if n not in barred}
    candidates = [n for n, _ in model.named_modules() if n in barred] + list(layers)
    called = [(n, n) for n in candidates] + [(other, n) for n in layers for other in layers[n].also]
    called += [(other, n) for other, n in aliases(model).items() if n in barred]
    body, patterns = with_body(where)
    asked = _asked(patterns, called + _parts(model, layers))
    asked |= {p: _parameters_named(model, p) for p, names in asked.items() if not names}
    if body:
        linear, odd = _all_linear(model, layers)
        named = set().union(*asked.values())
        odd = {n: why for n, why in odd.items() if not any(f"{p}.".startswith(f"{n}.") for p in named)}
        barred |= odd
        asked["'all-linear'"] = linear | set(odd)
    if exclude:
        asked = _without(asked, _asked(exclude, called + _parts(model, layers)), candidates)
    _say_left_out(asked, barred)
    new = sorted(set().union(*asked.values()) - set(layers) - set(barred), key=_in_order)
    layers |= layers_at(model, new)
    return _checked({pattern: names - set(barred) for pattern, names in asked.items()}, layers, model)


def with_body(where: Where) -> tuple[bool, Where]:
    """(whether "all-linear" is among what is asked for, the rest)."""
    if isinstance(where, str | re.Pattern):
        return where == "all-linear", () if where == "all-linear" else where
    patterns = list(where)
    return "all-linear" in patterns, [p for p in patterns if p != "all-linear"]


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key for names in which the third of a stack comes before its tenth."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _parts(model: nn.Module, layers: Mapping[str, LinearView]) -> list[tuple[str, str]]:
    """(name, site) of the matrices in stacks, by their own names, the stack's and the module's, and of those that a
    module keeps by the module's."""
    found = []
    for name, (_, owner, _, count) in stacks(model).items():
        for i in range(count):
            found += [(called, f"{name}.{i}") for called in (f"{name}.{i}", name, owner)]
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    found += [(n, out) for n in attention if (out := f"{n}.out_proj".lstrip(".")) in layers]
    return found + [(v.place, n) for n, v in layers.items() if isinstance(v, Matrix)]


def _parameters_named(model: nn.Module, pattern: str) -> set[str]:
    """The sites of matrices that a pattern names as parameters: exactly, by no glob and by more than `weight`."""
    pattern = pattern.strip("'")
    if pattern == "weight" or any(c in pattern for c in "*?["):
        return set()
    found: set[str] = set()
    for name, p in model.named_parameters():
        if name.endswith(pattern) and matches(name, pattern) and quantised.is_plain(p):
            found |= {name} if p.ndim == 2 else {f"{name}.{i}" for i in range(p.shape[0])} if p.ndim == 3 else set()
    return found


def _all_linear(model: nn.Module, layers: Mapping[str, LinearView]) -> tuple[set[str], dict[str, str]]:
    """The linear layers of the body, and {name: why} of those among them that compute something else than W x + b."""
    body = _body(model)
    linear = {n for n, m in model.named_modules() if n in body and n not in layers and isinstance(m, nn.Linear)}
    own = {n for n, v in layers.items() if n in body and not isinstance(v, Matrix) and _is_linear(v)}
    own |= {n for n, v in layers.items() if isinstance(v, Matrix) and v.place in body and not _is_recurrent(v.owner)}
    odd = {n: OWN.format(v.call.__qualname__) for n in own if (v := layers[n]).reader is None and not v.product}
    for n, m in model.named_modules():
        if n in body and is_stack(m):
            odd[n] = STACK.format(type(m).__name__, n.rpartition(".")[2] or "*")
        elif n in body and _is_recurrent(m):
            odd[n] = RECURRENT.format(type(m).__name__, n.rpartition(".")[2] or "*")
    return linear | own, odd


def _is_linear(layer: LinearView) -> bool:
    return isinstance(layer, Conv1DView) or layer.cls is not None and issubclass(layer.cls, nn.Linear)


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


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


def _asked(where: Where, called: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """{pattern: the layers that it names}, of (name, layer) by all of their names."""
    if isinstance(where, re.Pattern):
        return {repr(where.pattern): {n for name, n in called if where.fullmatch(name)}}
    patterns = [where] if isinstance(where, str) else list(where)
    return {repr(p): {n for name, n in called if matches(name, p)} for p in patterns}


OWN = "{} is not W x + b: an adapter goes through it where the layer is named in `where`"

STACK = "a {} keeps its matrices in stacks: adapters on these cost much, so name them in `where`, as {!r}"
RECURRENT = "the matrices of a {} are no linear layers: name them in `where`, as {!r}"


def barriers(model: nn.Module) -> dict[str, str]:
    """{name: why} of the modules with a matrix of their own that no adapter can act on."""
    barred = {}
    parents = dict(model.named_modules())
    reading = readers(model)
    for name, module in parents.items():
        if "undula" in module._modules:
            barred[name] = "adapted already, by an adapter on a part of this model or on a model around it"
            continue
        if name in reading and view(module) is not None and not has_plain_weight(module):
            barred[name] = f"{type(reading[name]).__name__} reads its weight, which is quantised or computed"
        elif name.rpartition(".")[2] == "shared" and isinstance(module, nn.Embedding) and _looked_up(module, parents):
            barred[name] = "encoder and decoder look up in embeddings of their own, which are tied to it"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            barred[name] = f"an embedding with max_norm={module.max_norm:g} rescales the rows that it looks up"
        elif not (view(module) or own_matrices(module) or is_stack(module)) and (why := _no_layer(module, name)):
            barred[name] = why
    return barred


def _no_layer(module: nn.Module, name: str) -> str | None:
    """Why no adapter acts on a module that keeps weights of its own; None where it keeps none."""
    kind, own = type(module).__name__, [(n, p.ndim) for n, p in module._parameters.items() if p is not None]
    leaf, sides = min([(n, d) for n, d in own if d > 1], key=lambda each: each[1] > 3, default=("", 0))
    if sides > 3:  # as sparse convolutions keep their kernels
        return (
            f"no adapter acts on the {leaf} of a {kind}, which has {sides} dimensions: keep it as a matrix (O, I) or "
            f"as a stack of them (places, O, I), or train it whole, full=['{name}']"
        )
    return f"no adapter acts on a {kind} as a layer; as a weight that it reads: '{name}.{leaf}'" if sides else None


def _looked_up(shared: nn.Embedding, modules: Mapping[str, nn.Module]) -> bool:
    """Whether other embeddings hold the weight of this one."""
    return any(m is not shared and isinstance(m, nn.Embedding) and m.weight is shared.weight for m in modules.values())


def _say_left_out(asked: Mapping[str, set[str]], barred: Mapping[str, str]) -> None:
    """TypeError where a pattern names only layers that cannot be adapted, a warning where it names others too."""
    for pattern, names in asked.items():
        if names and names <= set(barred):
            raise TypeError(f"where={pattern} names only layers that cannot be adapted: {_reasons(names, barred)}")
    left = {n for names in asked.values() for n in names if n in barred}
    if left:
        warnings.warn(f"left out of where={', '.join(asked)}: {_reasons(left, barred)}", stacklevel=7)


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
