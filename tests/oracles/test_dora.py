"""DoRA where an update takes rows of W away: they have no direction, or are all rounding unless they are formed."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import undula
from undula.host.views import view
from undula.methods import dora
from undula.methods.activations import Identity

LORA = undula.LoRA(r=2, alpha=2.0)
INNER = [
    LORA,
    undula.LoRAN(r=2, alpha=2.0, activation=Identity()),
    undula.Dropout(LORA, 0.5),
    undula.Sum((LORA,), (1.0,)),
]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(2, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(5, 12)),
    "Conv1D": (lambda: Conv1D(8, 12), lambda: torch.randn(5, 12)),
    "convolution": (lambda: nn.Conv2d(3, 8, 2), lambda: torch.randn(2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: torch.randint(0, 12, (2, 5))),
}
TAKEN = [2, 5]


def taken_away(inner, kind, left=0.0, dtype=torch.float64, by=1.0):
    """(model, x, V): rows 2 and 5 of V = W + dW are `left` times ordinary ones; where that is 0, to the bit, or but for
    rounding where `by` times W / `by` is taken away."""
    torch.manual_seed(0)
    make, data = LAYERS[kind]
    model, x = nn.Sequential(make()).to(dtype), data()
    W = view(model[0]).weight.detach().clone()
    f = undula.attach(model, undula.DoRA(inner), "*").factors["0"]
    A, B = (next(t for name, t in f.items() if name.endswith(letter)) for letter in "AB")
    with torch.no_grad():
        B.copy_(0.1 * torch.randn_like(B))
        A.copy_((left * W.flip(0)[TAKEN] - W[TAKEN]) / by)
        B[TAKEN] = by * torch.eye(2, dtype=dtype)  # s = 1
    V = W.double() + B.detach().double() @ A.detach().double()
    return model, x.to(dtype) if x.is_floating_point() else x, V


def channel(y, kind):
    return y.movedim(1, -1) if kind == "convolution" else y


@pytest.mark.parametrize("by", [1.0, 0.7])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_a_row_that_the_update_takes_away_is_zero_live_and_merged(inner, kind, by):
    """W = -dW: ||V|| = 0 has no direction.  m / ||V|| times the rounding of W x + dW x was of the size of m |x|."""
    model, x, V = taken_away(inner, kind, by=by)
    assert bool(V[TAKEN].any()) == (by == 0.7)
    bias = getattr(model[0], "bias", None)
    wanted = torch.zeros(2, dtype=V.dtype) if bias is None else bias.detach()[TAKEN]
    merged = copy.deepcopy(model.eval())
    undula.merge(merged)
    for each in (model, merged):
        y = channel(each(x), kind)
        torch.testing.assert_close(y[..., TAKEN], wanted.expand(*y.shape[:-1], 2))
        assert y[..., [0, 1, 3, 4]].abs().min() > 0
    assert not view(merged[0]).weight[TAKEN].any()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inner", INNER[:2], ids=repr)
def test_it_stays_so_without_hand_written_backwards(inner, kind):
    model, x, _ = taken_away(inner, kind)
    y = model(x)
    if x.is_floating_point():
        torch.testing.assert_close(torch.func.jvp(model, (x,), (torch.zeros_like(x),))[0], y)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inner", INNER[:2], ids=repr)
def test_rows_that_are_nearly_taken_away_are_as_exact_as_others(inner, kind, left):
    """As W' itself gives them, values and gradients: scaled up by m / ||V||, the rounding of W x + dW x is an error of
    1e-7 / left."""
    model, x, _ = taken_away(inner, kind, left, torch.float32)
    m, f = (getattr(undula.selected(model), name)["0"] for name in ("methods", "factors"))
    undula.detach(model)
    layer, found = view(model[0].requires_grad_(False)), []
    for forward in (m.forward, lambda *law: undula.Reweight.forward(m, *law)):
        y = channel(forward(x, layer, f), kind)
        g = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append([y, *torch.autograd.grad(y, list(f.values()), g)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a / b.detach().abs().max(), b / b.detach().abs().max())


@pytest.mark.parametrize("left", [0.0, 1e-5])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inner", INNER[:2], ids=repr)
def test_an_accelerator_forms_the_right_rows_without_a_look(inner, kind, left, monkeypatch):
    """There no branch may be taken on numbers: the rows that cancel most are formed, here 4 or 2 of 8."""
    monkeypatch.setattr(dora, "looks", lambda device: False)
    monkeypatch.setattr(dora, "SURE", 2)
    if left:
        test_rows_that_are_nearly_taken_away_are_as_exact_as_others(inner, kind, left)
    else:
        test_a_row_that_the_update_takes_away_is_zero_live_and_merged(inner, kind, 0.7)
