"""undula's methods on models in PEFT: the layers they go to, and training."""

import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import undula
from tests.support.models import PREFIX, Picture, gpt2, hosted, llama, shake, sites, tokens, trained
from undula import (
    AuroRA,
    Centred,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
)
from undula.host.views import outline
from undula.methods.activations import ReLU
from undula.starts import Gaussian

# Where


def test_target_modules():
    every = sites(hosted(LoRA()))
    assert len(every) == 14
    assert "lm_head" not in every
    assert sites(hosted(LoRA(), target_modules=["q_proj", "lm_head"])) == [
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    values = [n for n in every if n.endswith("v_proj")]
    assert sites(hosted(LoRA(), target_modules=r".*\.v_proj")) == values
    assert sites(hosted(LoRA(), target_modules=re.compile(r".*\.v_proj"))) == values
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sites(hosted(LoRA(), exclude_modules=["v_proj"])) == [n for n in every if n not in values]
    with pytest.warns(UserWarning, match="no modules were excluded"):
        hosted(LoRA(), exclude_modules=["x_proj"])
    assert sites(hosted(LoRA(), target_modules=["v_proj"], layers_to_transform=[1])) == values[1:]
    assert len(sites(hosted(LoRA(), model=gpt2()))) == 8


def test_a_second_adapter_sees_the_model_not_the_first():
    """Neither what PEFT wrapped for the first adapter nor its copy of a head is a layer of the model."""
    model = hosted(LoRA(r=2), model=Picture(), target_modules=["conv", "middle"], modules_to_save=["head"])
    model.add_adapter("other", undula.peft_config(LoRA(r=3)))
    assert sorted(model.peft_config["other"].sites) == ["middle"]
    model.add_adapter("third", undula.peft_config(LoRA(r=3), ".*(conv|middle).*"))
    assert sorted(model.peft_config["third"].sites) == ["conv", "middle"]


def test_overrides():
    model = hosted(LoRA(r=2), overrides={"*.layers.1.*.q_proj": AuroRA(r=3), "q_proj": LoRAN(r=1)})
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "law")}
    methods = {n: m.law(["default"])[0] for n, m in layers.items()}
    assert methods[PREFIX + "model.layers.1.self_attn.q_proj"] == AuroRA(r=3)
    assert methods[PREFIX + "model.layers.0.self_attn.q_proj"] == LoRAN(r=1)
    assert list(methods.values()).count(LoRA(r=2)) == 12


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (lambda: undula.peft_config(LoRA(), ["norm"]), TypeError, "model.norm, a LlamaRMSNorm: undula adapts Linear"),
        (lambda: undula.peft_config(LoRA(), ["no_proj"]), ValueError, "Target modules .*no_proj.* not found"),
        (
            lambda: undula.peft_config(LoRA(), ["q_proj"], overrides={"v_proj": LoRAN()}),
            LookupError,
            "the override 'v_proj' matches none of the chosen layers: model.layers.0.self_attn.q_proj",
        ),
        (lambda: undula.peft_config(LoRA(), overrides={"v_proj": LoRAN(activation=ReLU())}), ValueError, "never learn"),
    ],
)
def test_refused_before_anything_changes(config, error, message):
    model = llama()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, config())
    assert before == {n: type(m) for n, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_a_configuration_serves_several_models(tmp_path):
    config = undula.peft_config(LoRA(r=2))
    a, b = peft.get_peft_model(llama(), config), peft.get_peft_model(gpt2(), config)
    assert len(sites(a)) == 14
    assert len(sites(b)) == 8
    assert config.target_modules == "all-linear"
    for model, count in ((a, 14), (b, 8)):  # whoever had it last
        model.save_pretrained(tmp_path)
        assert len(undula.Adapter.load(tmp_path).methods) == count


@pytest.mark.parametrize("name", ["layers", "0", "A", "B", "weight", "q_proj"])
def test_names_that_are_parts_of_keys(name, tmp_path):
    """PEFT drops from a saved adapter every tensor with another adapter's name in its key: ours are put back."""
    model, x = hosted(LoRA(r=2), name=name), tokens()
    model.add_adapter("other", undula.peft_config(LoRA(r=3)))
    model.set_adapter("other")
    shake(trained(model).values())
    model.save_pretrained(tmp_path)
    for n in (name, "other"):
        model.set_adapter(n)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / n, adapter_name=n).eval()
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["undula_factors", "weight", "head", "keys"])
def test_names_that_peft_would_mistake(name):
    """Of a copy of a whole module PEFT drops what has another adapter's name in its key; and some are no names."""
    before = Picture()
    keys = set(before.state_dict())
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        hosted(LoRA(r=2), model=before, target_modules=["middle"], modules_to_save=["head"], name=name)
    assert set(before.state_dict()) == keys


