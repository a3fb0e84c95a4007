"""LoRAs as vLLM takes them: one rank for all layers out of its list, nothing beside the pairs.

The rules are those of vLLM's `PEFTHelper.validate_legal`, `LoRAModel.from_local_checkpoint` and `LoRAConfig`, as of
0.33.  It reads r and lora_alpha of the configuration alone, for every layer: patterns that say otherwise are not seen
by it, and what it does not know it passes over.  So a directory that it loads may still compute something else there;
`check` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import LowRank
from ..methods.lora import LoRA
from . import files
from .peft import LEAF, README, lora_state

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNKNOWN = {  # fields of PEFT's that change the function, and that vLLM refuses or passes over
    "use_dora": "DoRA: collapse it (`undula collapse`, `undula export --how truncate`)",
    "lora_bias": "a bias beside B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "parameters that are no layers (experts)",
    "modules_to_save": "modules that were trained in full",
}


def allowed_rank(r: int) -> int:
    """The smallest rank of vLLM's that takes r.  Raises ValueError beyond its list."""
    for allowed in RANKS:
        if r <= allowed:
            return allowed
    raise ValueError(
        f"vLLM takes ranks up to {RANKS[-1]} and this adapter has {r}: export it truncated (--how truncate --set "
        f"r={RANKS[-1]})"
    )


@torch.no_grad()
def fitted(adapter: Adapter) -> Adapter:
    """The same update as plain LoRAs of one rank, the allowed one that takes them all: what is lacking is zero.  Raises
    ValueError for parameters in full and for layers that vLLM has no LoRA for, TypeError below the LowRank rung."""
    if adapter.full:
        raise ValueError(
            f"the adapter holds {', '.join(list(adapter.full)[:3])} in full, and vLLM takes no modules_to_save. Serve "
            "it with `undula serve`, which gives each adapter its head; or merge it and serve the merged model"
        )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for site, f in adapter.factors.items():
        method, kernel = adapter.methods[site], adapter.kernels.get(site)
        if not isinstance(method, LowRank):
            raise TypeError(
                f"{method!r} at {site} stands on the rung {method.rung()}: it is no LoRA. Collapse it first"
            )
        if kernel is not None and len(kernel) > 1:
            raise ValueError(
                f"{site} is a convolution, for which vLLM has no LoRA: train without it (exclude), or merge"
            )
        if site.rpartition(".")[2].isdigit():
            raise ValueError(
                f"{site} is one matrix of a stack, which vLLM does not read from a LoRA: merge the adapter"
            )
        pairs[site] = method.pair(f)
    r = allowed_rank(max((len(A_RI) for _, A_RI in pairs.values()), default=1))
    factors = {
        site: {"A": _rows(A_RI, r), "B": _rows(B_OR.T, r).T.contiguous()} for site, (B_OR, A_RI) in pairs.items()
    }
    return replace(adapter, methods=dict.fromkeys(pairs, LoRA(r=r, alpha=r)), factors=factors)


def _rows(t: Tensor, r: int) -> Tensor:
    return torch.cat([t, t.new_zeros(r - len(t), t.shape[1])])


def export_vllm(adapter: Adapter, path: str | Path, base: str | None = None, task: str | None = None) -> int:
    """Writes a LowRank adapter as vLLM takes it (see `fitted`), which PEFT reads too.  Returns its rank: what
    --max-lora-rank has to be at least.  Raises as `fitted` and `export_lora`."""
    plain = fitted(adapter)
    config, tensors = lora_state(plain, base, task)
    named = {files.PREFIX + key: t for key, t in tensors.items()}
    wrong = faults(config, {key: tuple(t.shape) for key, t in named.items()})
    if wrong:
        raise ValueError(f"vLLM would not take this adapter: {'; '.join(wrong)}")
    files.write(Path(path), config, named, README)
    return int(config["r"])


def check(path: str | Path, max_lora_rank: int = RANKS[-1]) -> None:
    """Raises ValueError with every rule of vLLM's that the LoRA in a directory breaks; FileNotFoundError."""
    config, entries = files.headed(Path(path))
    wrong = faults(config, {key: entry.shape for key, entry in entries.items()}, max_lora_rank)
    if wrong:
        raise ValueError(
            f"vLLM would not take {path} as it is meant: {'; '.join(wrong)}. `undula export {path} --format vllm --out "
            "OTHER` writes one that it takes, or says why there is none"
        )


def faults(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], max_lora_rank: int = RANKS[-1]
) -> list[str]:
    """The rules that a PEFT configuration and its tensors break, in words."""
    if max_lora_rank not in RANKS:
        raise ValueError(f"--max-lora-rank is one of {', '.join(map(str, RANKS))}; found {max_lora_rank}")
    lacking = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if lacking or config.get("peft_type", "LORA") != "LORA":
        return [f"it is no LoRA of PEFT's: {', '.join(lacking) or 'peft_type ' + str(config.get('peft_type'))} ..."]
    r, alpha = config["r"], config["lora_alpha"]
    found = [f"it has {name}={config[name]!r:.60} ({what})" for name, what in UNKNOWN.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"it has bias={config['bias']!r}: vLLM takes none")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(STARTS):
        found.append(
            f"it began with init_lora_weights={start}, which moved the base's weights: convert it in PEFT when saving"
        )
    if r > max_lora_rank:
        found.append(f"its rank is {r}, and --max-lora-rank {max_lora_rank}")
    for name, one in (("rank_pattern", r), ("alpha_pattern", alpha)):
        other = {k: v for k, v in (config.get(name) or {}).items() if v != one}
        if other:
            site, value = next(iter(other.items()))
            found.append(f"{name} says {value} at {site}, and vLLM takes {one} at every layer")
    return found + _wrong_tensors(shapes, r)


def _wrong_tensors(shapes: Mapping[str, tuple[int, ...]], r: int) -> list[str]:
    found = []
    for key, shape in shapes.items():
        match = LEAF.fullmatch(key.removeprefix(files.PREFIX))
        if not key.startswith(files.PREFIX) or match is None or match["leaf"] == "lora_magnitude_vector":
            found.append(f"{key} is no factor of a plain LoRA")
        elif len(shape) != 2:
            found.append(f"{key} {shape} is of a convolution")
        elif r not in shape:
            found.append(f"{key} {shape} is not of the rank {r} that its configuration says")
    return found[:5]
