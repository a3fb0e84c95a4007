"""Writing the selected adapter into the weights, and taking it out again."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Live
from ..core.method import Method, Reweight
from . import masters, quantised
from .host import nest, restore, select
from .saving import unguard
from .sharded import check_whole
from .shelf import Held
from .slots import remove
from .state import (
    Host,
    changing,
    exchange,
    find,
    host_of,
    parameter,
)
from .views import LinearView, check_writable
from .weights import parameter_of, placed
from .where import inner


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> dict[str, float]:
    """Writes the selected adapter into the weights; the layers are plain again.

    Returns per site the rounding error that storing costs: |stored - exact| / |exact - W|, the exact one in float64
    (about 6e-8 |W| / |dW| in float32; large on a bf16 or quantised base; estimated for very large matrices).  `keep`
    holds the base's own weights for `unmerge`, bit for bit; without it the adapters are gone, and what trained before
    they came trains again.  A weight that other layers share is not changed for them: the layer gets its own.
    Warns (`LossyMerge`) where storing takes a tenth or more of what the adapter does.
    Raises TypeError for a method on the bare Method rung, a layer whose weight is computed, and shards, naming the
    sites, ValueError for a weight that is infinite then; nothing is changed then.
    """
    model = inner(model)
    with changing(host_of(model), "merge"):
        host, adapter = find(model, None)
        if host.merged is not None:
            raise RuntimeError("the adapter is merged already")
        if isinstance(adapter, Held):
            adapter.check_own(host.selected, "merge")
        errors = _merge(model, host, adapter, keep)
    if told := lossy(errors):
        warnings.warn(
            f"{told}. Merge into a float32 copy of the model (model.float()), or keep the adapter beside the base",
            LossyMerge,
            stacklevel=3,  # over no_grad's frame
        )
    return errors


class LossyMerge(UserWarning):
    """Storing the merged weights took much of what the adapter does."""


LOST = 0.1  # the share of the change that storing may cost before it is worth a warning


def lossy(errors: Mapping[str, float]) -> str:
    """What is to be said of the rounding errors of a merge (see `merge`); empty where they are small."""
    lost = [site for site, error in errors.items() if not error < LOST]
    if not lost:
        return ""
    worst = max(lost, key=lambda site: errors[site])
    share = "all" if errors[worst] >= 0.995 else f"{errors[worst]:.0%}"
    return (
        f"rounding takes {share} of what the adapter does at {worst}, and over {LOST:.0%} at {len(lost)} of "
        f"{len(errors)} layers: the merged model is not what was trained"
    )


def _merge(model: nn.Module, host: Host, adapter: Live, keep: bool) -> dict[str, float]:
    check_mergeable(adapter.methods)
    check_whole(
        (*(t for _, _, t in adapter.tensors()), *(s.layer.module.weight for s in host.slots.values())), "merging"
    )
    for path, slot in host.slots.items():
        check_writable(path, slot.layer)
    _tell_idle(host)
    errors: dict[str, float] = {}
    weights: dict[str, nn.Parameter] = {}
    for path, slot in host.slots.items():
        method, layer = slot.method, slot.layer
        assert isinstance(method, Reweight)
        W_OI = layer.weight
        exact_OI = layer.stays(W_OI, method.weight(W_OI, adapter.factors[path]))
        weights[path] = layer.put(exact_OI)
        if measurable(layer):
            wide_OI, f = W_OI.double(), {k: _double(t) for k, t in adapter.factors[path].items()}
            exact_OI = layer.stays(wide_OI, method.weight(wide_OI, f))
        errors[path] = rounding(layer, weights[path], exact_OI, W_OI)
        if not math.isfinite(errors[path]):
            raise ValueError(
                f"{path}: merged, its weight is beyond what {layer.module.weight.dtype} holds (infinity or NaN): the "
                "adapter is damaged or diverged, or the base too narrow for it (model.float(), or --dense)"
            )
    new: dict[str, nn.Parameter] = {}
    for path, slot in host.slots.items():
        parameter = parameter_of(path, slot.layer)
        new[parameter] = placed(slot.layer, weights[path], new.get(parameter))
    for slot in host.slots.values():
        remove(slot)
    own = {parameter: exchange(model, parameter, p) for parameter, p in new.items()}
    host.slots, host.merged = {}, own
    unguard(model)
    nest(host)
    if not keep:
        trained = {id(p) for p in host.trainable_before}
        for p in (*host.trainable_before, *(new[path] for path, p in own.items() if id(p) in trained)):
            p.requires_grad_(True)
        adapter.full = dict(adapter.full)  # its own again
        settle(model, adapter.full, host.own)
        del model.__dict__["_undula"]
        for every in host.adapters.values():
            every.attached = False
    host.untied = untie(model)
    return errors


def _tell_idle(host: Host) -> None:
    """Warns where the model computed, and never with some of its sites: a merge may be another function there."""
    idle = [path for path, slot in host.slots.items() if not slot.ran]
    if idle and len(idle) < len(host.slots):
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        warnings.warn(
            f"the model has computed since the adapter was selected, and never with {', '.join(idle[:3])}{more}: "
            "there the adapter had no effect, and merged it has one on whatever reads these weights. Where something "
            "does, adapt the weight by its parameter's own name (`where=['layer.weight']`)",
            stacklevel=4,
        )


def untie(model: nn.Module) -> list[Any]:
    """Where the output head and the embedding of a transformers model are two matrices now, its configuration says so:
    else whatever ties weights (`resize_token_embeddings`, loading what was saved) would take one for the other.
    Returns the configurations that were changed."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "tie_word_embeddings"):
        return []
    ends: list[Any] = []
    with contextlib.suppress(NotImplementedError):  # of a model without embeddings
        ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if None in ends or not ends or ends[0].weight is ends[1].weight:
        return []
    held = [m for m in model.modules() for p in m._parameters.values() if p is ends[0].weight or p is ends[1].weight]
    if len(held) > 2:  # encoder and decoder too: what is not tied any more would be missing in the file
        return []
    text = getattr(config, "get_text_config", lambda: config)()
    tied = [c for c in {id(c): c for c in (config, text)}.values() if getattr(c, "tie_word_embeddings", False)]
    for c in tied:
        c.tie_word_embeddings = False
    return tied


