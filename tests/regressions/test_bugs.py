"""One test per bug: our own, and those of other implementations that ours must not repeat."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import undula
from undula.methods.activations import Sinter


def shaken(model, method, **options):
    adapter = undula.attach(model, method, "*", **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return adapter


def test_backward_called_under_autocast():
    """The backward pass ran its products in bf16 when `backward()` itself stood under autocast, and failed."""
    for method in (undula.LoRA(r=2), undula.LoRAN(r=2)):
        model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
        adapter = shaken(model, method)
        y = model(x).square().sum()
        want = torch.autograd.grad(y, adapter.parameters(), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y, adapter.parameters())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_batch_of_sequences_through_the_fused_products():
    """The in-place sum refused the view that a (B, T, I) input makes."""
    model = nn.Sequential(nn.Linear(6, 5))
    shaken(model, undula.LoRA(r=2))
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(model(x).flatten(0, 1), model(x.flatten(0, 1)))
    assert model(x[0, 0]).shape == (5,)
    assert model(x[:0]).shape == (0, 3, 5)


def test_loran_merges_untransposed_on_square_layers():
    """The authors' merge adds the transpose, which only a square layer lets pass: off by 145 %."""
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    shaken(model, undula.LoRAN(r=2, activation=Sinter(a=0.5, w=20.0)))
    y = model(x)
    undula.merge(model)
    torch.testing.assert_close(model(x), y)


def test_nonlinear_methods_do_not_merge_as_plain_lora():
    """Another library merges Sine-LoRA and LoRAN as s B A: a silent change of function."""
    for method in (undula.SineLoRA(r=2), undula.LoRAN(r=2, activation=Sinter(a=0.5, w=20.0))):
        model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
        adapter = shaken(model, method)
        plain = model[0].weight + 8 * adapter.factors["0"]["B"] @ adapter.factors["0"]["A"]
        y = model(x)
        undula.merge(model)
        torch.testing.assert_close(model(x), y)
        assert not torch.allclose(model[0].weight, plain, atol=1e-3)


def test_a_row_of_zeros_under_dora():
    """Its norm is 0: the merged weight was NaN where the forward pass gave 0."""
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    model[0].weight.data[2] = 0
    undula.attach(model, undula.DoRA(undula.LoRA(r=2)), "*")
    y = model(x)
    undula.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("p", [1.0, 0.999999, 1e-6, -0.1])
def test_a_dropout_rate_that_leaves_nothing(p):
    """0.999999 is 65536/65536 in the steps that the rate has: it ended in a ZeroDivisionError while training; 1e-6 was
    no dropout at all, without a word."""
    with pytest.raises(ValueError, match=r"in steps of 1/65536|Dropout\.p is at least 0 and below 1"):
        undula.Dropout(undula.LoRA(), p)


def test_a_method_defined_twice():
    """A notebook cell run again kept the old class in the registry, and saving ended in StopIteration."""
    try:
        first, second = (dataclass(frozen=True)(type("Mine", (undula.LoRA,), {"__module__": "cell"})) for _ in range(2))
        assert undula.Method.named("mine") is second
        assert undula.Method.decode(second().encode()) == second()
        with pytest.raises(LookupError, match="Mine is not registered"):
            first().encode()
        with pytest.raises(ValueError, match="two Methods named Mine: cell and other"):
            type("Mine", (undula.LoRA,), {"__module__": "other"})
    finally:
        undula.Method.registry.pop("mine", None)


def test_centred_around_what_has_no_start():
    for inner in (undula.Dropout(undula.LoRA()), undula.Centred(undula.LoRA())):
        with pytest.raises(TypeError, match="has no start that could be chosen"):
            undula.Centred(inner)


def test_attaching_an_adapter_somewhere_else():
    """`where` was silently ignored for an adapter that knows its sites."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = undula.attach(model, undula.LoRA(r=2), ["0"])
    undula.detach(model)
    with pytest.raises(ValueError, match="knows its own sites"):
        undula.attach(model, adapter, ["1"])


def test_exporting_a_factor_that_sites_share(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = undula.attach(model, undula.LoRA(r=2), "*")
    adapter.factors["1"]["A"] = adapter.factors["0"]["A"]
    undula.io.export_lora(adapter, tmp_path)
    again = undula.Adapter.load(tmp_path)
    assert torch.equal(again.factors["1"]["A"], adapter.factors["0"]["A"])


def test_exporting_a_bias_of_an_adapted_layer(tmp_path):
    """PEFT could not load it: modules_to_save named the adapted layer itself."""
    adapter = undula.attach(nn.Sequential(nn.Linear(6, 6)), undula.LoRA(r=2), "*", full=["0.bias"])
    with pytest.raises(ValueError, match=r"0\.bias: trained in full in a layer that is adapted too"):
        undula.io.export_lora(adapter, tmp_path)


def test_merging_for_good_thaws_what_trained_before():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].requires_grad_(False)
    undula.attach(model, undula.LoRA(r=2), "*")
    undula.merge(model, keep=False)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize("method", [undula.LoRA(r=2), undula.LoRAN(r=2), undula.Restarted(undula.LoRA(r=2), past=1)])
def test_a_layer_trained_in_full_beside_its_factors_gets_gradients(method):
    """The fused products took weight and bias for frozen: they silently never trained."""
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    adapter = undula.attach(model, method, "*", full=["0.weight", "0.bias"])
    model(x).square().sum().backward()
    y = model(x).detach()
    torch.testing.assert_close(adapter.full["0.bias"].grad, 2 * y.sum(0))
    torch.testing.assert_close(adapter.full["0.weight"].grad, 2 * y.T @ x)
