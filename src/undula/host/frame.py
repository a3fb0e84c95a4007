"""What adapters of a model have to fit, seen once: checks that any thread may make while another computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Factors, Site
from .apart import apart
from .build import kernels
from .checks import check_there
from .fitting import check_all_there, check_full, check_site
from .matrices import aliases, layers_at, stacks, views
from .views import LinearView, site
from .weights import check_once
from .where import inner


class Frame:
    """The layers of a model, their shapes and types, and its parameters'.

    Made while nothing is selected and nobody is inside `rows`.  `check` neither touches the model nor reads its layers'
    classes, which change while adapters act.
    """

    def __init__(self, model: nn.Module):
        model = inner(model)
        paths = [f"{name}.{i}" for name, (_, _, _, count) in stacks(model).items() for i in range(count)]
        paths += [name for name, p in model.named_parameters() if p.ndim == 2]
        self.layers = {**views(model), **layers_at(model, paths)}
        self.odd = apart(self.layers)
        self.first = aliases(model)
        self.parameters = {n: p.to("meta") for n, p in model.named_parameters(remove_duplicate=False)}
        self.sites = {path: _seen(path, layer) for path, layer in self.layers.items()}

    def check(self, adapter: Adapter, dtype: torch.dtype | None = None) -> int:
        """How many bytes the adapter's tensors take on the model, each once, in the types that they have there (or in
        `dtype`, as with `attach`).  Of one without numbers (an outline) as far as shapes tell.  Raises ValueError or
        TypeError where it does not fit."""
        adapter.check_usable()
        check_all_there(adapter, self.layers, self.first)
        layers = {path: self.layers[path] for path in adapter.factors}
        check_once(layers)
        once: dict[int, int] = {}
        for path, layer in layers.items():
            dtypes = check_site(self._site(path), layer, adapter, self.odd.get(path))
            for name, t in adapter.factors[path].items():
                narrow = dtype is not None and t.is_floating_point()
                once[id(t)] = t.numel() * (dtype if narrow else dtypes[name]).itemsize  # type: ignore[union-attr]
        check_full(adapter.full, self.parameters)
        return sum(once.values()) + sum(t.numel() * t.element_size() for t in adapter.full.values())

    def fitted(self, adapter: Adapter) -> Adapter:
        """`adapter` as tensors of its own that fit the model.  Raises as `check` does."""
        adapter.check_usable()
        check_all_there(adapter, self.layers, self.first)
        layers = {path: self.layers[path] for path in adapter.factors}
        check_once(layers)
        once: dict[int, nn.Parameter] = {}

        def own(t: Tensor, where: Site, dtype: torch.dtype) -> nn.Parameter:
            if id(t) not in once:
                once[id(t)] = nn.Parameter(t.detach().to(where.device, dtype, copy=True), t.requires_grad)
            return once[id(t)]

        factors: dict[str, Factors] = {}
        for path, f in adapter.factors.items():
            where = self._site(path)
            dtypes = check_site(where, layers[path], adapter, self.odd.get(path))
            factors[path] = {k: own(t, where, dtypes[k]) for k, t in f.items()}
        here = {**adapter.apart, **{path: self.odd[path] for path in layers if path in self.odd}}
        return Adapter(adapter.methods, factors, adapter.shapes, {}, kernels(layers), adapter.about, here)

    def _site(self, path: str) -> Site:
        found = self.sites[path]
        if isinstance(found, Exception):
            raise type(found)(str(found))
        return found


def _seen(path: str, layer: LinearView) -> Site | Exception:
    try:
        check_there(path, layer)
        return site(path, layer)
    except (ValueError, TypeError) as error:  # of a layer that no adapter may ever ask for
        return error
