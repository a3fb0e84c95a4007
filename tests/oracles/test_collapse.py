"""collapse against closed forms: Eckart-Young, torch.linalg.lstsq, planted maps, and AuroRA's toy."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from tests.support.layers import Conv1D, net
from tests.support.numbers import shake
from tests.support.zoo import LOW_RANK, MERGEABLE
from undula import (
    AuroRA,
    DoRA,
    Dropout,
    LeastSquares,
    LoRA,
    LoRAN,
    Substitute,
    Truncate,
    collapse,
)
from undula.compress import Exact, Randomised
from undula.host.views import view
from undula.kernels import svd
from undula.methods.activations import Sinter
from undula.observe import listen

pytestmark = pytest.mark.usefixtures("made_up_evidence", "float64")


def each(methods):
    return pytest.mark.parametrize("m", methods, ids=[repr(m) for m in methods])


def adapted(m, model=None, where="*"):
    model = (model or net()).eval()
    shake(undula.attach(model, m, where=where))
    return model


def data(count=3, size=64, shift=0.0):
    return [torch.randn(size, 12) + shift for _ in range(count)]


BENT = LoRAN(r=3, activation=Sinter(a=1.0, w=30.0))


# Truncation


@each(MERGEABLE)
def test_truncation_is_the_best_there_is(m):
    """Every mergeable method at every rank, wrappers and DoRA included, against the exact SVD of W' - W."""
    model = adapted(m)
    adapter = undula.selected(model)
    for r in (1, 3, 12):
        done = collapse(model, Truncate(r, Exact()))
        for site, f in adapter.factors.items():
            W = model.get_submodule(site).weight.detach()
            delta = (adapter.methods[site].weight(W, f) - W).detach()
            s = torch.linalg.svdvals(delta)
            torch.testing.assert_close((done.adapter.delta(site) - delta).norm(), s[r:].norm())
            assert done.errors[site] == pytest.approx(float(s[r:].norm() / s.norm()), abs=1e-12)


def test_factors_give_the_svd_without_the_matrix():
    """Also where the stacked rank exceeds the matrix's."""
    for R in (3, 40):
        B, A = torch.randn(16, R), torch.randn(R, 12)
        U, s, V = svd.factored(B, A)
        torch.testing.assert_close(s, torch.linalg.svdvals(B @ A)[: len(s)])
        torch.testing.assert_close(U * s @ V.T, B @ A)
        torch.testing.assert_close(svd.factored_values(B, A), s)


@pytest.mark.parametrize(("shape", "r"), [((600, 600), 4), ((600, 600), 32), ((400, 1600), 16), ((600, 600), 64)])
def test_randomised_svd_keeps_its_promise_on_noise(shape, r):
    """The hardest spectrum there is; more ranks take more columns."""
    M = torch.randn(shape)
    u, t, v = Randomised()(M, r)
    best = torch.linalg.svdvals(M)[r:].norm()
    assert best * (1 - 1e-12) <= (M - u * t @ v.T).norm() <= 1.003 * best


def test_randomised_svd_reaches_the_optimum():
    """On a hard spectrum (flat tail) within a thousandth, on a falling one exactly; seeded, no one's state moves."""
    U, V = (torch.linalg.qr(torch.randn(400, 400)).Q for _ in range(2))
    flat = torch.cat([torch.ones(8), torch.full((392,), 0.3)])
    for s, excess in ((1 / torch.arange(1, 401) ** 2, 1e-9), (flat, 1e-3)):
        M, before = U * s @ V.T, torch.get_rng_state()
        u, t, v = Randomised()(M, 8)
        miss = (M - u * t @ v.T).norm()
        assert s[8:].norm() * (1 - 1e-12) <= miss <= s[8:].norm() * (1 + excess)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(Randomised()(M, 8)[1], t)
        assert not torch.equal(Randomised(seed=1)(M, 8)[0], u)