def settle(model: nn.Module, full: Mapping[str, Tensor], own: Mapping[str, nn.Parameter]) -> None:
    """Leaves what was trained in full as plain parameters of the model's own type."""
    for path, p in full.items():
        parent, _, leaf = path.rpartition(".")
        masters.narrow(model.get_submodule(parent), leaf)
        if parameter(model, path) is p and p.dtype != own[path].dtype:  # where nothing was merged into it
            exchange(model, path, nn.Parameter(p.detach().to(own[path].dtype), p.requires_grad))


def check_mergeable(methods: Mapping[str, Method]) -> None:
    """Raises TypeError where a site's method is on the bare Method rung: no weight gives its function."""
    bare = {s: m for s, m in methods.items() if not isinstance(m, Reweight)}
    if bare:
        site_name, method = next(iter(bare.items()))
        raise TypeError(
            f"{method!r} cannot be merged: it stands on the rung {method.rung()}, no weight gives its function "
            f"({len(bare)} sites, the first {site_name}). undula.collapse fits a LowRank adapter and reports the error"
        )


LARGEST = (
    2**27
)  # entries of a matrix whose merge is compared with float64: copies of a larger one would fill the memory


def measurable(layer: LinearView) -> bool:
    """Whether the exact weight is computed in float64 too: quantised ones are off by far more than float32 is."""
    W = layer.module.weight
    return quantised.is_plain(W) and W.numel() <= LARGEST and W.device.type != "mps"


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def rounding(layer: LinearView, weight: nn.Parameter, exact_OI: Tensor, W_OI: Tensor) -> float:
    """|stored - exact| / |exact - W| for a weight in the form in which the layer would store it.  Where `exact` is no
    wider than what is stored, its own rounding is estimated: entries are off by a fifth of the type's step."""
    stored_OI = layer.reread(weight)
    wide = torch.promote_types(exact_OI.dtype, torch.float32)
    lost = float((stored_OI.to(wide) - exact_OI.to(wide)).norm())
    if exact_OI.dtype.itemsize <= stored_OI.dtype.itemsize and exact_OI.dtype != torch.float64:
        lost = max(lost, torch.finfo(exact_OI.dtype).eps / 5 * float(exact_OI.norm()))
    change = float((exact_OI.to(wide) - W_OI.to(wide)).norm())
    return lost / change if change > 0 else 0.0


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`: the base's own weights are back, bit for bit, and the adapter is live again."""
    model = inner(model)
    host = host_of(model)
    if host.merged is None:
        raise RuntimeError("nothing is merged into this model (or it was merged with keep=False)")
    with changing(host, "unmerge"):
        restore(model, host)
        select(model, host.selected)
