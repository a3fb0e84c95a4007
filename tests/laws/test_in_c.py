"""LoRAN's passes in C against torch in double, and without a compiler."""

import os
import shutil
import time

import pytest
import torch
from torch import nn

import undula
from undula.host.views import site, view
from undula.kernels import in_c
from undula.methods.activations import Sine, Sinter

FLAT = pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@FLAT
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 0.05, 30.0])
@pytest.mark.parametrize("f", [Sinter(), Sinter(a=0.3, w=70.0), Sine()], ids=repr)
def test_a_pass_in_c_is_the_activation_and_its_slope(f, size, count):
    """Of arguments up to 1e6, in one part and in several that do not come out even: f(u) and g f'(u), of the argument
    w u as float32 has it."""
    torch.set_num_threads(count)
    torch.manual_seed(0)
    u, g = size * torch.randn(201, 331), torch.randn(201, 331)
    assert in_c.applies(u)
    x, v = (f.w * u).double(), u.double()
    if isinstance(f, Sinter):
        value, slope = v + f.a * v * x.sin(), 1 + f.a * (x.sin() + f.w * v * x.cos())
    else:
        value, slope = x.sin(), f.w * x.cos()
    spare = [torch.empty_like(u) for _ in range(2)]
    bent = f.bend(u.clone(), {}, spare[0])
    again, pulled, rest = f.pull(u.clone(), g.clone(), {}, spare)
    assert rest == []
    torch.testing.assert_close(bent.double(), value, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(again.double(), value, rtol=1e-5, atol=2e-6)
    largest = float(slope.abs().max())
    torch.testing.assert_close(pulled.double(), g.double() * slope, rtol=1e-5, atol=1e-6 * largest)


@FLAT
@pytest.mark.parametrize("m", [undula.LoRAN(r=2), undula.SineLoRA(r=2)], ids=repr)
def test_a_layer_trains_alike_with_and_without_the_passes_in_c(m, monkeypatch):
    layer = view(nn.Linear(300, 200).requires_grad_(False))
    f = {k: (t.detach() + 0.02 * torch.randn_like(t)).requires_grad_() for k, t in m.init(site("l", layer)).items()}
    x, found, called = torch.randn(6, 300, requires_grad=True), [], []
    real = in_c._in_parts
    monkeypatch.setattr(in_c, "_in_parts", lambda *law: called.append(law[0]) or real(*law))
    for least in (1, 1 << 40):
        monkeypatch.setattr(in_c, "LEAST", least)
        y = m.forward(x, layer, f)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *f.values()])])
    assert sorted(name.partition("_")[2] for name in called) == ["bend", "pull"]
    for fast, plain in zip(*found, strict=True):
        assert (fast - plain).norm() <= 1e-5 * plain.norm()


CASES = {
    "none there": {"CC": "no-such-compiler"},
    "one that fails": {"CC": "false"},
    "one that makes nothing": {"CC": "true"},
    "not wanted": {"UNDULA_COMPILE": "0"},
}


@pytest.mark.parametrize("case", CASES)
def test_without_a_compiler_torch_does_the_same(case, monkeypatch):
    for name, value in CASES[case].items():
        monkeypatch.setenv(name, value)
    in_c.passes.cache_clear()
    try:
        u = torch.randn(201, 331)
        assert not in_c.applies(u)
        torch.testing.assert_close(Sinter().bend(u.clone(), {}, torch.empty_like(u)), Sinter()(u))
    finally:
        in_c.passes.cache_clear()


@FLAT
def test_what_is_compiled_wrongly_is_not_used(monkeypatch):
    in_c.passes.cache_clear()
    monkeypatch.setattr(in_c, "SOURCE", in_c.SOURCE.replace("-1.66666665e-1f", "-1.6e-1f"))
    try:
        assert in_c.passes() is None
    finally:
        monkeypatch.undo()
        in_c.passes.cache_clear()


@FLAT
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    u = torch.randn(64, 100)  # torch itself computes it in one thread
    want = in_c.bend("sine", u.clone(), 2.0)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(in_c.bend("sine", u.clone(), 2.0), want) else 1)
        finally:
            os._exit(2)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert os.waitstatus_to_exitcode(status) == 0