def test_truncation_keeps_the_rest_and_changes_nothing():
    """`full` stays, the adapter given stays live and selected, and the result is a plain LoRA with scale 1."""
    model, x = net().train(), data()[0]
    adapter = undula.attach(model, LoRA(r=4, alpha=20.0), full=["2.weight"])
    shake(adapter)
    y, before = model(x), {k: t.clone() for k, t in model.state_dict().items()}
    done = collapse(model, Truncate(2), held_out=[x], evaluate=lambda m: float(m(x).sum()))
    assert undula.selected(model) is adapter
    assert list(undula.adapters(model)) == ["default"]
    assert all(module.training for module in model.modules())
    assert torch.equal(model(x), y)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert set(done.adapter.methods.values()) == {LoRA(r=2, alpha=2.0)}
    assert torch.equal(done.adapter.full["2.weight"], adapter.full["2.weight"])
    assert done.adapter.full["2.weight"] is not adapter.full["2.weight"]
    assert all(t.requires_grad and t.is_leaf for t in done.adapter.parameters())
    assert done.metric[0] == y.sum().item() != done.metric[1]


def test_more_rank_than_there_is_costs_nothing():
    adapter = undula.selected(adapted(LoRA(r=2)))
    done = collapse(adapter, Truncate(50))
    assert {f["A"].shape[0] for f in done.adapter.factors.values()} == {2}
    for site in adapter.factors:
        torch.testing.assert_close(done.adapter.delta(site), adapter.delta(site))
    assert done.error < 1e-14


def test_untrained_is_exactly_nothing():
    done = collapse(undula.attach(net(), LoRA(r=2)), Truncate(2))
    assert done.error == 0.0
    assert set(done.errors.values()) == {0.0}
    assert all(torch.isfinite(t).all() for _, _, t in done.adapter.tensors())


def test_convolutions_and_embeddings_truncate():
    for layer, x in (
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 6, 6)),
        (nn.Conv1d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9)),
        (nn.Embedding(11, 6), torch.randint(0, 11, (3, 5))),
    ):
        model = adapted(BENT, nn.Sequential(layer))
        done = collapse(model, Truncate(11), held_out=[x])
        assert done.errors["0"] < 1e-12  # full rank: the errors at the site are measured in the layer's own layout
        assert done.error < 1e-12
        assert collapse(model, Truncate(2), held_out=[x]).errors["0"] > 1e-3


# Least squares


@each(MERGEABLE)
def test_least_squares_recovers_linear_methods(m):
    """What is a matrix comes back as that matrix, at full rank: the fit sees the adapter's own change alone."""
    model, calibration = adapted(m), data(shift=0.5)
    done = collapse(model, LeastSquares(16, calibration, ridge=0.0), held_out=data(1))
    assert done.error < 1e-9
    for site, f in undula.selected(model).factors.items():
        W = model.get_submodule(site).weight.detach()
        torch.testing.assert_close(done.adapter.delta(site), (m.weight(W, f) - W).detach())


@each(LOW_RANK[:1])
def test_least_squares_recovers_a_planted_map_from_few_data(m):
    """Rank 3 of 12 x 16, on the inputs' own subspace, at the planted rank."""
    model = adapted(LoRA(r=3))
    done = collapse(model, LeastSquares(3, data(1, 40), ridge=0.0), held_out=data(1))
    assert max(done.errors.values()) < 1e-9


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [False, True])
def test_least_squares_is_lstsq(kind, bias):
    """At full rank against torch.linalg.lstsq on [x 1]; with a ridge against the normal equations."""
    model = nn.Sequential(nn.Linear(12, 16) if kind == "linear" else Conv1D(16, 12))
    model, calibration = adapted(AuroRA(r=3), model), data(2, 50, shift=0.7)
    X = torch.cat(calibration)
    undula.select(model, None)
    base = model(X)
    undula.select(model, "default")
    U = (model(X) - base).detach()
    ones = torch.ones(len(X), 1 if bias else 0)
    want = torch.linalg.lstsq(torch.cat([X, ones], 1), U).solution.T
    done = collapse(model, LeastSquares(12, calibration, ridge=0.0, bias=bias))
    torch.testing.assert_close(done.adapter.delta("0"), want[:, :12])
    assert done.errors["0"] == pytest.approx(float((torch.cat([X, ones], 1) @ want.T - U).norm() / U.norm()))
    assert done.measured_on.startswith("the calibration data")
    if bias:
        torch.testing.assert_close(done.adapter.full["0.bias"], model[0].bias + want[:, 12])
    Xc, Uc = (X - X.mean(0), U - U.mean(0)) if bias else (X, U)
    S = Xc.T @ Xc / len(X)
    ridged = torch.linalg.solve(S + 0.1 * S.diagonal().mean() * torch.eye(12), Xc.T @ Uc / len(X)).T
    done = collapse(model, LeastSquares(12, calibration, ridge=0.1, bias=bias))
    torch.testing.assert_close(done.adapter.delta("0"), ridged)


