"""Oracles of the methods with frozen bases: VeRA, NOLA, Uni-LoRA, TeRA, LoRA-XS, LoRA-SB."""

import dataclasses
import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula import (
    NOLA,
    LoRASB,
    LoRAXS,
    TeRA,
    UniLoRA,
    VeRA,
)
from undula.host.views import site, view
from undula.kernels import frozen
from undula.kernels import mixture as kernel
from undula.kernels.mixture import mixture
from undula.methods.tera import split
from undula.methods.unilora import Balanced, Independent
from undula.starts.first_step import first_step, leading

pytestmark = pytest.mark.usefixtures("float64")

O, I = 10, 7


def where(o=O, i=I, name="l", **changes):
    return dataclasses.replace(site(name, view(nn.Linear(i, o))), **changes)


def shaken(m, place=None, by=0.3):
    f = m.init(place or where())
    return {k: t.detach() + by * torch.randn_like(t) if t.requires_grad else t for k, t in f.items()}


def net():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 9))


def same_as_peft(model, x, theirs, pairs):
    """Outputs of both hosts, and the gradients of pairs (of ours, of theirs)."""
    torch.testing.assert_close(model(x), theirs(x))
    ours, others = zip(*pairs, strict=True)
    for a, b in zip(
        torch.autograd.grad(model(x).sin().sum(), ours), torch.autograd.grad(theirs(x).sin().sum(), others), strict=True
    ):
        torch.testing.assert_close(a, b)


# VeRA


def test_vera_is_two_diagonals():
    m = VeRA(r=3)
    f = shaken(m)
    b, B, d, A = (f[k].numpy() for k in "bBdA")
    np.testing.assert_allclose(m.delta(f), np.einsum("o,or,r,ri->oi", b, B, d, A))
    fresh = m.init(where())
    assert not fresh["b"].any()
    assert (fresh["d"] == 0.1).all()


def test_vera_shares_one_basis_per_size():
    adapter = undula.attach(net(), VeRA(r=4, seed=3), where="*")
    f = adapter.factors
    assert f["0"]["A"] is f["4"]["A"] is not f["2"]["A"]
    assert f["0"]["B"] is f["4"]["B"]
    assert adapter.num_parameters() == (9 + 4) + (6 + 4) + (9 + 4)
    for t, bound in ((f["0"]["A"], math.sqrt(6 / 6)), (f["2"]["A"], math.sqrt(6 / 9)), (f["0"]["B"], math.sqrt(6 / 4))):
        assert 0.85 * bound < float(t.abs().max()) <= bound
    other = undula.attach(net(), VeRA(r=4, seed=4), where="*").factors
    assert not torch.equal(other["0"]["A"], f["0"]["A"])


def test_vera_is_pefts():
    """PEFT cuts all bases out of one pair, undula has one per width and height: given the same matrices both agree."""
    model = net().requires_grad_(False)
    theirs = nn.Sequential(
        *[type(m)(m.in_features, m.out_features) if hasattr(m, "weight") else nn.Tanh() for m in model]
    )
    theirs.load_state_dict(model.state_dict())
    config = peft.VeraConfig(r=4, target_modules=["0", "2", "4"], d_initial=0.1, vera_dropout=0.0)
    theirs = peft.get_peft_model(theirs, config).double()
    adapter = undula.attach(model, VeRA(r=4), where="*")
    shake(adapter)
    pairs, layers = [], theirs.base_model.model
    for name, f in adapter.factors.items():
        layer, (o, i) = layers.get_submodule(name), adapter.shapes[name]
        f["A"].data.copy_(layer.vera_A["default"][:, :i])
        f["B"].data.copy_(layer.vera_B["default"][:o])
        for ours, other in (("b", layer.vera_lambda_b["default"]), ("d", layer.vera_lambda_d["default"])):
            assert other.shape == f[ours].shape
            other.data.copy_(f[ours].data)
            pairs.append((f[ours], other))
    same_as_peft(model, torch.randn(5, 6), theirs, pairs)
    largest = layers.get_submodule("0").vera_A["default"]  # the bounds are the same where PEFT's pair fits the layer
    assert 0.9 * math.sqrt(6 / 9) < float(largest.abs().max()) <= math.sqrt(6 / 9) + 1e-7


