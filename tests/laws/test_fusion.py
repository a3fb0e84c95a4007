"""Adapters behind trained gates: the formula, that no order and no empty adapter counts, and that gates alone train."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from undula import Fusion, LoRA, LoRAN, combine
from undula.methods.fusion import GATES

close = torch.testing.assert_close


def values(model, *methods):
    """An adapter of each method, with its own numbers."""
    made = []
    for i, m in enumerate(methods):
        made.append(shake(undula.attach(model, m, "*", name=str(i)), 0.4).copy())
        undula.detach(model, str(i))
    return made


def with_gates(adapter, seed=1):
    torch.manual_seed(seed)
    gates = {s: {k: f[k] + torch.randn_like(f[k]) for k in GATES} for s, f in adapter.factors.items()}
    return replace(adapter, factors={s: {**f, **gates[s]} for s, f in adapter.factors.items()})


def output(model, adapter, x):
    undula.attach(model, adapter, name="it")
    try:
        return model(x)
    finally:
        undula.detach(model, "it")


def conv():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1))


@pytest.mark.parametrize(("make", "shape"), [(net, (4, 12)), (conv, (2, 3, 5, 5))], ids=["linear", "convolution"])
def test_before_it_trains_it_is_the_sum(make, shape):
    """And at open gates with w_out = 1 too."""
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape).double()
    adapters = values(model, LoRA(r=2), LoRAN(r=2), LoRA(r=3, scaling=undula.RankStabilised()))
    fused = combine.fused(adapters)
    wanted = output(model, sum(adapters), x)
    close(output(model, fused, x), wanted)
    half = combine.fused(adapters, share=0.5)
    close(output(model, half, x), output(model, 0.5 * sum(adapters), x))
    with pytest.raises(ValueError, match="share is how much"):
        combine.fused(adapters, share=0.0)
    wide = {s: {"b": torch.full_like(f["b"], 60.0), "w_out": torch.ones_like(f["b"])} for s, f in fused.factors.items()}
    opened = replace(fused, factors={s: {**f, **wide[s]} for s, f in fused.factors.items()})
    close(output(model, opened, x), wanted)
    with pytest.raises(TypeError, match="rung Method"):
        fused.additive(next(iter(fused.methods)))


def test_it_is_its_formula_whatever_the_rungs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16)).double().eval(), torch.randn(5, 12).double()
    adapters = values(model, LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.AuroRA(r=2))
    fused = with_gates(combine.fused(adapters))
    f, o = fused.factors["0"], model(x)
    wanted = o.clone()
    for a in adapters:
        part = output(model, a, x) - o
        n_o, n_l = (F.layer_norm(t, (16,)) for t in (o, part))
        gate = torch.sigmoid(n_o * f["w_o"] + n_l * f["w_l"] + n_o * n_l * f["w_ol"] + f["b"])
        assert ((gate > 0) & (gate < 1)).all()
        wanted = wanted + f["w_out"] * gate * part
    close(output(model, fused, x), wanted)


def test_no_order_counts_and_an_adapter_that_does_nothing_changes_nothing():
    torch.manual_seed(0)
    model, x = net().double().eval(), torch.randn(4, 12).double()
    adapters = values(model, LoRA(r=2), LoRAN(r=2), LoRA(r=3))
    nothing = undula.attach(model, LoRA(r=4), "*", name="nothing").copy()
    undula.detach(model, "nothing")
    found = output(model, with_gates(combine.fused(adapters)), x)
    close(output(model, with_gates(combine.fused(adapters[::-1])), x), found)
    close(output(model, with_gates(combine.fused([nothing, *adapters])), x), found)


def test_gates_alone_train_and_it_is_saved_and_opened_as_any_adapter(tmp_path):
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(4, 12)
    fused = combine.fused(values(model, LoRA(r=2), LoRAN(r=2)))
    before = {(s, k): t.detach().clone() for s, k, t in fused.tensors()}
    live = undula.attach(model, fused, name="fused")
    assert {k for _, k, t in live.tensors() if t.requires_grad} == set(GATES)
    optimiser = torch.optim.SGD(live.parameters(), lr=0.5)
    model(x).square().sum().backward()
    optimiser.step()
    assert {k for s, k, t in live.tensors() if not torch.equal(t, before[s, k])} == set(GATES)
    wanted = model(x).detach()
    live.save(tmp_path)
    undula.detach(model, "fused")
    opened = undula.Adapter.load(tmp_path)
    assert all(isinstance(m, Fusion) for m in opened.methods.values())
    assert {k for _, k, t in opened.tensors() if t.requires_grad} == set(GATES)
    close(output(model, opened, x), wanted)


def test_layers_that_some_have_not_are_told():
    model = net()
    a = undula.attach(model, LoRA(r=1), ["0"], name="a").copy()
    b = undula.attach(model, LoRA(r=1), ["0", "2"], name="b").copy()
    with pytest.warns(combine.Missing, match="adapter 1 has nothing at 1 of 2 layers"):
        found = combine.fused([a, b])
    assert [len(m.parts) for m in found.methods.values()] == [2, 1]