class Below(nn.Conv2d):
    """Pads by itself, and not evenly, as TensorFlow does."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1), Below(3, 8, 2), nn.Conv1d(3, 8, 3, padding=1)]
)
def test_least_squares_on_convolutions_is_lstsq_on_patches(conv):
    """At full rank against torch.linalg.lstsq on the patches that F.unfold gives; a linear method comes back whole."""
    model = adapted(AuroRA(r=3), nn.Sequential(copy.deepcopy(conv).double()))
    x = torch.randn(4, conv.in_channels, *(40,) if isinstance(conv, nn.Conv1d) else (7, 7)) + 0.5
    padded = F.pad(x, (0, 1, 0, 1)) if isinstance(conv, Below) else x
    if isinstance(conv, nn.Conv1d):
        X = F.unfold(x[:, :, None], (1, *conv.kernel_size), padding=(0, *conv.padding)).mT.flatten(0, 1)
    else:
        X = F.unfold(padded, conv.kernel_size, padding=conv.padding, stride=conv.stride).mT.flatten(0, 1)
    undula.select(model, None)
    base = model(x)
    undula.select(model, "default")
    U = (model(x) - base).detach().flatten(2).mT.flatten(0, 1)
    want = torch.linalg.lstsq(X, U).solution.T
    done = collapse(model, LeastSquares(27, [x], ridge=0.0))
    torch.testing.assert_close(done.adapter.delta("0"), want)
    assert done.errors["0"] == pytest.approx(float((X @ want.T - U).norm() / U.norm()))
    held = collapse(model, LeastSquares(27, [x], ridge=0.0), held_out=[x])
    assert held.errors["0"] == pytest.approx(done.errors["0"])
    linear = adapted(BENT, nn.Sequential(nn.Conv2d(3, 8, 3)))
    back = collapse(linear, LeastSquares(27, [torch.randn(8, 3, 9, 9)], ridge=0.0))
    torch.testing.assert_close(back.adapter.delta("0"), undula.selected(linear).delta("0"))


def test_no_other_map_of_the_rank_fits_better():
    """The optimum of reduced-rank regression: the gradient of the loss in both factors vanishes, and truncating dW
    instead, which is blind to the inputs, does worse on them."""
    model = adapted(BENT, nn.Sequential(nn.Linear(12, 16)))
    X = torch.randn(200, 12) @ torch.diag(torch.logspace(0, -2, 12)) @ torch.linalg.qr(torch.randn(12, 12)).Q
    done = collapse(model, LeastSquares(2, [X], ridge=0.0))
    f = done.adapter.factors["0"]
    U = X @ undula.selected(model).delta("0").T
    loss = (X @ f["A"].T @ f["B"].T - U).square().sum()
    for g, t in zip(torch.autograd.grad(loss, [f["A"], f["B"]]), [f["A"], f["B"]], strict=True):
        assert g.norm() * t.norm() < 1e-9 * U.square().sum()
    assert done.errors["0"] == pytest.approx(float(loss.detach().sqrt() / U.norm()))
    assert done.errors["0"] < 0.7 * collapse(model, Truncate(2), held_out=[X]).errors["0"]


def test_the_whole_model_counts_from_the_base():
    """`error` is |new - own| / |own - base| of the outputs, with a head trained in full on all three."""
    model, X = net().eval(), data(1)[0]
    adapter = undula.attach(model, AuroRA(), where=["0"], full=["2.weight"])
    shake(adapter)
    calibration = data()
    done = collapse(model, LeastSquares(2, calibration), held_out=[X[:20], X[20:]])
    own = model(X)
    head = adapter.full["2.weight"]
    undula.detach(model)
    base = F.linear(model[1](model[0](X)), head)
    undula.attach(model, done.adapter)
    torch.testing.assert_close(done.error, float(((model(X) - own).norm() / (own - base).norm()).detach()))


def test_one_pass_and_only_moments():
    """The model is called once per calibration batch, and no activation of a batch outlives it."""
    model, tokens = adapted(AuroRA()), [31, 37, 41, 43]
    calls, left = [], []

    def look(module, inputs):
        gc.collect()
        gone = set(tokens[: len(calls)])
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t not in held]
        left.extend(t.shape for t in tensors if gone & set(t.shape))
        calls.append(1)

    class Held(list):
        def __contains__(self, t):
            return any(t is h for h in self)

    held = Held([torch.randn(n, 12) for n in tokens])
    handle = model.register_forward_pre_hook(look)
    collapse(model, LeastSquares(2, list(held)))
    handle.remove()
    assert len(calls) == len(tokens)
    assert left == []


def test_little_memory_means_more_passes_and_the_same_result():
    model, calibration = adapted(AuroRA()), data()
    once = collapse(model, LeastSquares(2, calibration))
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    twice = collapse(model, LeastSquares(2, calibration, memory=1))
    assert len(calls) == 2 * len(calibration)
    handle.remove()
    for site in once.errors:
        torch.testing.assert_close(once.adapter.delta(site), twice.adapter.delta(site))
    with pytest.raises(ValueError, match="gone through 2 times: give a list or a DataLoader"):
        collapse(model, LeastSquares(2, iter(calibration), memory=1))
    one_shot = collapse(model, LeastSquares(2, iter(calibration)), held_out=iter(calibration))
    assert torch.equal(one_shot.adapter.delta("0"), once.adapter.delta("0"))


class Masked(nn.Module):
    """A model that takes dicts, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x, attention_mask=None):
        return {"loss": torch.zeros(()), "logits": self.head(torch.tanh(self.body(x)))}


