"""Write GGUF, the model file of llama.cpp: a decoder of the Llama family with its tokenizer (a LoRA: `gguf_lora`).

    undula.merge(model, keep=False)
    export_gguf(model, tokenizer, "model.gguf", Encoding.f16)

The file is written by the `gguf` package, one tensor at a time.  What would be read as another model is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.extras import needs
from ..host.quantised import is_plain
from .draft import atomic
from .gguf_words import ELSEWHERE, Words, words_of

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter


class Encoding(StrEnum):
    """How matrices are stored; vectors are always float32.  q8_0 takes 8.5 bits a number, in blocks of 32 with a scale;
    matrices whose rows are no multiple of 32 are stored in float16 then."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


FILE_TYPES = {Encoding.f32: 0, Encoding.f16: 1, Encoding.bf16: 32, Encoding.q8_0: 7}  # general.file_type
KEPT = {torch.float32: Encoding.f32, torch.float16: Encoding.f16, torch.bfloat16: Encoding.bf16}


@dataclass(frozen=True)
class Family:
    """An architecture as transformers and llama.cpp have it."""

    cls: str
    arch: str
    turned: bool = False  # neighbouring rows of q and k rotate together, in transformers row i and row i + half
    stretched: bool = False  # it reads factors of the rotary frequencies


