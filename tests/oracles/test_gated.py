"""Methods with gated and nested ranks against their papers' algebra, PEFT where it ships them, and pruning."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula.host.views import site, view
from undula.methods.dylora import Frozen, Full
from undula.methods.lora import Fixed

pytestmark = pytest.mark.usefixtures("float64")

O, I = 10, 7


def shaken(m):
    f = m.init(site("l", view(nn.Linear(I, O))))
    return {k: t.detach() + 0.3 * torch.randn_like(t) if t.requires_grad else t for k, t in f.items()}


GATED = [
    (undula.GatedLoRA(r=4, alpha=6.0), "g", 1.5),
    (undula.GatedLoRA(r=4, open=3, alpha=6.0), "g", 2.0),
    (undula.SoRA(r=4, alpha=6.0), "g", 1.5),
    (undula.AdaLoRA(r=4, alpha=6.0), "E", 1.5),
]


@pytest.mark.parametrize(("m", "gate", "s"), GATED, ids=[repr(m) for m, _, _ in GATED])
def test_gated_is_a_weighted_sum_of_rank_one_updates(m, gate, s):
    f = shaken(m)
    n = {k: t.numpy() for k, t in f.items()}
    want = sum(s * n[gate][k] * np.outer(n["B"][:, k], n["A"][k]) for k in range(4))
    np.testing.assert_allclose(m.delta(f), want)


def test_starts():
    where = site("l", view(nn.Linear(2000, 500)))
    f = undula.GatedLoRA(r=4, open=3).init(where)
    assert f["g"].tolist() == [1, 1, 1, 0]
    assert not f["g"].requires_grad
    f = undula.SoRA(r=400).init(where)
    assert not f["B"].any()
    assert float(f["g"].detach().std()) == pytest.approx(1, rel=0.15)
    assert f["g"].requires_grad
    f = undula.AdaLoRA(r=8).init(where)
    assert not f["E"].any()
    assert float(f["A"].detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(f["B"].detach().std()) == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="open is at most r=4, found 5"):
        undula.GatedLoRA(r=4, open=5)


TRAPS = [(undula.GatedLoRA(), {"B"}), (undula.SoRA(), {"B"}), (undula.AdaLoRA(), {"E"}), (undula.DyLoRA(), {"B"})]


@pytest.mark.parametrize(("m", "learning"), TRAPS, ids=[repr(m) for m, _ in TRAPS])
def test_what_has_a_gradient_at_the_first_step(m, learning):
    model = nn.Sequential(nn.Linear(I, O))
    f = undula.attach(model, m).factors["0"]
    (model(torch.randn(5, I)) - 1).square().sum().backward()
    assert {k for k, t in f.items() if t.grad is not None and t.grad.any()} == learning


def test_closed_ranks_have_no_gradient():
    m = undula.GatedLoRA(r=4, open=2)
    f = {k: t.requires_grad_(k != "g") for k, t in shaken(m).items()}
    m.forward(torch.randn(5, I), view(nn.Linear(I, O)), f).square().sum().backward()
    assert f["A"].grad[:2].any(dim=1).all()
    assert not f["A"].grad[2:].any()
    assert not f["B"].grad[:, 2:].any()


def test_adalora_is_pefts_up_to_its_divisor():
    """PEFT divides by r + 1e-5, undula by r: with alpha (r + 1e-5) / r in PEFT both give the same."""
    from peft import AdaLoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(I, O))
    config = AdaLoraConfig(init_r=4, lora_alpha=6, target_modules=["0"], total_step=100)
    theirs = get_peft_model(nn.Sequential(base[0]), config)
    layer = theirs.base_model.model[0]
    m = undula.AdaLoRA(r=4, alpha=6.0)
    f = shaken(m)
    with torch.no_grad():
        layer.lora_A["default"].copy_(f["A"])
        layer.lora_B["default"].copy_(f["B"])
        layer.lora_E["default"].copy_(f["E"][:, None])
    torch.testing.assert_close(m.delta(f) * 4 / (4 + 1e-5), layer.get_delta_weight("default").detach())
    assert not torch.allclose(m.delta(f), layer.get_delta_weight("default").detach(), rtol=1e-6, atol=0)
    x = torch.randn(5, I)
    layer.scaling["default"] *= (4 + 1e-5) / 4
    base_layer = layer.get_base_layer()
    torch.testing.assert_close(m.forward(x, view(base_layer), f), theirs(x).detach(), check_stride=False)


@pytest.mark.parametrize("nesting", [Full(), Frozen()], ids=repr)
@pytest.mark.parametrize("scaling", [None, Fixed(3.0)], ids=repr)
@pytest.mark.parametrize("b", [1, 2, 5])
def test_dylora_is_a_lora_of_slices(b, scaling, nesting):
    m = undula.DyLoRA(r=5, alpha=6.0, nesting=nesting, **({"scaling": scaling} if scaling else {}))
    f = {**shaken(m), "b": torch.tensor(b)}
    s = 3.0 if scaling else 6.0 / b
    torch.testing.assert_close(m.delta(f), s * f["B"][:, :b] @ f["A"][:b])
    # the authors' code: both slices times sqrt(r / b), alpha / r outside
    if not scaling:
        torch.testing.assert_close(
            m.delta(f), 6 / 5 * (math.sqrt(5 / b) * f["B"][:, :b]) @ (math.sqrt(5 / b) * f["A"][:b])
        )
    lora, pair = m.at_rank(f, b)
    torch.testing.assert_close(lora.delta(pair), m.delta(f))
    assert pair["A"].shape == (b, I)


def test_dylora_gradients():
    for nesting, learning in (Full(), [0, 1, 2]), (Frozen(), [2]):
        m = undula.DyLoRA(r=5, nesting=nesting)
        f = {k: t.requires_grad_(k != "b") for k, t in {**shaken(m), "b": torch.tensor(3)}.items()}
        m.forward(torch.randn(5, I), view(nn.Linear(I, O)), f).square().sum().backward()
        assert f["A"].grad.any(dim=1).nonzero().flatten().tolist() == learning
        assert f["B"].grad.any(dim=0).nonzero().flatten().tolist() == learning


def test_dylora_refuses():
    with pytest.raises(ValueError, match="scales by Classic"):
        undula.DyLoRA(scaling=undula.RankStabilised())
    m = undula.DyLoRA(r=3)
    for b in (0, 4):
        with pytest.raises(ValueError, match=f"trained at the ranks 1 to 3, not at {b}"):
            m.at_rank(shaken(m), b)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))


def test_adapter_at_rank(tmp_path):
    model, x = net(), torch.randn(4, 6)
    adapter = shake(undula.attach(model, undula.Dropout(undula.DyLoRA(r=4), 0.1), "*"), 1.0)
    model.eval()
    for b in (1, 3):
        for f in adapter.factors.values():
            f["b"].fill_(b)
        y = model(x)
        cut = adapter.at_rank(b)
        assert cut.method == undula.LoRA(r=b)
        undula.attach(model, cut, name=str(b))
        torch.testing.assert_close(model(x), y)
        undula.select(model, "default")
    with pytest.raises(TypeError, match=r"LoRA\(.*\) at 0 was not trained.*collapse\(Truncate\(2\)\)"):
        undula.attach(net(), undula.LoRA()).at_rank(2)
    adapter.save(tmp_path)  # the rank in use is saved with it
    assert undula.Adapter.load(tmp_path).factors["0"]["b"].item() == 3


@pytest.mark.parametrize("alpha", [8.0, 5.0])
@pytest.mark.parametrize("name", ["GatedLoRA", "SoRA", "AdaLoRA"])
def test_pruned_is_gated(name, alpha):
    m = getattr(undula, name)(r=4, alpha=alpha)
    model, x = net(), torch.randn(5, 6)
    adapter = shake(undula.attach(model, m, overrides={"2": undula.Dropout(m, 0.1)}), 1.0)
    model.eval()
    with torch.no_grad():
        adapter.factors["0"][m.gate][[0, 2]] = 0
        adapter.factors["2"][m.gate][3] = 0
        adapter.factors["4"][m.gate].zero_()
    y = model(x)
    pruned = undula.prune(adapter)
    assert {s: p.undropped().r for s, p in pruned.methods.items()} == {"0": 2, "2": 3}
    assert isinstance(pruned.methods["2"], undula.Dropout)
    assert list(pruned.shapes) == ["0", "2"]
    for s, p in pruned.methods.items():
        alive = adapter.factors[s][m.gate] != 0
        B, A = adapter.methods[s].pair(adapter.factors[s])
        equal = torch.equal if alpha == 8.0 else torch.allclose  # a scale of 2 is exact
        assert equal(p.pair(pruned.factors[s])[0], B[:, alive])
        assert torch.equal(p.pair(pruned.factors[s])[1], A[alive])
    assert pruned.methods["0"].undropped().scaling == Fixed(alpha / 4)  # not alpha / 2
    undula.select(model, None)
    undula.attach(model, pruned, name="pruned")
    torch.testing.assert_close(model(x), y)
    assert all(p.requires_grad for p in pruned.parameters())


def test_pruning_leaves_the_rest_alone():
    model = net()
    adapter = shake(
        undula.attach(model, undula.GatedLoRA(r=4, open=2), ["0", "2"], overrides={"2": undula.LoRAN(r=2)}), 1.0
    )
    pruned = undula.prune(adapter)
    assert [type(m) for m in pruned.methods.values()] == [undula.LoRA, undula.LoRAN]
    assert torch.equal(pruned.delta("2"), adapter.delta("2"))
    assert pruned.num_parameters() == 2 * (6 + 8) + 2 * (8 + 8)
    with pytest.raises(TypeError, match="has no gate to prune by"):
        undula.prune(undula.attach(net(), undula.LoRA()))
