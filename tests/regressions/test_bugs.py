"""One test per bug: our own, and those of other implementations that ours must not repeat."""

import subprocess
import sys

import torch
from torch import nn

import undula
from undula.activations import Sinter


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


def test_importing_undula_imports_none_of_the_ecosystem():
    """PEFT alone costs five seconds and 340 MiB."""
    others = ("peft", "transformers", "datasets", "trl", "matplotlib")
    code = f"import undula, sys; print(sorted({set(others)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