def test_vera_without_d_is_refused():
    with pytest.raises(ValueError, match="could never learn"):
        VeRA(d=0.0)


# NOLA


def bases(m, name, shape, place="l"):
    """The matrices that NOLA mixes, all at once."""
    count = m.k if name == "A" else m.l
    return frozen.uniform(m.seed, ("NOLA", name, place), (count, *shape)).double()


def test_nola_mixes_the_materialised_bases():
    m = NOLA(r=3, k=6, l=4, c=6.0, seed=2)
    f = shaken(m)
    A = f["start"] + torch.einsum("k,kri->ri", f["alpha"], bases(m, "A", (3, I))) / math.sqrt(6)
    B = torch.einsum("l,lor->or", f["beta"], bases(m, "B", (O, 3))) / math.sqrt(4)
    torch.testing.assert_close(m.delta(f), 2.0 * B @ A)
    assert 0.6 / math.sqrt(I) < float(f["start"].abs().max()) <= 1 / math.sqrt(I)


@pytest.mark.parametrize("block", [1, 50, 1 << 16])
def test_mixture_in_blocks(block, monkeypatch):
    """Values and gradients in any blocks; no more than one block, or one matrix, is ever there."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    sizes, draw = [], kernel.numbers
    monkeypatch.setattr(kernel, "numbers", lambda words, start, n: sizes.append(n) or draw(words, start, n))
    words = torch.tensor(frozen.words(1, ("m",)), dtype=torch.int32)
    M = frozen.uniform(1, ("m",), (11, 4, 5)).double()
    c, g = torch.randn(11, requires_grad=True), torch.randn(4, 5)
    out = mixture(c, words, (4, 5))
    torch.testing.assert_close(out, torch.einsum("k,kri->ri", c, M))
    (dc,) = torch.autograd.grad(out, c, g)
    torch.testing.assert_close(dc, torch.einsum("kri,ri->k", M, g))
    assert sum(sizes) == 2 * 11 * 20
    assert max(sizes) <= max(block, 20)
    assert torch.autograd.gradcheck(lambda c: mixture(c, words, (4, 5)), c)


def test_mixture_is_exact_under_autocast():
    words = torch.tensor(frozen.words(1, ("m",)), dtype=torch.int32)
    c = torch.randn(300, dtype=torch.float32, requires_grad=True)
    want = mixture(c, words, (8, 9))
    with torch.autocast("cpu", torch.bfloat16):
        got = mixture(c, words, (8, 9))
        (dc,) = torch.autograd.grad(got.square().sum(), c)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(dc, torch.autograd.grad(want.square().sum(), c)[0])


def test_nola_compiles_to_one_operator_per_mixture():
    """The compiler takes the drawing as it is: no unrolled loops, no graph break, gradients included."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    m, layer = NOLA(r=2, k=40, l=40), view(nn.Linear(I, O).requires_grad_(False))
    f = {k: t.requires_grad_(k in ("alpha", "beta")) for k, t in shaken(m).items()}
    x, trained = torch.randn(3, I), [f["alpha"], f["beta"]]
    torch.compiler.reset()
    y = torch.compile(lambda x: m.forward(x, layer, f), backend=backend, fullgraph=True)(x)
    want = m.forward(x, layer, f)
    torch.testing.assert_close(y, want)
    for a, b in zip(
        torch.autograd.grad(y.sin().sum(), trained), torch.autograd.grad(want.sin().sum(), trained), strict=True
    ):
        torch.testing.assert_close(a, b)
    mixed = [node for g in graphs for node in g.graph.nodes if "undula.mixed" in str(node.target)]
    assert len(graphs) == 1
    assert len(mixed) == 2