def test_names_that_transformers_would_mistake():
    with pytest.raises(ValueError, match="cannot be called 'layers'"):
        llama().add_adapter(undula.peft_config(LoRA(r=2)), "layers")


@pytest.mark.parametrize("version", ["0.20.4", "0.23.0", "1.0"])
def test_other_versions_of_peft_are_refused(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=f"peft>=0.21,<0.23; this is peft {version}"):
        undula.peft_config(LoRA())


# Layers of every kind


class Scaled(nn.Embedding):
    """As Gemma's: the embedding multiplies what it looks up."""

    def forward(self, x):
        return super().forward(x) * 3.0


@pytest.mark.parametrize("method", [LoRA(r=2), AuroRA(), DoRA(LoRA(r=2)), LoRAN(r=2)], ids=repr)
def test_convolutions(method):
    x, untouched = torch.randn(2, 3, 6, 6), Picture()
    model = hosted(method, model=Picture(), target_modules=["conv", "middle"])
    y = model(x)
    assert not torch.allclose(y, untouched(x))
    assert model.base_model.model.conv.kernel_size == (3, 3)  # what a model asks its layers
    if isinstance(method, undula.Reweight):
        torch.testing.assert_close(model.merge_and_unload()(x), y)


@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled])
def test_embeddings(embedding, tmp_path):
    """The lookup's own scale applies to the update, so merging does not change the function."""
    base = llama()
    base.model.embed_tokens.__class__ = embedding
    model = hosted(LoRA(r=2), model=base, target_modules=["embed_tokens", "q_proj", "lm_head"])
    y = model(tokens()).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".undula_factors." in k for k in stored)  # not the embedding's own weight
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, y)


def test_tied_embedding_is_merged_for_its_own_layer():
    base = llama(tie_word_embeddings=True)
    own = base.lm_head.weight
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        model = hosted(LoRA(r=2), model=base, target_modules=["embed_tokens"])
    y = model(tokens()).logits
    with pytest.warns(UserWarning, match="embeddings are no longer tied after merging"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, y)
    assert merged.lm_head.weight is own


def test_hooks_of_a_layer_run():
    """Hooks that were put on a layer before PEFT wrapped it, as accelerate and others do."""
    base, seen = llama(), []
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(1) or y + 1)
    want = llama()
    want.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: y + 1)
    model = peft.get_peft_model(base, undula.peft_config(LoRA(r=2))).eval()
    torch.testing.assert_close(model(tokens()).logits, want(tokens()).logits)
    assert len(seen) == 1


# Training


@pytest.mark.parametrize("method", [LoRA(r=2), AuroRA(), DoRA(LoRA(r=2)), Centred(LoRAN(r=2), Gaussian(0.1))], ids=repr)
def test_frozen_factors_stay_frozen(method):
    """However adapters are switched, exactly the method's own trainable factors train."""
    model = hosted(method, name="french")
    wanted = set(trained(model))
    declared = {k for k, t in method.init(outline("", (32, 32))).items() if t.requires_grad}
    assert {n.rpartition(".")[2] for n in wanted} == declared
    model.add_adapter("german", undula.peft_config(LoRA(r=2)))
    model.set_adapter("german")
    assert {n.split(".")[-2] for n in trained(model)} == {"german"}
    model.set_adapter("french")
    assert set(trained(model)) == wanted
    with model.disable_adapter():
        assert not trained(model)
    assert set(trained(model)) == wanted
    model.set_adapter("french", inference_mode=True)
    assert not trained(model)
    model.set_requires_grad("french")
    assert set(trained(model)) == wanted


