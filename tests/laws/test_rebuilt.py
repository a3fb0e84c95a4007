"""Factors that a seed rebuilds: they are not in the file, and what the file says of them must hold."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import undula
from tests.support.numbers import shake
from undula import (
    NOLA,
    Dropout,
    Sum,
    TeRA,
    UniLoRA,
    VeRA,
)
from undula.host.build import rebuilt
from undula.kernels import frozen

from .test_disk import edit_config, edit_tensors, put

SEEDED = [VeRA(r=3), NOLA(r=2, k=4, l=4), UniLoRA(d=40), TeRA(r=2), Dropout(VeRA(r=3), 0.1),
          Sum((VeRA(r=2), UniLoRA(d=9)), (1.0, 0.5))]  # fmt: skip
each = pytest.mark.parametrize("m", SEEDED, ids=repr)
KEY = "base_model.model.{}.undula_factors.{}"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)).eval()


def saved(m, path):
    model = net()
    adapter = undula.attach(model, m, where="*")
    shake(adapter)
    adapter.save(path)
    return model, adapter


def config(path):
    return json.loads((path / "adapter_config.json").read_text())["undula"]


@each
def test_no_file_holds_them(m, tmp_path):
    model, adapter = saved(m, tmp_path)
    again = {KEY.format(site, name): t for site, name, t in rebuilt(adapter.methods, adapter.shapes)}
    stored, checksums = load_file(tmp_path / "adapter_model.safetensors"), config(tmp_path)["rebuilt"]
    trained = sum(t.numel() for t in stored.values())
    assert set(checksums) == set(again)
    assert not set(again) & set(stored)
    assert trained == adapter.num_parameters()  # nothing else is in the file
    assert checksums == {k: frozen.checksum(t) for k, t in again.items()}
    loaded = undula.Adapter.load(tmp_path)
    for site, name, t in adapter.tensors():
        assert torch.equal(loaded.factors[site][name], t)
        assert loaded.factors[site][name].requires_grad == t.requires_grad
    x = torch.randn(4, 12)
    other = net()
    undula.attach(other, loaded)
    torch.testing.assert_close(other(x), model(x))


@each
def test_ties_survive(m, tmp_path):
    """Layers that shared a frozen matrix or a trained vector share it after loading."""
    _, adapter = saved(m, tmp_path)
    loaded = undula.attach(net(), undula.Adapter.load(tmp_path))
    where = [(site, name) for site, name, _ in adapter.tensors()]
    for a in (adapter, loaded):
        ids = [id(a.factors[site][name]) for site, name in where]
        same = [[i == j for j in ids] for i in ids]
        if a is adapter:
            want = same
    assert same == want
    assert loaded.num_parameters() == adapter.num_parameters()


def test_a_wrong_checksum_is_refused(tmp_path):
    saved(VeRA(r=3), tmp_path)
    edit_config(tmp_path, lambda c: put(c, "undula", "rebuilt", KEY.format(0, "A"), value="0" * 16))
    with pytest.raises(ValueError, match=r"0\.A is rebuilt from its seed with the checksum .* '0000000000000000'"):
        undula.Adapter.load(tmp_path)


@pytest.mark.parametrize("m", SEEDED[:4], ids=repr)
def test_another_seed_is_refused(m, tmp_path):
    """A configuration that was changed by hand would silently mean another adapter."""
    saved(m, tmp_path)
    edit_config(tmp_path, lambda c: put(c, "undula", "methods", 0, "seed", value=1))
    with pytest.raises(ValueError, match="it was changed by hand, or a later version"):
        undula.Adapter.load(tmp_path)


def test_another_order_of_layers_is_refused(tmp_path):
    """Uni-LoRA's indices follow the order of the layers."""
    saved(UniLoRA(d=40), tmp_path)
    y = undula.Adapter.load(tmp_path).delta("0")
    edit_config(tmp_path, lambda c: put(c, "undula", "sites", value=dict(reversed(c["undula"]["sites"].items()))))
    assert torch.equal(undula.Adapter.load(tmp_path).delta("0"), y)  # `order` tells the order, whoever sorts the JSON
    edit_config(tmp_path, lambda c: c["undula"]["order"].reverse())
    with pytest.raises(ValueError, match="index_A is rebuilt from its seed with the checksum"):
        undula.Adapter.load(tmp_path)
    edit_config(tmp_path, lambda c: c["undula"]["order"].pop())
    with pytest.raises(ValueError, match="`order` has other sites than `sites`"):
        undula.Adapter.load(tmp_path)