FAMILIES = {  # by the model_type of a configuration
    "llama": Family("LlamaForCausalLM", "llama", turned=True, stretched=True),
    "mistral": Family("MistralForCausalLM", "llama", turned=True, stretched=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
}


@needs("gguf")
@torch.no_grad()
def export_gguf(model: Any, tokenizer: Any, path: str | Path, encoding: Encoding | None = None) -> dict[str, float]:
    """Writes a causal language model of transformers (Llama, Mistral, Qwen2, Qwen3) and its tokenizer as one file.

    `encoding`: how matrices are stored; None: as the model has them, which loses nothing.  Returns by parameter the
    Frobenius norm of what storing took from it, 0 where nothing: `merge` returns what matters, a share of the change.
    Raises ValueError for another architecture, a rotary embedding or tokenizer that llama.cpp would read as another
    one, adapters that are not merged, quantised weights, and numbers that the encoding cannot hold.
    """
    config = model.config
    family = family_of(config, type(model).__name__)
    state = {n: p for n, p in model.state_dict().items() if not (n == "lm_head.weight" and _tied(model))}
    for name, p in state.items():
        if ".undula." in f".{name}" or "lora_" in name:
            raise ValueError("the model has an adapter on it: merge it first (undula.merge), or write that alone")
        if not is_plain(p) or not p.is_floating_point():
            raise ValueError(f"{name} is quantised ({p.dtype}): dequantise the model first (model.dequantize())")
    kept = encoding or KEPT.get(model.dtype)
    if kept is None:
        raise ValueError(f"the model is of {model.dtype}: say how to store it (encoding=..., or --encoding)")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    words = words_of(tokenizer, config.vocab_size, [ends] if isinstance(ends, int) else ends or ())
    places = places_of(family, config, state)
    factors = _frequencies(family, config)
    lost: dict[str, float] = {}

    def tensors() -> Iterator[tuple[str, Tensor, Encoding, str | None]]:
        if factors is not None:
            yield "rope_freqs.weight", factors, Encoding.f32, None
        for name, p in state.items():
            yield places[name], turned(family, config, name, p), _stored(p, kept), name

    def produce(place: str) -> None:
        write_file(place, family, lambda w: _describe(w, config, words, kept), tensors, lost)

    atomic(Path(path), produce)
    return lost


def family_of(config: Any, name: str | None) -> Family:
    """The family of a configuration and of the class `name`, where one is known."""
    family = FAMILIES.get(config.model_type)
    if family is None or name not in (None, family.cls):
        known = ", ".join(f.cls for f in FAMILIES.values())
        raise ValueError(f"{name or config.model_type} is not written as GGUF; {known} are. {ELSEWHERE}")
    odd = {
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
        "partial_rotary_factor": (getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0,
    }
    if any(odd.values()):
        what = next(key for key, wrong in odd.items() if wrong)
        raise ValueError(f"{what} is {getattr(config, what)!r}, which llama.cpp's {family.arch} has not. {ELSEWHERE}")
    return family


def _tied(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return ends[1] is not None and ends[0].weight is ends[1].weight


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def places_of(family: Family, config: Any, state: Iterable[str]) -> dict[str, str]:
    """The names in the file by those of the model.  Raises ValueError for a tensor without one."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    places = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in state}
    strange = [name for name, place in places.items() if place is None]
    if strange:
        raise ValueError(f"{', '.join(strange[:3])}: llama.cpp's {family.arch} has no such tensor. {ELSEWHERE}")
    return {name: place for name, place in places.items() if place is not None}


def turned(family: Family, config: Any, name: str, t: Tensor, back: bool = False) -> Tensor:
    """Rows of q and k in the order in which llama.cpp rotates them, or from it `back`; any other tensor as it is."""
    kind = name.rsplit(".", 2)[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)
    if not family.turned or heads is None:
        return t
    half = t.shape[0] // heads // 2
    pairs = (half, 2) if back else (2, half)
    return t.reshape(heads, *pairs, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def _frequencies(family: Family, config: Any) -> Tensor | None:
    """By what each rotary frequency is divided, where the configuration stretches them (Llama 3.1's way)."""
    told = dict(config.rope_parameters or {})
    kind = told.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or not family.stretched:
        raise ValueError(f"rotary embeddings of the type {kind!r} are not written for {family.arch}. {ELSEWHERE}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if factor != 1.0:
        raise ValueError(f"rotary embeddings with an attention factor ({factor}) are not written. {ELSEWHERE}")
    size = _head_size(config)
    plain = told["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / stretched.double()).float()


def _describe(writer: GGUFWriter, config: Any, words: Words, encoding: Encoding) -> None:
    """The metadata: what the model is, then its tokenizer."""
    import gguf

    told, size = dict(config.rope_parameters or {}), _head_size(config)
    window = getattr(
        config, "sliding_window", None
    )  # within it the model attends to all: no longer context is promised
    longest = config.max_position_embeddings
    writer.add_type("model")
    name = str(getattr(config, "_name_or_path", "") or "")
    writer.add_name(Path(name).name or "model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(longest, window) if window else longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(told["rope_theta"])
    if told.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(told["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[encoding])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_token_scores(words.scores)
    for kind, i in words.ids.items():
        getattr(writer, f"add_{kind}_token_id")(i)
    writer.add_add_bos_token(words.adds["bos"])
    writer.add_add_eos_token(words.adds["eos"])
    writer.add_add_space_prefix(words.adds["space_prefix"])
    if words.template is not None:
        writer.add_chat_template(words.template)


def _stored(p: Tensor, encoding: Encoding) -> Encoding:
    if p.ndim < 2:
        return Encoding.f32
    return Encoding.f16 if encoding is Encoding.q8_0 and p.shape[-1] % 32 else encoding


def _encoded(name: str, t: Tensor, encoding: Encoding) -> tuple[np.ndarray, float]:
    """(the tensor as it is stored, the norm of what that took from it).  Raises ValueError for numbers out of range."""
    import gguf

    exact = t.detach().cpu().float()
    kind = gguf.GGMLQuantizationType[encoding.name.upper()]
    with_range = exact.half() if encoding is Encoding.f16 else exact
    if not bool(torch.isfinite(with_range).all()):
        raise ValueError(
            f"{name} has numbers that {encoding} cannot hold: is the model sound? If it is, take bf16 or f32"
        )
    stored = gguf.quants.quantize(exact.numpy(), kind)
    read = torch.from_numpy(gguf.quants.dequantize(stored, kind)).reshape(exact.shape)
    return stored, float((read - exact).norm())


def write_file(place: str, family: Family, describe: Any, tensors: Any, lost: dict[str, float]) -> None:
    """Writes a file in two passes over the tensors: what they are, then their numbers."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(None, family.arch)
    describe(writer)
    for name, t, encoding, _ in tensors():
        kind = gguf.GGMLQuantizationType[encoding.name.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # numpy has no bfloat16: such rows, like quantised ones, are bytes
        writer.add_tensor_info(name, t.shape, np.dtype("float32"), t.numel() // block * size, raw_dtype=kind)
    try:
        writer.write_header_to_file(Path(place))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, t, encoding, own in tensors():
            stored, error = _encoded(name, t, encoding)
            writer.write_tensor_data(stored)
            if own is not None:
                lost[own] = error
    finally:
        writer.close()
