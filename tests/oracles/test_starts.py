"""Starts against their papers' algebra, written a second time, and against PEFT where PEFT has them."""

import copy
import math

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import undula
from tests.support.bases import BASES
from undula import Centred, Dropout, LoRA, LoRAN, Probe
from undula.host import quantised
from undula.host.views import site, view
from undula.kernels.solver import Exact, Randomised
from undula.starts import (
    EVA,
    A2rBr,
    ArB2r,
    ArBr,
    FullStep,
    Gaussian,
    Kaiming,
    LoRAGA,
    LoRASB,
    MiLoRA,
    OfWeight,
    OLoRA,
    Orthogonal,
    PiSSA,
    Shuffled,
    Stable,
    Start,
    Unit,
    explained,
)
from undula.starts.first_step import first_step

pytestmark = pytest.mark.usefixtures("float64")

O, I, R = 12, 10, 3
EVERY = [Orthogonal(), PiSSA(), PiSSA(Randomised()), MiLoRA(), OLoRA(), LoRAGA(), LoRASB(), EVA()]
each = pytest.mark.parametrize("start", EVERY, ids=repr)


class Told:
    """Evidence that is given."""

    def __init__(self, G=None, x=None):
        self.G, self.x = G, x

    def gradient(self, name):
        return self.G

    def moments(self, name):
        return self.x.T @ self.x, self.x.sum(0), len(self.x)


def where(module=None, G=None, x=None):
    place = site("l", view(nn.Linear(I, O) if module is None else module))
    O_, I_ = place.shape
    G = torch.randn(O_, I_) if G is None else G
    x = torch.randn(40, I_) if x is None else x
    return type(place)(**{**vars(place), "evidence": Told(G, x)})


def regression(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(I, 14), nn.Tanh(), nn.Linear(14, O)).to(dtype)
    return model, torch.randn(30, I, dtype=dtype), torch.randn(30, O, dtype=dtype)


def probed(x, target, **options):
    return Probe([(x, target)], loss=lambda m, b: F.mse_loss(m(b[0]), b[1]), **options)


def best(M, r):
    """Eckart-Young, by numpy."""
    U, s, Vh = np.linalg.svd(np.asarray(M))
    return torch.from_numpy(U[:, :r] * s[:r] @ Vh[:r])


# The algebra of each


@pytest.mark.parametrize("s", [1.0, 2.5])
def test_orthogonal(s):
    """Whatever the method's scale: with B = 0 there is nothing to make up for."""
    B, A = Orthogonal()(where(), R, s)
    torch.testing.assert_close(A @ A.T, torch.eye(R))
    assert not B.any()
    again = Orthogonal()(where(), R)[1]
    assert not torch.allclose(A.T @ A, again.T @ again)  # another subspace each time


@pytest.mark.parametrize("solver", [Exact(), Randomised()], ids=repr)
@pytest.mark.parametrize("s", [1.0, 2.5])
def test_pissa_is_the_best_approximation_of_w(solver, s):
    place = where()
    B, A = PiSSA(solver)(place, R, s)
    torch.testing.assert_close(s * B @ A, best(place.W, R))
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    values = np.linalg.svd(place.W.numpy(), compute_uv=False)
    np.testing.assert_allclose(B.T @ B, np.diag(values[:R]) / s, atol=1e-12)


def falling(O, I):
    """A layer whose singular values are 4, 2, 1, 1/2 ..."""
    layer = nn.Linear(I, O)
    with torch.no_grad():
        U, s, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(U * (4 * 0.5 ** torch.arange(len(s))) @ Vh)
    return layer


def test_randomised_pissa_of_a_large_matrix_is_the_exact_one():
    place = where(falling(300, 200))
    (B, A), (B2, A2) = PiSSA()(place, 4), PiSSA(Randomised())(place, 4)
    torch.testing.assert_close(B2 @ A2, B @ A)
    assert not torch.equal(B2 @ A2, B @ A)


def test_milora_is_the_tail_of_the_spectrum():
    place = where()
    B, A = MiLoRA()(place, R, 2.0)
    tail = np.linalg.svd(place.W.numpy(), compute_uv=False)[-R:]
    np.testing.assert_allclose(np.linalg.norm(2.0 * B @ A), np.linalg.norm(tail))
    torch.testing.assert_close(place.W - 2.0 * B @ A, best(place.W, min(O, I) - R))
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


