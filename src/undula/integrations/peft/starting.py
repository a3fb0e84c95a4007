"""How the factors of an adapter under PEFT come about: new, like one that is there, or for tensors to come.

PEFT does not say whether a configuration means a new adapter or one whose tensors will be loaded, so every adapter is
started.  What PEFT's trainers then do (copy the trained factors from one adapter to another, name by name) is right for
methods with frozen factors only if those are the first adapter's: a configuration that is on the model already means
"another adapter like that one", and its frozen factors are copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.method import Factors, Method
from ...host.build import again, assigned, made, outlined
from ...host.views import LinearView, site
from ...io import files, native, reading
from .config import UndulaConfig
from .layer import hosts

Layers = Mapping[str, LinearView]


def alike(configs: Mapping[str, UndulaConfig], name: str) -> str | None:
    """The other adapter that has the configuration of `name`, or that it is a copy of."""
    given = configs[name]
    others = {n: c for n, c in configs.items() if n != name and isinstance(c, UndulaConfig)}
    for n, c in others.items():
        if c is given or (given.origin is not None and c.origin == given.origin):
            return n
    return None


def by_rules(model: nn.Module, layers: Layers, config: UndulaConfig, meta: bool) -> tuple[Adapter, dict[str, Any]]:
    """(a new adapter, its record) of a configuration's method, at the layers that its rules chose."""
    methods = assigned(layers, config.method, config.overrides)
    if meta:
        new = outlined(layers, methods)
    else:
        new = made(layers, methods, None if config.probe is None else config.probe.on(model, layers))
    return new, _record(new, None)


def by_record(
    layers: Layers, record: Mapping[str, Any], live: Mapping[str, Factors] | None, meta: bool
) -> tuple[Adapter, dict[str, Any]]:
    """(a new adapter, its record) of the methods in a record, tied, frozen and rebuilt as it says.  Raises ValueError
    where shapes or checksums differ."""
    every = reading.read_sites(record, files.CONFIG)[0]
    methods = {s: every[s] for s in layers}
    own = _part(record, layers)
    seeded = own.get("rebuilt", {})
    new = _apart(outlined(layers, methods) if meta else again(layers, methods, _floats(layers, live)), seeded)
    new = reading.as_recorded(new, own, files.CONFIG)
    if live is not None and not meta:
        _take_frozen(new, live)
    new = replace(new, apart={**own["apart"], **new.apart}, about=reading.told(own, files.CONFIG))
    record_made = _record(new, seeded)
    if "quantised" in own:  # until the integers have come, see `storing.checked`
        record_made["quantised"] = own["quantised"]
    return new, record_made


def _part(record: Mapping[str, Any], sites: Collection[str]) -> dict[str, Any]:
    """What a record says of some of its sites."""

    def mine(keys: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in keys.items() if reading.split(k)[0] in sites}

    return {
        **record,
        "sites": {s: v for s, v in record["sites"].items() if s in sites},
        "order": [s for s in record.get("order", record["sites"]) if s in sites],
        "tied": {k: v for k, v in mine(record.get("tied", {})).items() if reading.split(v)[0] in sites},
        "rebuilt": mine(record.get("rebuilt", {})),
        "apart": {s: why for s, why in reading.texts(record, "apart", files.CONFIG).items() if s in sites},
    }


def _floats(layers: Layers, live: Mapping[str, Factors] | None) -> dict[str, dict[str, Tensor]] | None:
    """Live factors of these layers as copies, one of those that are shared, in float32 (float64 over such a base)."""
    if live is None:
        return None
    once: dict[Any, Tensor] = {}

    def copied(t: Tensor, wide: torch.dtype) -> Tensor:
        key = (t.data_ptr(), tuple(t.shape), t.stride())
        if key not in once or not t.numel():
            new = t.detach().clone()
            once[key] = (new.to(wide) if t.is_floating_point() else new).requires_grad_(t.requires_grad)
        return once[key]

    return {s: {k: copied(t, site(s, layers[s]).dtype) for k, t in live[s].items()} for s in layers}


def _apart(new: Adapter, seeded: Collection[str]) -> Adapter:
    """The same factors, each a tensor of its own: which of them are one is for the record to say."""
    return replace(
        new,
        factors={
            s: {
                k: t if reading.key_of(s, k) in seeded else nn.Parameter(t.detach().clone(), t.requires_grad)
                for k, t in f.items()
            }
            for s, f in new.factors.items()
        },
    )


def _take_frozen(new: Adapter, live: Mapping[str, Factors]) -> None:
    for at, factor, t in new.tensors():
        if not t.requires_grad:
            t.data.copy_(live[at][factor])


def _record(new: Adapter, seeded: Collection[str] | None) -> dict[str, Any]:
    """What the directory says of this adapter.  Only those `seeded` are left for a seed to rebuild (None: any): a file
    may hold others, whose numbers are its own."""
    record = native.laid_out(new, None, None)[0]["undula"]
    if seeded is None or set(record["rebuilt"]) <= set(seeded):
        return record
    record["rebuilt"] = {k: c for k, c in record["rebuilt"].items() if k in seeded}
    first: dict[int, str] = {}
    for at, factor, t in new.tensors():
        key = reading.key_of(at, factor)
        if key not in record["rebuilt"] and first.setdefault(id(t), key) != key:
            record["tied"][key] = first[id(t)]
    return record


def live_factors(model: nn.Module, name: str) -> dict[str, Factors] | None:
    """The factors of an adapter, by site; None while they are on the meta device."""
    found = factors_of(model, name)
    return None if any(t.is_meta for f in found.values() for t in f.values()) else found


def factors_of(model: nn.Module, name: str) -> dict[str, Factors]:
    """The factors of an adapter, by site."""
    return {s: layer.undula_factors[name].factors() for s, layer in hosts(model).items() if name in layer}


def record_of(model: nn.Module, name: str) -> dict[str, Any] | None:
    """What the directory says of an adapter on a model; None where it is nowhere."""
    return next((layer.undula_factors[name].record for layer in hosts(model).values() if name in layer), None)


def methods_of(record: Mapping[str, Any]) -> dict[str, Method]:
    """The sites of a record and their methods."""
    return reading.read_sites(record, files.CONFIG)[0]
