"""What PEFT offers, on models that carry undula's methods: each feature against the real library."""

import copy
import json
import pickle
import re
from dataclasses import dataclass

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import undula
from undula import AuroRA, AuroRAStatic, Centred, DoRA, Dropout, LoRA, LoRAN, LowRank, Method
from undula.activations import ReLU
from undula.sites import outline
from undula.starts import Gaussian

from .models import Picture, gpt2, llama, shake, tokens, trained

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")


def hosted(method, *, model=None, name="default", **rules):
    """A tiny Llama with shaken adapters."""
    model = peft.get_peft_model(model or llama(), undula.peft_config(method, **rules), name).eval()
    shake(trained(model).values())
    return model


def sites(model):
    """Names of the adapted layers."""
    return sorted(n.removeprefix(PREFIX) for n, m in model.named_modules() if hasattr(m, "law"))


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
    assert sites(hosted(LoRA(), exclude_modules=["v_proj"])) == [n for n in every if n not in values]
    assert sites(hosted(LoRA(), target_modules=["v_proj"], layers_to_transform=[1])) == values[1:]
    assert len(sites(hosted(LoRA(), model=gpt2()))) == 8


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


def test_a_configuration_serves_several_models():
    config = undula.peft_config(LoRA(r=2))
    a, b = peft.get_peft_model(llama(), config), peft.get_peft_model(gpt2(), config)
    assert len(sites(a)) == 14
    assert len(sites(b)) == 8
    assert config.target_modules == "all-linear"
    with pytest.raises(ValueError, match="names no layers yet"):
        config.to_dict()