@pytest.mark.parametrize(("wide", "high"), [(I, O), (O, I)])
def test_olora_is_the_first_columns_of_the_whole_decomposition(wide, high):
    place = where(nn.Linear(wide, high))
    Q, upper = np.linalg.qr(place.W.numpy())
    B, A = OLoRA()(place, R)
    np.testing.assert_allclose(B, Q[:, :R])
    np.testing.assert_allclose(A, upper[:R], atol=1e-14)
    columns = place.W[:, :R]
    onto = columns @ torch.linalg.solve(columns.T @ columns, columns.T)  # the projection, another way
    torch.testing.assert_close(B @ A, onto @ place.W)


@pytest.mark.parametrize(
    ("directions", "b", "a"),
    [(ArB2r(), [3, 4, 5], [0, 1, 2]), (A2rBr(), [0, 1, 2], [3, 4, 5]), (ArBr(), [0, 2, 4], [1, 3, 5])],
)
def test_loraga_directions(directions, b, a):
    place = where()
    U, _, Vh = np.linalg.svd(place.evidence.G.numpy())
    z = O**0.25 / 4  # gamma = 16
    B, A = LoRAGA(directions)(place, R)
    np.testing.assert_allclose(np.abs(U[:, b].T @ B.numpy()), z * np.eye(R), atol=1e-12)
    np.testing.assert_allclose(np.abs(Vh[a] @ A.numpy().T), z * np.eye(R), atol=1e-12)
    # signs are those of one decomposition: u_i' G v_i > 0 for every i
    U_B, V_A = Exact()(place.evidence.G, 2 * R)[::2]
    torch.testing.assert_close(B, U_B[:, b] * z)
    torch.testing.assert_close(A, V_A[:, a].T * z)


def test_loraga_shuffled_halves():
    b, a = Shuffled(seed=1)(5, "model.q")
    assert sorted(b + a) == list(range(10))
    assert (b, a) == Shuffled(seed=1)(5, "model.q")
    assert len({tuple(sorted(Shuffled(seed=1)(5, n)[0])) for n in "abcdef"}) > 1
    assert (b, a) != Shuffled(seed=2)(5, "model.q")


def test_loraga_magnitudes():
    place = where()
    values = np.linalg.svd(place.W.numpy(), compute_uv=False)
    want = {
        Stable(): O**0.25 / 4,
        Stable(gamma=4.0): O**0.25 / 2,
        Unit(): 1,
        FullStep(): 1 / 2.5,
        OfWeight(): np.sqrt(values[:R] / 2.5).mean(),
    }
    for magnitude, z in want.items():
        B, A = LoRAGA(magnitude=magnitude)(place, R, 2.5)
        np.testing.assert_allclose(B.norm(dim=0), z)
        np.testing.assert_allclose(A.norm(dim=1), z)


def first_move(model, method, x, target, mu, **options):
    """(the update's move in the first SGD step, per layer; the gradients at the base)."""
    before = {n: model[int(n)].weight.detach().clone() for n in ("0", "2")}
    loss = F.mse_loss(model(x), target)
    G = dict(zip(("0", "2"), torch.autograd.grad(loss, [model[0].weight, model[2].weight]), strict=True))
    adapter = undula.attach(model, method, **options)
    F.mse_loss(model(x), target).backward()
    at_start = {n: adapter.delta(n).detach() for n in before}
    with torch.no_grad():
        for p in adapter.parameters():
            p.sub_(mu * p.grad)
    return {n: adapter.delta(n).detach() - at_start[n] for n in before}, G


