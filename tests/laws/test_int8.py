"""A base with 8-bit products: how far off it may be, whose numbers depend on whose, and adapters beside it."""

import copy
import io

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula.compress.int8 import TOKENS, WEIGHTS, Int8Linear, int8

pytestmark = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no int8 products")


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(48, 20, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_off_by_no_more_than_its_roundings(bias):
    """Half a step of each weight and of each input, for each output of each token."""
    float_, x = layer(bias), torch.randn(7, 48) * torch.logspace(-3, 3, 7)[:, None]
    off = (Int8Linear(float_)(x).double() - float_.double()(x.double())).abs()
    W = float_.weight.double().abs()
    w_step, x_step = W.amax(1) / WEIGHTS / 2, x.double().abs().amax(1) / TOKENS / 2
    bound = x.double().abs().sum(1)[:, None] * w_step + x_step[:, None] * W.sum(1) + 48 * x_step[:, None] * w_step
    assert (off <= bound * 1.001 + 1e-5).all()
    assert off.max() > 0


def test_a_token_gets_the_same_whoever_is_beside_it():
    eight, x = Int8Linear(layer()), torch.randn(5, 48)
    torch.testing.assert_close(eight(torch.cat([x, 1e4 * x]))[:5], eight(x), rtol=0, atol=0)
    assert not eight(torch.zeros(2, 48)).isnan().any()
    assert eight(x.view(5, 1, 48).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", [undula.LoRA(r=2), undula.DoRA(undula.LoRA(r=2)), undula.LoRAN(r=2)], ids=repr)
def test_adapters_compute_beside_it_in_float(method):
    """As over a float base that has the rounded weights, but for the rounding of the tokens."""
    model = nn.Sequential(layer(), nn.Tanh(), nn.Linear(20, 6))
    eight = copy.deepcopy(model).eval()
    assert int8(eight) == 2
    rounded = copy.deepcopy(model).eval()
    for i in (0, 2):
        rounded[i].weight.data = eight[i].format.dense(eight[i])
    x = torch.randn(64, 48)
    adapter = shake(undula.attach(rounded, method))
    undula.attach(eight, undula.detach(rounded), name="a", frozen=True)
    undula.attach(rounded, adapter)
    with torch.no_grad(), undula.rows(eight, ["a"] * 64):
        found, want = eight(x), rounded(x)
    base = (eight(x) - want).norm()
    assert (found - want).norm() < 0.02 * want.norm() < base


def test_it_is_copied_and_stored():
    eight, x = nn.Sequential(Int8Linear(layer())), torch.randn(3, 48)
    want = eight(x)
    file = io.BytesIO()
    torch.save(eight, file)
    file.seek(0)
    for each in (copy.deepcopy(eight), torch.load(file, weights_only=False)):
        torch.testing.assert_close(each(x), want, rtol=0, atol=0)


def test_what_cannot_be_int8_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    undula.attach(model, undula.LoRA(r=2))
    with pytest.raises(ValueError, match="make the base int8 first"):
        int8(model)
    with pytest.raises(ValueError, match="are for CPUs; layers of this model are on meta"):
        int8(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear layers"):
        int8(nn.Sequential(nn.Tanh()))
    plain = nn.Sequential(nn.Linear(4, 4))
    int8(plain)
    undula.attach(plain, undula.LoRA(r=2))
    with pytest.raises(TypeError, match="nothing is merged into a base in int8"):
        undula.merge(plain)


def test_a_base_that_rounds_inputs_is_asked_as_a_narrow_one(monkeypatch):
    """A float's last digit moves an input by a step: asked as closely as float32, a real base was refused."""
    from tests.support import served
    from undula.serve.engine import Limits
    from undula.serve.policy import Fcfs
    from undula.serve.steps import Model
    from undula.serve.work import Work

    forward = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, *given: forward(self, *given) * 1.01)
    plain, eight = served.llama().float(), served.llama().float()
    int8(eight)
    with pytest.raises(ValueError, match="requests of one batch get other logits"):
        Work(plain, served.Attached([]), Fcfs(), Limits())
    Work(eight, served.Attached([]), Fcfs(), Limits())