def test_padding_does_not_count():
    model = adapted(AuroRA(), Masked())
    x, mask = torch.randn(4, 9, 12), torch.arange(9) < torch.tensor([9, 3, 5, 1])[:, None]
    padded = torch.where(mask[..., None], x, 100.0)
    rows = [{"x": x[mask]}]  # the same positions without padding
    batch = [{"x": padded, "attention_mask": mask.long()}]
    want, got = (collapse(model, LeastSquares(2, b), held_out=b) for b in (rows, batch))
    for site in want.errors:
        torch.testing.assert_close(got.adapter.delta(site), want.adapter.delta(site))
        assert got.errors[site] == pytest.approx(want.errors[site])
    assert got.error == pytest.approx(want.error)
    unmasked = collapse(model, LeastSquares(2, [{"x": padded}]))
    assert not torch.allclose(unmasked.adapter.delta("body"), want.adapter.delta("body"))


def test_batches_of_every_kind():
    x = torch.randn(20, 12)
    model = adapted(AuroRA(), Masked())
    want = collapse(model, LeastSquares(2, [x])).adapter
    for batch in ((x,), [x], {"x": x}, (x, torch.ones(20, 12))):
        got = collapse(model, LeastSquares(2, [batch])).adapter
        assert torch.equal(got.delta("body"), want.delta("body"))


def test_low_precision_is_measured_without_its_rounding():
    """On a bf16 base the fit still recovers a small linear adapter: u is not the difference of two bf16 outputs."""
    torch.set_default_dtype(torch.float32)
    model = net().bfloat16().eval()
    adapter = undula.attach(model, LoRA(r=2), where="*")
    with torch.no_grad():
        for f in adapter.factors.values():
            f["B"].normal_(std=1e-4)
    done = collapse(model, LeastSquares(2, [torch.randn(64, 12).bfloat16() for _ in range(4)], ridge=1e-12))
    for site in done.errors:
        own = adapter.delta(site)
        assert (done.adapter.delta(site) - own).norm() < 1e-3 * own.norm()


# AuroRA on inputs of non-zero mean


@pytest.fixture(scope="module")
def toy():
    """AuroRA (64 -> 64, r = 2, alpha = 4) trained on a linear map of rank 4, inputs of mean 1."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    M, model = torch.randn(64, 4) @ torch.randn(4, 64) / 16, nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    adapter = undula.attach(model, AuroRA(r=2, alpha=4.0), where="*")
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 800)
    for _ in range(800):
        x = torch.randn(64, 64) + 1.0
        loss = F.mse_loss(model(x), x @ M.T) / (x @ M.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    X = torch.randn(4096, 64) + 1.0

    def task_error(model):
        with torch.no_grad():
            return float((model(X) - X @ M.T).square().mean() / (X @ M.T).square().mean())

    return model, [torch.randn(1024, 64) + 1.0 for _ in range(4)], [X], task_error


def test_substitution_fails_where_inputs_have_a_mean(toy):
    """The paper's deployment ruins the adapter, and says so; least squares keeps what it learned."""
    model, calibration, held_out, task_error = toy
    plain = collapse(model, Substitute(), held_out=held_out, evaluate=task_error)
    before, after = plain.metric
    assert before < 0.35
    assert after > 5
    assert plain.error > 5
    fit = collapse(model, LeastSquares(2, calibration), held_out=held_out, evaluate=task_error)
    assert fit.metric[0] == before
    assert fit.metric[1] < before + 0.02
    assert fit.error < 0.15
    assert fit.errors["0"] == pytest.approx(fit.error, rel=1e-4)  # one layer: site and model are the same


