"""New adapters that fit a model.  Nothing here touches the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.choice import plain
from ..core.method import Factors, Method, Reweight
from ..core.site import Evidence, Evident, NoEvidence, Site
from .apart import apart
from .checks import check_layer
from .masters import wide
from .matrices import aliases
from .views import LinearView, outline, site
from .weights import check_once, parameter_of
from .where import Where, choose, matches, with_body

Shapes = Mapping[str, tuple[int, int]]


def fresh(
    model: nn.Module,
    method: Method,
    where: Where,
    overrides: Mapping[str, Method],
    full: Sequence[str],
    probe: Evident | None = None,
    exclude: Where = (),
) -> Adapter:
    """A new adapter for `model`, not attached."""
    layers, parameters = choose(model, where, exclude), chosen_parameters(model, full)
    if with_body(where)[0]:  # a layer that trains in full needs no adapter beside
        layers = {n: v for n, v in layers.items() if parameter_of(n, v) not in parameters}
        layers = _readable(layers, assigned(layers, method, overrides))
    evidence = None if probe is None else probe.on(model, layers)
    once = {id(p): _trainable(p) for p in parameters.values()}  # what is tied trains as one
    in_full = {n: once[id(p)] for n, p in parameters.items()}
    return replace(made(layers, assigned(layers, method, overrides), evidence), full=in_full)


def _readable(layers: Mapping[str, LinearView], methods: Mapping[str, Method]) -> dict[str, LinearView]:
    """The layers without the weights that are read and whose methods name none; a warning tells of these."""
    able = {n: v for n, v in layers.items() if v.reader is None or isinstance(methods[n], Reweight)}
    left = [n for n in layers if n not in able]
    if left and able:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"left out of where='all-linear': {', '.join(left[:3])}{more} ({layers[left[0]].reader} reads the "
            f"weight and never calls it as a layer; {methods[left[0]]!r} has no adapted weight)",
            stacklevel=6,
        )
    return able if able else dict(layers)


def check_what(what: Any, overrides: Mapping[str, Any]) -> None:
    """Raises TypeError that says what to write where something else than a method or an Adapter is given."""
    for found in (what, *overrides.values()):
        if isinstance(found, Method) or (found is what and isinstance(what, Adapter)):
            continue
        if isinstance(found, type) and issubclass(found, Method):
            hint = f"the class {found.__name__}: make a method of it, {found.__name__}()"
        elif isinstance(found, str):
            member = Method.registry.get(plain(found))
            names = ", ".join(sorted(m.__name__ for m in Method.registry.values()))
            hint = f"the text {found!r}: " + (
                f"write undula.{member.__name__}()"
                if member
                else f"methods are undula.NAME(...), with NAME one of {names}"
            )
        else:
            hint = f"{found!r:.80}"
        raise TypeError(f"a method such as undula.LoRA(r=8), or an undula.Adapter, is attached; found {hint}")


def assigned(layers: Mapping[str, LinearView], method: Method, overrides: Mapping[str, Method]) -> dict[str, Method]:
    """The method of each site: the first override whose pattern matches, else `method`.  Raises LookupError."""
    names = {n: (n, *layer.also) for n, layer in layers.items()}

    def meant(pattern: str, n: str) -> bool:
        return any(matches(name, pattern) for name in names[n])

    for pattern in overrides:
        if not any(meant(pattern, n) for n in names):
            raise LookupError(f"the override {pattern!r} matches none of the chosen layers: {', '.join(names)}")
    return {n: next((m for p, m in overrides.items() if meant(p, n)), method) for n in names}


def made(layers: Mapping[str, LinearView], methods: Mapping[str, Method], evidence: Evidence | None = None) -> Adapter:
    """New factors for each layer, as parameters; what a method makes once for several sites is one parameter."""
    return _filled(layers, methods, lambda method, where: method.init(replace(where, evidence=evidence)))


def again(
    layers: Mapping[str, LinearView], methods: Mapping[str, Method], live: Mapping[str, Factors] | None = None
) -> Adapter:
    """A new adapter of methods that have begun before: beside a `live` one its frozen factors are that one's (see
    `Method.again`).  Where a start asks for data that are not here, factors that only it could tell are NaN."""

    def make(method: Method, where: Site) -> Factors:
        try:
            return method.init(where) if live is None else method.again(where, live[where.name])
        except NoEvidence:
            own = {} if live is None else {k: t for k, t in live[where.name].items() if not t.requires_grad}
            return {**_blank(method, where), **method.rebuilt(where), **own}

    return _filled(layers, methods, make)


def _blank(method: Method, where: Site) -> dict[str, Tensor]:
    """NaN in the shapes of the factors (zeros for integers, which have none)."""
    outlines = method.init(where.outline())
    return {
        k: torch.full_like(t, math.nan if t.is_floating_point() else 0, device=where.device).requires_grad_(
            t.requires_grad
        )
        for k, t in outlines.items()
    }


def outlined(layers: Mapping[str, LinearView], methods: Mapping[str, Method]) -> Adapter:
    """Factors on the meta device, for a file's tensors to take their places; what seeds rebuild is made."""
    return _filled(layers, methods, lambda method, where: {**method.init(where.outline()), **method.rebuilt(where)})


