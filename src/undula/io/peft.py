"""Plain PEFT LoRA directories: reading them, and writing any LowRank adapter as one, bit for bit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..method import LowRank, Method
from ..methods.dora import DoRA
from ..methods.lora import LoRA, RankStabilised
from . import files

LEAF = re.compile(
    r"(?P<site>.+)\.(?P<leaf>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
NEUTRAL = {"bias": "none", "lora_bias": False, "fan_in_fan_out": None, "alora_invocation_tokens": None}


README = """# A LoRA adapter

A plain LoRA in PEFT's format, written by undula: `peft.PeftModel.from_pretrained(model, "this directory")` puts it on
the model that it was trained on.  `undula export` writes one that says which model that is, and how to open it.
"""


def export_lora(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> None:
    """Writes a LowRank adapter as a plain PEFT LoRA (`peft_type: LORA`): what vLLM, llama.cpp and PEFT alone read.

    lora_alpha equals r at every site, so the stored factors are `pair(f)` to the bit.  Parameters trained in full
    leave as PEFT's modules_to_save.  Raises TypeError below the LowRank rung: another function is never written as a
    LoRA (`collapse` first); ValueError where a parameter in full lies in an adapted layer.
    """
    config, tensors = lora_state(adapter, base, task)
    named = {files.PREFIX + key: t for key, t in tensors.items()}
    extra = {} if (Path(path) / "README.md").exists() else {"README.md": README}
    files.write(Path(path), config, named, extra)


@torch.no_grad()
def lora_state(adapter: Adapter, base: str | None, task: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(LoraConfig, tensors by their names below the model) of a LowRank adapter.  Raises what `export_lora` raises."""
    below = {s: m for s, m in adapter.methods.items() if not isinstance(m, LowRank)}
    if below:
        site, method = next(iter(below.items()))
        raise TypeError(
            f"{method!r} at {site} ({len(below)} such sites) stands on the rung {method.rung()}: it is no LoRA. "
            "undula.collapse makes one and reports the error"
        )
    inside = [n for n in adapter.full if n.rpartition(".")[0] in adapter.factors]
    if inside:
        raise ValueError(
            f"{', '.join(inside[:3])}: trained in full in a layer that is adapted too, which no PEFT LoRA can say "
            "(its modules_to_save are whole modules). Merge the adapter, or collapse it with bias=False"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for site, f in adapter.factors.items():
        method = adapter.methods[site]
        assert isinstance(method, LowRank)
        B_OR, A_RI = method.pair(f)
        ranks[site] = A_RI.shape[0]
        leaves = _leaves(adapter.kernels.get(site), B_OR, A_RI)
        tensors |= {f"{site}.{leaf}" if site else leaf: t.clone() for leaf, t in leaves}  # sites may share a factor
    return lora_config(ranks, list(adapter.full), base, task), tensors | dict(adapter.full)


def _leaves(kernel: tuple[int, ...] | None, B_OR: Tensor, A_RI: Tensor) -> list[tuple[str, Tensor]]:
    """The pair under PEFT's names and in its shapes, which depend on the kind of layer (see `Adapter.kernels`)."""
    if kernel is None:
        return [("lora_A.weight", A_RI), ("lora_B.weight", B_OR)]
    if not kernel:
        return [("lora_embedding_A", A_RI), ("lora_embedding_B", B_OR)]
    return [("lora_A.weight", A_RI.reshape(-1, *kernel)), ("lora_B.weight", B_OR[:, :, None, None])]


def lora_config(ranks: Mapping[str, int], full: list[str], base: str | None, task: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON, with scaling 1 everywhere."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(s)}$": n for s, n in ranks.items() if n != r}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": list(ranks),
        "modules_to_save": sorted({n.rpartition(".")[0] or n for n in full}) or None,
    }


def read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> Adapter:
    """A PEFT LoRA (rsLoRA, DoRA, rank and alpha patterns included) as an Adapter.  Raises ValueError for what would
    change the function and is not understood (biases, aLoRA, start-dependent conversions)."""
    odd = [k for k in ("bias", "lora_bias", "alora_invocation_tokens") if config.get(k) not in (NEUTRAL[k], None)]
    if odd:
        raise ValueError(f"{path}: undula does not read LoRAs with {', '.join(f'{k}={config[k]!r}' for k in odd)}")
    found: dict[str, dict[str, Tensor]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    full: dict[str, Tensor] = {}
    for key, t in tensors.items():
        name = files.check_name(key.removeprefix(files.PREFIX), "tensor")
        match = LEAF.fullmatch(name)
        if match is None:
            # PEFT stores the own weight of an embedding that it adapts: it may have grown with the vocabulary
            full[name.replace(".base_layer.", ".")] = t.requires_grad_()
        else:
            leaf = {"A": "A", "B": "B", "r": "m"}[match["leaf"][-1]]
            found.setdefault(match["site"], {})[leaf] = t.float().requires_grad_()
            if leaf == "A" and (t.ndim > 2 or "embedding" in match["leaf"]):
                kernels[match["site"]] = tuple(t.shape[1:]) if t.ndim > 2 else ()
    if not found:
        raise ValueError(f"{path} holds no LoRA factors")
    methods: dict[str, Method] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for site, f in found.items():
        wanted = {"A", "B", "m"} if config.get("use_dora") else {"A", "B"}
        if set(f) != wanted or f["A"].ndim < 2 or f["A"].shape[0] != f["B"].shape[1]:
            seen = {k: tuple(t.shape) for k, t in f.items()}
            raise ValueError(f"{path}: {site} needs the factors {sorted(wanted)} with one rank; found {seen}")
        methods[site], shapes[site], found[site] = _method(config, site, f)
    return Adapter(methods, found, shapes, full, kernels)


def _method(
    config: Mapping[str, Any], site: str, f: dict[str, Tensor]
) -> tuple[Method, tuple[int, int], dict[str, Tensor]]:
    flat = {k: t.detach().flatten(1).requires_grad_() if t.ndim > 2 else t for k, t in f.items()}  # convolutions
    r = flat["A"].shape[0]
    alpha = _patterned(config.get("alpha_pattern") or {}, site, config.get("lora_alpha", 8))
    plain = LoRA(r=r, alpha=float(alpha), **({"scaling": RankStabilised()} if config.get("use_rslora") else {}))
    if "m" in flat:
        flat["m"] = flat["m"].detach().flatten().requires_grad_()
    return DoRA(plain) if "m" in flat else plain, (flat["B"].shape[0], flat["A"].shape[1]), flat


def _patterned(patterns: Mapping[str, Any], site: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches a tail of the name."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", site)), default)