def test_nola_trains_beta_first():
    m, layer = NOLA(r=2, k=5, l=5), view(nn.Linear(I, O))
    f = m.init(site("l", layer))
    da, db = torch.autograd.grad(m.forward(torch.randn(3, I), layer, f).sin().sum(), [f["alpha"], f["beta"]])
    assert not da.any()
    assert db.abs().min() > 0


def test_nola_has_rank_r_from_few_numbers():
    m = NOLA(r=4, k=9, l=9)
    place = where(30, 20)
    f = shaken(m, place)
    assert int(torch.linalg.matrix_rank(m.delta(f))) == 4
    assert sum(t.numel() for t in m.init(place).values() if t.requires_grad) == 18 < 4 * (30 + 20)


def test_nola_is_linear_in_its_coefficients():
    m = NOLA(r=2, k=5, l=5)
    f, g = shaken(m), shaken(m)
    g = {**g, "beta": f["beta"]}
    base = m.delta({**f, "alpha": torch.zeros(5)})
    both = m.delta({**f, "alpha": f["alpha"] + 2 * g["alpha"]})
    torch.testing.assert_close(both - base, (m.delta(f) - base) + 2 * (m.delta(g) - base))
    torch.testing.assert_close(m.delta({**f, "beta": 3 * f["beta"]}), 3 * m.delta(f))


def test_nola_has_bases_of_its_own_in_every_layer_and_for_every_seed():
    adapter = undula.attach(net(), NOLA(r=2, k=5, l=5), where="*")
    again = undula.attach(net(), NOLA(r=2, k=5, l=5), where="*")
    other = undula.attach(net(), NOLA(r=2, k=5, l=5, seed=1), where="*")
    for a in (adapter, again, other):
        for f in a.factors.values():
            f["alpha"].data.fill_(1.0), f["beta"].data.fill_(1.0)
    assert not torch.allclose(adapter.delta("0"), adapter.delta("4"))
    assert torch.equal(adapter.delta("0"), again.delta("0"))
    assert not torch.allclose(adapter.delta("0"), other.delta("0"))


# Uni-LoRA


def entries(adapter):
    """theta_D: all entries of all A and B, end to end, in the model's order."""
    parts = []
    for name, f in adapter.factors.items():
        B, A = adapter.methods[name].pair(f)
        parts += [A.flatten(), B.flatten()]
    return torch.cat(parts)


def projection(adapter):
    """P (D, d), explicitly."""
    theta = next(iter(adapter.factors.values()))["theta"]
    return torch.func.jacrev(
        lambda t: entries(adapter.map(lambda f: {**f, "theta": t}))
    )(theta.detach())  # fmt: skip


@pytest.mark.parametrize("assignment", [Balanced(), Independent()], ids=repr)
def test_unilora_is_an_isometry(assignment):
    m = UniLoRA(r=2, d=23, assignment=assignment)
    adapter = undula.attach(net(), m, where="*")
    P, theta = projection(adapter), adapter.factors["0"]["theta"]
    assert P.shape == (2 * 45, 23)
    assert ((P != 0).sum(1) == 1).all()
    close = {"rtol": 1e-6, "atol": 1e-7}  # the scales are float32, so that any machine rebuilds them
    torch.testing.assert_close(P.T @ P, torch.eye(23), **close)
    torch.testing.assert_close(P @ theta, entries(adapter))
    torch.testing.assert_close(entries(adapter).norm(), theta.norm(), **close)
    n = (P != 0).sum(0)
    torch.testing.assert_close(P.sum(0) / n, 1 / n.double().sqrt(), **close)
    weights = torch.randn(len(P))
    (g,) = torch.autograd.grad(entries(adapter).sin() @ weights, theta)
    torch.testing.assert_close(g, P.T @ (weights * (P @ theta).cos()))


def test_unilora_counts():
    for D, d in ((90, 23), (1000, 7), (64, 64), (5, 9)):
        n = torch.bincount(Balanced()(0, D, d).long(), minlength=d)
        assert int(n.max() - n.min()) <= 1
        assert int(n.sum()) == D
    a, b = (Balanced()(seed, 1000, 10) for seed in (0, 1))
    assert not torch.equal(a, b)
    assert int((a[:-1] == a[1:]).sum()) == pytest.approx(100, abs=50)  # in a random order
    n = torch.bincount(Independent()(0, 70000, 7).long(), minlength=7)
    assert int((n - 10000).abs().max()) < 500
    assert int(n.max() - n.min()) > 1