def _filled(
    layers: Mapping[str, LinearView], methods: Mapping[str, Method], make: Callable[[Method, Site], Factors]
) -> Adapter:
    check_once(layers)
    for path, layer in layers.items():
        check_layer(path, layer, methods[path])
    factors: dict[str, Factors] = {}
    shared: dict[Any, Any] = {}
    sites = {path: site(path, layer, shared) for path, layer in layers.items()}
    shapes = {path: where.shape for path, where in sites.items()}
    peers = peers_of(methods, shapes)
    once: dict[int, tuple[Tensor, nn.Parameter]] = {}  # holds the tensors too, so that no id is used twice
    for path, where in sites.items():
        new = _blank_padding(make(methods[path], replace(where, peers=peers[methods[path]])), layers[path], where.shape)
        factors[path] = {
            k: once.setdefault(id(t), (t, nn.Parameter(t.detach().contiguous(), t.requires_grad)))[1]
            for k, t in new.items()
        }
    return Adapter(dict(methods), factors, shapes, kernels=kernels(layers), apart=apart(layers))


def _blank_padding(f: Factors, layer: LinearView, shape: tuple[int, int]) -> Factors:
    """The columns of A that stand for an embedding's padding, zero: dW has none there, wherever the adapter goes."""
    padding, A = getattr(layer.module, "padding_idx", None), f.get("A")
    if padding is not None and A is not None and A.requires_grad and A.shape[-1] == shape[1]:
        with torch.no_grad():
            for t in (A, f.get("A0", A)):
                t[:, padding] = 0
    return f


def peers_of(methods: Mapping[str, Method], shapes: Shapes) -> dict[Method, dict[str, tuple[int, int]]]:
    """`Site.peers` of the sites of each method."""
    peers: dict[Method, dict[str, tuple[int, int]]] = {}
    for path, method in methods.items():
        peers.setdefault(method, {})[path] = shapes[path]
    return peers


def rebuilt(
    methods: Mapping[str, Method], shapes: Shapes, sites: Container[str] | None = None, device: str = "cpu"
) -> Iterator[tuple[str, str, Tensor]]:
    """(site, factor, tensor) of the frozen factors that seeds determine, made anew (see `Method.rebuilt`), on the
    CPU in float32, of all sites or of some.  Sites that share a tensor get the same object.  The device "meta" tells
    their shapes alone."""
    shared: dict[Any, Any] = {}
    peers = peers_of(methods, shapes)
    for path, method in methods.items():
        if sites is not None and path not in sites:
            continue
        where = replace(outline(path, shapes[path]), device=torch.device(device), shared=shared, peers=peers[method])
        for name, t in method.rebuilt(where).items():
            yield path, name, t


def kernels(layers: Mapping[str, LinearView]) -> dict[str, tuple[int, ...]]:
    """What `Adapter.kernels` says of these layers."""
    return {path: layer.kernel for path, layer in layers.items() if layer.kernel is not None}


def _trainable(p: nn.Parameter) -> nn.Parameter:
    if not p.is_floating_point():
        raise TypeError(f"only floating-point parameters can be trained in full, found {p.dtype}")
    return nn.Parameter(p.detach().to(wide(p.dtype), copy=True))


def chosen_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that these patterns name, or whose modules they name, by any name that they have; one that is tied
    to others at each of its places.  Raises LookupError."""
    patterns = [patterns] if isinstance(patterns, str) else patterns  # one name, not its letters
    every = list(_parameters(model))
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        found = {
            path: p
            for n, path, p in every
            if matches(n, pattern) or any(matches(n[:i], pattern) for i, c in enumerate(n) if c == ".")
        }
        if not found:
            tops = sorted({n.split(".")[0] for n, _, _ in every})
            raise LookupError(f"full={pattern!r} matches no parameter and no module; at the top are: {', '.join(tops)}")
        chosen |= found
    taken = {id(p) for p in chosen.values()}
    return {path: p for _, path, p in every if id(p) in taken}


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, name below the module's first name, parameter) of every parameter under all of its names."""
    first = aliases(model)
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        yield name, f"{first.get(owner, owner)}.{leaf}".lstrip("."), p
