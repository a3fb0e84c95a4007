"""SHiRA and S2FT against full gradients, brute force, PEFT, and the permutations that S2FT's paper makes."""

import copy
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from tests.support.numbers import shake
from undula.host.switching import Switch
from undula.host.views import site, view
from undula.kernels import elementwise, frozen, reference, sparse
from undula.methods.shira import interference
from undula.starts.channels import (
    Activation,
    ByName,
    Gradient,
    Inputs,
    Largest,
    Outputs,
    Random,
    Smallest,
    Weight,
    WeightActivation,
    block,
)
from undula.starts.masks import SNIP, Magnitude, Rand, Struct
from undula.starts.masks import Gradient as GradientMask

pytestmark = pytest.mark.usefixtures("float64")

O, I = 60, 40  # K = 100 of 2400 at r = 1: sampled products, not dense ones


class Known:
    """Evidence with given numbers."""

    def __init__(self, G_OI, x_TI):
        self.G_OI, self.x_TI = G_OI, x_TI

    def gradient(self, name):
        return self.G_OI

    def moments(self, name):
        return self.x_TI.T @ self.x_TI, self.x_TI.sum(0), len(self.x_TI)


def net():
    return nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, I, bias=False))


def full_gradient(layer, W_OI, x, g):
    """dL/dW of y = W x + b by autograd, W in full."""
    W = W_OI.detach().clone().requires_grad_()
    (F.linear(x.detach(), W, layer.bias) * g).sum().backward()
    return W.grad


def bits(t):
    return t.detach().contiguous().view(torch.int64 if t.dtype == torch.float64 else torch.int32)


# SHiRA


@pytest.mark.parametrize("r", [1, 8])  # sampled products, and dense ones
def test_values_have_the_masked_full_gradient(r):
    m, layer = undula.SHiRA(r=r, s=0.7), view(nn.Linear(I, O))
    layer.module.requires_grad_(False)
    f = m.init(site("l", layer))
    f["values"] = torch.randn(len(f["index"]), requires_grad=True)
    x, g = torch.randn(3, 5, I, requires_grad=True), torch.randn(3, 5, O)
    (m.forward(x, layer, f) * g).sum().backward()
    W_OI = layer.weight + m.delta(f).detach()
    torch.testing.assert_close(f["values"].grad, 0.7 * full_gradient(layer, W_OI, x, g).flatten()[f["index"]])
    torch.testing.assert_close(x.grad, g @ W_OI)
    assert (r * (O + I) * sparse.DENSE > O * I) == (r == 8)


def test_blocks_of_rows(monkeypatch):
    """Several blocks, with and without a bias, with entries in some of them only."""
    monkeypatch.setattr(elementwise, "BLOCK", 1)
    for bias in (True, False):
        layer = view(nn.Linear(10, 200, bias=bias))
        layer.module.requires_grad_(False)
        assert len(list(elementwise.blocks(200, 10))) == 4
        index = torch.cat([torch.arange(3, 20), torch.arange(1500, 1600, 7)])
        values, x = torch.randn(len(index), requires_grad=True), torch.randn(6, 10, requires_grad=True)
        S_OI = torch.zeros(2000).index_add(0, index, values).view(200, 10)
        got, want = sparse.entries(x, layer, index, values, 200), reference.additive(x, layer, S_OI)
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(y, [x, values], g) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_a_layer_that_keeps_its_own_product():
    """Over bfloat16 (and quantised) bases the layer's product stays; S x comes beside it, in float32."""
    layer = view(nn.Linear(I, O).to(torch.bfloat16))
    layer.module.requires_grad_(False)
    m = undula.SHiRA(r=1)
    f = m.init(site("l", layer))
    assert f["values"].dtype == torch.float32
    f["values"] = torch.randn(len(f["index"]), dtype=torch.float32, requires_grad=True)
    x = torch.randn(4, 7, I, dtype=torch.bfloat16, requires_grad=True)
    got, want = m.forward(x, layer, f), reference.additive(x, layer, m.delta(f))
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, [x, f["values"]], g) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_product_alone_has_right_gradients():
    index = frozen.subset(1, (), O * I, 100)
    x, values = torch.randn(5, I, requires_grad=True), torch.randn(100, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: sparse._Product.apply(x, index, v, O), [x, values])
    S_OI = torch.zeros(O * I).index_add(0, index, values).view(O, I)
    torch.testing.assert_close(sparse._Product.apply(x, index, values, O), x @ S_OI.T)