def test_unilora_has_one_vector_for_the_model():
    adapter = undula.attach(net(), UniLoRA(r=2, d=23), where="*")
    assert len({id(f["theta"]) for f in adapter.factors.values()}) == 1
    assert adapter.num_parameters() == 23
    assert {f["index_A"].dtype for f in adapter.factors.values()} == {torch.int32}
    again = undula.attach(net(), UniLoRA(r=2, d=23), where="*")
    fewer = undula.attach(net(), UniLoRA(r=2, d=23), where=["0", "4"])
    assert torch.equal(adapter.factors["4"]["index_B"], again.factors["4"]["index_B"])
    assert not torch.equal(adapter.factors["4"]["index_B"], fewer.factors["4"]["index_B"])


def test_unilora_starts_small_and_not_at_a_stationary_point():
    m, layer = UniLoRA(r=2, d=23), view(nn.Linear(I, O))
    f = m.init(site("l", layer))
    assert 0.7 * 0.02 < float(f["theta"].detach().abs().max()) <= 0.02
    assert 0 < float(m.delta(f).detach().abs().max()) < 2 * 0.02**2 + 1e-12
    (g,) = torch.autograd.grad(m.forward(torch.randn(3, I), layer, f).sin().sum(), f["theta"])
    assert g.abs().max() > 0
    zero = {**f, "theta": torch.zeros(23, requires_grad=True)}
    (g,) = torch.autograd.grad(m.forward(torch.randn(3, I), layer, zero).sin().sum(), zero["theta"])
    assert not g.any()
    with pytest.raises(ValueError, match="theta = 0 has no gradient"):
        UniLoRA(bound=0.0)


def test_unilora_warns_of_numbers_that_nothing_uses():
    with pytest.warns(UserWarning, match="more numbers than the 90 entries of all factors: 10 at least remain unused"):
        adapter = undula.attach(net(), UniLoRA(r=2, d=100), where="*")
    assert torch.isfinite(entries(adapter)).all()


def test_unilora_is_pefts(monkeypatch):
    """PEFT's own traversal and scales, given undula's indices (PEFT draws them from numpy's generator)."""
    model = net().requires_grad_(False)
    theirs = net()
    theirs.load_state_dict(model.state_dict())
    draw = lambda D, d, seed: Balanced()(seed, D, d).long()  # noqa: E731
    monkeypatch.setattr(peft.tuners.unilora.UniLoraModel, "generate_index", staticmethod(draw))
    config = peft.UniLoraConfig(r=2, theta_d_length=23, proj_seed=5, target_modules=["0", "2", "4"])
    theirs = peft.get_peft_model(theirs, config).double()
    adapter = undula.attach(model, UniLoRA(r=2, d=23, seed=5), where="*")
    shake(adapter)
    theta, other = adapter.factors["0"]["theta"], theirs.base_model.unilora_theta_d["default"]
    other.data.copy_(theta.data)
    for name, f in adapter.factors.items():
        layer = theirs.base_model.model.get_submodule(name)
        for side in "AB":
            assert torch.equal(getattr(layer, f"unilora_indices_{side}")["default"], f[f"index_{side}"].long())
            scales = f["scale"][f[f"index_{side}"].long()]
            torch.testing.assert_close(getattr(layer, f"unilora_scales_{side}")["default"], scales)
            getattr(layer, f"unilora_scales_{side}")["default"] = scales  # theirs is rounded in another place
    same_as_peft(model, torch.randn(5, 6), theirs, [(theta, other)])


# TeRA


