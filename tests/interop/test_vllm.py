"""Exports for vLLM, checked against the rules by which it takes a LoRA."""

import dataclasses
import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import undula
from tests.support import models
from tests.support.numbers import shake
from undula.cli.main import app
from undula.io import vllm


class Helper:
    """What vLLM makes of a directory, written from its documented behaviour: one r and one scale for all layers, each
    pair copied into a buffer of --max-lora-rank rows."""

    def __init__(self, path, most):
        config = json.loads((path / "adapter_config.json").read_text())
        assert not config["modules_to_save"]
        assert not config["use_dora"]
        assert config["bias"] == "none"
        assert config["r"] <= most
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        self.update = {}
        tensors = load_file(path / "adapter_model.safetensors")
        for key, A in tensors.items():
            if key.endswith(".lora_A.weight"):
                B = tensors[key.replace("lora_A", "lora_B")]
                a, b = torch.zeros(most, A.shape[1]), torch.zeros(B.shape[0], most)
                a[: A.shape[0]], b[:, : B.shape[1]] = A, B  # an error, where a rank is larger
                self.update[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * b @ a


def adapted(method=None, **rules):
    model = models.llama()
    return model, shake(undula.attach(model, method or undula.LoRA(r=3, alpha=5), where=["q_proj", "v_proj"], **rules))


@pytest.mark.parametrize(
    ("method", "rank"),
    [(undula.LoRA(r=1), 1), (undula.LoRA(r=3, alpha=5), 8), (undula.LoRA(r=8), 8), (undula.LoRA(r=9), 16)],
    ids=repr,
)
def test_the_rank_is_the_next_of_its_list_and_the_update_the_same(method, rank, tmp_path):
    _, adapter = adapted(method)
    assert vllm.export_vllm(adapter, tmp_path / "out", "base", "CAUSAL_LM") == rank
    vllm.check(tmp_path / "out", rank)
    found = Helper(tmp_path / "out", rank).update
    assert set(found) == set(adapter.factors)
    for site, delta in found.items():
        torch.testing.assert_close(delta, adapter.delta(site).float())


def test_layers_of_several_ranks_and_scales_get_one(tmp_path):
    """Which its configuration could not say otherwise: vLLM reads no patterns."""
    _, adapter = adapted(overrides={"*.0.*q_proj": undula.LoRA(r=2, alpha=9), "*v_proj": undula.VeRA(r=4)})
    vllm.export_vllm(adapter, tmp_path / "out")
    for site, delta in Helper(tmp_path / "out", 8).update.items():
        torch.testing.assert_close(delta, adapter.delta(site).float())
    undula.io.export_lora(adapter, tmp_path / "plain")
    with pytest.raises(ValueError, match="rank_pattern says"):
        vllm.check(tmp_path / "plain")


def test_peft_and_undula_read_it_too(tmp_path):
    model, adapter = adapted()
    vllm.export_vllm(adapter, tmp_path / "out", "base", "CAUSAL_LM")
    tokens = models.tokens()
    with torch.no_grad():
        wanted = model(tokens).logits
        theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "out")(tokens).logits
    torch.testing.assert_close(theirs, wanted)
    other = models.llama()
    undula.attach(other, undula.Adapter.load(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, wanted)


CONFIGS = {
    "DoRA": {"use_dora": True},
    "a head": {"modules_to_save": ["score"]},
    "a bias": {"bias": "all"},
    "PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "replicated": {"layer_replication": [[0, 1]]},
    "other ranks": {"rank_pattern": {"q_proj": 4}},
    "other scales": {"alpha_pattern": {"q_proj": 4}},
    "experts": {"target_parameters": ["experts.gate_up_proj"]},
    "too large a rank": {"r": 1024},
    "no rank": {"r": None},
    "another type": {"peft_type": "LOKR"},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_directory_that_it_would_not_take_is_named_with_the_rule(what, tmp_path):
    _, adapter = adapted()
    vllm.export_vllm(adapter, tmp_path / "out")
    vllm.check(tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text()) | CONFIGS[what]
    if what == "no rank":
        del config["r"]
    file.write_text(json.dumps(config))
    said = "rank is 1024" if what == "too large a rank" else next(iter(CONFIGS[what]))
    with pytest.raises(ValueError, match=said):
        vllm.check(tmp_path / "out")


def test_tensors_that_are_no_plain_pairs_are_named(tmp_path):
    _, adapter = adapted()
    vllm.export_vllm(adapter, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, t in {
        "base_model.model.score.weight": torch.zeros(2, 4),
        "base_model.model.model.x.lora_magnitude_vector": torch.zeros(4),
        "base_model.model.model.x.lora_A.weight": torch.zeros(8, 3, 3, 3),
        "base_model.model.model.x.lora_B.weight": torch.zeros(4, 5),
    }.items():
        save_file(tensors | {name: t}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            vllm.check(tmp_path / "out")


def test_what_it_has_no_place_for_is_refused_with_the_way_out(tmp_path):
    _, adapter = adapted(full=["norm"])
    with pytest.raises(ValueError, match=r"in full.*undula serve"):
        vllm.export_vllm(adapter, tmp_path / "out")
    _, adapter = adapted(undula.LoRAN(r=2))
    with pytest.raises(TypeError, match="Collapse it first"):
        vllm.export_vllm(adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="truncate"):
        vllm.allowed_rank(513)
    with pytest.raises(ValueError, match="--max-lora-rank is one of"):
        vllm.faults({}, {}, 24)
    picture = models.Picture()
    adapter = undula.attach(picture, undula.LoRA(r=2), where=["conv"])
    adapter = dataclasses.replace(adapter.copy(), full={})
    with pytest.raises(ValueError, match="is a convolution"):
        vllm.export_vllm(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_it_and_says_the_command(tmp_path):
    _, adapter = adapted()
    adapter.save(tmp_path / "in", "base", "CAUSAL_LM")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "in"), "--format", "vllm", "--out", str(tmp_path / "it")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert f"--max-lora-rank8--lora-modulesit={tmp_path / 'it'}" in "".join(done.output.split())
    vllm.check(tmp_path / "it", 8)
