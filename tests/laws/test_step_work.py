"""What a training step computes, and what it does not."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import undula
from undula import Dropout, LoRA
from undula.host.views import site, view
from undula.kernels.holes import pair_of_dropped

from ..support.numbers import shake


class Backwards(TorchDispatchMode):
    """Which of a model's matrices a gradient went through: as they lie, where a forward takes them transposed."""

    def __init__(self, model):
        super().__init__()
        self.found = set()
        self.names = {p.data_ptr(): n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 2}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            for t in args:
                if t.data_ptr() in self.names and t.is_contiguous() and torch._C._current_graph_task_id() != -1:
                    self.found.add(self.names[t.data_ptr()])
        return function(*args, **(kwargs or {}))


def tower():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(3)))


WAYS = {
    "plain": lambda model, x: model(x),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
}
METHODS = [LoRA(r=2), undula.LoRAN(r=2), undula.AuroRA(), Dropout(LoRA(r=2), 0.1), undula.DoRA(LoRA(r=2)),
           undula.SHiRA(r=1), undula.Centred(LoRA(r=2)), undula.VeRA(r=2)]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("m", METHODS, ids=repr)
def test_no_gradient_goes_below_the_lowest_adapter(m, way):
    """Neither through the layers below it nor to its own input; through every layer above it."""
    model = tower()
    shake(undula.attach(model, m, ["1.2", "2.0"]))
    with Backwards(model) as seen:
        WAYS[way](model, torch.randn(5, 6)).square().sum().backward()
    own = {"1.2"} if way == "plain" else set()  # computed again, DoRA's forward is seen here too
    assert seen.found & ({"0.0", "0.2", "1.0"} | own) == set()
    assert "2.2" in seen.found
    assert all(t.grad is not None for t in undula.selected(model).parameters() if t.requires_grad)


def bf16(m, bias=True):
    module = nn.Linear(64, 48, bias=bias).requires_grad_(False).bfloat16()
    f = {k: t.detach() + 0.1 * torch.randn_like(t) for k, t in m.init(site("l", view(module))).items()}
    return view(module), {k: t.requires_grad_() for k, t in f.items()}


@pytest.mark.parametrize("m", [LoRA(r=4), Dropout(LoRA(r=4), 0.1)], ids=repr)
def test_over_a_bf16_base_nothing_is_copied_to_float32(m):
    """In training: no tensor as long as the batch is float32, in neither direction; gradients of factors are."""
    layer, f = bf16(m)
    x = torch.randn(3, 40, 64).bfloat16().requires_grad_()
    wide = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            if isinstance(y, torch.Tensor) and y.dtype == torch.float32 and y.numel() >= 120 * 48:
                wide.append(str(function))
            return y

    B, A = m.pair(f)
    with Watch():  # under which Dropout draws a mask: its fused product is called by itself
        y = pair_of_dropped(x, layer, A, B, 0.1) if m.drops else m.forward(x, layer, f)
        y.backward(torch.ones_like(y))
    assert not wide
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert {t.grad.dtype for t in f.values()} == {torch.float32}


@pytest.mark.parametrize("bias", [True, False])
def test_over_a_bf16_base_a_training_step_is_right_to_bf16(bias):
    """Output, input gradient and factor gradients against float64, within 2^-7 of the size of what is summed."""
    torch.manual_seed(0)
    m = LoRA(r=4)
    layer, f = bf16(m, bias)
    x, g = torch.randn(40, 64).bfloat16().requires_grad_(), torch.randn(40, 48).bfloat16()
    y = m.forward(x, layer, f)
    got = [y, *torch.autograd.grad(y, [x, *f.values()], g)]
    exact = view(nn.Linear(64, 48, bias=bias).double().requires_grad_(False))
    exact.module.load_state_dict(layer.module.state_dict())
    wide = {k: t.detach().double().requires_grad_() for k, t in f.items()}
    x64 = x.detach().double().requires_grad_()
    y64 = m.forward(x64, exact, wide)
    want = [y64, *torch.autograd.grad(y64, [x64, *wide.values()], g.double())]
    for a, w in zip(got, want, strict=True):
        assert (a.double() - w).norm() <= 2**-7 * w.norm()
    assert y.dtype == torch.bfloat16


def test_outside_training_a_bf16_base_has_its_adapter_exactly():
    """The change is a float32 product; so it is for pairs that may cancel, in training too."""
    for m, training in ((LoRA(r=4), False), (undula.Centred(LoRA(r=4)), True)):
        layer, f = bf16(m)
        layer.module.train(training)
        layer.module.weight.zero_()
        layer.module.bias.zero_()
        x = torch.randn(9, 64).bfloat16()
        B, A = m.pair(f)
        want = (x.float() @ A.T @ B.T).bfloat16()
        torch.testing.assert_close(m.forward(x, layer, f), want, rtol=2**-8, atol=1e-5)


def test_a_float16_base_keeps_small_gradients():
    """Of B = 1e-6 and g = 1e-4: B' g is below float16's numbers, and A's gradient is not zero all the same."""
    layer = view(nn.Linear(8, 8, bias=False).requires_grad_(False).half())
    f = {"A": torch.ones(2, 8, requires_grad=True), "B": torch.full((8, 2), 1e-6, requires_grad=True)}
    y = LoRA(r=2).forward(torch.ones(3, 8).half(), layer, f)
    y.backward(torch.full_like(y, 1e-4))
    assert f["A"].grad.abs().min() > 0
