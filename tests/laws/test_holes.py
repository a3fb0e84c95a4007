"""Dropout whose holes are drawn, and whose mask is drawn again in the backward pass."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import undula
from undula import Dropout, LoRA
from undula.host.views import site, view
from undula.kernels import holes as kernel


def layer_and_factors(m, bias=True, dtype=torch.float64):
    layer = view(nn.Linear(12, 16, bias=bias, dtype=dtype).requires_grad_(False))
    f = {k: (t.detach() + 0.3 * torch.randn_like(t)).requires_grad_() for k, t in m.init(site("l", layer)).items()}
    return layer, f


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "inner", [LoRA(r=3), undula.AuroRAStatic(), undula.DoRA(LoRA(r=3)), undula.LoRAN(r=2)], ids=repr
)
def test_forward_and_backward_drop_the_same(inner, bias):
    """Values and all gradients are those of the law as written, of the mask that the seed gives."""
    torch.set_default_dtype(torch.float64)
    m = Dropout(inner, 0.2)
    layer, f = layer_and_factors(m, bias)
    x, g = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 16)
    torch.manual_seed(3)
    y = m.forward(x, layer, f)
    torch.manual_seed(3)
    at = kernel.holes(kernel.drawn(), x.numel(), 0.2)
    assert 0 < len(at) < x.numel() / 2
    mask = torch.ones(x.numel()).index_fill(0, at, 0.0).view(x.shape) / 0.8
    W = layer.weight
    want = layer(x) + (x * mask) @ (m.weight(W, f) - W).T
    torch.testing.assert_close(y, want)
    inputs = [x, *f.values()]
    for got, wanted in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_computed_again_drop_the_same(reentrant):
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    adapter = undula.attach(model, Dropout(LoRA(r=2), 0.2), "*")
    for t in adapter.parameters():
        nn.init.normal_(t)
    x, found = torch.randn(6, 12, requires_grad=True), []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().sum().backward()
        found.append([t.grad.clone() for t in adapter.parameters()])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice)


def test_no_mask_is_kept_for_the_backward():
    """The graph of a dropped layer holds x, the factors and A D(x): as much as without dropout."""

    def kept(m):
        layer, f = layer_and_factors(m, dtype=torch.float32)
        x, sizes = torch.randn(50, 12, requires_grad=True), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            y = m.forward(x, layer, f)
        assert y.grad_fn is not None
        return sum(sizes.values())

    assert kept(Dropout(LoRA(r=2), 0.1)) == kept(LoRA(r=2))
    assert kept(Dropout(LoRA(r=2), 0.5)) > kept(LoRA(r=2))  # a mask of bits


@pytest.mark.parametrize("p", [0.01, 0.2])
@pytest.mark.parametrize("spare", [6.0, -3.0], ids=["at once", "in several draws"])
def test_entries_fall_out_independently(p, spare, monkeypatch):
    """At the rate p, neighbours both at p^2, the first and the last entry as any other; each at most once, and none
    beyond the end."""
    monkeypatch.setattr(kernel, "SPARE", spare)
    n = 200_000
    out = torch.zeros(n)
    at = kernel.holes(7, n, p)
    assert (at.diff() > 0).all()
    out[at] = 1
    for found, share, count in ((out.mean(), p, n), ((out[1:] * out[:-1]).mean(), p * p, n)):
        assert abs(float(found) - share) < 6 * (share * (1 - share) / count) ** 0.5
    ends = torch.zeros(50)
    for seed in range(400):
        ends[kernel.holes(seed, 50, p)] += 1
    sigma = (400 * p * (1 - p)) ** 0.5
    assert ((ends - 400 * p).abs() < 6 * sigma + 3)[[0, -1]].all()
    assert torch.equal(kernel.holes(7, n, p), at)


def test_nothing_to_drop_from():
    m = Dropout(LoRA(r=2), 0.1)
    layer, f = layer_and_factors(m, dtype=torch.float32)
    x = torch.randn(0, 12, requires_grad=True)
    m.forward(x, layer, f).sum().backward()
    assert x.grad.shape == (0, 12)


def test_every_word_of_random_bits_makes_a_gap():
    """A u that rounds to 0 has no logarithm: one in 2^26 words had none once, several in each step of a small model."""
    bits = torch.tensor([0, -1, 5, -(2**31), 2**31 - 1, (1 << 24) - 1, 1 << 24], dtype=torch.int32)
    for p in (1 / 65536, 0.05, 0.2):
        u = [((b & 0xFFFFFF) + 1) / 2**24 for b in bits.tolist()]
        wanted = [math.log(each) / math.log1p(-p) for each in u]
        for found, exact in zip(kernel.gaps(bits, p).tolist(), wanted, strict=True):
            assert found == pytest.approx(math.floor(exact), abs=1, rel=1e-6)
            assert found >= 0
