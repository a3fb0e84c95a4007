"""A LoRA as llama.cpp's `--lora` has it: written, and read again for its base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.extras import needs
from . import files
from .draft import atomic
from .gguf_write import Encoding, Family, family_of, places_of, turned, write_file
from .peft import LEAF, lora_state, read_lora

if TYPE_CHECKING:
    from gguf import GGUFWriter

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}


@needs("gguf")
@torch.no_grad()
def export_gguf_lora(adapter: Adapter, config: Any, path: str | Path) -> None:
    """Writes a LowRank adapter as the file that llama.cpp's `--lora` takes, in float32; `config`: that of its base.

    llama.cpp has one alpha for all layers: it is the commonest rank, and B of other ranks r is multiplied by
    r / alpha.  Raises TypeError below the LowRank rung (`collapse` first); ValueError for parameters trained in full,
    for layers that are no linear ones of the base, and for other architectures.
    """
    family = family_of(config, (config.architectures or [None])[0])
    if adapter.full:
        raise ValueError(
            f"llama.cpp's LoRA files hold no parameters trained in full: {', '.join(sorted(adapter.full)[:3])}. "
            "Merge the adapter and write the whole model"
        )
    described, found = lora_state(adapter, None, None)
    alpha = float(described["lora_alpha"])
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, t in found.items():
        match = LEAF.fullmatch(key)
        if match is None or match["leaf"] not in ("lora_A", "lora_B") or t.ndim != 2:
            raise ValueError(f"{key} is no factor of a linear layer: merge the adapter and write the whole model")
        pairs.setdefault(match["site"], {})[match["leaf"]] = t
    places = places_of(family, config, [f"{site}.weight" for site in pairs])
    if "output.weight" in places.values() and config.tie_word_embeddings:
        raise ValueError(
            "lm_head is adapted, and the base shares its weight with the embedding: llama.cpp has no such layer. Merge "
            "the adapter and write the whole model"
        )

    def tensors() -> Iterator[tuple[str, Tensor, Encoding, str | None]]:
        for site, pair in pairs.items():
            name = f"{site}.weight"
            B_OR = pair["lora_B"].float() * (pair["lora_A"].shape[0] / alpha)
            yield f"{places[name]}.lora_a", pair["lora_A"], Encoding.f32, None
            yield f"{places[name]}.lora_b", turned(family, config, name, B_OR), Encoding.f32, None

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    atomic(Path(path), lambda place: write_file(place, family, describe, tensors, {}))


@needs("gguf")
@torch.no_grad()
def load_gguf_lora(path: str | Path, config: Any) -> Adapter:
    """The LoRA in a file of llama.cpp's, for the base of this configuration (Llama, Mistral, Qwen2, Qwen3), whose names
    and order of rows it gets again.  Quantised factors come as the numbers that their blocks mean.

    Raises ValueError for a file that is no LoRA, or of another architecture, and for tensors that are no linear layers
    of the base.
    """
    from .gguf import read_gguf

    family = family_of(config, (config.architectures or [None])[0])
    with files.door(str(path)):
        found = read_gguf(path)
        told = {k: found.metadata.get(k) for k in ("general.architecture", "adapter.type", "adapter.lora.alpha")}
        if told != told | {"general.architecture": family.arch, "adapter.type": "lora"}:
            raise ValueError(f"{path} is no LoRA for {family.arch}, which the base is: it says {told}")
        sites = _sites(family, config)
        tensors: dict[str, Tensor] = {}
        for key in found.tensors:
            place, _, side = key.rpartition(".")
            if place not in sites or side not in SIDES:
                raise ValueError(f"{path}: {key!r:.100} is no factor of a linear layer of the base")
            t = found.tensor(key)
            t = t if side == "lora_a" else turned(family, config, f"{sites[place]}.weight", t, back=True)
            tensors[f"{sites[place]}.{SIDES[side]}"] = t
        files.check_finite(tensors, str(path))
        ranks = {f"^{re.escape(k[: -len('.lora_A')])}$": len(t) for k, t in tensors.items() if k.endswith("A")}
        said = {"peft_type": "LORA", "rank_pattern": ranks, "lora_alpha": told["adapter.lora.alpha"]}
        return read_lora({**said, "task_type": "CAUSAL_LM"}, tensors, str(path))


def _sites(family: Family, config: Any) -> dict[str, str]:
    """{name of a weight in the file: the layer}."""
    names = ["lm_head", *(f"model.layers.{i}.{n}" for i in range(config.num_hidden_layers) for n in LAYERS)]
    return {
        place: name.removesuffix(".weight")
        for name, place in places_of(family, config, [f"{n}.weight" for n in names]).items()
    }
