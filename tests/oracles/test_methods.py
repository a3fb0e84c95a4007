"""One oracle per method: the paper's algebra, written here a second time and in another way."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import undula
from undula import activations as act
from undula.host.views import site, view
from undula.kernels.spline import basis, cardinal
from undula.methods.aurora import PerChannel, SharedSum
from undula.methods.dropout import drop
from undula.starts import Gaussian, Kaiming

pytestmark = pytest.mark.usefixtures("float64")

O, I = 10, 7


def shaken(m):
    f = m.init(site("l", view(nn.Linear(I, O))))
    return {k: t.detach() + 0.3 * torch.randn_like(t) for k, t in f.items()}


def numpy(f):
    return {k: t.numpy() for k, t in f.items()}


def test_lora_scales_by_alpha_over_r():
    f = shaken(undula.LoRA(r=4, alpha=6.0))
    n = numpy(f)
    np.testing.assert_allclose(undula.LoRA(r=4, alpha=6.0).delta(f), 1.5 * n["B"] @ n["A"])
    stabilised = undula.LoRA(r=4, alpha=6.0, scaling=undula.RankStabilised())
    np.testing.assert_allclose(stabilised.delta(f), 3.0 * n["B"] @ n["A"])


def test_loran_is_elementwise_in_weight_space():
    m = undula.LoRAN(r=3, alpha=6.0, activation=act.Sinter(a=0.25, w=3.0))
    n = numpy(f := shaken(m))
    u = n["B"] @ n["A"]
    np.testing.assert_allclose(m.delta(f), 2.0 * (u + 0.25 * u * np.sin(3.0 * u)))


def test_loran_published_constants():
    assert undula.LoRAN().activation == act.Sinter(a=5e-5, w=1e4)


def test_loran_learns_its_constants():
    m = undula.LoRAN(r=3, activation=act.Sinter(a=0.25, w=3.0), learn=("a", "w"))
    f = m.init(site("l", view(nn.Linear(I, O))))
    assert f["a"].item() == 0.25
    assert f["w"].item() == 3.0
    n = numpy(f := shaken(m))
    u = n["B"] @ n["A"]
    np.testing.assert_allclose(m.delta(f), 16 / 3 * (u + n["a"] * u * np.sin(n["w"] * u)))


def test_loran_in_activation_space_is_another_function():
    m = undula.LoRANActivation(r=3, alpha=6.0, activation=act.Tanh())
    layer, x = view(nn.Linear(I, O)), torch.randn(5, I)
    n = numpy(f := shaken(m))
    y = m.forward(x, layer, f).detach().numpy() - layer(x).detach().numpy()
    np.testing.assert_allclose(y, 2.0 * np.tanh(x.numpy() @ n["A"].T @ n["B"].T))
    weight_space = undula.LoRAN(r=3, alpha=6.0, activation=act.Tanh()).delta(f)
    assert not np.allclose(y, x @ weight_space.T)


def test_sine_lora():
    m = undula.SineLoRA(r=3, alpha=6.0, activation=act.Sine(w=40.0))
    n = numpy(f := shaken(m))
    np.testing.assert_allclose(m.delta(f), 2.0 * np.sin(40.0 * n["B"] @ n["A"]) / math.sqrt(I))


PUBLISHED = {
    act.Sinter(a=5e-4, w=1e3): lambda u: u + 5e-4 * u * np.sin(1e3 * u),
    act.Sigmoid(): lambda u: 1 / (1 + np.exp(-u)) - 0.5,
    act.Tanh(): np.tanh,
    act.ReLU(): lambda u: np.maximum(u, 0),
    act.LeakyReLU(): lambda u: np.where(u > 0, u, 0.01 * u),
    act.SiLU(): lambda u: u / (1 + np.exp(-u)),
    act.Swish(): lambda u: u / (1 + np.exp(-25 * u)),
    act.Cos(): lambda u: u * np.cos(1e4 * u) + u,
    act.GaussianBump(): lambda u: 0.5 * u * np.exp(-(u**2)),
    act.Identity(): lambda u: u,
    act.Sine(w=30.0): lambda u: np.sin(30 * u),
}


@pytest.mark.parametrize("f", PUBLISHED, ids=repr)
def test_activations(f):
    u = torch.randn(50)
    np.testing.assert_allclose(f(u), PUBLISHED[f](u.numpy()), rtol=1e-10, atol=1e-13)
    assert float(f(torch.zeros(()))) == 0.0


def test_every_activation_has_its_oracle():
    assert {type(f) for f in PUBLISHED} == set(act.Activation.registry.values())


@pytest.mark.parametrize("f", PUBLISHED, ids=repr)
def test_pull_is_the_derivative(f):
    """Value, slope and trained constants of the block kernel against autograd on the definition."""
    u, g = torch.randn(6, 5) * 0.1, torch.randn(6, 5)
    for names in ((), f.trainable):
        c = {k: torch.tensor(v, requires_grad=True) for k, v in f.constants().items() if k in names}
        v = u.clone().requires_grad_()
        want = f(v, c)
        grads = torch.autograd.grad(want, [v, *c.values()], g)
        trained, spare = {k: t.detach() for k, t in c.items()}, torch.empty(2, *u.shape).unbind()
        value, du, dc = f.pull(u.clone(), g.clone(), trained, spare)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(f.bend(u.clone(), trained, spare[0]), want)
        for a, b in zip([du, *dc], grads, strict=True):
            torch.testing.assert_close(a, b)


def test_an_activation_that_cannot_learn_is_refused():
    layer = site("l", view(nn.Linear(I, O)))
    with pytest.raises(ValueError, match="derivative 0 at 0, and B = 0"):
        undula.LoRAN(activation=act.ReLU()).init(layer)
    model = nn.Sequential(nn.Linear(I, O))
    with pytest.raises(ValueError, match="could never learn"):
        undula.attach(model, undula.LoRAN(activation=act.ReLU()))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    undula.attach(model, undula.Centred(undula.LoRAN(activation=act.ReLU()), Gaussian()))
    model(torch.randn(3, I)).square().sum().backward()
    assert model[0].undula.A.grad.abs().max() > 0


def cox_de_boor(z, knots, i, k):
    if k == 0:
        return np.where((knots[i] <= z) & (z < knots[i + 1]), 1.0, 0.0)
    left = (z - knots[i]) / (knots[i + k] - knots[i]) * cox_de_boor(z, knots, i, k - 1)
    right = (knots[i + k + 1] - z) / (knots[i + k + 1] - knots[i + 1]) * cox_de_boor(z, knots, i + 1, k - 1)
    return left + right


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_spline_is_cox_de_boor(order):
    z, intervals = torch.linspace(-4, 4, 301), 5
    knots = -1 + (np.arange(intervals + 2 * order + 1) - order) * 0.4
    want = np.stack([cox_de_boor(z.numpy(), knots, i, order) for i in range(intervals + order)], -1)
    got = basis(z, intervals, order, -1.0, 1.0)
    np.testing.assert_allclose(got, want, atol=1e-12)
    inside = z.abs() <= 1
    torch.testing.assert_close(got.sum(-1)[inside], torch.ones(int(inside.sum())))
    assert not got[z.abs() > 1 + order * 0.4].any()
    torch.testing.assert_close(cardinal(z, order), cardinal(-z, order))


@pytest.mark.parametrize("spline", [SharedSum(), PerChannel()], ids=repr)
def test_aurora_dynamic(spline):
    m = undula.AuroRA(r=3, alpha=6.0, spline=spline)
    layer, x = view(nn.Linear(I, O)), torch.randn(5, I)
    n = numpy(f := shaken(m))
    z = x.numpy() @ n["A"].T
    knots = -1 + (np.arange(12) - 3) * 0.4
    b = np.stack([cox_de_boor(z, knots, i, 3) for i in range(8)], -1)  # (T, R, K)
    S = np.einsum("trk,rk->tr", b, n["S"]) if isinstance(spline, PerChannel) else b.sum(1) @ n["S"].T
    sigma = np.tanh(np.tanh(z) @ n["H"].T) + S
    np.testing.assert_allclose(
        m.forward(x, layer, f).detach(), layer(x).detach().numpy() + 2.0 * sigma @ n["B"].T, rtol=1e-9
    )


def test_aurora_static_is_sigma_of_the_columns():
    m = undula.AuroRAStatic(r=3, alpha=6.0)
    dynamic = undula.AuroRA(r=3, alpha=6.0)
    f = shaken(m)
    columns = [dynamic.sigma(math.sqrt(I) * f["A"][:, i], f) - dynamic.sigma(torch.zeros(3), f) for i in range(I)]
    torch.testing.assert_close(m.delta(f), 2.0 * f["B"] @ torch.stack(columns, 1))
    raw = undula.AuroRAStatic(r=3, alpha=6.0, kappa=1.0, centred=False)
    B_OR, A_RI = dynamic.static_pair(f)
    torch.testing.assert_close(raw.delta(f), B_OR @ A_RI)


def test_aurora_defaults_are_the_papers():
    m = undula.AuroRA()
    assert (m.r, m.alpha, m.intervals, m.order, m.low, m.high) == (2, 4.0, 5, 3, -1.0, 1.0)


def test_dora():
    m = undula.DoRA(undula.LoRA(r=3, alpha=6.0))
    layer = view(nn.Linear(I, O))
    n = numpy(f := shaken(m))
    V = layer.weight.detach().numpy() + 2.0 * n["B"] @ n["A"]
    want = n["m"][:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    np.testing.assert_allclose(m.weight(layer.weight.detach(), f), want)
    np.testing.assert_allclose(m.init(site("l", layer))["m"].detach(), np.linalg.norm(layer.weight.detach(), axis=1))
    np.testing.assert_allclose(1 / m.inverse_norms(layer.weight, f)[0], np.linalg.norm(V, axis=1))


def test_dora_holds_its_norms_constant():
    """The paper's gradient (section 4.3): that of m/c * V with c a constant."""
    m = undula.DoRA(undula.LoRA(r=3))
    layer, x = view(nn.Linear(I, O).requires_grad_(False)), torch.randn(5, I)
    f = {k: t.requires_grad_() for k, t in shaken(m).items()}
    c = 1 / m.inverse_norms(layer.weight, f)[0]
    V = layer.weight + m.inner.delta(f)
    want = torch.nn.functional.linear(x, (f["m"] / c)[:, None] * V, layer.bias)
    grads = torch.autograd.grad(want.sin().sum(), f.values(), retain_graph=True)
    by_weight = torch.nn.functional.linear(x, m.weight(layer.weight, f), layer.bias)
    for got in (m.forward(x, layer, f), by_weight):
        for a, b in zip(torch.autograd.grad(got.sin().sum(), f.values()), grads, strict=True):
            torch.testing.assert_close(a, b)


