"""PEFT's LoRAs on parameters (`target_parameters`): what the experts of a mixture are trained with there."""

import json

import pytest
import safetensors.torch
import torch

import undula

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 11,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "num_local_experts": 3,
    "experts_implementation": "eager",
}


def made(name):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES))
    return model.double().eval()


def saved(name, folder, **options):
    """PEFT's own adapter in a directory, and what the model computes with it."""
    model = peft.get_peft_model(made(name), peft.LoraConfig(r=2, lora_alpha=3, **options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    model.save_pretrained(folder)
    return model(input_ids=torch.arange(8).view(2, 4)).logits.detach()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "parameters", "more"),
    [
        ("Mixtral", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {}),
        ("Mixtral", ["experts.down_proj"], {"alpha_pattern": {"experts.down_proj": 5}}),
        ("Mixtral", ["mlp.gate.weight", "experts.gate_up_proj"], {"rank_pattern": {"gate_up_proj": 1}}),
        ("GptOss", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], {}),
    ],
)
def test_a_lora_on_parameters_computes_what_it_does_in_peft(name, parameters, more, tmp_path):
    """Every expert has a pair of its own, in both layouts of a stack."""
    wanted = saved(name, tmp_path, target_modules=["q_proj"], target_parameters=parameters, **more)
    model = made(name)
    base = model(input_ids=torch.arange(8).view(2, 4)).logits
    adapter = undula.Adapter.load(tmp_path)
    undula.attach(model, adapter)
    torch.testing.assert_close(model(input_ids=torch.arange(8).view(2, 4)).logits, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base, wanted)
    for each in (adapter, undula.squeeze(adapter, undula.compress.ByRank(1)).adapter, adapter + adapter):
        with pytest.raises(ValueError, match="which undula reads and does not write"):
            undula.io.export_lora(each, tmp_path / "out")  # under names that PEFT would leave out
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target_parameters": ["mlp.experts.other"]}, "factors that|knows in which order|has the rank"),
        ({"target_parameters": ["mlp.experts.down_proj", "mlp.experts.other"]}, "knows in which order"),
        ({"target_parameters": ["elsewhere.down_proj"]}, "holds no factors for that"),
        ({"target_parameters": ["down_proj"]}, "reads names with their module"),
        ({"target_parameters": [3]}, "target_parameters are names"),
        ({"r": 4}, "no multiple of its rank 4"),
    ],
)
def test_a_lora_on_other_parameters_than_it_says_is_refused(change, why, tmp_path):
    saved("Mixtral", tmp_path, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    assert safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=why):
        undula.attach(made("Mixtral"), undula.Adapter.load(tmp_path))