def test_a_bias_takes_up_the_constant(toy):
    """sigma(0) != 0: the dynamic form carries a constant that no matrix gives; a shift of the layer's bias does."""
    model, calibration, held_out, task_error = toy
    without = collapse(model, LeastSquares(2, calibration), held_out=held_out)
    done = collapse(model, LeastSquares(2, calibration, bias=True), held_out=held_out, evaluate=task_error)
    assert done.error < 0.1 * without.error
    assert done.errors["0"] == pytest.approx(done.error, rel=1e-3)
    assert abs(done.metric[1] - done.metric[0]) < 0.005
    twin = copy.deepcopy(model)
    undula.detach(twin)
    undula.attach(twin, done.adapter)
    undula.merge(twin)
    assert task_error(twin) == pytest.approx(done.metric[1], rel=1e-4)  # the shift leaves with the merged model


def test_substitution_is_exact_where_it_may_be():
    """sigma affine without a constant would be; LowRank sites are: they stay as they are, bit for bit."""
    model = net().eval()
    adapter = undula.attach(model, Dropout(AuroRA(), 0.5), overrides={"2": LoRA(r=3)}, where="*")
    shake(adapter)
    done = collapse(model, Substitute(), held_out=data())
    assert done.errors["2"] < 1e-15
    B, A = AuroRA().static_pair(adapter.factors["0"])
    assert torch.equal(done.adapter.delta("0"), (B @ A).detach())
    assert collapse(undula.selected(adapted(LoRA(r=3))), Substitute()).error == 0.0


# Refusals


def test_refusals_say_what_is_needed():
    model, x = adapted(AuroRA()), data()
    adapter = undula.selected(model)
    with pytest.raises(TypeError, match=r"at 0 stands on the rung Method.*Use LeastSquares\(r, calibration\)"):
        collapse(model, Truncate(2))
    with pytest.raises(ValueError, match=r"Substitute\(\) cannot tell its own error: give held_out"):
        collapse(model, Substitute())
    with pytest.raises(TypeError, match="LeastSquares runs the adapted model"):
        collapse(adapter, LeastSquares(2, x))
    with pytest.raises(TypeError, match="held_out and evaluate need a model"):
        collapse(adapter, Substitute(), held_out=x)
    with pytest.raises(ValueError, match="layer 2 has no bias"):
        collapse(model, LeastSquares(2, x, bias=True))
    with pytest.raises(ValueError, match="never reached 0, 2: is it empty"):
        collapse(model, LeastSquares(2, []))
    with pytest.raises(ValueError, match="held_out holds no batches"):
        collapse(model, LeastSquares(2, x), held_out=[])
    with pytest.raises(ValueError, match=r"do not span their 12 dimensions \(5 positions were seen\)"):
        collapse(model, LeastSquares(2, [x[0][:5]], ridge=0.0))
    with pytest.raises(ValueError, match="at least 1"):
        Truncate(0)
    with pytest.raises(ValueError, match="ridge is at least 0"):
        LeastSquares(2, x, ridge=-1.0)
    with pytest.raises(LookupError, match="no adapter is selected"):
        collapse(net(), Truncate(2))


