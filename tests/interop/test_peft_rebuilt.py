"""Factors that a seed rebuilds, under PEFT: the same directory as undula's own, and as strict."""

import dataclasses

import peft
import pytest
import torch
from safetensors.torch import load_file

import undula
from tests.support.models import PREFIX, hosted, llama, shake, tokens, trained
from undula import (
    NOLA,
    LoRASB,
    LoRAXS,
    TeRA,
    UniLoRA,
    VeRA,
)

from .test_peft_disk import configure, edit

SEEDED = [VeRA(r=3), NOLA(r=2, k=4, l=4), UniLoRA(d=40), TeRA(r=2)]
TARGETS = ["q_proj", "v_proj", "down_proj"]
SITE = "model.layers.0.self_attn.q_proj"
each = pytest.mark.parametrize("m", SEEDED, ids=repr)


def key_of(factor):
    return f"{PREFIX}{SITE}.undula_factors.{factor}"


@each
@pytest.mark.parametrize("low", [False, True])
def test_saved_by_peft_and_read_by_both(m, low, tmp_path):
    model, x = hosted(m, target_modules=TARGETS), tokens()
    y = model(x).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained(model).values())
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    torch.testing.assert_close(again.eval()(x).logits, y)
    assert len(trained(again)) == len(trained(model))
    own = llama()
    adapter = undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(own(x).logits, y)
    own(x, labels=x).loss.backward()
    again(x, labels=x).loss.backward()
    for site, factor, t in adapter.tensors():
        theirs = again.base_model.model.get_submodule(site).law(["default"])[1][factor]
        assert theirs.requires_grad == t.requires_grad
        if t.requires_grad:
            torch.testing.assert_close(theirs.grad, t.grad)


@each
def test_saved_by_undula_and_read_by_peft(m, tmp_path):
    own, x = llama(), tokens()
    adapter = undula.attach(own, m, TARGETS)
    shake(adapter.parameters())
    adapter.save(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(model.eval()(x).logits, own(x).logits)
    merged = model.merge_and_unload()
    undula.merge(own)
    torch.testing.assert_close(merged(x).logits, own(x).logits)


@each
def test_a_part_of_an_adapter(m, tmp_path):
    """Uni-LoRA's indices followed layers that are gone: they are in the file."""
    own, x = llama(), tokens()
    adapter = undula.attach(own, m, TARGETS)
    shake(adapter.parameters())
    keep = [s for s in adapter.factors if "layers.1" in s]
    part = dataclasses.replace(
        adapter, **{k: {s: getattr(adapter, k)[s] for s in keep} for k in ("methods", "factors", "shapes")}
    )
    part.save(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert any("index_A" in k for k in stored) == isinstance(m, UniLoRA)
    undula.detach(own)
    undula.attach(own, part)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(model.eval()(x).logits, own(x).logits)
    model.save_pretrained(tmp_path / "again")
    undula.detach(own)
    undula.attach(own, undula.Adapter.load(tmp_path / "again"))
    torch.testing.assert_close(model(x).logits, own(x).logits)


DAMAGE = {
    "checksum": (
        configure,
        lambda u: u["rebuilt"].update({key_of("A"): "0" * 16}),
        r"q_proj\.A is rebuilt from its seed with the checksum",
    ),
    "seed": (configure, lambda u: u["methods"][0].update(seed=5), "it was changed by hand"),
    "no seed": (configure, lambda u: u["rebuilt"].update({key_of("b"): "0" * 16}), "cannot be rebuilt from a seed"),
    "both": (edit, lambda t: t.update({key_of("A"): torch.ones(3, 32)}), "no place in this model: .*q_proj"),
    "neither": (configure, lambda u: u["rebuilt"].pop(key_of("A")), r"the adapter has \['B', 'b', 'd'\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, tmp_path):
    damage, change, message = DAMAGE[name]
    hosted(VeRA(r=3), target_modules=["q_proj"]).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises((ValueError, LookupError), match=message):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_two_adapters_with_one_seed():
    """The second adapter has its own copy of what the first has: deleting one leaves the other."""
    model, x = hosted(VeRA(r=3), target_modules=["q_proj"]), tokens()
    y = model(x).logits
    model.add_adapter("other", undula.peft_config(VeRA(r=3), ["q_proj"]))
    model.set_adapter("other")
    torch.testing.assert_close(model(x).logits, llama()(x).logits)
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(model(x).logits, y)


def test_lora_xs_keeps_its_singular_vectors(tmp_path):
    """They cannot be rebuilt: the file has them."""
    model, x = hosted(LoRAXS(r=4), target_modules=["q_proj"]), tokens()
    model.save_pretrained(tmp_path)
    assert {k.rpartition(".")[2] for k in load_file(tmp_path / "adapter_model.safetensors")} == {"A", "B", "R"}
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(again.eval()(x).logits, model(x).logits)
    own = llama()
    undula.attach(own, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(own(x).logits, model(x).logits)


def test_lora_sb_is_made_by_undula_and_read_by_peft(tmp_path):
    """PEFT has no data to start from: it says so, and reads what undula has begun."""
    own, x = llama(), tokens()
    probe = undula.Probe([{"input_ids": x, "labels": x}])
    before = own(x, labels=x).loss
    adapter = undula.attach(own, LoRASB(r=4, eta=1e-4), ["q_proj", "v_proj"], probe=probe)
    assert own(x, labels=x).loss < before  # the first step of full fine-tuning
    adapter.save(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(model.eval()(x).logits, own(x).logits)
    with pytest.raises(RuntimeError, match="this method starts from gradients"):
        peft.get_peft_model(llama(), undula.peft_config(LoRASB(r=4), ["q_proj"]))
