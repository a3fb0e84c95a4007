"""Narrow types: values and gradients against the same adapter in float64.

What a narrow type may cost is its own rounding, of inputs, products and outputs, a few times over: `ROUNDINGS` units of
its epsilon, in norm.  What must not be in it is a nonlinear function computed in the narrow type: sin(w u) at w = 1e4
would be noise, and a spline over bf16 knots a step function.
"""

import copy

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from tests.support.zoo import ZOO
from undula.methods.activations import Sine, Sinter

ROUNDINGS = 8
VISIBLE = Sinter(a=0.01, w=1e4)  # its sine turns many times within the entries of B A
NONLINEAR = [
    undula.LoRAN(r=8, activation=VISIBLE),
    undula.LoRAN(r=8, activation=Sinter(a=0.01, w=1e3), learn=("a", "w")),
    undula.SineLoRA(r=8, activation=Sine(w=200.0)),
    undula.LoRANActivation(r=8, activation=VISIBLE),
    undula.AuroRA(r=8, intervals=50, low=-3.0, high=3.0),
    undula.AuroRAStatic(r=4, intervals=20),
    undula.Dropout(undula.LoRAN(r=8, activation=VISIBLE), 0.5),
    undula.DoRA(undula.LoRAN(r=8, activation=VISIBLE)),
]
EPS = {"bfloat16": torch.finfo(torch.bfloat16).eps, "float16": torch.finfo(torch.float16).eps}
EPS = {getattr(torch, name): eps for name, eps in EPS.items()}


def both(model, x, autocast=None):
    """(output, gradients of the factors and of x as one vector), in float64."""
    model.zero_grad()
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad] + [x] * x.is_floating_point()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    gradients = torch.autograd.grad((y.double() * weights).sum(), trained)
    return y.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def off(got, want):
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


def check(method, make, x, cast, autocast):
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    shake(undula.attach(model, method, "*"))
    model.to(cast)
    if x.is_floating_point():
        x = x.to(cast if autocast is None else torch.float32)
    want = both(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    value, gradient = off(both(model, x, autocast), want)
    eps = EPS[autocast or cast]
    assert value <= ROUNDINGS * eps
    assert gradient <= ROUNDINGS * eps


LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), lambda: torch.randn(6, 48)),
    "conv": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(2, 3, 6, 6)),
    "embedding": (lambda: nn.Embedding(11, 32), lambda: torch.randint(0, 11, (3, 5))),
}
SETTINGS = {
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
    "half": (torch.float16, None),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", NONLINEAR, ids=repr)
def test_nonlinear_functions_are_computed_in_float32(method, kind, setting):
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    check(method, make, x(), *SETTINGS[setting])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ZOO, ids=repr)
def test_every_method_keeps_to_a_few_roundings(method, setting):
    make, x = LAYERS["linear"]
    torch.manual_seed(0)
    check(method, make, x(), *SETTINGS[setting])


@pytest.mark.parametrize("method", [undula.SHiRA(r=2), undula.S2FT(share=0.1), undula.NOLA(r=2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_layers_train_in_narrow_types(method, dtype):
    """Few entries of a larger matrix: the products that torch samples have no narrow form."""
    check(method, lambda: nn.Linear(128, 128), torch.randn(4, 128), dtype, None)


@pytest.mark.parametrize("method", [undula.LoRAN(r=4), undula.SHiRA(r=1), undula.NOLA(r=2), undula.LoRA(r=2)], ids=repr)
def test_a_backward_within_autocast_is_the_one_outside(method):
    """Hand-written backwards compute in the types of what they saved."""
    model = nn.Sequential(nn.Linear(32, 32))
    shake(undula.attach(model, method))
    factors = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(4, 32)
    y = model(x)
    inside = model(x)
    want = torch.autograd.grad(y.sum(), factors)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(inside.sum(), factors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sum_is_rounded_once():
    """y + change in bf16: half a unit and a little more, rounded twice, is lost."""
    change = 2**-8 + 2**-17
    y = torch.ones(3, dtype=torch.bfloat16)
    want = torch.full_like(y, 1 + 2**-7)
    torch.testing.assert_close(undula.kernels.reference.added(y, torch.full((3,), change)), want, rtol=0, atol=0)
    model = nn.Sequential(nn.Linear(1, 1)).bfloat16()
    for name in "ab":
        f = undula.attach(model, undula.LoRA(r=1, alpha=1.0), name=name).factors["0"]
        with torch.no_grad():
            f["A"].fill_(1.0)
            f["B"].fill_(change)
    undula.select(model, None)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
        with undula.rows(model, ["a", None, "b", "a"]):
            y = model(torch.ones(4, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(
        y.flatten(), torch.tensor([1 + 2**-7, 1, 1 + 2**-7, 1 + 2**-7]).bfloat16(), rtol=0, atol=0
    )


@pytest.mark.parametrize("inner", [undula.LoRA(r=4, alpha=4.0), undula.LoRAN(r=4, alpha=4.0)], ids=repr)
@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 0.0])
def test_dora_where_the_update_takes_the_weight_away(inner, left):
    """||W + dW||^2 as a sum of three terms cancels there: not below what rounding leaves of W."""
    torch.manual_seed(0)
    U, V = torch.randn(32, 4), torch.randn(4, 64)
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data = U @ V + left * torch.randn(32, 64) / 8
    model, x = nn.Sequential(layer), torch.randn(5, 64)
    f = undula.attach(model, undula.DoRA(inner)).factors["0"]
    with torch.no_grad():
        f["A"].copy_(V)
        f["B"].copy_(-U)
    exact, live = copy.deepcopy(model).double()(x.double()).detach(), model(x).detach()
    undula.merge(model)
    merged = model(x).detach()
    lost = torch.finfo(torch.float32).eps * float((U @ V).norm() / (left * 32**0.5 * 64**0.5 / 8 or 1))
    if left and isinstance(inner, undula.LoRA):
        assert float((live - exact).norm() / exact.norm()) <= 64 * lost
        assert float((merged - exact).norm() / exact.norm()) <= 64 * lost
    m = float(f["m"].detach().norm())
    assert float(live.norm()) <= 8 * m * float(x.norm())
    assert float(merged.norm()) <= 8 * m * float(x.norm())


@pytest.mark.parametrize("method", [undula.AuroRAStatic(), undula.LoRAN(r=2)], ids=repr)
def test_outlines_have_an_update_too(method):
    """The meta device has no autocast to turn off: shapes are counted there."""
    f = method.init(undula.host.views.outline("l", (6, 4)))
    assert method.delta(f).shape == (6, 4)


def test_a_weight_beyond_its_type_is_not_merged():
    """Half of its entries would be infinite; the adapter stays what it was, and alive."""
    model = nn.Sequential(nn.Linear(4, 4)).half()
    adapter, W = shake(undula.attach(model, undula.LoRA(r=2)), 300.0), model[0].weight.clone()
    with pytest.raises(ValueError, match=r"^0: merged, its weight is beyond what torch.float16 holds"):
        undula.merge(model)
    assert undula.selected(model) is adapter
    assert torch.equal(model[0].weight, W)