def test_tera_is_a_tensor_network():
    """The Kronecker form against the network contracted with einsum, mode by mode."""
    m = TeRA(r=3, modes=2, seed=1)
    f = shaken(m, where(12, 20))
    C = f["core"].view(3, 3, 3, 3)
    U1, U2, V1, V2 = (f[f"{M}{n}"] * f[f"{v}{n}"] for M, v in (("U", "d"), ("V", "e")) for n in (1, 2))
    assert [t.shape[0] for t in (U1, U2, V1, V2)] == [4, 3, 5, 4]
    want = torch.einsum("pqrs,ap,bq,cr,ds->abcd", C, U1, U2, V1, V2).reshape(12, 20)
    torch.testing.assert_close(m.delta(f), want)


def test_tera_pads_what_does_not_divide():
    assert [split(n, 2) for n in (12, 7, 4096, 11008, 13)] == [(4, 3), (3, 3), (64, 64), (128, 86), (4, 4)]
    assert split(60, 3) == (4, 5, 3)
    assert split(7, 1) == (7,)
    m = TeRA(r=2)
    layer = view(nn.Linear(11, 7))
    f = shaken(m, site("l", layer))
    C, x = f["core"].view(2, 2, 2, 2), torch.randn(5, 11)
    U1, U2, V1, V2 = (f[f"{M}{n}"] * f[f"{v}{n}"] for M, v in (("U", "d"), ("V", "e")) for n in (1, 2))
    whole = torch.einsum("pqrs,ap,bq,cr,ds->abcd", C, U1, U2, V1, V2).reshape(9, 12)
    torch.testing.assert_close(m.delta(f), whole[:7, :11])
    torch.testing.assert_close(m.forward(x, layer, f), layer(x) + x @ whole[:7, :11].T)


def test_tera_reaches_full_rank_with_few_numbers():
    m = TeRA(r=4)
    place = where(12, 20)
    assert sum(t.numel() for t in m.init(place).values() if t.requires_grad) == 16
    assert int(torch.linalg.matrix_rank(m.delta(shaken(m, place)))) == 12


def test_tera_of_one_mode_is_diagonals_between_frozen_matrices():
    m = TeRA(r=3, modes=1)
    f = shaken(m)
    U, V = f["U1"].numpy(), f["V1"].numpy()
    want = U @ np.diag(f["d1"]) @ f["core"].numpy() @ np.diag(f["e1"]) @ V.T
    np.testing.assert_allclose(m.delta(f), want)


def test_tera_starts_at_zero_with_one_gradient():
    m, layer = TeRA(r=3), view(nn.Linear(I, O))
    f = m.init(site("l", layer))
    assert not m.delta(f).any()
    names = ["d1", "d2", "e1", "e2"]
    grads = torch.autograd.grad(m.forward(torch.randn(3, I), layer, f).sin().sum(), [f[k] for k in names])
    assert [bool(g.any()) for g in grads] == [True, False, False, False]
    with pytest.raises(ValueError, match="could never learn"):
        TeRA(d=0.0)


def test_teras_diagonals_start_where_d_says_but_the_first():
    f = TeRA(r=2, modes=3, d=0.3).init(site("l", view(nn.Linear(I, O))))
    starts = {name: t.unique().tolist() for name, t in f.items() if t.requires_grad}
    assert starts.pop("d1") == [0.0]
    assert starts.keys() == {"d2", "d3", "e1", "e2", "e3"}
    assert all(len(found) == 1 and abs(found[0] - 0.3) < 1e-6 for found in starts.values())


def test_tera_shares_its_frozen_factors():
    f = undula.attach(net(), TeRA(r=3), where="*").factors
    assert f["0"]["core"] is f["2"]["core"]
    assert f["0"]["U1"] is f["4"]["U1"]
    assert f["0"]["core"].data_ptr() == f["4"]["core"].data_ptr()
    assert not torch.equal(f["0"]["U1"], f["0"]["U2"])  # 9 = 3 x 3: as large, drawn apart
    big = TeRA(r=40).rebuilt(where(900, 900))  # U_1 is 30 x 40
    assert float(big["U1"].var()) == pytest.approx(1 / 40, rel=0.1)
    assert float(big["core"].var()) == pytest.approx(1 / 1600, rel=0.01)


# LoRA-XS


