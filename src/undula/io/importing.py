"""PEFT's LoRAs that say a change of the base's own numbers, read with that base: `lora_bias`, trained tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from . import files, lora_config
from .native import load
from .peft import read_lora
from .places import place

BIAS = re.compile(r"(?P<site>.+)\.lora_B\.bias", re.DOTALL)
TOKENS = re.compile(r"(?P<site>.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)


def needs_base(path: Path) -> bool:
    """Whether a directory says something that `Adapter.load` cannot read and `load_for` can."""
    return (path / files.CONFIG).is_file() and lora_config.needs_base(files.configuration(path))


def partly(path: str | Path) -> Adapter:
    """What `Adapter.load` reads; of a LoRA that needs its base (`load_for`) all that it says without."""
    path = place(path)
    with files.door(str(path)):
        if not needs_base(path):
            return load(path)
        config, tensors = files.read(path)
        rest = {k: t for k, t in tensors.items() if not any(p.fullmatch(_bare(k)) for p in (BIAS, TOKENS))}
        return read_lora({k: v for k, v in config.items() if k not in lora_config.WITH_BASE}, rest, str(path))


def _bare(key: str) -> str:
    return key.removeprefix(files.PREFIX)


@torch.no_grad()
def load_for(path: str | Path, model: nn.Module) -> Adapter:
    """The adapter in a directory, for `model`, its base: all that `Adapter.load` reads, and of PEFT's LoRAs `lora_bias`
    and `trainable_token_indices`, which change numbers of the base that only the base has.

    What is changed is trained in full in the adapter: the biases of the layers, b + s b_B; the table of embeddings with
    the trained rows in their places, a tied output head's too.  So it is exact, and an adapter with trained tokens
    holds a whole table.  Raises what `Adapter.load` raises, LookupError for layers that the model has not, ValueError
    for a bias where the layer has none, with how large it is.
    """
    path = place(path)
    with files.door(str(path)):
        if not needs_base(path):
            return load(path)
        config, tensors = files.read(path)
        if not lora_config.needs_base(config):
            return load(path)
        rest: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for key, t in tensors.items():
            name = _bare(key)
            bias, token = BIAS.fullmatch(name), TOKENS.fullmatch(name)
            if bias is not None:
                biases[bias["site"]] = t
            elif token is not None:
                rows[token["site"]] = t
            else:
                rest[key] = t
        adapter = read_lora({k: v for k, v in config.items() if k not in lora_config.WITH_BASE}, rest, str(path))
        full = dict(adapter.full)
        full |= _shifted(adapter, biases, model, str(path))
        full |= _rows(config.get("trainable_token_indices"), rows, full, model, str(path))
        return replace(adapter, full={k: t.detach().requires_grad_() for k, t in full.items()})


def _shifted(adapter: Adapter, biases: Mapping[str, Tensor], model: nn.Module, path: str) -> dict[str, Tensor]:
    """The layers' biases with those of the LoRAs."""
    shifts: dict[str, Tensor] = {}
    for site, b_O in biases.items():
        method: Any = adapter.methods.get(site)
        if method is None or not hasattr(method, "scaling") or b_O.shape != adapter.shapes[site][:1]:
            raise ValueError(f"{path}: the bias {tuple(b_O.shape)} of {site} goes with no LoRA of the file")
        shifts[site] = method.scaling(method.r, method.alpha) * b_O.float()
    own = {site: getattr(_module(model, site, path), "bias", None) for site in shifts}
    lone = {site: float(shifts[site].norm()) for site, bias in own.items() if bias is None}
    if lone:
        worst = max(lone, key=lambda site: lone[site])
        raise ValueError(
            f"{path} adds a bias (lora_bias) at {len(lone)} layers that have none to add it to; without them the "
            f"outputs would be off by vectors of norm {lone[worst]:.3g} at most ({worst}). Give the layers biases of "
            f"zero (bias = nn.Parameter(torch.zeros({len(shifts[worst])}))), or keep to PEFT for it"
        )
    made = {}
    for site, shift in shifts.items():
        bias = adapter.full.get(f"{site}.bias", own[site])
        assert isinstance(bias, Tensor)
        made[f"{site}.bias"] = (bias.float() + shift.to(bias.device)).to(bias.dtype)
    return made


def _rows(
    indices: Any, rows: Mapping[str, Tensor], full: Mapping[str, Tensor], model: nn.Module, path: str
) -> dict[str, Tensor]:
    """The tables with the trained rows in their places."""
    made: dict[str, Tensor] = {}
    for site, t_NI in rows.items():
        found = indices
        if isinstance(indices, dict):
            found = next((v for k, v in indices.items() if site == k or site.endswith(f".{k}")), None)
        if not isinstance(found, list) or not all(type(i) is int for i in found) or len(set(found)) != len(t_NI):
            raise ValueError(f"{path}: the {len(t_NI)} trained rows of {site} are those of trainable_token_indices, "
                             f"found {found!r:.80}")  # fmt: skip
        module = _module(model, site, path)
        weight = getattr(module, "weight", None)
        table = full.get(f"{site}.weight", weight)
        if not isinstance(table, Tensor) or table.ndim != 2 or t_NI.shape[1:] != table.shape[1:]:
            raise ValueError(f"{path}: {site} is no table with rows of {tuple(t_NI.shape[1:])}")
        if not all(0 <= i < len(table) for i in found):
            raise ValueError(f"{path}: {site} has {len(table)} rows; trained are {found!r:.80}")
        table = table.detach().clone()
        table[torch.tensor(found, device=table.device)] = t_NI.to(table)
        tied = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
        made |= {f"{name}.weight": table if name == site else table.clone() for name in tied}
    return made


def _module(model: nn.Module, site: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(site)
    except AttributeError:
        raise LookupError(f"{path}: the model has no layer {site!r:.100}") from None
