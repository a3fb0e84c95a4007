"""The matrices of a model that adapters can act on, by the names of their sites: modules, matrices that attention and
recurrent modules keep beside, matrices in a stack."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from . import quantised
from .readers import readers
from .views import LinearView, view
from .weights import Matrix, read


def aliases(model: nn.Module) -> dict[str, str]:
    """{other name: the first} of the modules that stand at several places: it is the first that counts."""
    first: dict[nn.Module, str] = {}
    return {n: first[m] for n, m in model.named_modules(remove_duplicate=False) if first.setdefault(m, n) != n}


def views(model: nn.Module) -> dict[str, LinearView]:
    """Every module that is a matrix, and every matrix that attention and recurrent modules keep beside, by its name."""
    reading, found = readers(model), {}
    for n, m in model.named_modules():
        layer = view(m)
        if layer is not None:
            found[n] = read(layer, n, reading[n]) if n in reading and has_plain_weight(m) else layer
        found |= {f"{n}.{leaf}".lstrip("."): Matrix(m, n, leaf) for leaf in own_matrices(m)}
    for other, n in aliases(model).items():
        if n in found:
            found[n].also += (other,)
    return found


def own_matrices(module: nn.Module) -> list[str]:
    """The parameters of attention and recurrent modules that are matrices."""
    if not isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
        return []
    return [leaf for leaf, p in module._parameters.items() if p is not None and p.ndim == 2 and quantised.is_plain(p)]


def has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and quantised.is_plain(weight)


def stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str, str, int]]:
    """{name of a parameter: (module, its name, the parameter's in it, how many)} of matrices in a stack, as the experts
    of a mixture are in transformers 5."""
    return {
        f"{n}.{leaf}".lstrip("."): (m, n, leaf, p.shape[0])
        for n, m in model.named_modules()
        if is_stack(m)
        for leaf, p in m._parameters.items()
        if p is not None and p.ndim == 3 and quantised.is_plain(p)
    }


def layers_at(model: nn.Module, paths: Iterable[str]) -> dict[str, LinearView]:
    """The layers of these sites, as far as they are there: modules, matrices of a module and matrices in a stack."""
    every = views(model)
    found = {path: every[path] if path in every else _parameter(model, path) for path in paths}
    return {path: layer for path, layer in found.items() if layer is not None}


def resolve(model: nn.Module, path: str) -> tuple[nn.Module, str, str, int | None] | None:
    """(module, its path, the name of its parameter, position in a stack) of what a site is called; None where there is
    nothing of the kind."""
    module, names = model, path.split(".") if path else []
    here: list[str] = []
    while names and module._modules.get(names[0]) is not None:
        module = module._modules[names[0]]  # type: ignore[assignment]
        here.append(names.pop(0))
    leaf, *at = names or ["weight"]
    if (names and module._parameters.get(leaf) is None) or len(at) > 1 or (at and not at[0].isdigit()):
        return None
    return module, ".".join(here), leaf, int(at[0]) if at else None


def _parameter(model: nn.Module, path: str) -> LinearView | None:
    """A parameter by its own name: a matrix, a matrix of a stack, or the weight of a layer that is not called alone."""
    found = resolve(model, path)
    if found is None or found[1] == path:
        return None
    owner, place, leaf, at = found
    p, layer = owner._parameters[leaf], view(owner)
    if p is None or not quantised.is_plain(p) or p.ndim != (2 if at is None else 3) or (at or 0) >= p.shape[0]:
        return read(layer, place, owner) if layer is not None and leaf == "weight" and at is None else None
    return read(layer, place, owner) if layer is not None and leaf == "weight" else Matrix(owner, place, leaf, at)


def is_stack(module: nn.Module) -> bool:
    """Whether the module holds stacked matrices, as the experts of a mixture are in transformers 5."""
    conv = isinstance(module, nn.modules.conv._ConvNd)
    return not conv and any(p is not None and p.ndim == 3 and p.shape[0] > 1 for p in module._parameters.values())