def test_another_stream_is_refused(tmp_path, monkeypatch):
    """A version of undula that drew other numbers."""
    saved(VeRA(r=3), tmp_path)
    monkeypatch.setattr(frozen, "floats", lambda drawn: drawn.float() * 2.0**-31)
    with pytest.raises(ValueError, match="a later version of undula draws other numbers"):
        undula.Adapter.load(tmp_path)


def test_what_no_seed_rebuilds_is_refused(tmp_path):
    saved(VeRA(r=3), tmp_path)
    edit_config(tmp_path, lambda c: put(c, "undula", "rebuilt", KEY.format(0, "b"), value="0" * 16))
    with pytest.raises(ValueError, match=r"factors\.b' cannot be rebuilt from a seed, and is not in the file"):
        undula.Adapter.load(tmp_path)


def test_a_missing_checksum_is_a_missing_factor(tmp_path):
    saved(VeRA(r=3), tmp_path)
    edit_config(tmp_path, lambda c: c["undula"]["rebuilt"].pop(KEY.format(2, "B")))
    with pytest.raises(ValueError, match=r"has the factors \['A', 'B', 'b', 'd'\], the adapter has \['A', 'b', 'd'\]"):
        undula.Adapter.load(tmp_path)


def test_in_the_file_and_rebuilt_is_refused(tmp_path):
    """Which of the two would count?"""
    saved(VeRA(r=3), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({KEY.format(0, "A"): torch.ones(3, 12)}))
    with pytest.raises(ValueError, match=r"0\.A is rebuilt from a seed, and in the file as well"):
        undula.Adapter.load(tmp_path)


@each
def test_a_changed_factor_is_stored(m, tmp_path):
    """Frozen numbers that somebody changed are saved as they are: the file never means another function."""
    model, adapter = saved(m, tmp_path)
    site, name, t = next((s, n, t) for s, n, t in adapter.tensors() if not t.requires_grad and t.is_floating_point())
    t.data.mul_(1.5)
    adapter.save(tmp_path)
    assert KEY.format(site, name) in load_file(tmp_path / "adapter_model.safetensors")
    assert KEY.format(site, name) not in config(tmp_path)["rebuilt"]
    other, x = net(), torch.randn(4, 12)
    undula.attach(other, undula.Adapter.load(tmp_path))
    torch.testing.assert_close(other(x), model(x))


@each
def test_a_part_of_an_adapter_round_trips(m, tmp_path):
    """Without one of its layers an adapter is still what it was, whatever its indices depended on."""
    model, adapter = saved(m, tmp_path)
    keep = ["2", "4"]
    part = dataclasses.replace(
        adapter, **{k: {s: getattr(adapter, k)[s] for s in keep} for k in ("methods", "factors", "shapes")}
    )
    part.save(tmp_path)
    loaded = undula.Adapter.load(tmp_path)
    assert set(loaded.factors) == set(keep)
    for site in keep:
        torch.testing.assert_close(loaded.delta(site), adapter.delta(site), rtol=0, atol=0)
    undula.detach(model)
    undula.attach(model, loaded)
    loaded.save(tmp_path / "again")
    assert torch.equal(undula.Adapter.load(tmp_path / "again").delta("4"), adapter.delta("4"))


def test_sums_of_unlike_adapters_round_trip(tmp_path):
    model = net()
    a = undula.attach(model, UniLoRA(d=40), where=["0", "2"], name="a")
    b = undula.attach(model, UniLoRA(d=40), where=["2", "4"], name="b")
    shake(a)
    shake(b)
    total = 2 * a - b
    total.save(tmp_path)
    loaded = undula.Adapter.load(tmp_path)
    for site in ("0", "2", "4"):
        assert torch.equal(loaded.delta(site), total.delta(site))


def test_a_wrapped_and_a_bare_adapter_do_not_mix():
    """Overrides give each method peers of its own; what they share at one attach stays apart."""
    bare = UniLoRA(d=40)
    adapter = undula.attach(net(), bare, where="*", overrides={"2": Dropout(bare, 0.1)})
    assert adapter.factors["0"]["theta"] is adapter.factors["4"]["theta"]
    assert adapter.factors["2"]["theta"] is not adapter.factors["0"]["theta"]
    alone = undula.attach(net(), bare, where=["0", "4"])
    for site in ("0", "4"):
        assert torch.equal(adapter.factors[site]["index_A"], alone.factors[site]["index_A"])


def test_rebuilding_leaves_the_global_generator_alone(tmp_path):
    for i, m in enumerate(SEEDED):
        saved(m, tmp_path / str(i))
    state = torch.get_rng_state()
    for i in range(len(SEEDED)):
        undula.Adapter.load(tmp_path / str(i))
    assert torch.equal(torch.get_rng_state(), state)