@pytest.mark.parametrize("directions", [ArB2r(), A2rBr(), ArBr(), Shuffled()], ids=repr)
@pytest.mark.parametrize("magnitude", [Stable(), FullStep()], ids=repr)
def test_loraga_first_step_is_the_gradients_best_approximation(directions, magnitude):
    """-mu (s z)^2 G_2r, to first order in mu; and plain LoRA's is not of that kind."""
    model, x, target = regression()
    m = LoRA(r=R, alpha=4.0, scaling=undula.RankStabilised())
    s, mu = 4.0 / math.sqrt(R), 1e-6
    start = LoRAGA(directions, magnitude)
    moves, G = first_move(model, Centred(m, start), x, target, mu, probe=probed(x, target))
    for n, move in moves.items():
        sz = 1.0 if magnitude == FullStep() else s * G[n].shape[0] ** 0.25 / 4
        torch.testing.assert_close(move, -mu * sz**2 * best(G[n], 2 * R), rtol=1e-4, atol=mu * 1e-5)
    undula.detach(model)
    plain, _ = first_move(model, m, x, target, mu)
    for n, move in plain.items():
        want = best(G[n], 2 * R)
        cosine = -(move * want).sum() / move.norm() / want.norm()
        assert cosine < 0.9
        assert torch.linalg.matrix_rank(move, rtol=1e-3) == R


def test_lorasb_start_is_the_first_adam_step():
    """Eckart-Young: it misses the step by the tail of the step's spectrum; and Adam itself takes this step."""
    place = where()
    W = nn.Parameter(torch.zeros(O, I))
    W.grad = place.evidence.G.clone()
    torch.optim.Adam([W], lr=0.01).step()
    B, A = LoRASB(eta=0.01)(place, R, 2.0)
    miss = np.linalg.norm(W.detach() - 2.0 * B @ A)
    tail = np.linalg.svd(W.detach().numpy(), compute_uv=False)[R:]
    np.testing.assert_allclose(miss, np.linalg.norm(tail), rtol=1e-4)  # Adam's epsilon
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    U, S, V = first_step(place, R, 0.01)
    torch.testing.assert_close(U * S @ V.T, best(-0.01 * np.sign(place.evidence.G.numpy()), R))
    torch.testing.assert_close(V.T @ V, torch.eye(R))


def test_eva_is_the_principal_components():
    from sklearn.decomposition import PCA

    x = torch.randn(50, I) @ torch.randn(I, I) + 5 * torch.randn(I)
    pca = PCA(R).fit(x.numpy())
    place = where(x=x)
    B, A = EVA()(place, R)
    np.testing.assert_allclose(np.abs(pca.components_ @ A.numpy().T), np.eye(R), atol=1e-9)
    torch.testing.assert_close(A @ A.T, torch.eye(R))
    assert not B.any()
    np.testing.assert_allclose(explained(place, R), pca.explained_variance_ratio_)
    mean = x.mean(0) / x.mean(0).norm()
    top = torch.linalg.svd(x).Vh[0]
    assert (top @ mean).abs() > 0.95 > (A[0] @ mean).abs()  # without the mean taken out it would be the mean


def test_eva_next_to_an_input_that_is_larger_by_far():
    """Language models have them: one channel of one token a thousand times larger than the rest."""
    torch.set_default_dtype(torch.float32)
    x = torch.randn(50, I) * torch.linspace(2, 1, I)
    x[0, 4] = 2000.0
    model = nn.Sequential(nn.Linear(I, O))
    A = undula.attach(model, Centred(LoRA(r=R), EVA()), probe=Probe([x])).factors["0"]["A"].detach().double()
    x = x.double() - x.double().mean(0)
    want = torch.linalg.svd(x).Vh[:R]
    torch.testing.assert_close((A @ want.T).abs(), torch.eye(R).double(), rtol=1e-5, atol=1e-5)


