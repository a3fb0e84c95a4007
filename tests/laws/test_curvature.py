"""The largest eigenvalue of the Hessian: against the dense one."""

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula.observe.curvature import differences, top_eigenvalue


@pytest.fixture
def tiny(float64):
    """(loss, the same without an adapter's kernels, parameters, a positive scale for each), away from B = 0."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    adapter = undula.attach(model, undula.LoRA(r=2, alpha=4), ["0"], full=["2.bias"])
    shake(adapter.parameters())
    x, y = torch.randn(7, 5), torch.randint(0, 3, (7,))
    A, B, bias = adapter.factors["0"]["A"], adapter.factors["0"]["B"], model[2].bias

    def plain():
        h = torch.tanh(nn.functional.linear(x, model[0].weight + 2 * B @ A, model[0].bias))
        return nn.functional.cross_entropy(nn.functional.linear(h, model[2].weight, bias), y)

    parameters = [A, B, bias]
    scale = [torch.rand_like(p) + 0.5 for p in parameters]
    return lambda: nn.functional.cross_entropy(model(x), y), plain, parameters, scale


def dense(plain, parameters, scale):
    """S H S, a row for each entry."""
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(plain(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in g]
    H = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
    s = torch.cat([t.reshape(-1) for t in scale])
    return s[:, None] * H * s


def products(loss, parameters, scale, size=1e-5):
    return differences(lambda: list(torch.autograd.grad(loss(), parameters)), parameters, scale, size)


def test_lanczos_finds_the_dense_hessians_largest_eigenvalue(tiny):
    loss, plain, parameters, scale = tiny
    found = top_eigenvalue(products(loss, parameters, scale), parameters, 30, seeded())
    wanted = torch.linalg.eigvalsh(dense(plain, parameters, scale))[-1]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-6, atol=0)


def test_a_product_is_the_dense_hessians(tiny):
    loss, plain, parameters, scale = tiny
    u = [torch.randn_like(p) for p in parameters]
    found = torch.cat([t.reshape(-1) for t in products(loss, parameters, scale)(u)])
    wanted = dense(plain, parameters, scale) @ torch.cat([t.reshape(-1) for t in u])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_a_loss_times_c_has_c_times_the_eigenvalue(tiny):
    loss, _, parameters, scale = tiny
    one, three = (
        top_eigenvalue(products(lambda c=c: c * loss(), parameters, scale), parameters, 5, seeded()) for c in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)


def seeded():
    return torch.Generator().manual_seed(0)


def test_differences_put_parameters_back_to_the_bit_even_where_the_loss_fails(tiny):
    loss, _, parameters, scale = tiny
    before = [p.detach().clone() for p in parameters]
    products(loss, parameters, scale, size=0.3)([torch.randn_like(p) for p in parameters])

    def fails():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        differences(fails, parameters, scale, 0.3)([torch.randn_like(p) for p in parameters])
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_of_a_loss_that_is_not_finite_the_eigenvalue_is_not_either(tiny):
    parameters, scale = tiny[2:]
    product = differences(lambda: [torch.full_like(p, torch.nan) for p in parameters], parameters, scale, 1e-3)
    assert not torch.isfinite(torch.tensor(top_eigenvalue(product, parameters, 3, seeded())))