def test_refusals_by_site():
    words = adapted(LoRA(r=2), nn.Sequential(nn.Embedding(11, 6)))
    with pytest.raises(TypeError, match="linear layers and convolutions; 0 is a Embedding"):
        collapse(words, LeastSquares(2, [torch.randint(0, 11, (3, 5))]))
    grouped = adapted(BENT, nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)))
    with pytest.raises(TypeError, match="0 is a convolution in 2 groups"):
        collapse(grouped, Truncate(2))
    with pytest.raises(TypeError, match=r"at 0 has no static form.*Use Truncate\(r\)"):
        collapse(adapted(BENT), Substitute())
    dora = adapted(DoRA(LoRA(r=2)))
    with pytest.raises(TypeError, match="only together with its base: give the model"):
        collapse(undula.selected(dora), Truncate(2))
    undula.merge(dora)
    with pytest.raises(RuntimeError, match="unmerge it before collapsing"):
        collapse(dora, Truncate(2))


def test_a_failing_evaluation_leaves_the_model_alone():
    model = adapted(LoRA(r=2))

    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collapse(model, Truncate(1), evaluate=fail)
    assert list(undula.adapters(model)) == ["default"]
    assert undula.selected(model) is undula.adapters(model)["default"]


def test_the_original_is_not_held():
    """The result is a value of its own: the original adapter can be freed."""
    model = adapted(AuroRA())
    done = collapse(model, LeastSquares(2, data()), held_out=data())
    ref = weakref.ref(next(iter(undula.selected(model).factors.values()))["A"])
    undula.detach(model)
    gc.collect()
    assert ref() is None
    assert done.adapter.num_parameters() == 2 * (12 + 16) + 2 * (16 + 8)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1e-1, 1e-4])
def test_the_error_of_a_narrow_models_outputs_is_that_in_float32(narrow, std):
    """However small the update is against the steps of the type; the model comes back as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24)).to(narrow).eval()
    adapter = undula.attach(model, LoRA(r=2), ["0"])
    with torch.no_grad():
        adapter.factors["0"]["B"].normal_(std=std)
    x = torch.randn(64, 16).to(narrow)
    tensors = {n: (p, p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    got = collapse(model, Truncate(1), held_out=[x])
    assert {n: (p, p.data_ptr(), p.dtype) for n, p in model.named_parameters()} == tensors
    want = collapse(model.float(), Truncate(1), held_out=[x.float()])
    assert got.error == pytest.approx(want.error, rel=1e-4)
    assert 0.1 < want.error < 1


def test_outputs_that_a_model_makes_narrow_are_said_to_be_rounding():
    class Narrow(nn.Sequential):
        def forward(self, x):
            return super().forward(x).bfloat16()

    model = Narrow(nn.Linear(16, 24)).float().eval()
    adapter = undula.attach(model, LoRA(r=2), ["0"])
    with torch.no_grad():
        adapter.factors["0"]["B"].normal_(std=1e-4)
    with pytest.warns(
        UserWarning, match="the error of the model's outputs is mostly rounding: they are in torch.bfloat16"
    ):
        collapse(model, Truncate(1), held_out=[torch.randn(64, 16, dtype=torch.float32)])


@pytest.mark.parametrize(
    ("make", "bias", "message"),
    [
        (lambda: torch.full((40, 12), float("nan")), False, "0: .*hold NaN or infinity"),
        (lambda: torch.zeros(40, 12), False, "0: .*all zero"),
        (lambda: torch.ones(40, 12), True, r"0: .*the same at all 40 positions.*bias=False"),
        (lambda: torch.randn(1, 12), False, None),
    ],
)
def test_calibration_that_no_ridge_helps_is_told_apart(make, bias, message):
    """One position under a ridge is little data, but no fault."""
    model = adapted(LoRA(r=2), nn.Sequential(nn.Linear(12, 9)))
    if message is None:
        collapse(model, LeastSquares(2, [make()], bias=bias))
        return
    with pytest.raises(ValueError, match=message):
        collapse(model, LeastSquares(2, [make()], bias=bias))


def test_what_looks_at_a_model_leaves_its_modes_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[1].eval()
    with listen.evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_change_is_heard_as_it_is_and_not_as_a_narrow_output_rounds_it():
    heard, m = [], LoRA(r=2)
    layer, x = view(nn.Linear(6, 4).bfloat16().eval()), torch.randn(3, 6).bfloat16()
    f = {"A": torch.randn(2, 6, dtype=torch.float32), "B": 1e-3 * torch.randn(4, 2, dtype=torch.float32)}
    listen.ChangeRecorder(m, lambda layer, x, u: heard.append(u)).forward(x, layer, f)
    torch.testing.assert_close(heard[0], x.float() @ m.delta(f).T)
