"""The tensors of an adapter under PEFT, to disk and back: undula's own directory, as strict as `undula.io.native`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from ...host.checks import check_range, check_shapes
from ...host.views import site
from ...io import files, packing, reading
from .config import UndulaConfig
from .layer import UndulaLayer, hosts
from .starting import factors_of, methods_of, record_of

FSDP = "_fsdp_wrapped_module."  # in names of modules, not in those of a gathered state


def stored(
    tuner: Any, model: nn.Module, config: UndulaConfig, name: str, found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that a directory holds, under the model's keys; tensors that sites share are stored once.

    `found` is what PEFT's filter has left: it drops every key with another adapter's name in it, which may be the name
    of one of our factors.  Those are put back.  The configuration, which other adapters may have had since, says what
    this adapter is.
    """
    record = record_of(model, name)
    if record is None:
        return dict(found)
    config.undula, config.sites = record, methods_of(record)
    _hide_embeddings(model, config)
    layers = {n.replace(FSDP, ""): m for n, m in model.named_modules() if isinstance(m, UndulaLayer) and name in m}
    kept = dict(found)
    for path, layer in layers.items():
        hosted = layer.undula_factors[name]
        if not any(t.is_meta for t in hosted.factors().values()):
            hosted.check(name)
        for k, t in hosted.state_dict().items():
            kept.setdefault(f"{path}.undula_factors.{name}.{k}".lstrip("."), t)
    on_disk = {k: tuner._remove_adapter_name_from_key(k, name).removeprefix(files.PREFIX) for k in kept}
    return {k: t for k, t in kept.items() if files.PREFIX + on_disk[k] not in record["tied"]}


def _hide_embeddings(model: nn.Module, config: UndulaConfig) -> None:
    """PEFT stores an embedding's own weight where its name is among the targets; `undula` names the sites."""
    targets = config.target_modules
    if isinstance(targets, str):
        names = [n for n, _ in model.named_modules() if re.match(rf"(.*\.)?({'|'.join(EMBEDDING_LAYER_NAMES)})$", n)]
        named = targets != "all-linear" and any(
            match_target_against_key(targets, n.removeprefix(files.PREFIX)) for n in names
        )
    else:
        named = any(n in (targets or ()) for n in EMBEDDING_LAYER_NAMES)
    if named:
        config.rule, config.target_modules = targets, None


def checked(model: nn.Module, adapter: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strict, where PEFT only warns: missing, surplus or misshapen tensors and NaN are errors."""
    name, record = f"adapter {adapter!r}", record_of(model, adapter) or {"tied": {}, "rebuilt": {}}
    state_dict = dict(reading.untied(state_dict, record["tied"], name))
    files.check_finite(state_dict, name)
    wanted = factors_of(model, adapter)
    found: dict = {at: {} for at in wanted}
    for key, t in state_dict.items():
        at, factor = reading.split(key)
        if at is not None:  # else it is of modules_to_save: PEFT looks after those
            state_dict[key] = reading.with_dimension({factor: t}, wanted.get(at, {})).get(factor, t)
            found.setdefault(at, {})[factor] = state_dict[key]
    once: dict[int, Tensor] = {}
    for at, f in found.items():
        found[at] = packing.unpacked(f, wanted.get(at, {}), record.get("quantised"), f"{name}: {at}", once)
    record.pop("quantised", None)  # what is saved from here are numbers
    state_dict = {
        k: found[at][n] if at is not None else t
        for k, t in state_dict.items()
        for at, n in [reading.split(k)]
        if not k.endswith(packing.SCALE)
    }
    for at, factors in wanted.items():
        rebuilt = {k: t for k, t in factors.items() if reading.key_of(at, k) in record["rebuilt"]}
        found[at] = {**rebuilt, **found[at]}
    for at, tensors in found.items():
        check_shapes(f"{name}: {at}", tensors, wanted.get(at, {}))
    layers = hosts(model)
    for at, tensors in found.items():
        _check_numbers(at, layers[at], adapter, tensors)
    return state_dict


def _check_numbers(at: str, layer: UndulaLayer, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """What `undula.host.fitting.fitted` asks of the numbers of a given adapter.  Raises ValueError."""
    hosted = layer.undula_factors[adapter]
    try:
        for k, t in tensors.items():
            check_range(f"{at}.{k}", t, hosted.factors()[k].dtype)
        hosted.method.check(site(at, layer.layer), tensors)
    except ValueError as error:
        raise ValueError(f"adapter {adapter!r}: {error}") from None


def placed(model: nn.Module, adapter: str, renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the model's keys.  Raises ValueError for one that has no place there."""
    own = model.state_dict()
    surplus = [k for k in renamed if k not in own and k.removeprefix(files.PREFIX) not in own]
    if surplus:
        raise ValueError(
            f"adapter {adapter!r} holds tensors that have no place in this model: {', '.join(surplus[:5])}"
        )
    return _as_parameters(model, renamed)


def _as_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the parameters that they become, one for those that are tied: low_cpu_mem_usage puts them in place of
    the model's own.  Copies: parts of a mapped file are not aligned, and BLAS rounds those differently."""
    ours = {k: p for k, p in model.named_parameters(remove_duplicate=False) if reading.MARK in k}
    once: dict[int, Tensor] = {}

    def live(t: Tensor, p: nn.Parameter) -> Tensor:
        return once.setdefault(id(t), nn.Parameter(t.to(p.dtype, copy=True), p.requires_grad))

    return {k: live(t, ours[k]) if k in ours else t for k, t in tensors.items()}
