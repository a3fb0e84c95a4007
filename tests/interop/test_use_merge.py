"""Merging for any model of transformers, whether undula has a task for it or not; and what a merge loses, told."""

import warnings

import pytest
import torch
import transformers
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.host.merging import LossyMerge

IDS = {"input_ids": torch.tensor([[2, 7, 8, 3]])}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
SOUND = {"input_values": torch.linspace(-1, 1, 800)[None].sin()}
HEADS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
NAMES = {0: "cat", 1: "dog", 2: "bird"}
BERT = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **HEADS, id2label=NAMES)
TWO = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **HEADS)
T5 = transformers.T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
VIT = {"image_size": 32, "patch_size": 16, **HEADS}
WAVE = transformers.Wav2Vec2Config(
    vocab_size=12, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, **HEADS, num_labels=3,
)  # fmt: skip
MODELS = {
    "feature extraction": (transformers.BertModel, BERT, "value", IDS),
    "masked words": (transformers.BertForMaskedLM, BERT, "value", IDS),
    "tokens": (transformers.BertForTokenClassification, BERT, "value", IDS),
    "questions": (transformers.BertForQuestionAnswering, TWO, "value", IDS),
    "multiple choice": (transformers.BertForMultipleChoice, BERT, "value", {"input_ids": IDS["input_ids"][None]}),
    "sequence to sequence": (
        transformers.T5ForConditionalGeneration, T5, "v", IDS | {"decoder_input_ids": IDS["input_ids"]},
    ),
    "encoder of T5": (transformers.T5EncoderModel, T5, "v", IDS),
    "object detection": (
        transformers.YolosForObjectDetection,
        transformers.YolosConfig(**VIT | {"image_size": [32, 32]}, num_detection_tokens=4, id2label=NAMES),
        "*v*",
        PIXELS,
    ),
    "masked images": (
        transformers.ViTForMaskedImageModeling, transformers.ViTConfig(**VIT, encoder_stride=16), "*v*", PIXELS,
    ),
    "sounds to letters": (transformers.Wav2Vec2ForCTC, WAVE, "v_proj", SOUND),
    "sounds to classes": (transformers.Wav2Vec2ForSequenceClassification, WAVE, "v_proj", SOUND),
}  # fmt: skip


def first(output):
    """The tensor that a model gives first."""
    return next(v for v in output.to_tuple() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_of_any_model_merge_into_a_folder_that_its_own_class_opens(kind, tmp_path):
    """Which class it is the adapter's task or the base's configuration says; names of classes stay."""
    cls, config, where, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "base")
    if "input_ids" in inputs:
        tiny.tokenizer(tmp_path / "base")
    adapter = undula.attach(model, undula.LoRAN(r=2), where)
    with torch.no_grad():
        for p in adapter.parameters():
            torch.nn.init.normal_(p)
        want = first(model(**inputs))
        undula.select(model, None)
        bare = first(model(**inputs))
    assert not torch.allclose(want, bare, rtol=1e-2, atol=0)
    adapter.save(tmp_path / "adapter", base=str(tmp_path / "base"))
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "whole")])
    assert done.exit_code == 0, done.output
    merged, told = cls.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not told["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(first(merged.eval()(**inputs)), want, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label == config.id2label
    assert merged.config.architectures == [cls.__name__]
    assert (tmp_path / "whole" / "tokenizer.json").is_file() == ("input_ids" in inputs)
    assert f"{cls.__name__}" in (tmp_path / "whole" / "README.md").read_text() or kind == "feature extraction"


def test_a_merged_folder_has_all_that_its_base_had(tmp_path):
    """Several files of weights where that is asked for, the base's dtype, its settings of generation, its tokenizer, a
    card."""
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=64, dtype="bfloat16")  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=7, eos_token_id=3, repetition_penalty=1.5)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer(tmp_path / "base")
    adapter = undula.attach(model, undula.LoRA(r=2), "q_proj")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    adapter.save(tmp_path / "adapter", base=str(tmp_path / "base"), task="CAUSAL_LM")
    words = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "whole"), "--max-shard-size"]
    assert "a number with KB, MB or GB" in CliRunner().invoke(app, [*words, "tiny"]).stderr
    done = CliRunner().invoke(app, [*words, "5KB"])
    assert done.exit_code == 0, done.output
    there = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= there
    assert len([name for name in there if name.endswith(".safetensors")]) > 1
    assert list(undula.io.inspect(tmp_path / "whole").dtypes) == ["BF16"]  # all files of the index
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    assert merged.dtype == torch.bfloat16
    own = merged.generation_config
    assert (own.max_new_tokens, own.eos_token_id, own.repetition_penalty) == (7, 3, 1.5)
    undula.merge(model)
    for name, t in merged.state_dict().items():
        assert torch.equal(t, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("dtype", "size", "lost"),
    [
        (torch.bfloat16, 1e-5, True),
        (torch.float16, 1e-5, True),
        (torch.bfloat16, 0.2, False),
        (torch.float32, 1e-5, False),
    ],
)
def test_a_merge_that_storing_swallows_is_told(dtype, size, lost):
    """An update below the step of the base's numbers is rounded away, which nothing else shows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=dtype))
    adapter = undula.attach(model, undula.LoRA(r=2), "*")
    with torch.no_grad():
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=size**0.5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        errors = undula.merge(model)
    told = [w for w in said if issubclass(w.category, LossyMerge)]
    assert [max(errors.values()) >= 0.1] == [lost] == [bool(told)]
    if lost:
        assert "of what the adapter does at 0" in str(told[0].message)
        assert told[0].filename == __file__