def test_starts():
    where = site("l", view(nn.Linear(2000, 50)))
    B, A = Kaiming()(where, 8)
    assert not B.any()
    assert 0.99 / math.sqrt(2000) < A.abs().max() <= 1 / math.sqrt(2000)
    B, A = Gaussian(std=0.2)(where, 8)
    assert float(B.std()) == pytest.approx(0.2, rel=0.1)
    assert float(A.std()) == pytest.approx(1 / math.sqrt(2000), rel=0.05)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("p", [0.001, 0.01, 0.05, 0.5, 0.99])
def test_dropout_drops_as_much_as_was_asked(p, compiled):
    """In bytes, 0.01 was 3/256."""
    torch.compiler.reset()
    torch.manual_seed(0)
    z = (torch.compile(drop, backend="eager", fullgraph=True) if compiled else drop)(torch.ones(1000, 1001), p)
    sigma = (p * (1 - p) / z.numel()) ** 0.5
    assert abs(float((z == 0).double().mean()) - p) < 5 * sigma + 1 / (1 << 17)
    assert float(z.max()) == pytest.approx(1 / (1 - p), rel=1e-3)


def test_dropout_rate_scale_and_base():
    m, layer = undula.Dropout(undula.LoRA(r=3), 0.25), view(nn.Linear(I, O))
    f, x = shaken(m), torch.randn(4000, I)
    y = m.forward(x, layer, f) - layer(x)  # the base sees x itself
    B, A = m.pair(f)
    per_row = torch.linalg.lstsq(B @ A, y.T).solution  # some masked, rescaled x explains every row
    torch.testing.assert_close(B @ A @ per_row, y.T)
    z = drop(torch.ones(100, 1000), 0.25)
    assert set(z.unique().tolist()) == {0.0, 4 / 3}
    assert float((z == 0).double().mean()) == pytest.approx(0.25, abs=0.005)
    torch.manual_seed(3)
    a = m.forward(x, layer, f)
    torch.manual_seed(3)
    assert torch.equal(m.forward(x, layer, f), a)
    layer.module.eval()
    torch.testing.assert_close(m.forward(x, layer, f), undula.LoRA(r=3).forward(x, layer, f))


def test_centred_counts_from_its_start():
    inner = undula.LoRA(r=2, alpha=4.0)
    m = undula.Centred(inner, Gaussian(0.5))
    f = dict(m.init(site("l", view(nn.Linear(I, O)))))
    start = inner.delta(f).detach()
    assert start.norm() > 0
    torch.testing.assert_close(m.delta(f), torch.zeros(O, I))
    f["B"] = f["B"].detach() + 1.0
    torch.testing.assert_close(m.delta(f), inner.delta(f) - start)
    assert m.pair(f)[1].shape == (4, I)