@pytest.mark.parametrize("name", ["layers", "0", "A", "undula_factors"])
def test_names_that_peft_would_mistake(name):
    """PEFT drops from a saved adapter every tensor with another adapter's name in its key."""
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        hosted(LoRA(r=2), name=name)


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
    model = hosted(LoRA(r=2), model=base, target_modules=["embed_tokens", "q_proj"])
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
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAN(r=2), AuroRA(), DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize("low", [False, True])
def test_float32_adapters_over_a_bfloat16_base(method, low, tmp_path):
    """Kept in float32 through saving and loading, to the bit; the same function as under undula's own host."""
    x, model = tokens(), hosted(method, model=llama().bfloat16())
    y = model(x).logits
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
    for name, p in trained(model).items():
        assert torch.equal(trained(again)[name], p)
    assert torch.equal(again.eval()(x).logits, y)
    own = llama().bfloat16()
    undula.attach(own, undula.Adapter.load(tmp_path))
    assert torch.equal(own(x).logits, y)


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
    assert torch.equal(model(x).logits, y)
    for m in (model, own):
        m(x, labels=x).loss.backward()
    for p, q in zip(trained(model).values(), adapter.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    if isinstance(method, undula.Reweight):
        model.merge_adapter()
        undula.merge(own)
        assert torch.equal(model(x).logits, own(x).logits)
        model.unmerge_adapter()
        assert torch.equal(model(x).logits, y)


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
    assert torch.equal(own(x), y)
    adapter.save(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(Picture(), tmp_path / "own")
    assert torch.equal(again(x), y)
    with again.disable_adapter():
        assert torch.equal(again(x), Picture()(x))


# Several adapters


def test_mixed_batches_while_generating():
    """Greedy and with beams: every row as if it were alone with its adapter."""
    model, x = hosted(AuroRA(), name="french"), tokens(3)
    model.add_adapter("german", undula.peft_config(LoRA(r=2), ["q_proj"]))
    model.set_adapter("german")
    shake(trained(model).values())
    for beams in (1, 3):
        options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        want = []
        for i, name in enumerate(["german", None, "french"]):
            model.set_adapter(name or "german")
            with model.disable_adapter() if name is None else torch.no_grad():
                want.append(model.generate(input_ids=x[i : i + 1], **options))
        got = model.generate(input_ids=x, adapter_names=["german", "__base__", "french"], **options)
        assert torch.equal(got, torch.cat(want))
    assert not any(m._forward_pre_hooks for m in model.modules() if hasattr(m, "law"))


def test_mixed_batches_refused():
    model, x = hosted(LoRA(), name="french"), tokens(2)
    with pytest.raises(ValueError, match="asks for german; there are: french, __base__"):
        model(x, adapter_names=["french", "german"])
    with pytest.raises(ValueError, match="3 names, this layer sees a batch of 2"):
        model(x, adapter_names=["french"] * 3)
    with pytest.raises(ValueError, match="is for inference"):
        model.train()(x, adapter_names=["french"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        model(x, adapter_names=["french"] * 2)


def test_merging_several():
    model, x = hosted(LoRA(r=2), name="x"), tokens()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight.clone()
    model.add_adapter("y", undula.peft_config(LoRAN(r=3), ["q_proj"]))
    model.set_adapter("y")
    shake(trained(model).values())
    model.base_model.set_adapter(["x", "y"])
    y = model(x).logits
    model.merge_adapter(["x"])
    with pytest.warns(UserWarning, match="additionally merging y"):
        model.merge_adapter(["y"])
    torch.testing.assert_close(model(x).logits, y)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.weight, weight)
    assert torch.equal(model(x).logits, y)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        assert torch.equal(model(x).logits, llama()(x).logits)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, y)


def test_a_method_without_a_weight_is_never_merged():
    """Nor one of several: the model is as it was, and other adapters still merge."""
    model, x = hosted(LoRA(r=2), name="plain", overrides={"down_proj": AuroRA()}), tokens()
    y = model(x).logits
    message = (
        r"AuroRA\(.*cannot be merged: it stands on the rung Method.*2 sites, the first .*down_proj.*undula.collapse"
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=message):
            merge()
    assert torch.equal(model(x).logits, y)
    model.add_adapter("other", undula.peft_config(LoRA(r=2)))
    model.set_adapter("other")
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["other"]


def test_safe_merge():
    model = hosted(LoRA(r=2))
    next(iter(trained(model).values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.unload()(tokens()).logits, llama()(tokens()).logits)


def test_copies_and_pickles():
    model, x = hosted(AuroRA(), exclude_modules=["v_proj"]), tokens()
    y = model(x).logits
    twin = copy.deepcopy(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, y)
    shake(trained(twin).values())  # the copy's adapter is the copy's alone
    assert torch.equal(model(x).logits, y)
    assert not torch.equal(twin(x).logits, y)


def test_status():
    status = hosted(LoRA(), name="french").get_model_status()
    assert status.peft_types == {"french": "UNDULA"}
    assert status.adapter_model_type == "UndulaModel"
    assert status.enabled
    assert status.requires_grad == {"french": True}


# Tensors that layers share


@dataclass(frozen=True)
class _Shared(LowRank):
    """One A for all layers of a width, and one frozen, shuffled copy of it."""

    r: int = 2

    def init(self, site):
        def once(key, make):
            return site.shared.setdefault((key, site.shape[1]), make())

        A_RI = once("A", lambda: site.normal(self.r, site.shape[1], std=0.1).requires_grad_())
        N_RI = once("N", lambda: site.normal(self.r, site.shape[1], std=0.1))
        return {"A": A_RI, "N": N_RI, "B": site.zeros(site.shape[0], self.r).requires_grad_()}

    def pair(self, f):
        return f["B"], f["A"] + f["N"]


@pytest.fixture
def shared():
    """Registered for the test alone."""
    Method.register(_Shared)
    yield _Shared()
    del Method.registry["shared"]


@pytest.mark.parametrize("low", [False, True])
def test_shared_tensors(shared, low, tmp_path):
    """Trained once, stored once, still one after loading; the same directory as undula's own host writes."""
    model, x = hosted(shared, target_modules=["q_proj", "v_proj"]), tokens()
    assert len(trained(model)) == 1 + 4
    optimiser = torch.optim.SGD(trained(model).values(), lr=0.1)
    model(x, labels=x).loss.backward()
    optimiser.step()
    y = model(x).logits
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1 + 1 + 4
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    assert torch.equal(again.eval()(x).logits, y)
    assert len(trained(again)) == 1 + 4
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    assert torch.equal(own(x).logits, y)
    assert len(adapter.parameters()) == 1 + 4
    own(x, labels=x).loss.backward()
    again(x, labels=x).loss.backward()
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(
        adapter.factors[key]["A"].grad, again.base_model.model.get_submodule(key).law(["default"])[1]["A"].grad
    )
    model.delete_adapter("default")


def test_an_adapter_added_to_itself_stays_tied(tmp_path):
    """Ties that no method makes, as arithmetic does: they are in the directory."""
    own = llama()
    adapter = undula.attach(own, LoRA(r=2), ["q_proj"])
    shake(adapter.parameters())
    (adapter + adapter).save(tmp_path)
    y = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert len(trained(y)) == 4
    undula.detach(own)
    undula.attach(own, undula.Adapter.load(tmp_path))
    assert torch.equal(y.eval()(tokens()).logits, own(tokens()).logits)


# transformers' own way to adapters


@pytest.mark.parametrize("method", [LoRA(r=2), AuroRAStatic(), Centred(LoRA(r=2), Gaussian(0.3))], ids=repr)
def test_transformers_own_adapters(method, tmp_path):
    model, x = llama(), tokens()
    model.add_adapter(undula.peft_config(method), "french")
    shake(trained(model).values())
    y = model(x).logits
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(tmp_path)
    torch.testing.assert_close(again(x).logits, y)
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name.replace("french", "default")], t)
    own = llama()
    undula.attach(own, undula.Adapter.load(tmp_path))
    assert torch.equal(own(x).logits, y)
    model.disable_adapters()
    assert torch.equal(model(x).logits, llama()(x).logits)
    model.enable_adapters()
    model.delete_adapter("french")
    assert torch.equal(model(x).logits, llama()(x).logits)


def test_transformers_own_way_refuses_shared_tensors(shared):
    model = llama()
    with pytest.raises(ValueError, match=r"_Shared\(r=2\) shares tensors between layers.*Use peft.get_peft_model"):
        model.add_adapter(undula.peft_config(shared, ["q_proj"]))
    assert not sites(model)


# Loading is strict


def edit(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def configure(path, change):
    config = json.loads((path / "adapter_config.json").read_text())
    change(config["undula"])
    (path / "adapter_config.json").write_text(json.dumps(config))


SITE = "model.layers.0.self_attn.q_proj"
KEY = f"{PREFIX}{SITE}.undula_factors.A"
DAMAGE = {
    "missing": (edit, lambda t: t.pop(KEY), r"has the factors \['A', 'B'\], the adapter has \['B'\]"),
    "surplus": (edit, lambda t: t.update({KEY[:-1] + "C": torch.ones(2)}), r"\['A', 'B', 'C'\]"),
    "elsewhere": (
        edit,
        lambda t: t.update({PREFIX + "no.such.weight": torch.ones(2)}),
        "no place in this model: .*such",
    ),
    "no site": (edit, lambda t: t.update({KEY.replace("q_proj", "x"): torch.ones(2)}), "the method has the factors"),
    "shape": (edit, lambda t: t.update({KEY: torch.ones(3, 32)}), r"factor A is \(3, 32\) in the adapter"),
    "NaN": (edit, lambda t: t.update({KEY: torch.full((2, 32), float("nan"))}), "holds NaN or infinity"),
    "method": (configure, lambda u: u["methods"][0].update({"is": "WhatLoRA"}), "no method is called 'WhatLoRA'"),
    "field": (configure, lambda u: u["methods"][0].update(depth=3), "LoRA has no option depth"),
    "version": (configure, lambda u: u.update(version=9), "format version 9"),
    "other model": (configure, lambda u: u["sites"].update({"a.b": [0, 8, 8]}), "sites that this model has not: a.b"),
    "other shape": (configure, lambda u: u["sites"].update({SITE: [0, 8, 8]}), r"\(8, 8\) in the adapter"),
    "tie": (configure, lambda u: u.update(tied={KEY: KEY[:-1] + "Z"}), "is tied to .*, which does not fit"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, tmp_path):
    damage, change, message = DAMAGE[name]
    hosted(LoRA(r=2), target_modules=["q_proj"]).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises((ValueError, LookupError), match=message):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_the_directory_says_how_to_load_it(tmp_path):
    model = hosted(LoRA(r=2))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("undula.enable_peft()") == 1
    assert "library_name: peft" in text