@pytest.mark.parametrize(
    "method", [LoRA(r=2), LoRAN(r=2), AuroRA(), DoRA(LoRA(r=2)), Dropout(LoRA(r=2), 0.3)], ids=repr
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(method, reentrant):
    model, x, gradients = hosted(method).train(), tokens(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        model(x, labels=x, use_cache=False).loss.backward()
        gradients.append([p.grad for p in trained(model).values()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAN(r=2), AuroRA(), DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize("low", [False, True])
def test_float32_adapters_over_a_bfloat16_base(method, low, tmp_path):
    """Kept in float32 through saving and loading, to the bit; the same function as under undula's own host, as near as
    bfloat16 tells (its products may take other kernels)."""
    x, model = tokens(), hosted(method, model=llama().bfloat16())
    y = model(x).logits
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
    for name, p in trained(model).items():
        assert torch.equal(trained(again)[name], p)
    torch.testing.assert_close(again.eval()(x).logits, y, rtol=0.016, atol=0.016)
    own = llama().bfloat16()
    undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(own(x).logits, y, rtol=0.016, atol=0.016)


@pytest.mark.parametrize("method", [LoRA(r=2), AuroRA(), DoRA(LoRA(r=2)), LoRAN(r=2)], ids=repr)
def test_a_quantised_base(method):
    """The same function, gradients and merged weights as under undula's own host, which is tested by itself."""
    x, targets = tokens(), ["q_proj", "down_proj"]

    def base():
        model = llama()
        quantize_(model.model, Int8WeightOnlyConfig())
        return model

    quantised, own = base(), base()
    torch.manual_seed(3)
    model = hosted(method, model=quantised, target_modules=targets)
    torch.manual_seed(3)
    adapter = undula.attach(own, method, targets)
    shake(adapter.parameters())
    y = own(x).logits
    torch.testing.assert_close(model(x).logits, y)
    for m in (model, own):
        m(x, labels=x).loss.backward()
    for p, q in zip(trained(model).values(), adapter.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    if isinstance(method, undula.Reweight):
        model.merge_adapter()
        undula.merge(own)
        torch.testing.assert_close(model(x).logits, own(x).logits)
        model.unmerge_adapter()
        assert torch.equal(model(x).logits, y)


@pytest.mark.parametrize("method", [LoRA(r=3), AuroRA(), Centred(LoRA(r=2), Gaussian(0.3))], ids=repr)
def test_low_cpu_mem_usage(method, tmp_path):
    """The tensors of the file take the places of the model's own; the function is the same."""
    model, x = hosted(method), tokens()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(again(x).logits, model(x).logits)
    again.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    again.set_adapter("again")
    torch.testing.assert_close(again(x).logits, model(x).logits)


def test_modules_to_save(tmp_path):
    """A head in full beside the adapter, in the same directory for both hosts."""
    x = torch.randn(2, 3, 6, 6)
    model = hosted(AuroRA(), model=Picture(), target_modules=["middle"], modules_to_save=["head"])
    assert {n.split(".")[2] for n in trained(model)} == {"middle", "head"}
    y = model(x)
    model.save_pretrained(tmp_path)
    own = Picture()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert set(adapter.full) == {"head.weight", "head.bias"}
    torch.testing.assert_close(own(x), y)
    adapter.save(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(Picture(), tmp_path / "own")
    torch.testing.assert_close(again(x), y)
    with again.disable_adapter():
        torch.testing.assert_close(again(x), Picture()(x))
