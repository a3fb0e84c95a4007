"""Adapters under PEFT that are saved and loaded: shared tensors, transformers' own way, and what is refused."""

import json
from dataclasses import dataclass

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import undula
from tests.support.models import PREFIX, hosted, llama, shake, sites, tokens, trained
from undula import AuroRAStatic, Centred, LoRA, LowRank, Method
from undula.starts import Gaussian

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")

# Tensors that layers share


@dataclass(frozen=True)
class _Shared(LowRank):
    """One A for all layers of a width, and one frozen tensor that is added to it."""

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
    torch.testing.assert_close(again.eval()(x).logits, y)
    assert len(trained(again)) == 1 + 4
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(own(x).logits, y)
    assert len(adapter.parameters()) == 1 + 4
    own(x, labels=x).loss.backward()
    again(x, labels=x).loss.backward()
    key = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        adapter.factors[key]["A"].grad, again.base_model.model.get_submodule(key).law(["default"])[1]["A"].grad
    )
    model.delete_adapter("default")


def test_an_adapter_added_to_itself_stays_tied(tmp_path):
    """Ties that no method makes, as arithmetic does: they are in the directory."""
    undula.enable_peft()
    own = llama()
    adapter = undula.attach(own, LoRA(r=2), ["q_proj"])
    shake(adapter.parameters())
    (adapter + adapter).save(tmp_path)
    y = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert len(trained(y)) == 4
    undula.detach(own)
    undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(y.eval()(tokens()).logits, own(tokens()).logits)


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
    torch.testing.assert_close(own(x).logits, y)
    model.disable_adapters()
    torch.testing.assert_close(model(x).logits, llama()(x).logits)
    model.enable_adapters()
    model.delete_adapter("french")
    torch.testing.assert_close(model(x).logits, llama()(x).logits)


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
    "other model": (
        configure,
        lambda u: u["sites"].update({"a.b": [0, 8, 8]}) or u["order"].append("a.b"),
        "sites that this model has not: a.b",
    ),
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


INDICES = {
    "SHiRA": (undula.SHiRA(r=1, mask=undula.starts.masks.Magnitude()), "index", "lie in 0 .. 1023"),
    "S2FT": (undula.S2FT(share=0.3, selection=undula.starts.channels.Weight()), "order", "is no order of its 32"),
    "UniLoRA": (undula.UniLoRA(r=2, d=30), "index_A", "lie in 0 .. 29"),
    "DyLoRA": (undula.DyLoRA(r=3), "b", "lie in 1 .. 3"),
}
WRAPPED = {"bare": lambda m: m, "Dropout": lambda m: undula.Dropout(m, 0.1), "DoRA": undula.DoRA}
LOADS = {
    "from_pretrained": lambda path: peft.PeftModel.from_pretrained(llama(), path),
    "low_cpu_mem_usage": lambda path: peft.PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=True),
    "load_adapter": lambda path: hosted(LoRA(r=2)).load_adapter(path, "second"),
    "transformers": None,
}


def _by_transformers(path):
    """Its loader asks nobody: the first forward finds it."""
    model = llama()
    model.load_adapter(path)
    model(tokens())


@pytest.mark.every(4)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("value", [10**9, -1])
def test_indices_outside_the_layer_are_refused(value, name, wrapper, load, tmp_path):
    """When loaded, as in undula's own host: the forward would read elsewhere, or end a process on a GPU."""
    undula.enable_peft()
    method, factor, message = INDICES[name]
    adapter = undula.attach(llama(), WRAPPED[wrapper](method), where=["q_proj"])
    own = adapter.factors[SITE][factor].data
    own.view(-1)[:1].fill_(value)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if load == "transformers" and config["undula"]["tied"]:
        pytest.skip("refused before: all layers share a tensor")
    with pytest.raises(ValueError, match=rf"adapter '\w+': {SITE}.{factor} .*{message}"):
        (LOADS[load] or _by_transformers)(tmp_path)


def test_nan_that_transformers_loads_is_found(tmp_path):
    """Before a forward computes with it, not only where PEFT loads."""
    undula.enable_peft()
    undula.attach(llama(), LoRA(r=2), where=["q_proj"]).save(tmp_path)
    edit(tmp_path, lambda t: t.update({KEY: torch.full((2, 32), float("nan"))}))
    with pytest.raises(RuntimeError, match=rf"no numbers yet in A: .* NaN have been, for {SITE}"):
        _by_transformers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_beyond_the_factors_type_are_refused(dtype, tmp_path):
    """They would be infinite there."""
    adapter = undula.attach(llama(), LoRA(r=2), where=["q_proj"])
    adapter.save(tmp_path)
    beyond = torch.full((2, 32), 1e300, dtype=torch.float64) if dtype == torch.float32 else torch.full((2, 32), 1e30)
    edit(tmp_path, lambda t: t.update({KEY: beyond}))
    with pytest.raises(ValueError, match=r"q_proj.*A holds numbers beyond (float32.s|the) range"):
        peft.PeftModel.from_pretrained(llama().to(dtype), tmp_path, autocast_adapter_dtype=False)


def test_the_directory_says_how_to_load_it(tmp_path):
    model = hosted(LoRA(r=2))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("undula.enable_peft()") == 1
    assert "library_name: peft" in text


class _Wrapped(torch.nn.Module):
    """As FSDP wraps a model: one more name for modules, none in the state that it gathers."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module
        self.peft_config = module.peft_config

    def state_dict(self):
        return {k: t.clone() for k, t in self._fsdp_wrapped_module.state_dict().items()}


@pytest.mark.parametrize("method", [LoRA(r=2), undula.VeRA(r=3)], ids=repr)
def test_a_wrapped_model_gives_the_same_tensors(method):
    """Those of the gathered state, not the pieces that lie in the layers."""
    model = hosted(method, target_modules=["q_proj"])
    want, found = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(_Wrapped(model))
    assert want.keys() == found.keys()
    assert all(torch.equal(want[k], t) and want[k].data_ptr() != t.data_ptr() for k, t in found.items())


def test_numbers_without_a_dimension_are_still_read_under_peft(tmp_path):
    """As LoRAN's trained constants were written before they had one."""
    model = hosted(undula.LoRAN(r=2, learn=("a", "w")))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any(t.shape == (1,) for t in tensors.values())
    save_file({k: t[0] if t.shape == (1,) else t for k, t in tensors.items()}, file)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, model.eval()(tokens()).logits)


def test_peft_opens_quantised_factors_and_saves_numbers(tmp_path):
    """The integers of `undula.quantise` become numbers on the way in; what PEFT saves holds numbers."""
    undula.enable_peft()
    own, x = llama(), tokens()
    adapter = undula.attach(own, LoRA(r=4), ["q_proj", "v_proj"])
    shake(adapter.parameters())
    undula.quantise(adapter, 8, group=16).save(tmp_path / "q")
    undula.detach(own)
    undula.attach(own, undula.Adapter.load(tmp_path / "q"))
    for low in (False, True):
        model = peft.PeftModel.from_pretrained(llama(), tmp_path / "q", low_cpu_mem_usage=low)
        torch.testing.assert_close(model.eval()(x).logits, own.eval()(x).logits)
    model.save_pretrained(tmp_path / "numbers")
    saved, read = (undula.Adapter.load(tmp_path / name) for name in ("numbers", "q"))
    assert all(torch.equal(t, saved.factors[s][k]) for s, k, t in read.tensors())
