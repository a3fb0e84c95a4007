"""Every method in every narrow setting, values and gradients, against a float64 copy of the same numbers."""

import copy
import threading

import pytest
import torch
from torch import nn

import undula
from tests.support.zoo import ZOO
from undula import Restarted, Sum, activations
from undula.host.views import site, view
from undula.kernels import elementwise, reference
from undula.kernels.spline import basis
from undula.methods import tera

SINTER = activations.Sinter(a=0.01, w=1e4)
WAVES = [undula.SineLoRA(r=4), undula.LoRAN(r=4, activation=SINTER), undula.LoRANActivation(r=4, activation=SINTER),
         undula.AuroRA(r=4, intervals=50)]  # fmt: skip
LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), lambda: torch.randn(16, 48)),
    "conv": (lambda: nn.Conv2d(4, 8, 3), lambda: torch.randn(2, 4, 8, 8)),
    "embedding": (lambda: nn.Embedding(24, 16), lambda: torch.randint(0, 24, (4, 12))),
}


def trained(m, kind):
    """(model, x): an adapter away from its start."""
    make, data = LAYERS[kind]
    model = nn.Sequential(make())
    adapter = undula.attach(model, m, "*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, data()


def measured(model, x, cast=None):
    """[y, gradients of the factors, of x]."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        y = model(x)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    inputs = [p for p in model.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    grads = torch.autograd.grad(y, inputs, g)
    assert [t.dtype for t in grads] == [t.dtype for t in inputs]
    return [y, torch.cat([t.flatten().double() for t in grads[: len(inputs) - x.requires_grad]]), *grads[-1:]]


def narrowed(model, x, how):
    """(model, x, autocast's type, eps)."""
    to = {"bf16": torch.bfloat16, "fp16": torch.float16, "float": torch.float32, "double": torch.float64}[
        how.split()[-1]
    ]
    moved = x.to(to) if x.is_floating_point() else x
    if how.startswith("autocast"):
        return model, x, to, torch.finfo(to).eps
    if how.startswith("base"):
        for name, p in model.named_parameters():
            if "undula" not in name:
                p.data = p.data.to(to)
        return model, moved, None, torch.finfo(to).eps
    return model.to(to), moved, None, torch.finfo(to).eps


SETTINGS = ["autocast bf16", "autocast fp16", "base bf16", "all bf16", "all fp16"]


def errors(m, kind, how):
    """Relative errors of y, of the factors' gradients and of x's, in units of the setting's eps."""
    model, x, cast, eps = narrowed(*trained(m, kind), how)
    exact = copy.deepcopy(model).double()
    want = measured(exact, x.double() if x.is_floating_point() else x)
    return [
        float((a.double() - b).norm() / b.norm() / eps) for a, b in zip(measured(model, x, cast), want, strict=True)
    ]


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("m", WAVES, ids=repr)
def test_what_bends_fast_is_computed_wide(m, kind, how):
    """A sine or a spline of a narrow argument is off by 10 to 100 eps: nothing but the frozen product may be narrow."""
    assert max(errors(m, kind, how)) < 4


@pytest.mark.parametrize("m", [WAVES[0], WAVES[1]], ids=repr)
def test_the_update_of_narrow_factors_is_wide(m):
    model, _ = trained(m, "linear")
    model.bfloat16()
    adapter = undula.selected(model)
    wanted = m.delta({k: t.double() for k, t in adapter.factors["0"].items()})
    torch.testing.assert_close(adapter.delta("0").double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_entries_train_in_narrow_types(dtype):
    """torch samples no narrow products: those of the sparse gradient are wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96))
    undula.attach(model, undula.SHiRA(r=1))
    model.to(dtype)
    x = torch.randn(8, 128, dtype=dtype)
    got, want = measured(model, x), measured(copy.deepcopy(model).double(), x.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("m", [undula.LoRA(r=4, alpha=4.0), Sum((undula.LoRA(r=4, alpha=4.0),), (1.0,)),
                               undula.LoRAN(r=4, alpha=4.0, activation=activations.Identity())], ids=repr)  # fmt: skip
@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
def test_rows_near_zero_have_their_own_norm(m, eps):
    """DoRA where the update takes W to eps of itself: no more than the rounding of W + dW, magnified by 1 / eps."""
    torch.manual_seed(0)
    U, V = torch.randn(32, 4).round(), torch.randn(4, 64).round()
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(5, 64)
    layer.weight.data = 10 * (U @ V + eps * torch.randn(32, 64))
    model = nn.Sequential(layer)
    f = undula.attach(model, undula.DoRA(m), "*").factors["0"]
    prefix = "0_" if isinstance(m, Sum) else ""
    f[f"{prefix}A"].data.copy_(10 * V)
    f[f"{prefix}B"].data.copy_(-U)
    exact = copy.deepcopy(model).double()
    got, want = model(x), exact(x.double())
    rounding = torch.finfo(torch.float32).eps * 50 / max(eps, 1e-7)
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= rounding * want.norm()
    undula.merge(model)
    assert (model(x) - got).norm() <= rounding * got.norm()


def test_scratch_memory_is_real_and_of_one_thread():
    """What fake tensors or inference left behind must not be written into later, nor what another thread uses."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(results):
        x = torch.randn(3, 12)
        model = nn.Sequential(nn.Linear(12, 8))
        want = undula.attach(model, undula.LoRAN(r=2))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
        with torch.inference_mode():
            want = model(x)
        with torch.device("meta"):
            results.append((model(x), want))
        model(x).sum().backward()
        results.append(elementwise.scratch(1, slice(0, 4), x)[0])

    results = []
    for _ in range(2):  # new threads, which have no memory yet
        thread = threading.Thread(target=run, args=(results,))
        thread.start()
        thread.join()
    assert len(results) == 4
    torch.testing.assert_close(*results[0])
    own = elementwise.scratch(1, slice(0, 4), torch.zeros(3, 12))[0]
    assert type(own) is torch.Tensor
    assert own.data_ptr() not in (results[1].data_ptr(), results[3].data_ptr())


def test_a_sum_of_two_types_is_rounded_once():
    """y at one, changes of just over half its spacing: rounded before the sum, they would be half of it, and vanish."""
    y, change = torch.ones(1, dtype=torch.bfloat16), torch.tensor([2**-8 + 2**-17])
    assert reference.added(y, change).item() == 1 + 2**-7


@pytest.mark.parametrize("names", [["a", "b", "a", "b"], ["a", None, "b", None], ["a", "a", "b", "b"]])
def test_rows_over_a_narrow_base_are_rounded_once(names):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16().eval(), torch.randn(4, 64).bfloat16()
    for name in "ab":
        adapter = undula.attach(model, undula.LoRA(r=4), "*", name=name)
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.3)
    with undula.rows(model, names):
        got = model(x).float()
    undula.select(model, None)
    want = model(x).float()
    for i, name in enumerate(names):
        if name is not None:
            want[i] += undula.adapters(model)[name].delta("0") @ x[i].float()
    half = torch.exp2(torch.frexp(want).exponent - 9.0)  # of bf16's spacing at a number 2^(e - 1) to 2^e
    assert ((got - want).abs() <= half + 1e-4).all()


def test_rows_drop_out_in_training():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.ones(2, 64)
    adapter = undula.attach(model, undula.Dropout(undula.LoRA(r=4), 0.5), "*", name="a")
    nn.init.normal_(adapter.factors["0"]["B"])
    for train in (True, False):
        model.train(train)
        with undula.rows(model, ["a", "a"]):
            y = model(x)
        assert torch.allclose(y[0], y[1]) is not train


PAIRS = [undula.LoRA(r=2), Sum((undula.LoRA(r=2), undula.LoRA(r=1)), (0.5, 1.0)), undula.LoRAN(r=2), undula.TeRA(r=2),
         Sum((undula.LoRAN(r=2), undula.SHiRA(r=1)), (0.5, 1.0)), undula.Centred(undula.LoRA(r=2)), undula.S2FT(),
         undula.Centred(undula.LoRAN(r=2)), undula.AuroRAStatic(), undula.VeRA(r=4), undula.GatedLoRA(r=2)]  # fmt: skip
WRAP = [undula.DoRA, undula.Dropout, lambda m: Restarted(m, 2), lambda m: Sum((m, m), (0.5, 2.0)), lambda m: m]


@pytest.mark.parametrize("m", PAIRS, ids=repr)
def test_wrappers_of_wrappers_keep_their_factors_apart(m):
    """All that can be built, two and three deep: the base at the start, the weight of the forward after training."""
    torch.set_default_dtype(torch.float64)
    x, built = torch.randn(5, 12), 0
    for outer in WRAP:
        for inner in WRAP:
            try:
                method = outer(inner(m))
            except (TypeError, ValueError):
                continue
            built += 1
            model = nn.Sequential(nn.Linear(12, 8))
            base = model(x)
            adapter = undula.attach(model, method, "*")
            count = len(adapter.factors["0"])
            torch.testing.assert_close(model(x), base)
            with torch.no_grad():
                for t in adapter.factors["0"].values():
                    if t.is_floating_point():
                        t.add_(0.1 * torch.rand_like(t))
            model.eval()
            live = model(x)
            assert len(adapter.factors["0"]) == count
            undula.merge(model)
            torch.testing.assert_close(model(x), live)
    assert built >= 8


def test_restarted_is_not_put_around_itself():
    with pytest.raises((TypeError, ValueError), match="not Restarted"):
        Restarted(undula.Dropout(Restarted(undula.LoRA(), 2)), 2)


@pytest.mark.parametrize("m", [m for m in ZOO if "Dropout" not in repr(m)], ids=repr)
def test_no_rows_give_no_rows(m):
    """An empty batch, and an expert without tokens: an empty output, zero gradients."""
    model = nn.Sequential(nn.Linear(12, 8))
    adapter = undula.attach(model, m, "*")
    for shape in ((0, 12), (2, 0, 12)):
        y = model(torch.zeros(shape))
        assert y.shape == (*shape[:-1], 8)
        y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("m", [undula.LoRA(r=2), undula.LoRAN(r=2), undula.AuroRA(), undula.DoRA(undula.LoRA(r=2)),
                               undula.SHiRA(r=1), undula.VeRA(r=4), undula.NOLA(r=2, k=8, l=8)], ids=repr)  # fmt: skip
def test_exporters_and_transforms_follow_the_laws(m):
    """torch.export, torch.jit.trace, torch.func.grad and vmap of a live adapter, at the eager model's numbers."""
    torch.set_default_dtype(torch.float64)
    model, x = trained(m, "linear")
    model.eval()
    want = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), want)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    grads = torch.func.grad(loss)(own, x)
    for got, wanted in zip(grads.values(), torch.autograd.grad(want.square().sum(), list(own.values())), strict=True):
        torch.testing.assert_close(got, wanted)
    forwards = torch.func.jvp(lambda p: loss(p, x), (own,), (grads,))[1]
    if not isinstance(m, undula.DoRA):  # whose gradient holds its norms constant, and is no derivative
        torch.testing.assert_close(forwards, sum(g.square().sum() for g in grads.values()))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x)
    for name, g in each.items():
        torch.testing.assert_close(g.sum(0), grads[name])


