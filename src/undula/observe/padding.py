"""Which positions of the values that a layer sees are padding.

A batch's attention_mask (rows x positions) tells it for the sequence of `input_ids`.  A model may have more than one
sequence (encoder and decoder, text and image), and equal lengths must not make the mask of one stand in for another:
what counts is the mask that the modules around a layer were called with, and where its input comes from.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SOURCE, TARGET = "attention_mask", "decoder_attention_mask"
STATES = "encoder_hidden_states"
IGNORED = -100  # a label that does not count
Scope = tuple[Tensor, ...]  # the masks among which the one is that fits


def masks_of(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the batch's sequence and of what a decoder reads, as booleans: False marks padding.  Where a decoder
    has no mask of its own, labels that are ignored tell its padding."""
    if not isinstance(batch, Mapping):
        return None, None
    target = _mask(batch.get(TARGET))
    labels = batch.get("labels")
    if target is None and isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        target = labels != IGNORED
    return _mask(batch.get(SOURCE)), target


def _mask(given: Any) -> Tensor | None:
    return given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None


def matched(mask: Tensor, positions: torch.Size) -> Tensor | None:
    """The mask for values at these positions, flat; None where it does not fit them.  Layers see (rows, positions,
    ...), (positions, rows) or all of them in one row."""
    if positions[:2] == mask.shape:
        spread = mask.reshape(*mask.shape, *(1 for _ in positions[2:])).expand(positions)
        return spread.reshape(-1)
    if tuple(positions) in ((mask.numel(),), (1, mask.numel())):
        return mask.reshape(-1)
    return mask.T.reshape(-1) if positions == mask.T.shape else None


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values (..., channels) that are no padding, (T, channels); `mask` is flat, None: all of them."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if mask is None else flat[mask.to(values.device)]


def of_outputs(model: nn.Module, batch: Any, out: Tensor) -> Tensor | None:
    """The flat mask of a model's outputs: of what its decoder reads, where it has one."""
    source, target = masks_of(batch)
    mask = target if _reads_two(model, batch) else source
    return None if mask is None or out.ndim < 3 else matched(mask, out.shape[:-1])


def _reads_two(model: nn.Module, batch: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or (
        isinstance(batch, Mapping) and TARGET in batch
    )


class Watch:
    """Follows the masks through the calls of a model's modules."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.scopes: list[Scope] = [()]
        self.told: set[str] = set()
        self.two = False
        self.source: Tensor | None = None
        self.target: Tensor | None = None
        self.came: dict[int, tuple[Tensor, Scope]] = {}  # by storage; the tensor is held so that it is not used anew

    def begin(self, batch: Any) -> None:
        """Before the model runs on `batch`."""
        self.source, target = masks_of(batch)
        self.two = _reads_two(self.model, batch)
        self.target = target if self.two else None
        outermost = (
            (self.target,) if self.two and hasattr(self.model, "main_input_name") else (self.source, self.target)
        )
        self.scopes, self.came = [tuple(m for m in outermost if m is not None)], {}

    def of(self, site: str, x: Tensor, channel: int = -1) -> Tensor | None:
        """The flat mask of a layer's input; None where nothing in it is known to be padding.  Warns, once for a site,
        where there is padding and it cannot be told which values are."""
        if channel < -2:
            return None  # an image
        if channel == -2:
            self._convolved(site)
            return None
        known = self.came.get(x.untyped_storage().data_ptr())
        scope = self.scopes[-1] if known is None else known[1]
        positions = x.shape[:-1] if x.is_floating_point() else x.shape
        found = [m for m in (matched(mask, positions) for mask in scope) if m is not None]
        if found and all(torch.equal(m, found[0]) for m in found):
            return found[0]
        one_each = len(positions) == 1 and any(positions[0] == len(mask) for mask in scope)  # a pooled row
        if site not in self.told and not one_each and any(not mask.all() for mask in scope):
            self.told.add(site)
            why = "two sequences of that length have different masks" if found else "no mask has that shape"
            warnings.warn(
                f"padding counts at {site}: it sees values at {tuple(positions)} positions, and {why} "
                f"(masks: {', '.join(str(tuple(m.shape)) for m in scope)}). Batches without padding leave it out",
                stacklevel=2,
            )
        return None

    def _convolved(self, site: str) -> None:
        """A convolution along a sequence sees windows of it, at positions of its own."""
        if site not in self.told and any(not mask.all() for mask in self.scopes[-1]):
            self.told.add(site)
            warnings.warn(
                f"padding counts at {site}: a convolution along a sequence sees it within its windows. Batches without "
                "padding leave it out",
                stacklevel=3,
            )

    def enter(self, name: str, module: nn.Module, given: dict[str, Any]) -> None:
        states = given.get(STATES)
        if isinstance(states, Tensor):
            mask = _mask(given.get("encoder_attention_mask"))
            self._from(states, () if mask is None else (mask,))
        self.scopes.append(self._scope(name, module, given))

    def _scope(self, name: str, module: nn.Module, given: dict[str, Any]) -> Scope:
        mask = _mask(given.get(SOURCE))
        if mask is not None and module is not self.model:
            return (mask,)
        if hasattr(module, "main_input_name") and module is not self.model:  # a model within, which got no mask
            if self.two:
                return () if self.target is None or not isinstance(given.get(STATES), Tensor) else (self.target,)
            return self.scopes[-1] if module.main_input_name == "input_ids" else ()
        if self.two and name in ("encoder", "decoder") and not hasattr(self.model, "main_input_name"):
            mask = self.source if name == "encoder" else self.target
            return () if mask is None else (mask,)
        return self.scopes[-1]

    def leave(self, out: Any) -> None:
        scope = self.scopes.pop()
        if scope is not self.scopes[-1]:
            for t in out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    self._from(t, scope)

    def passed(self, x: Any, out: Any) -> None:
        """After a layer: what it made of values from elsewhere is from there too."""
        known = self.came.get(x.untyped_storage().data_ptr()) if isinstance(x, Tensor) else None
        if known is not None and isinstance(out, Tensor):
            self._from(out, known[1])

    def _from(self, t: Tensor, scope: Scope) -> None:
        self.came.setdefault(t.untyped_storage().data_ptr(), (t, scope))


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """A Watch on the model's modules; `begin(batch)` goes before each run."""
    watch, handles = Watch(model), []

    def enter(path: str, module: nn.Module) -> Any:
        names = tuple(inspect.signature(module.forward).parameters)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            watch.enter(path.rpartition(".")[2], module, given)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        watch.leave(out)

    def passed(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if len(args) == 1:
            watch.passed(args[0], out)

    try:
        for path, module in list(model.named_modules()):
            if ".undula" in f".{path}":
                continue
            if any(True for _ in module.children()) and not hasattr(module, "undula"):
                handles += [enter(path, module), module.register_forward_hook(leave)]
            else:
                handles.append(module.register_forward_hook(passed))
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        watch.came.clear()