def test_nothing_dense_is_kept():
    """Saved for the backward pass: x, W itself, and K-sized tensors."""
    layer = view(nn.Linear(I, O))
    layer.module.requires_grad_(False)
    m, kept = undula.SHiRA(r=1), []
    f = m.init(site("l", layer))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m.forward(torch.randn(7, I, requires_grad=True), layer, f)
    assert [t for t in kept if t.numel() >= O * I and t.data_ptr() != layer.weight.data_ptr()] == []
    assert any(t.shape == (7, I) for t in kept)


@pytest.mark.parametrize("r", [1, 3, 50])
@pytest.mark.parametrize("mask", [Rand(), Struct(), Struct(shift=5), Magnitude(), GradientMask(), SNIP()])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 6), (6, 1)])
def test_masks_have_exactly_k_entries(mask, shape, r):
    where = site("l", view(nn.Linear(*shape[::-1])))
    object.__setattr__(where, "evidence", Known(torch.randn(shape), torch.randn(5, shape[1])))
    index = undula.SHiRA(r=r, mask=mask).index(where)
    assert len(index) == min(r * sum(shape), math.prod(shape))
    assert index.dtype == torch.int64
    assert (index.diff() > 0).all()  # different, rising
    assert index[0] >= 0
    assert index[-1] < math.prod(shape)


@pytest.mark.parametrize("levels", [1, 3, 10**6])  # many ties, few, none
def test_scored_masks_are_brute_force(levels, monkeypatch):
    layer, G = view(nn.Linear(I, O)), torch.randn(O, I)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(O, I) * levels).round() / levels)
    G = (G * levels).round() / levels
    where = site("l", layer)
    object.__setattr__(where, "evidence", Known(G, torch.randn(5, I)))
    W = layer.weight.detach().numpy()
    scores = {Magnitude(): abs(W), GradientMask(): abs(G.numpy()), SNIP(): abs(W * G.numpy())}
    for mask, score in scores.items():
        want = sorted(np.argsort(-score.flatten(), kind="stable")[:137])
        assert mask(where, 137).tolist() == want


def test_a_mask_refuses_nan():
    layer = view(nn.Linear(I, O))
    layer.module.weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match="l: weights or gradients hold NaN"):
        undula.SHiRA(mask=Magnitude()).init(site("l", layer))


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 5), (10, 6), (10, 10), (5000, 2500), (10**6, 400)])
def test_subset_is_the_first_k_different_draws(n, k):
    got = frozen.subset(3, ("a",), n, k).tolist()
    assert got == sorted(set(got))
    assert len(got) == k
    if 2 * k <= n:
        stream = frozen.integers(3, ("a",), (4 * k + 1000,), n).tolist()
        assert got == sorted(list(dict.fromkeys(stream))[:k])
    assert got != frozen.subset(4, ("a",), n, k).tolist() or k == n


def test_subsets_are_uniform():
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[frozen.subset(seed, (), 20, 5)] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # five standard deviations