def test_autocast_stays_out_of_hand_written_backwards():
    """A backward pass inside the autocast block is that of the types it saved."""
    z = torch.rand(5, 2, requires_grad=True)
    model, x = trained(undula.LoRA(r=4), "linear")
    own = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    want = torch.autograd.grad(y, own, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, own, torch.ones_like(y))
        basis(z, 5, 3, -1.0, 1.0).sum().backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_auroras_start_is_xavier_normal():
    torch.manual_seed(0)
    H = undula.AuroRA(r=400).init(site("l", view(nn.Linear(400, 400))))["H"]
    assert abs(float(H.std()) * 20 - 1) < 0.01


def test_the_padding_row_gets_no_gradient():
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2))
    adapter = undula.attach(model, undula.LoRA(r=2), "*")
    nn.init.normal_(adapter.factors["0"]["B"])
    model(torch.arange(9)).sum().backward()
    g = adapter.factors["0"]["A"].grad
    assert not g[:, 2].any()
    assert g.any(0).sum() == 8


@pytest.mark.parametrize("modes", range(1, 10))
def test_perfect_powers_are_split_into_their_roots(modes):
    for root in range(2, 12):
        assert tera.split(root**modes, modes) == (root,) * modes


def test_a_dropout_rate_that_would_be_none_is_refused():
    with pytest.raises(ValueError, match="none at all"):
        undula.Dropout(undula.LoRA(), 1e-6)
    assert undula.Dropout(undula.LoRA(), 0.0).p == 0.0