def test_eva_leaves_the_gradient_of_b_larger_than_a_random_start():
    """The paper's claim, on inputs that vary mostly in a few directions."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 20))
    x = torch.randn(200, 3) @ torch.randn(3, 40) + 0.05 * torch.randn(200, 40)
    target = torch.randn(200, 20)
    norms = {}
    for start in (EVA(), Orthogonal()):
        adapter = undula.attach(model, Centred(LoRA(r=R), start), probe=probed(x, target))
        F.mse_loss(model(x), target).backward()
        norms[start] = adapter.factors["0"]["B"].grad.norm()
        undula.detach(model)
    assert norms[EVA()] > 2 * norms[Orthogonal()]


# What all have in common


@each
def test_the_scale_of_the_method_is_known_to_the_start(start):
    """Through LoRA(r=3, alpha=9), s = 3: the starts that aim at a matrix hit it."""
    place = where()
    m = LoRA(r=R, alpha=9.0)
    torch.manual_seed(3)
    f = m.init(place, start)
    torch.manual_seed(3)
    B, A = start(place, R, 3.0)
    assert torch.equal(f["B"], B)
    assert torch.equal(f["A"], A)
    if isinstance(start, PiSSA | MiLoRA | LoRASB):
        torch.testing.assert_close(m.delta(f), start(place, R)[0] @ start(place, R)[1])


@each
def test_on_every_kind_of_layer_the_model_is_unchanged_until_it_trains(start):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.linear = nn.Linear(8, 7, bias=False)
            self.transposed = Conv1D(10, 7)
            self.conv = nn.Conv2d(10, 6, 3, padding=1)

        def forward(self, ids):
            y = torch.tanh(self.transposed(self.linear(self.table(ids))))
            return self.conv(y.movedim(-1, 1)[..., None].expand(-1, -1, -1, 3)).mean((2, 3))

    model, ids = Net(), torch.randint(0, 9, (12, 5))
    places = ["linear", "transposed", "conv"] + ([] if start == EVA() else ["table"])
    y, weights = model(ids), copy.deepcopy(model.state_dict())
    probe = Probe([ids], loss=lambda m, b: m(b).square().sum())
    adapter = undula.attach(model, Centred(LoRA(r=R), start), places, probe=probe)
    torch.testing.assert_close(model(ids), y)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        before = model(ids).square().sum()
        before.backward()
        optimiser.step()
    assert model(ids).square().sum() < y.square().sum()
    trained = model(ids)
    undula.merge(model)
    torch.testing.assert_close(model(ids), trained)
    undula.unmerge(model)
    undula.detach(model)
    for n, t in model.state_dict().items():
        assert torch.equal(t, weights[n])


def test_a_start_with_b_zero_has_nothing_to_count_out():
    for start in (Kaiming(), Orthogonal(), EVA()):
        assert start.at_base
        for inner in (LoRA(r=R), LoRAN(r=R)):
            m = Centred(inner, start)
            f = m.init(where())
            assert set(f) == {"A", "B"}
            f = {k: t.detach() + 0.1 for k, t in f.items()}
            torch.testing.assert_close(m.delta(f), inner.delta(f))
        assert Centred(LoRA(r=R), start).pair(f)[1].shape == (R, I)
        with pytest.raises(ValueError, match="could never learn"):
            Centred(LoRAN(activation=undula.activations.ReLU()), start).init(where())
    for start in (Gaussian(), PiSSA(), LoRAGA()):
        assert not start.at_base
        assert Centred(LoRA(r=R), start).pair(Centred(LoRA(r=R), start).init(where()))[1].shape == (2 * R, I)


@each
def test_shapes_are_known_without_numbers(start):
    """Loading an adapter learns them on the meta device, where no probe is."""
    place = where()
    B, A = start(place.outline(), R)
    assert B.device.type == A.device.type == "meta"
    assert (B.shape, A.shape) == ((O, R), (R, I))


@each
def test_factors_lie_as_they_will_after_loading(start):
    """In rows, one after another: products of other layouts round differently, and some are slow."""
    B, A = start(where(), R)
    assert B.is_contiguous()
    assert A.is_contiguous()


@each
def test_files(tmp_path, start):
    model, x, target = regression()
    adapter = undula.attach(model, Dropout(Centred(LoRA(r=R), start), 0.1), probe=probed(x, target))
    adapter.save(tmp_path)
    again = undula.Adapter.load(tmp_path)
    assert again.methods == adapter.methods
    y = model.eval()(x)
    undula.detach(model)
    undula.attach(model, again)
    torch.testing.assert_close(model(x), y)


@each
def test_a_matrix_that_is_too_small(start):
    needs = 8 if isinstance(start, LoRAGA) else 4
    place = where(nn.Linear(3, 20))
    with pytest.raises(ValueError, match=rf"at rank 4 needs {needs} directions at l, which is 20 x 3 and has 3"):
        start(place, 4)
    assert start(place, 1)[0].shape == (20, 1)
    with pytest.raises(ValueError, match="Give it a rank of"):
        start(place.outline(), 4)


def test_no_rank_is_small_enough():
    with pytest.raises(ValueError, match=r"needs 2 directions at l, .* has 1\. Leave it out of `where`"):
        LoRAGA()(where(nn.Linear(5, 1)), 1)


def test_starts_that_could_never_learn_are_refused():
    dead = nn.Linear(I, O)
    nn.init.zeros_(dead.weight)
    with pytest.raises(ValueError, match="B = A = 0 at l, which never learns: all singular values of W"):
        PiSSA()(where(dead), R)
    thin = nn.Linear(I, O)
    with torch.no_grad():
        thin.weight.copy_(torch.randn(O, 4) @ torch.randn(4, I))
    with pytest.raises(ValueError, match="the 3 smallest singular values of W are zero"):
        MiLoRA()(where(thin), R)
    with pytest.raises(ValueError, match="the gradients of the loss are zero"):
        LoRASB()(where(G=torch.zeros(O, I)), R)
    with pytest.raises(ValueError, match="vary in 2 over the probe's batches"):
        EVA()(where(x=torch.randn(3, I)), R)
    for wrong in (lambda: LoRASB(eta=0.0), lambda: Stable(gamma=0.0)):
        with pytest.raises(ValueError, match=r"is greater than 0, found 0\.0"):
            wrong()


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "torchao int8"])
@each
def test_over_a_quantised_base(base, start):
    """The matrix is the one that the base stands for; nothing is written into it."""
    torch.set_default_dtype(torch.float32)
    model = BASES[base](nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))).eval().requires_grad_(False)
    x, target = torch.randn(80, 64), torch.randn(80, 32)
    W = quantised.dense(model[0]).clone()
    y = model(x)
    adapter = undula.attach(model, Centred(LoRA(r=R, alpha=R), start), probe=probed(x, target))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(quantised.dense(model[0]), W)
    if isinstance(start, PiSSA):
        f = adapter.factors["0"]
        torch.testing.assert_close(f["B"] @ f["A"], best(W, R), rtol=1e-3, atol=1e-4)


# PEFT


def under_peft(model, how, r=R, alpha=6.0, **options):
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=how, **options)
    return peft.get_peft_model(copy.deepcopy(model), config)


def pair_of(wrapped, n):
    layer = wrapped.base_model.model[int(n)]
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


def descend(model, parameters, x, target):
    optimiser = torch.optim.SGD(parameters, lr=0.02)
    for _ in range(5):
        optimiser.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimiser.step()


@pytest.mark.parametrize(("start", "how"), [(PiSSA(), "pissa"), (OLoRA(), "olora")])
def test_exported_it_is_pefts_without_the_changed_base(tmp_path, start, how):
    """PEFT changes the base and trains over it; here a plain LoRA of rank 2r on the untouched base does the same."""
    torch.set_default_dtype(torch.float32)
    model, x, target = regression(torch.float32)
    untouched, theirs = copy.deepcopy(model), under_peft(model, how)
    adapter = undula.attach(model, Centred(LoRA(r=R, alpha=6.0), start))
    for n, f in adapter.factors.items():
        B, A = pair_of(theirs, n)
        torch.testing.assert_close(f["B"] @ f["A"], B @ A)
        torch.testing.assert_close(f["B"] @ f["B"].T, B @ B.T)
        changed = theirs.base_model.model[int(n)].base_layer.weight
        torch.testing.assert_close(changed, untouched[int(n)].weight - adapter.delta(n) - 2.0 * f["B"] @ f["A"])
    torch.testing.assert_close(model(x), theirs(x))
    descend(model, adapter.parameters(), x, target)
    descend(theirs, [p for p in theirs.parameters() if p.requires_grad], x, target)
    assert F.mse_loss(model(x), target) < F.mse_loss(untouched(x), target)
    torch.testing.assert_close(model(x), theirs(x))
    undula.io.export_lora(adapter, tmp_path)
    loaded = peft.PeftModel.from_pretrained(untouched, tmp_path)
    assert loaded.base_model.model[0].lora_A["default"].weight.shape == (2 * R, I)
    torch.testing.assert_close(loaded(x), theirs(x))


def test_randomised_pissa_is_pefts_fast_one():
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(falling(300, 200), nn.Tanh(), falling(150, 300))
    theirs = under_peft(model, "pissa_niter_16", r=4, alpha=4.0)
    f = LoRA(r=4, alpha=4.0).init(where(model[0]), PiSSA(Randomised()))
    B, A = pair_of(theirs, "0")
    torch.testing.assert_close((f["B"] @ f["A"]).detach(), B @ A)


def test_pefts_orthogonal_is_another_start():
    """There neither factor has orthonormal rows or columns and neither is zero; their product is zero."""
    torch.set_default_dtype(torch.float32)
    model, *_ = regression(torch.float32)
    B, A = pair_of(under_peft(model, "orthogonal", r=4), "0")
    torch.testing.assert_close(B @ A, torch.zeros(14, I))
    assert B.abs().max() > 0.01
    assert not torch.allclose(A @ A.T, torch.eye(4), atol=0.1)
    B, A = Orthogonal()(where(model[0]), 4)
    assert not B.any()
    torch.testing.assert_close(A @ A.T, torch.eye(4))


def test_pefts_loraga_is_another_start():
    """PEFT puts the gradient's singular values, and all of z, into B: where gradients are small, B is nearly zero, and
    the first step is not the gradient's best approximation (on purpose not followed: Algorithm 1 and the authors' code
    scale both factors by z and no singular value)."""
    from peft.tuners.lora import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.set_default_dtype(torch.float32)
    model, x, target = regression(torch.float32)
    scale = 1e-2  # of the loss: gradients as small as large models have them
    s, mu = 6.0 / math.sqrt(R), 1e-2

    def loss(m):
        return scale * F.mse_loss(m(x), target)

    config = {"lora_ga_config": LoraGAConfig(), "use_rslora": True}
    base = copy.deepcopy(model)
    preprocess_loraga(
        base,
        peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="lora_ga", **config),
        lambda: loss(base).backward(),
    )
    G = torch.autograd.grad(loss(model), model[2].weight)[0]
    theirs = under_peft(base, "lora_ga", **config)
    B, A = pair_of(theirs, "2")
    values = torch.linalg.svdvals(G)
    z = O**0.25 / 4
    torch.testing.assert_close(B.norm(dim=0), z * values[R : 2 * R], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(A.norm(dim=1), torch.ones(R))

    m = Centred(LoRA(r=R, alpha=6.0, scaling=undula.RankStabilised()), LoRAGA())
    adapter = undula.attach(model, m, probe=Probe([x], loss=lambda m, b: loss(m)))
    f = adapter.factors["2"]
    torch.testing.assert_close(f["B"].detach().norm(dim=0), torch.full((R,), z))
    torch.testing.assert_close(f["A"].detach().norm(dim=1), torch.full((R,), z))
    assert f["B"].norm() > 50 * B.norm()

    def relative(before, after):
        want = -mu * best(G, 2 * R).float()
        move = after - before
        gain = (move * want).sum() / want.square().sum()
        return float((move - gain * want).norm() / (gain * want).norm())

    loss(model).backward()
    loss(theirs).backward()
    ours0, theirs0 = adapter.delta("2").detach(), s * B.double() @ A.double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.sub_(mu * p.grad)
        layer = theirs.base_model.model[2]
        gB, gA = layer.lora_B["default"].weight.grad, layer.lora_A["default"].weight.grad
        after = s * (B - mu * gB).double() @ (A - mu * gA).double()
    assert relative(ours0, adapter.delta("2").detach()) < 0.02
    assert relative(theirs0, after) > 0.2


def test_eva_is_pefts(tmp_path):
    """One minibatch, so that PEFT's incremental decomposition drops nothing: the same directions and ratios."""
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.set_default_dtype(torch.float32)
    model, x, _ = regression(torch.float32)
    x = x @ torch.diag(torch.linspace(3, 0.1, I)) + 1
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = get_eva_state_dict(
        copy.deepcopy(model),
        [x],
        config,
        forward_fn=lambda m, b: m(b),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    components = next(iter(theirs.values())).float()
    adapter = undula.attach(model, Centred(LoRA(r=R), EVA()), ["0"], probe=Probe([x]))
    A = adapter.factors["0"]["A"].detach()
    torch.testing.assert_close((A @ components.T).abs(), torch.eye(R), rtol=1e-4, atol=1e-4)


def test_every_start_is_tried_here():
    assert {type(s) for s in EVERY} | {Kaiming, Gaussian} == set(Start.registry.values())