def test_struct_is_the_diagonal_and_whole_rows():
    def at(shift):
        index = Struct(shift=shift)(site("l", view(nn.Linear(9, 9))), 9 + 2 * 8 + 3)
        return torch.zeros(9 * 9).index_fill(0, index, 1).view(9, 9)

    assert (at(0).diagonal() == 1).all()
    assert at(0).sum(1).tolist() == [9, 1, 1, 9, 1, 1, 4, 1, 1]  # rows 0, 3, and 3 entries of row 6
    assert (at(2).roll(-2, 1).diagonal() == 1).all()
    assert at(2).sum(1).tolist() == [1, 1, 9, 1, 1, 9, 1, 1, 4]


def test_rank_is_far_above_loras():
    model = nn.Sequential(nn.Linear(14, 16))
    a, b = (shake(undula.attach(model, m, name=m.rung()), 1.0) for m in (undula.SHiRA(r=1), undula.LoRA(r=1)))
    assert a.num_parameters() == b.num_parameters() == 30
    assert torch.linalg.matrix_rank(b.delta("0")) == 1
    assert torch.linalg.matrix_rank(a.delta("0")) >= 8


@pytest.mark.parametrize("m", [undula.SHiRA(r=1, mask=Magnitude()), undula.S2FT(share=0.1, side=Inputs())])
def test_the_rest_stays_to_the_bit(m):
    """After training with weight decay and merging: unselected entries, signs of zeros included, and biases."""
    model = net()
    model[0].weight.data[:, :5] = -0.0  # and -0.0 + 0.0 would be 0.0
    before = copy.deepcopy(model)
    adapter = undula.attach(model, m)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(8, I)).square().sum().backward()
        optimiser.step()
    undula.merge(model)
    for name in ("0", "2"):
        moved = torch.zeros(adapter.shapes[name]).flatten()
        moved[m.entries(adapter.factors[name])[0]] = 1
        new, old = (bits(net.get_submodule(name).weight).flatten() for net in (model, before))
        assert torch.equal(new != old, moved > 0)
    assert torch.equal(bits(model[0].bias), bits(before[0].bias))