def test_lora_xs_trains_between_singular_vectors():
    m = LoRAXS(r=3, alpha=6.0)
    layer = view(nn.Linear(I, O))
    f = shaken(m, site("l", layer))
    U, s, Vh = np.linalg.svd(layer.weight.detach().numpy())
    f_ = {k: t.numpy() for k, t in f.items()}
    signs = np.sign((f_["B"] * U[:, :3]).sum(0))
    np.testing.assert_allclose(f_["B"] * signs, U[:, :3], atol=1e-10)
    np.testing.assert_allclose(f_["A"] * signs[:, None], s[:3, None] * Vh[:3], atol=1e-10)
    np.testing.assert_allclose(m.delta(f), 2.0 * f_["B"] @ f_["R"] @ f_["A"])


def test_lora_xs_with_the_identity_is_the_best_low_rank_part():
    m, layer = LoRAXS(r=3, alpha=3.0), view(nn.Linear(I, O))
    f = {**m.init(site("l", layer)), "R": torch.eye(3)}
    U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(m.delta(f), U[:, :3] * s[:3] @ Vh[:3])
    rest = layer.weight.detach() - m.delta(f)
    torch.testing.assert_close(rest.norm(), s[3:].norm())


def test_lora_xs_starts_near_the_base():
    m = LoRAXS(r=5)
    place = where(64, 64)
    f = m.init(place)
    assert 0 < float(m.delta(f).detach().norm()) < 1e-3
    R = torch.cat([m.init(place)["R"].detach().flatten() for _ in range(80)])
    assert float(R.std()) == pytest.approx(1e-5, rel=0.1)
    assert LoRAXS(r=50).init(where())["R"].shape == (7, 7)


def test_lora_xs_gradient():
    """dL/dR = s B' G A'."""
    m, layer = LoRAXS(r=3, alpha=6.0), view(nn.Linear(I, O).requires_grad_(False))
    f, x = m.init(site("l", layer)), torch.randn(5, I)
    W = (layer.weight + m.delta(f)).detach().requires_grad_()
    (G,) = torch.autograd.grad(torch.nn.functional.linear(x, W, layer.bias).sin().sum(), W)
    (R,) = torch.autograd.grad(m.forward(x, layer, f).sin().sum(), f["R"])
    torch.testing.assert_close(R, 2.0 * f["B"].T @ G @ f["A"].T)


def test_large_matrices_are_sketched():
    """As good as the full decomposition where the spectrum falls, the same each time, the global generator unused."""
    place = where(300, 400)
    M = torch.randn(300, 60) * 0.8 ** torch.arange(60) @ torch.randn(60, 400)
    state = torch.get_rng_state()
    U, s, V = leading(place, M, 6)
    again = leading(place, M, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip((U, s, V), again, strict=True))
    torch.testing.assert_close(s, torch.linalg.svdvals(M)[:6])
    torch.testing.assert_close(U.T @ U, torch.eye(6))
    torch.testing.assert_close(V.T @ V, torch.eye(6))
    torch.testing.assert_close((M - U * s @ V.T).norm(), torch.linalg.svdvals(M)[6:].norm())


# LoRA-SB


class Evidence:
    def __init__(self, G):
        self.G = G

    def gradient(self, name):
        return self.G


@pytest.fixture
def G():
    return torch.randn(O, I)


def test_lora_sb_starts_at_the_best_part_of_the_first_step(G):
    """Eckart and Young: of all updates of rank r the nearest to -eta sign(G)."""
    m, place = LoRASB(r=3, eta=1e-3), where(evidence=Evidence(G))
    f = m.init(place)
    step = -1e-3 * torch.sign(G)
    s = torch.linalg.svdvals(step)
    torch.testing.assert_close((step - m.delta(f)).norm().detach(), s[3:].norm())
    torch.testing.assert_close(f["R"].detach(), torch.diag(s[:3]))
    torch.testing.assert_close(f["B"].T @ f["B"], torch.eye(3))
    torch.testing.assert_close(f["A"] @ f["A"].T, torch.eye(3))
    U, sigma, V = first_step(place, 3, 1e-3)
    torch.testing.assert_close(U * sigma @ V.T, m.delta(f).detach())
    assert int(torch.linalg.matrix_rank(m.delta(f))) == 3


