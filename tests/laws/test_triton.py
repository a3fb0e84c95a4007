"""Kernels in Triton against the laws as written.  Without a GPU they run in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/laws/test_triton.py
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

triton = pytest.importorskip("triton")

import undula  # noqa: E402
from undula.host.views import site, view  # noqa: E402
from undula.kernels import compiled, elementwise, reference, sparse  # noqa: E402
from undula.methods.activations import Sine, Sinter, Tanh  # noqa: E402

ON_CPU = torch.empty(0).device.type == "cpu"
pytestmark = pytest.mark.skipif(
    ON_CPU and os.environ.get("TRITON_INTERPRET") != "1", reason="on a CPU Triton runs under TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("activation", [Sinter(a=0.3, w=4.0), Sinter(), Sine(w=3.0)], ids=repr)
@pytest.mark.parametrize("shape", [(10, 7), (70, 150)])
def test_the_block_function_is_the_law(activation, fold, shape, monkeypatch):
    """Values and gradients, shapes that fill no tile, several blocks."""
    from undula.kernels import triton_elementwise

    calls = []
    monkeypatch.setattr(triton_elementwise, "_launch", counted(triton_elementwise._launch, calls))
    monkeypatch.setattr(elementwise, "LEAST_ROWS", 4)
    monkeypatch.setattr(elementwise, "BLOCK", 300)
    monkeypatch.setattr(elementwise, "AWAY", 1)
    (O, I), r = shape, 3
    W, b, x = torch.randn(O, I), torch.randn(O), torch.randn(2, 5, I, requires_grad=True)
    A, B = (0.1 * torch.randn(r, I)).requires_grad_(), (0.1 * torch.randn(O, r)).requires_grad_()
    change = elementwise.bent(activation, 1.5, B, A, {})
    want = F.linear(x, W + change if fold else change, b)
    with compiled.asked():
        got = elementwise.elementwise(x, W if fold else None, b, A, B, activation, 1.5, {})
        g = torch.randn_like(want)
        grads = torch.autograd.grad(got, [x, A, B], g)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    for a, w in zip(grads, torch.autograd.grad(want, [x, A, B], g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)
    assert len(calls) >= 2


def counted(function, calls):
    def run(*given):
        calls.append(given)
        return function(*given)

    return run


def test_other_curves_and_types_stay_with_torch():
    """Tanh has no form there, and neither has float64."""
    from undula.kernels import triton_elementwise as fused

    for activation, dtype in ((Tanh(), torch.float32), (Sinter(), torch.float64)):
        x, A, B = (torch.randn(s, dtype=dtype) for s in ((4, 6), (2, 6), (5, 2)))
        with compiled.asked(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_launch", None)
            y = elementwise.elementwise(x, None, None, A, B, activation, 1.0, {})
        torch.testing.assert_close(y, F.linear(x, elementwise.bent(activation, 1.0, B, A, {})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 200])
def test_sampled_products_are_entries_of_the_whole_one(tokens, dtype, monkeypatch):
    from undula.kernels import triton_sparse

    calls = []
    monkeypatch.setattr(triton_sparse, "sampled", counted(triton_sparse.sampled, calls))
    g, x = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 30).to(dtype)
    index = torch.randperm(1200)[:37].sort().values
    with compiled.asked():
        got = sparse.sampled(g, x, index)
    assert got.dtype == dtype
    assert len(calls) == 1
    want = (g.float().t() @ x.float()).flatten()[index]
    torch.testing.assert_close(got.float(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "m", [undula.LoRAN(r=4, activation=Sinter(a=0.3, w=3.0)), undula.SineLoRA(r=2), undula.SHiRA(r=1)], ids=repr
)
def test_a_layer_is_the_same_with_them(m):
    layer, x = view(nn.Linear(24, 40).requires_grad_(False)), torch.randn(3, 5, 24, requires_grad=True)
    f = {
        k: (t.detach() + 0.05 * torch.randn_like(t)).requires_grad_() if t.requires_grad else t
        for k, t in m.init(site("l", layer)).items()
    }
    trained = [x, *(t for t in f.values() if t.requires_grad)]
    want, g = reference.additive(x, layer, m.delta(f)), torch.randn(3, 5, 40)
    with compiled.asked():
        got = m.forward(x, layer, f)
        grads = torch.autograd.grad(got, trained, g)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, w in zip(grads, torch.autograd.grad(want, trained, g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("counts", "ranks"), [([3, 20, 1], [2, 8, 5]), ([0, 4], [1, 3]), ([17], [16])])
def test_segments_are_each_adapters_own_products(counts, ranks):
    """Of any counts (none too) and ranks, values and gradients."""
    from undula.kernels import triton_segments as segments

    T, I, O = sum(counts), 70, 90
    x = torch.randn(T, I, requires_grad=True)
    A, B = torch.randn(sum(ranks), I, requires_grad=True), torch.randn(sum(ranks), O, requires_grad=True)
    want = torch.cat([p @ a.t() @ b for p, a, b in zip(x.split(counts), A.split(ranks), B.split(ranks), strict=True)])
    got = segments.grouped(x, A, B, segments.where(tuple(counts), tuple(ranks), x.device))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    g = torch.randn_like(want)
    for a, w in zip(*(torch.autograd.grad(y, [x, A, B], g) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("used", [["a", "b", "c", "a"], ["c", None, "a", "b"]])
def test_a_mixed_batch_is_the_same_with_them(used, monkeypatch):
    """Of pairs whose ranks differ, in training."""
    from undula.kernels import triton_segments

    calls = []
    monkeypatch.setattr(triton_segments, "grouped", counted(triton_segments.grouped, calls))
    model, x = nn.Sequential(nn.Linear(12, 16)), torch.randn(4, 3, 12, requires_grad=True)
    for name, m in {"a": undula.VeRA(r=2), "b": undula.LoRAXS(r=3), "c": undula.GatedLoRA(r=4)}.items():
        for p in undula.attach(model, m, "*", name=name).parameters():
            p.data.normal_(std=0.3)
    trained = [x, *(p for a in undula.adapters(model).values() for p in a.parameters())]
    with undula.rows(model, used):
        want = model(x)
        grads = torch.autograd.grad(want.square().sum(), trained)
        with compiled.asked():
            got = model(x)
            again = torch.autograd.grad(got.square().sum(), trained)
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, w in zip(again, grads, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-3)


def test_they_are_used_where_they_are_asked_for_alone():
    device = torch.empty(0).device
    assert not compiled.chosen(device)
    with compiled.asked():
        assert compiled.chosen(device)
    assert not compiled.chosen(device)