def test_peft_has_the_same_function_and_gradient():
    peft = pytest.importorskip("peft")
    mine = nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, I)).float()
    theirs = copy.deepcopy(mine)
    adapter = undula.attach(mine, undula.SHiRA(r=2), ["0"])
    f = adapter.factors["0"]

    def mask_fn(base_layer, r, **kwargs):
        return torch.zeros(O * I, dtype=torch.float32).index_fill(0, f["index"], 1).view(O, I)

    config = peft.ShiraConfig(r=2, mask_type="given", target_modules=["0"], inference_mode=True)
    config.mask_fn, config.inference_mode = mask_fn, False
    theirs = peft.get_peft_model(theirs, config)
    weight = theirs.base_model.model[0].shira_weight["default"]
    assert weight.shape == f["values"].shape  # K = r (O + I)
    with torch.no_grad():
        f["values"].copy_(weight.copy_(torch.randn(weight.shape, dtype=torch.float32)))
    x = torch.randn(6, I, dtype=torch.float32)
    torch.testing.assert_close(mine(x), theirs(x))
    mine(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(f["values"].grad, weight.grad)
    with pytest.raises(ValueError, match="more shira params"):  # undula takes all of W instead
        peft.get_peft_model(net(), peft.ShiraConfig(r=100, target_modules=["0"]))
    assert len(undula.SHiRA(r=100).index(site("l", view(nn.Linear(I, O))))) == O * I


def test_interference():
    made = {}
    for name, m in {
        "a": undula.SHiRA(r=1, mask=Struct()),
        "b": undula.SHiRA(r=1, mask=Struct(shift=1)),
        "rand": undula.SHiRA(r=1),
        "rand too": undula.SHiRA(r=1, mask=Rand(seed=1)),
        "lora": undula.LoRA(r=1),
    }.items():
        made[name] = undula.detach(model := nn.Sequential(nn.Linear(40, 40)), undula.attach(model, m) and None)
        shake(made[name], 1.0)
    one, other = made["a"].delta("0").numpy(), made["b"].delta("0").numpy()
    got = interference(made["a"], made["b"])["0"]
    np.testing.assert_allclose(got.awom, np.sqrt(np.square(one.T @ other).sum()))
    assert got.awor == 1 - np.count_nonzero(one.T @ other) / 1600
    # two Struct adapters that share no row: no more of S1' S2 is nonzero than of S1 and S2 together (lemma 4.5)
    assert 1 - got.awor <= 2 * 80 / 1600
    assert got.awor > interference(made["rand"], made["rand too"])["0"].awor
    assert interference(made["a"], made["lora"])["0"].awor < 0.1


# Switching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switch_there_and_back(dtype):
    """A, B, A: the same bits as merging each into a fresh base; None: the base's own."""
    base = net().to(dtype)
    adapters = {}
    for name, m in {
        "shira": undula.SHiRA(r=1),
        "overlapping": undula.SHiRA(r=2, s=0.3, mask=Magnitude()),
        "rows": undula.S2FT(share=0.1),
        "columns": undula.S2FT(share=0.1, side=Inputs()),
    }.items():
        model = copy.deepcopy(base)
        adapters[name] = shake(undula.attach(model, m, name=name), 1.0)
        undula.detach(model, name)
    adapters["sum"] = 0.5 * adapters["shira"] + adapters["overlapping"]
    adapters["lora"] = shake(undula.attach(model := copy.deepcopy(base), undula.LoRA(r=2), ["2"]), 1.0)
    merged = {}
    for name, adapter in adapters.items():
        undula.attach(model := copy.deepcopy(base), adapter.copy())
        undula.merge(model)
        merged[name] = [model[0].weight, model[2].weight]
    model = copy.deepcopy(base)
    switch = Switch(model)
    for name in [*adapters, *reversed(adapters), "shira", "overlapping", "shira"]:
        switch(adapters[name])
        assert torch.equal(model[0].weight, merged[name][0])
        assert torch.equal(model[2].weight, merged[name][1])
    switch(None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_switch_reads_and_writes_the_entries_alone():
    model = nn.Sequential(nn.Linear(I, O))
    adapter = shake(undula.attach(model, undula.SHiRA(r=1)), 1.0)
    undula.detach(model)
    switch = Switch(model)
    switch(adapter)
    assert [w.base.numel() for w in switch.written] == [O + I]


def test_switch_in_other_layers():
    conv = nn.Conv2d(3, 8, 3)
    gpt = pytest.importorskip("transformers.pytorch_utils").Conv1D(16, 12)
    for layer, x in ((conv, torch.randn(2, 3, 6, 6)), (gpt.double(), torch.randn(4, 12)), (nn.Embedding(9, 6), None)):
        model, x = nn.Sequential(layer), torch.tensor([[1, 5]]) if x is None else x
        before = model(x)
        adapter = shake(undula.attach(model, undula.SHiRA(r=1), "*"), 1.0)
        y = model(x)
        undula.detach(model)
        switch = Switch(model)
        switch(adapter)
        torch.testing.assert_close(model(x), y)
        assert not torch.allclose(y, before)
        switch(None)
        assert torch.equal(model(x), before)


def test_switch_refuses():
    model = net()
    adapter = undula.attach(model, undula.SHiRA(r=1))
    with pytest.raises(RuntimeError, match="detach them"):
        Switch(model)
    undula.detach(model)
    with pytest.raises(LookupError, match="has a site that this model has not: 2"):
        Switch(model[:2])(adapter)
    with pytest.raises(ValueError, match=r"0 is \(3, 4\) in this model, \(60, 40\) in the adapter"):
        Switch(nn.Sequential(nn.Linear(4, 3), *net()[1:]))(adapter)
    twin = net()
    twin.other = nn.Linear(I, O)
    twin.other.weight = twin[0].weight
    with pytest.raises(ValueError, match="0 and other share one weight"):
        Switch(twin)(adapter)
    bare = undula.attach(model, undula.AuroRA())
    undula.detach(model)
    before = copy.deepcopy(model)
    switch = Switch(model)
    with pytest.raises(TypeError, match="stands on the rung Method"):
        switch(bare)
    assert torch.equal(model[0].weight, before[0].weight)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
    held = undula.detach(conv, undula.attach(conv, undula.SHiRA(r=1), "*") and None)
    with pytest.raises(TypeError, match="cannot be overwritten"):
        Switch(conv)(held)


# Files


def test_what_files_hold(tmp_path):
    """Masks and orders that a seed determines are made anew; others are in the file."""
    from safetensors import safe_open

    for m, held in [
        (undula.SHiRA(r=1), {"values"}),
        (undula.SHiRA(r=1, mask=Magnitude()), {"values", "index"}),
        (undula.S2FT(share=0.1), {"rows"}),
        (undula.S2FT(share=0.1, side=Inputs(), selection=Weight()), {"columns", "order"}),
    ]:
        model, path = net().float(), tmp_path / str(len(list(tmp_path.iterdir())))
        adapter = shake(undula.attach(model, m), 1.0)
        x = torch.randn(3, I, dtype=torch.float32)
        y = model(x)
        adapter.save(path)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            assert {key.rpartition(".")[2] for key in file.keys()} == held  # noqa: SIM118
        undula.detach(model)
        undula.attach(model, undula.Adapter.load(path))
        assert torch.equal(model(x), y)


# S2FT


@pytest.mark.parametrize("side", [Outputs(), Inputs()])
def test_block_has_the_slice_of_the_full_gradient(side):
    m, layer = undula.S2FT(share=0.1, side=side), view(nn.Linear(I, O))
    layer.module.requires_grad_(False)
    f = m.init(site("l", layer))
    rows, S, index = m.block(f)
    assert rows == isinstance(side, Outputs)
    S.data.normal_()
    x, g = torch.randn(3, 5, I, requires_grad=True), torch.randn(3, 5, O)
    (m.forward(x, layer, f) * g).sum().backward()
    G_OI = full_gradient(layer, layer.weight + m.delta(f).detach(), x, g)
    torch.testing.assert_close(S.grad, G_OI[index] if rows else G_OI[:, index])
    W_OI = layer.weight.detach().clone()
    if rows:
        W_OI[index] += S
    else:
        W_OI[:, index] += S
    assert torch.equal(m.weight(layer.weight, f), W_OI)
    torch.testing.assert_close(x.grad, g @ W_OI)


def test_only_the_selected_columns_are_kept():
    layer = view(nn.Linear(I, O))
    layer.module.requires_grad_(False)
    m, kept = undula.S2FT(share=0.1, side=Inputs()), []
    f = m.init(site("l", layer))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m.forward(torch.randn(7, I, requires_grad=True), layer, f)
    given = {t.data_ptr() for t in (layer.weight, f["columns"], f["order"])}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == [(7, 4)]


def test_side_and_block_follow_the_name():
    side = ByName()
    inputs = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "h.0.attn.c_proj", "h.0.mlp.c_proj"]
    inputs += ["encoder.layer.1.output.dense", "encoder.layer.1.attention.output.dense", "decoder.layers.0.fc2"]
    outputs = ["model.layers.0.self_attn.q_proj", "h.0.attn.c_attn", "encoder.layer.1.intermediate.dense", "fc1", "0"]
    assert not any(side.rows(name) for name in inputs)
    assert all(side.rows(name) for name in outputs)
    attention = {f"model.layers.3.self_attn.{p}_proj" for p in "qkvo"}
    assert {block(name) for name in attention} == {"model.layers.3 attention"}
    assert {block(f"model.layers.3.mlp.{p}_proj") for p in ("up", "gate", "down")} == {"model.layers.3 mlp"}
    assert block("bert.encoder.layer.1.attention.self.query") == block("bert.encoder.layer.1.attention.output.dense")
    assert block("bert.encoder.layer.1.intermediate.dense") == block("bert.encoder.layer.1.output.dense")
    assert block("bert.encoder.layer.11.output.dense") != block("bert.encoder.layer.1.output.dense")


def test_selections_are_brute_force():
    layer, G, x = view(nn.Linear(I, O)), torch.randn(O, I), torch.randn(50, I) * torch.rand(I)
    W, g, data = layer.weight.detach().numpy(), G.numpy(), x.numpy()
    scores = {
        Weight: (np.square(W).sum(1), np.square(W).sum(0)),
        Activation: (np.square(data @ W.T).mean(0), np.square(data).mean(0)),
        WeightActivation: tuple((abs(W) * np.sqrt(np.square(data).mean(0))).sum(axis) for axis in (1, 0)),
        Gradient: (np.square(g).sum(1), np.square(g).sum(0)),
    }
    for selection, (of_rows, of_columns) in scores.items():
        for unit in (1, 5):
            for rows, score in ((True, of_rows), (False, of_columns)):
                where = site("l", layer)
                object.__setattr__(where, "evidence", Known(G, x))
                groups = score.reshape(-1, unit).sum(1)
                want = np.argsort(-groups, kind="stable")
                assert selection(Largest())(where, rows, unit).tolist() == want.tolist()
                where.shared.clear()
                assert selection(Smallest())(where, rows, unit).tolist() == want[::-1].tolist()


def test_order_is_whole_units():
    where = site("l", view(nn.Linear(I, O)))
    m = undula.S2FT(share=0.2, unit=4, selection=Random(seed=2))
    order = m.order(where)
    assert sorted(order.tolist()) == list(range(O))
    chosen = order[:12].view(3, 4)  # 3 of 15 units
    assert (chosen[:, 0] % 4 == 0).all()
    assert (chosen.diff(dim=1) == 1).all()
    assert set((chosen[:, 0] // 4).tolist()) == set(frozen.permutation(2, ("S2FT", block("l")), 15)[:3].tolist())
    with pytest.raises(ValueError, match="l has 60 rows: no whole units of 7"):
        undula.S2FT(unit=7).init(where)


def test_as_a_plain_lora(tmp_path):
    """Exact as a pair, and as the PEFT LoRA that is written from it."""
    model = net().float()
    adapter = shake(undula.attach(model, undula.S2FT(share=0.1)), 1.0)
    x = torch.randn(3, I, dtype=torch.float32)
    y = model(x)
    undula.io.export_lora(adapter, tmp_path)
    undula.detach(model)
    again = undula.Adapter.load(tmp_path)
    assert all(torch.equal(again.delta(s), adapter.delta(s)) for s in adapter.factors)
    undula.attach(model, again)
    torch.testing.assert_close(model(x), y)


# S2FT on a whole model


def llama(heads, groups, bias=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attention_bias=bias,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    return model


def s2ft(model, **options):
    """On all linear layers, heads as units (whole groups where queries are grouped)."""
    config = model.config
    width, queries = 32 // config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    wide = undula.S2FT(share=0.5, unit=width * queries, **options)
    narrow = undula.S2FT(share=0.5, unit=width, **options)
    overrides = {"q_proj": wide, "o_proj": wide, "k_proj": narrow, "v_proj": narrow}
    return undula.attach(model, undula.S2FT(share=0.2, **options), overrides=overrides)


@torch.no_grad()
def permuted(model, orders, biases=True):
    """The model with the rows or columns of its layers in the order that the adapter's `order` says."""
    model = copy.deepcopy(model)
    for name, (rows, order) in orders.items():
        layer = model.get_submodule(name)
        layer.weight.copy_(layer.weight[order] if rows else layer.weight[:, order])
        if rows and biases and layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
    return model


@pytest.mark.parametrize(("heads", "groups", "bias"), [(4, 4, False), (4, 4, True), (4, 2, True), (8, 2, False)])
def test_it_is_the_papers_contiguous_block(heads, groups, bias):
    """Coupled matrices, permuted by `order`, are the same model; the update is then the slice [0, k) of each."""
    model, tokens = llama(heads, groups, bias), torch.randint(0, 31, (2, 9))
    base = copy.deepcopy(model)
    adapter = shake(s2ft(model), 1.0)
    blocks = {name: adapter.methods[name].block(f) for name, f in adapter.factors.items()}
    orders = {name: (blocks[name][0], f["order"]) for name, f in adapter.factors.items()}
    moved = permuted(base, orders)
    torch.testing.assert_close(moved(tokens).logits, base(tokens).logits)
    back = permuted(moved, {name: (rows, torch.argsort(order)) for name, (rows, order) in orders.items()})
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), base.parameters(), strict=True))
    if bias:
        assert not torch.allclose(permuted(base, orders, biases=False)(tokens).logits, base(tokens).logits)
    with torch.no_grad():
        for name, (rows, S, index) in blocks.items():
            W_OI = moved.get_submodule(name).weight
            (W_OI[: len(index)] if rows else W_OI[:, : len(index)]).add_(S)
    want = moved(tokens).logits
    torch.testing.assert_close(model(tokens).logits, want)
    assert not torch.allclose(base(tokens).logits, want)
    undula.merge(model)
    torch.testing.assert_close(model(tokens).logits, want)


def test_heads_are_permuted_in_whole_groups():
    """Query heads alone cannot move between the groups, nor channels within a head (rotary positions)."""
    base, tokens = llama(4, 2), torch.randint(0, 31, (2, 9))
    heads = torch.arange(32).view(4, 8)
    across = heads[[2, 1, 0, 3]].flatten()  # queries of groups 0 and 1 change places, keys and values stay
    within = heads.flip(1).flatten()
    names = {"q": "model.layers.0.self_attn.q_proj", "o": "model.layers.0.self_attn.o_proj"}
    for q, o in ((across, across), (within, torch.arange(32))):
        moved = permuted(base, {names["q"]: (True, q), names["o"]: (False, o)})
        assert not torch.allclose(moved(tokens).logits, base(tokens).logits)


def test_blocks_select_together():
    """Up, gate and down of one MLP the same channels, the attention the same groups; other layers others."""
    for selection in (Random(), Weight()):
        model = llama(8, 2)
        adapter = s2ft(model, selection=selection)
        chosen = {n: set(adapter.methods[n].block(f)[2].tolist()) for n, f in adapter.factors.items()}
        mlp = [chosen[f"model.layers.0.mlp.{p}_proj"] for p in ("gate", "up", "down")]
        assert mlp[0] == mlp[1] == mlp[2]
        assert len(mlp[0]) == 5
        assert mlp[0] != chosen["model.layers.1.mlp.up_proj"]
        groups = [chosen[f"model.layers.0.self_attn.{p}_proj"] for p in "qkvo"]
        widths = (16, 4, 4, 16)
        assert len({frozenset(c // w for c in g) for g, w in zip(groups, widths, strict=True)}) == 1
        assert [len(g) for g in groups] == list(widths)


def test_s2ft_warns_where_its_share_is_very_many_numbers():
    """A share of O I: 194 M at the defaults on a model of 7 B, where a LoRA has 10 M."""
    here = site("l", view(nn.Linear(8, 8)))
    large = dataclasses.replace(here, peers={f"{i}": (4096, 11008) for i in range(80)} | {"l": (8, 8)}, shared={})
    with pytest.warns(UserWarning, match=r"108,\d+,\d+ numbers over 81 layers, 11 times .* share=0.0027"):
        undula.S2FT().init(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undula.S2FT().init(large)  # once an attach
        undula.S2FT().init(here)
        undula.S2FT(share=0.002).init(dataclasses.replace(large, shared={}))