def test_lora_sb_first_step_is_adamws(G):
    """The step that torch's AdamW takes from zero moments, weight decay aside."""
    W = torch.zeros(O, I, requires_grad=True)
    W.grad = G.clone()
    torch.optim.AdamW([W], lr=1e-3, weight_decay=0.0).step()
    U, s, V = first_step(where(evidence=Evidence(G)), I, 1e-3)
    torch.testing.assert_close(U * s @ V.T, W.detach(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_sb_gradient_is_the_best_one(G, alpha):
    """Of all R' the update s B R' A is nearest to the full gradient at R' = B'GA'/s; with s = 1 that is dL/dR itself,
    and otherwise (1/s^2) (B'B)^-1 dL/dR (AA')^-1."""
    m, layer = LoRASB(r=3, alpha=alpha, eta=1e-2), view(nn.Linear(I, O).requires_grad_(False))
    f, x = m.init(dataclasses.replace(site("l", layer), evidence=Evidence(G))), torch.randn(5, I)
    s = m.scale()
    W = (layer.weight + m.delta(f)).detach().requires_grad_()
    (full,) = torch.autograd.grad(torch.nn.functional.linear(x, W, layer.bias).sin().sum(), W)
    (R,) = torch.autograd.grad(m.forward(x, layer, f).sin().sum(), f["R"])
    torch.testing.assert_close(R, s * f["B"].T @ full @ f["A"].T)
    map_ = s * torch.kron(f["B"], f["A"].T.contiguous())  # R' (row by row) -> s B R' A (row by row)
    best = torch.linalg.lstsq(map_, full.reshape(-1, 1)).solution.view(3, 3)
    torch.testing.assert_close(best, R / s**2)


def test_lora_sb_does_not_depend_on_alpha(G):
    place = where(evidence=Evidence(G))
    deltas = [LoRASB(r=3, alpha=alpha, eta=1e-3) for alpha in (None, 3.0, 12.0)]
    deltas = [m.delta(m.init(place)).detach() for m in deltas]
    for d in deltas[1:]:
        torch.testing.assert_close(d, deltas[0])


def test_lora_sb_from_a_real_probe():
    """The start is a step downhill, and so is a step of SGD on R from there."""
    model, x = nn.Sequential(nn.Linear(I, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(64, I)
    target = torch.randn(64, 3)
    loss_of = lambda model, x: nn.functional.mse_loss(model(x), target)  # noqa: E731
    before = loss_of(model, x).item()
    adapter = undula.attach(model, LoRASB(r=2, eta=1e-3), where="*", probe=undula.Probe([x], loss_of))
    loss = loss_of(model, x)
    assert loss.item() < before
    loss.backward()
    with torch.no_grad():
        for p in adapter.parameters():
            p -= 1e-2 * p.grad
    assert loss_of(model, x).item() < loss.item()
    assert adapter.num_parameters() == 2 * 2**2


def test_lora_sb_needs_a_probe_and_a_step():
    with pytest.raises(RuntimeError, match="this method starts from gradients"):
        undula.attach(net(), LoRASB(), where="*")
    for wrong in ({"eta": 0.0}, {"alpha": 0.0}, {"r": 0}):
        with pytest.raises(
            ValueError, match=r"is greater than 0, found 0|is at least 1 and at most 1,048,576, found 0"
        ):
            LoRASB(**wrong)


def test_defaults_are_the_sources():
    assert (VeRA().d, VeRA().r) == (0.1, 256)
    assert (NOLA().r, NOLA().k, NOLA().l) == (8, 256, 256)
    u = UniLoRA()
    assert (u.r, u.d, u.bound, u.assignment) == (4, 256, 0.02, Balanced())
    assert (LoRAXS().r, LoRAXS().alpha, LoRAXS().std) == (32, 64.0, 1e-5)
    assert LoRASB().scale() == 1.0
