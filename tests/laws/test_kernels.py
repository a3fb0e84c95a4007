"""The fast products against the laws as written, where the shared laws do not reach: several blocks, narrow types,
autocast, and second derivatives."""

import pytest
import torch
from torch import nn

import undula
from undula.host.views import site, view
from undula.kernels import elementwise as kernel
from undula.kernels import reference
from undula.kernels.spline import basis
from undula.methods.activations import Sinter, Tanh


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("activation", [Sinter(a=0.3, w=4.0), Tanh()], ids=repr)
@pytest.mark.parametrize("learn", [True, False])
def test_elementwise_in_several_blocks(bias, fold, activation, learn, monkeypatch):
    """Values and all gradients of the blockwise product equal autograd on the whole matrix; 10 rows in blocks of 4."""
    monkeypatch.setattr(kernel, "LEAST_ROWS", 4)
    monkeypatch.setattr(kernel, "BLOCK", 1)
    assert [r.start for r in kernel.blocks(10, 7)] == [0, 4, 8]
    torch.set_default_dtype(torch.float64)
    W, b = torch.randn(10, 7), torch.randn(10) if bias else None
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((3, 5, 7), (2, 7), (10, 2)))
    c = {k: torch.tensor(v, requires_grad=True) for k, v in activation.constants().items()} if learn else {}
    change = kernel.bent(activation, 1.5, B, A, c)
    want = torch.nn.functional.linear(x, W + change if fold else change, b)
    got = kernel.elementwise(x, W if fold else None, b, A, B, activation, 1.5, c)
    torch.testing.assert_close(got, want)
    g, inputs = torch.randn_like(want), [x, A, B, *c.values()]
    grads = torch.autograd.grad(got, inputs, g)
    for a, w in zip(grads, torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, w)


@pytest.mark.parametrize("m", [undula.LoRA(r=2), undula.LoRAN(r=2), undula.AuroRA()], ids=repr)
def test_second_derivatives_are_refused(m):
    layer, x = view(nn.Linear(12, 16).requires_grad_(False)), torch.randn(4, 12, requires_grad=True)
    y = m.forward(x, layer, m.init(site("l", layer)))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


NARROW = [undula.LoRA(r=4), undula.LoRAN(r=4, activation=Sinter(a=0.3, w=30.0)), undula.SineLoRA(r=4), undula.AuroRA(),
          undula.AuroRAStatic(), undula.DoRA(undula.LoRA(r=4)), undula.LoRANActivation(r=4)]  # fmt: skip


@pytest.mark.parametrize("m", NARROW, ids=repr)
def test_bf16_base_with_fp32_factors(m):
    """Factors and gradients are float32, the output is the base's type and equals the float32 law to its rounding."""
    module = nn.Linear(48, 32).requires_grad_(False)
    module.weight.data, module.bias.data = module.weight.data.bfloat16().float(), module.bias.data.bfloat16().float()
    f = {k: t.detach() + 0.05 * torch.randn_like(t) for k, t in m.init(site("l", view(module))).items()}
    x = torch.randn(6, 48).bfloat16()
    want = m.forward(x.float(), view(module), f)
    narrow = view(module.bfloat16())
    f = {k: t.requires_grad_() for k, t in f.items()}
    y = m.forward(x, narrow, f)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=2**-6, atol=2**-5)
    y.float().sum().backward()
    assert {t.grad.dtype for t in f.values()} == {torch.float32}


def test_the_sine_is_computed_in_fp32():
    """At w = 1e4 a bf16 argument would lose the phase: the update keeps it, under autocast and over a bf16 base."""
    m = undula.LoRAN(r=4, alpha=4.0, activation=Sinter(a=0.5, w=1e4))
    layer = view(nn.Linear(48, 32, bias=False).requires_grad_(False))
    f = m.init(site("l", layer))
    f["B"].data.normal_(std=0.05)
    exact = m.delta({k: t.double() for k, t in f.items()})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m.delta(f).double(), exact, rtol=1e-3, atol=1e-5)
    assert site("l", view(nn.Linear(48, 32).bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("m", NARROW, ids=repr)
def test_autocast(m):
    """Under autocast the method runs and trains, and gives its float32 result to bf16's rounding."""
    model = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8))
    adapter = undula.attach(model, m, "*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(6, 48)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        got.float().square().sum().backward()
    torch.testing.assert_close(got.float(), want, rtol=2**-4, atol=2**-4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_nothing_of_the_size_of_the_weight_is_kept():
    """LoRAN's graph holds x, A and B; the plain law holds (O, I) tensors too."""
    module = nn.Linear(300, 400).requires_grad_(False)
    m, layer = undula.LoRAN(r=2), view(module)
    f, x = m.init(site("l", layer)), torch.randn(5, 300, requires_grad=True)

    def kept(run) -> int:
        sizes = {}
        own = {t.data_ptr() for t in (module.weight, module.bias, x, *f.values())}

        def pack(t):
            if t.data_ptr() not in own:
                sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return sum(sizes.values())

    assert kept(lambda: m.forward(x, layer, f)) == 0
    assert kept(lambda: reference.additive(x, layer, m.delta(f))) >= 400 * 300
    z = torch.randn(50, 2, requires_grad=True)
    assert kept(lambda: basis(z, 5, 3, -1.0, 1.0)) == z.numel()
