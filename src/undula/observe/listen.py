"""Running a model on batches of any kind, and listening at its adapted layers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Factors, Layer, Method
from ..host.host import select, selected
from ..host.masters import Cast
from ..host.masters import wide as master_type
from ..host.slots import Slot
from ..host.state import Host, host_of
from ..host.views import check_product
from ..host.where import inner
from .padding import watching

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
OnChange = Callable[
    [str, Layer, Tensor, Tensor, Tensor | None], None
]  # (site, layer, x, u, flat mask of its positions)


def live(model: nn.Module, doing: str) -> Adapter:
    """The selected adapter of a model.  Raises LookupError where there is none, RuntimeError where it is merged."""
    adapter = selected(model)
    if host_of(model).merged is not None:
        raise RuntimeError(f"the adapter is merged into this model: unmerge it before {doing} it")
    return adapter


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output on a batch, as one tensor: a mapping is given as keywords, a tuple or list as arguments, a
    tensor as itself.  Of a structured output it is `logits`, or else its first tensor."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = moved(batch, device)
    if isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, tuple | list):
        out = model(*batch)
    else:
        out = model(batch)
    return _tensor(out)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    return type(batch)(moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits
    values = list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, tuple | list) else []
    found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 0), None)
    if found is None:
        raise TypeError(f"the model returned a {type(out).__name__} without a tensor: its outputs cannot be compared")
    return found


def widened(batch: Any) -> Any:
    """A batch with its narrow floating-point tensors in float32."""
    if isinstance(batch, Tensor):
        return batch.float() if _narrow(batch) else batch
    if isinstance(batch, Mapping):
        return {k: widened(v) for k, v in batch.items()}
    return type(batch)(widened(v) for v in batch) if type(batch) in (tuple, list) else batch


def _narrow(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4


@contextlib.contextmanager
def wide(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a function that puts what is narrower than float32 in the model now into float32, and tells whether it did:
    not where weights are quantised, sharded or elsewhere (meta).  Afterwards all tensors are the ones that they were;
    meanwhile both are in memory."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    casting: list[tuple[Cast, dict[str, torch.dtype]]] = []  # modules with masters: they compute with narrow casts

    def widen() -> bool:
        every = [*model.parameters(), *model.buffers()]
        if any(type(t) not in (Tensor, nn.Parameter) or t.device.type == "meta" for t in every):
            return False
        for t in every:
            if _narrow(t):
                kept[id(t)] = (t, t.data)
                t.data = t.data.float()
        for module in model.modules():
            if isinstance(module, Cast):
                casting.append((module, module.undula_types))
                module.undula_types = {k: master_type(v) for k, v in module.undula_types.items()}
        return True

    try:
        yield widen
    finally:
        for t, data in kept.values():
            t.data = data
        for module, types in casting:
            module.undula_types = types


def batches(data: Iterable[Batch], what: str) -> Iterator[Batch]:
    """`data`, with a progress bar on a terminal, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        yield from data
        return
    if not sys.stderr.isatty():
        yield from data
        return
    yield from track(data, description=what, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and the selected adapter are as they were."""
    host: Host | None = inner(model).__dict__.get("_undula")
    before = None if host is None else host.selected
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if host is not None and host.merged is None:
            select(model, before)


class ChangeRecorder:
    """Wraps the method of one site and reports the change u(x) = forward(x) - layer(x) in float32 or wider: in bfloat16
    the difference of two outputs would be mostly rounding."""

    def __init__(self, method: Method, on_change: Callable[[Layer, Tensor, Tensor], None]):
        self.method, self.on_change = method, on_change

    def forward(self, x: Tensor, layer: Layer, f: Factors) -> Tensor:
        y = layer(x)
        wide = torch.promote_types(y.dtype, torch.float32)
        layer_known = _KnownOutput(layer, y.to(wide))
        out = self.method.forward(x.to(wide) if x.is_floating_point() else x, layer_known, f)
        self.on_change(layer, x, out.to(wide) - layer_known.y)
        return out.to(y.dtype)


class _KnownOutput:
    """A layer whose output for this x is known already."""

    plain = False  # a fused product would compute it again

    def __init__(self, layer: Layer, y: Tensor):
        self._layer, self.y = layer, y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextlib.contextmanager
def listening(
    model: nn.Module, adapter: Adapter, sites: Iterable[str], on_change: OnChange
) -> Iterator[Callable[[Batch], Tensor]]:
    """Gives a function that runs the model on a batch.  Meanwhile each of `sites` calls `on_change(site, layer, x, u,
    mask)` when it computes.  `adapter` is the selected one."""
    slots = {site: _slot(model, site) for site in sites}
    for site, slot in slots.items():
        check_product(site, slot.layer)
    with watching(model) as watch:

        def go(batch: Batch) -> Tensor:
            watch.begin(batch)
            return run(model, batch)

        def recorder(site: str) -> ChangeRecorder:
            return ChangeRecorder(
                adapter.methods[site],
                lambda layer, x, u: on_change(site, layer, x, u, watch.of(site, x, layer.channel)),
            )

        for site, slot in slots.items():
            slot.method = recorder(site)
        try:
            yield go
        finally:
            for site, slot in slots.items():
                slot.method = adapter.methods[site]


def _slot(model: nn.Module, site: str) -> Slot:
    return host_of(model).slots[site]
