"""What is saved is what is loaded, in a new process; what is damaged is refused and nothing else happens."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from tests.support.zoo import LOW_RANK, ZOO

from .test_laws import each

SCRIPT = """
import sys, torch, undula
model = torch.load(sys.argv[1], weights_only=False).eval()
x, wanted, factors = torch.load(sys.argv[2])
for i, y in enumerate(wanted):
    undula.attach(model, undula.Adapter.load(f"{sys.argv[3]}/{i}"), name=str(i))
    adapter = undula.selected(model)
    assert all(torch.equal(t, adapter.factors[s][k]) for (s, k), t in factors[i].items()), i
    torch.testing.assert_close(model(x), y, msg=lambda text: f"{i}: {text}")
print(len(wanted), "equal")
"""


def test_round_trip_in_a_new_process(tmp_path, python):
    """Every method: the same factors to the bit, and the same outputs."""
    model, x, wanted, factors = net().float().eval(), torch.randn(4, 12, dtype=torch.float32), [], []
    torch.save(model, tmp_path / "base.pt")
    for i, m in enumerate(ZOO):
        adapter = undula.attach(model, m, name=str(i), where="*")
        shake(adapter)
        wanted.append(model(x).detach())
        factors.append({(s, k): t.detach() for s, k, t in adapter.tensors()})
        adapter.save(tmp_path / str(i))
    torch.save((x, wanted, factors), tmp_path / "wanted.pt")
    run = [python, "-c", SCRIPT, tmp_path / "base.pt", tmp_path / "wanted.pt", tmp_path]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(ZOO)} equal\n", done.stderr[-2000:]


@each(LOW_RANK)
def test_low_rank_leaves_as_lora(m, tmp_path):
    adapter = undula.attach(net().double(), m, overrides={"2": undula.LoRA(r=1)})
    shake(adapter)
    undula.io.export_lora(adapter, tmp_path)
    again = undula.Adapter.load(tmp_path)
    for site, f in adapter.factors.items():
        for ours, theirs in zip(
            adapter.methods[site].pair(f), again.methods[site].pair(again.factors[site]), strict=True
        ):
            assert torch.equal(ours.float(), theirs)


def test_other_functions_never_leave_as_lora(tmp_path):
    adapter = undula.attach(net(), undula.LoRAN(r=2))
    with pytest.raises(TypeError, match="rung Additive: it is no LoRA"):
        undula.io.export_lora(adapter, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_training_resumes_from_a_loaded_adapter(tmp_path):
    model = net().float()
    undula.attach(model, undula.AuroRA(), full=["2.weight"]).save(tmp_path)
    undula.detach(model)
    adapter = undula.attach(model, undula.Adapter.load(tmp_path))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {*"ABHS", "weight"}
    assert len(adapter.full) == 1


def edit_config(path, change):
    config = json.loads((path / "adapter_config.json").read_text())
    change(config)
    (path / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


KEY = "base_model.model.0.undula_factors.A"


def put(config, *keys, value):
    for k in keys[:-1]:
        config = config[k]
    config[keys[-1]] = value


DAMAGE = {
    "unknown method": (
        edit_config,
        lambda c: put(c, "undula", "methods", 0, "is", value="WhatLoRA"),
        "no method is called 'WhatLoRA'; there are: .*AuroRA",
    ),
    "unknown field": (
        edit_config,
        lambda c: put(c, "undula", "methods", 0, "depth", value=3),
        "LoRA has no option depth; it has: r, alpha",
    ),
    "wrong type": (
        edit_config,
        lambda c: put(c, "undula", "methods", 0, "r", value="two"),
        "LoRA.r is an integer at least 1 and at most 1,048,576, found 'two'",
    ),
    "bad rank": (edit_config, lambda c: put(c, "undula", "methods", 0, "r", value=0), "at least 1"),
    "other version": (edit_config, lambda c: put(c, "undula", "version", value=99), "format version 99"),
    "other type": (edit_config, lambda c: put(c, "peft_type", value="IA3"), "peft_type 'IA3'"),
    "bad site": (
        edit_config,
        lambda c: put(c, "undula", "sites", value={"../../etc": [0, 2, 2]}),
        "not a name of modules",
    ),
    "bad pointer": (edit_config, lambda c: put(c, "undula", "sites", "0", value=[7, 16, 12]), "method of 1, O, I"),
    "absurd shape": (
        edit_config,
        lambda c: put(c, "undula", "sites", "0", value=[0, 10**12, 12]),
        r"site '0' is \[method of 1, O, I\]; found \[0, 1000000000000, 12\]",
    ),
    "absurd rank": (edit_config, lambda c: put(c, "undula", "methods", 0, "r", value=10**6), r"\(1000000, 12\)"),
    "missing tensor": (edit_tensors, lambda t: t.pop(KEY), "the adapter has \\['B'\\]"),
    "surplus tensor": (edit_tensors, lambda t: t.update({KEY[:-1] + "C": torch.ones(2)}), "'C'"),
    "surplus site": (edit_tensors, lambda t: t.update({KEY.replace("0", "9"): torch.ones(2)}), "does not name"),
    "wrong shape": (edit_tensors, lambda t: t.update({KEY: torch.ones(3, 12)}), "factor A is \\(3, 12\\)"),
    "NaN": (edit_tensors, lambda t: t.update({KEY: torch.full((2, 12), float("nan"))}), "NaN or infinity"),
    "traversal": (
        edit_tensors,
        lambda t: t.update({"base_model.model.../../x": torch.ones(2)}),
        "not a name of modules",
    ),
    "not JSON": (lambda p, _: (p / "adapter_config.json").write_text("{"), None, "is not JSON"),
    "cut": (
        lambda p, _: (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-9]),
        None,
        "cut or damaged",
    ),
    "header": (lambda p, _: (p / "adapter_model.safetensors").write_bytes(b"\xff" * 64), None, "header claims"),
    "no file": (lambda p, _: (p / "adapter_model.safetensors").unlink(), None, "is missing; found"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, tmp_path):
    damage, change, message = DAMAGE[name]
    model = net().float()
    undula.attach(model, undula.LoRA(r=2)).save(tmp_path)
    undula.detach(model)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    damage(tmp_path, change)
    with pytest.raises((ValueError, LookupError, FileNotFoundError), match=message):
        undula.attach(model, undula.Adapter.load(tmp_path))
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_interrupted_save_keeps_the_old_one(tmp_path, monkeypatch):
    model = net().float()
    adapter = undula.attach(model, undula.LoRA(r=2))
    adapter.save(tmp_path)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    shake(adapter)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("undula.io.tensorfile.write", fail)
    with pytest.raises(OSError, match="disk full"):
        adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_for_another_model_is_refused(tmp_path):
    undula.attach(net().float(), undula.LoRA(r=2)).save(tmp_path)
    adapter = undula.Adapter.load(tmp_path)
    with pytest.raises(ValueError, match=r"0 is \(5, 12\) \(O, I\) in this model, \(16, 12\) in the adapter"):
        undula.attach(nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(16, 8)), adapter)
    with pytest.raises(ValueError, match="sites that this model has not: 2"):
        undula.attach(nn.Sequential(nn.Linear(12, 16)), adapter)
