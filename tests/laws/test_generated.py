"""Generated adapters: what holds of the mixture, of the divergence and of the packing, whatever was trained."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import undula
from undula.cli.generating import evenly
from undula.generate import Expert, ICMLoRA, Layout, Library, SGLoRA, icmlora, mixture, sglora
from undula.generate.fitting import Basis, Standard, drawn, kl, seeded
from undula.generate.icm_nets import Convolutional, Dense
from undula.generate.mixture import chosen, total
from undula.generate.pack import digest, moments
from undula.train.rows import spaced

METHODS = [undula.LoRA(r=2), undula.LoRAN(r=2), undula.AuroRA(r=2), undula.VeRA(r=2), undula.DoRA(undula.LoRA(r=2))]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()


def adapter(method, seed=0):
    torch.manual_seed(seed)
    return undula.attach(model(), method, "all-linear").copy()


def library(tmp_path, n=5, rows=3, method=undula.LoRA(r=2)):
    """Experts that are drawn around a start, not trained."""
    start = adapter(method)
    layout = Layout.of(start)
    draw, experts = seeded(1), []
    for i in range(n):
        center = layout.pack(start) + torch.randn(layout.size, generator=draw, dtype=torch.float64)
        points = center + 0.1 * torch.randn(rows, layout.size, generator=draw, dtype=torch.float64)
        embedding = nn.functional.normalize(torch.randn(8, generator=draw, dtype=torch.float64), dim=0)
        experts.append(Expert(f"e{i}", f"task {i}", embedding, *moments(points), points, {"before": 0.5}))
    return Library(tmp_path, "a-base", layout, layout.pack(start), tuple(experts))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_pack_and_unpack_are_a_bijection(method):
    made = adapter(method)
    layout = Layout.of(made)
    vector = torch.randn(layout.size, dtype=torch.float64, generator=seeded(2))
    back = layout.unpack(vector)
    assert torch.equal(layout.pack(back), vector)
    assert layout.size == made.num_parameters() == back.num_parameters()
    again = layout.unpack(layout.pack(made))
    for (_, _, a), (_, _, b) in zip(made.tensors(), again.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    host = model()
    x = torch.randn(3, 6, dtype=torch.float64, generator=seeded(3))
    undula.attach(host, back)
    assert torch.isfinite(host(x)).all()


def test_factors_that_sites_share_are_packed_once():
    made = adapter(undula.UniLoRA())
    layout = Layout.of(made)
    assert layout.size == made.num_parameters()
    back = layout.unpack(layout.pack(made) + 1)
    assert len(back.parameters()) == len(made.parameters())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: adapter(undula.LoRA(r=3)), r"two has LoRA\(r=3.* at 0"),
        (lambda: adapter(undula.LoRAN(r=2)), "two has LoRAN"),
        (lambda: undula.attach(model(), undula.LoRA(r=2), "0").copy(), "other layers .*: 1"),
        (lambda: undula.attach(model(), undula.LoRA(r=2), "0", full=["1.bias"]).copy(), "trains 1.bias in full"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(other, words):
    with pytest.raises(ValueError, match=words):
        Layout.of(adapter(undula.LoRA(r=2))).pack(other(), "two")


def test_frozen_factors_of_another_seed_are_refused():
    layout = Layout.of(adapter(undula.VeRA(r=2)))
    frozen = adapter(undula.VeRA(r=2))
    other = frozen.map(lambda f: {k: t if t.requires_grad else t + 1 for k, t in f.items()})
    with pytest.raises(ValueError, match="does not train, has other numbers"):
        layout.pack(other, "two")


def test_one_expert_is_its_own_mixture(tmp_path):
    lib = library(tmp_path)
    for expert in lib.experts:
        found = mixture(lib, expert.embedding, k=1)
        assert found.names == (expert.name,)
        torch.testing.assert_close(found.mean, expert.mean)
        torch.testing.assert_close(found.variance, expert.variance)


def test_equal_experts_are_their_own_mixture(tmp_path):
    one = library(tmp_path).experts[0]
    a = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mean, variance = total(a, one.mean.expand(3, -1), one.variance.expand(3, -1))
    torch.testing.assert_close(mean, one.mean)
    torch.testing.assert_close(variance, one.variance)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_weights_sum_to_one_and_the_nearest_counts_most(tmp_path, k):
    lib = library(tmp_path)
    numbers, weights = chosen(lib.embeddings[2], lib.embeddings, k)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    assert len(numbers) == min(k, 5)
    assert numbers[0] == 2
    assert (weights.diff() <= 0).all()


def test_the_variance_of_a_mixture_is_that_of_its_draws():
    """The law of total variance, exact: over all pairs of a part (in its share) and two points of that part."""
    mu = torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 4.0]], dtype=torch.float64)
    s = torch.tensor([[0.5, 1.0], [2.0, 0.1], [1.5, 0.7]], dtype=torch.float64)
    points = torch.stack([mu - s, mu + s], 1)  # of mean mu and variance s^2
    repeated = torch.cat([points[i].repeat(n, 1) for i, n in enumerate((1, 2, 5))])
    mean, variance = total(torch.tensor([1, 2, 5], dtype=torch.float64) / 8, mu, s.square())
    torch.testing.assert_close(mean, repeated.mean(0))
    torch.testing.assert_close(variance, repeated.var(0, correction=0))


def test_kl_is_zero_for_equal_and_above_for_others():
    draw = seeded(4)
    a, b, c, d = (torch.randn(50, 3, generator=draw, dtype=torch.float64) for _ in range(4))
    assert (kl(a, b, c, d) > 0).all()
    torch.testing.assert_close(kl(a, b, a, b), torch.zeros(50, dtype=torch.float64))
    p, q = (torch.distributions.Normal(m, (0.5 * log).exp()) for m, log in ((c, d), (a, b)))
    torch.testing.assert_close(kl(a, b, c, d), torch.distributions.kl_divergence(q, p).sum(-1))


def test_standardising_knows_the_library_alone(tmp_path):
    """A held-out expert has no part in it: the statistics are to the bit those of a library that never saw it."""
    lib = library(tmp_path)
    without = Standard.of(lib.without(["e3"]))
    other = Standard.of(Library(tmp_path, "a-base", lib.layout, lib.start, lib.experts[:3] + lib.experts[4:]))
    assert torch.equal(without.mean, other.mean)
    assert torch.equal(without.deviation, other.deviation)
    x = lib.experts[3].mean
    torch.testing.assert_close(without.back(without(x)), x)


def test_a_library_s_basis_holds_its_checkpoints(tmp_path):
    """With as many components as there are, there and back is the identity on them; their squares are those of the
    standardised numbers, and a variance along them is what it is by a computation of its own."""
    lib = library(tmp_path)
    basis, standard = Basis.of(lib, 99), Standard.of(lib)
    X = torch.cat([e.checkpoints for e in lib.experts])
    assert basis.size == len(X) - 1 or basis.size == len(X)
    torch.testing.assert_close(basis.back(basis(X)), X)
    torch.testing.assert_close(basis(X).square().sum(1) * basis.unit**2, standard(X).square().sum(1))
    torch.testing.assert_close(basis.V @ basis.V.T, torch.eye(basis.size, dtype=torch.float64))
    torch.testing.assert_close(basis(X).square().sum(1).mean(), torch.tensor(float(basis.size), dtype=torch.float64))
    few = Basis.of(lib, 2)
    torch.testing.assert_close(few.V.abs(), basis.V[:2].abs())
    s = lib.experts[0].variance
    J = basis.V / basis.unit / standard.deviation
    torch.testing.assert_close(basis.spread(s), (J @ s.diag() @ J.T).diagonal())


SG = sglora.Options(hidden=16, latent=4, steps=3, k=2)
ICM = icmlora.Options(hidden=8, latent=4, steps=3)
CONV = dataclasses.replace(ICM, channels=(4, 8))
KINDS = ["sg", "icm", "convolutions"]


def tasks(n=5):
    return torch.randn(n, 7, generator=seeded(5), dtype=torch.float64)


def generators(lib):
    return {
        "sg": (SGLoRA.fit(lib, SG), lib.embeddings[0], -lib.embeddings[0]),
        "icm": (ICMLoRA.fit(lib, ICM, tasks()), tasks()[0], -tasks()[0]),
        "convolutions": (ICMLoRA.fit(lib, CONV, tasks()), tasks()[0], -tasks()[0]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_settles_all_and_the_condition_changes_the_output(tmp_path, kind):
    lib = library(tmp_path)
    made, one, other = generators(lib)[kind]
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    again = generators(lib)[kind][0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(made.vector(one), again.vector(one))
    assert torch.equal(made.vector(one, seed=1), again.vector(one, seed=1))
    assert not torch.equal(made.vector(one, seed=1), made.vector(one, seed=2))
    assert not torch.allclose(made.vector(one), made.vector(other))
    shapes = {(s, k): t.shape for s, k, t in made.generate(one).tensors()}
    assert shapes == {(s, k): t.shape for s, k, t in lib.layout.like.tensors()}


def test_what_says_nothing_is_not_learned(tmp_path):
    lib = library(tmp_path)
    with pytest.raises(ValueError, match="has one"):
        ICMLoRA.fit(lib.without(lib.names[1:]), ICM, tasks(1))
    with pytest.raises(ValueError, match="one task vector"):
        ICMLoRA.fit(lib, ICM, tasks(1).expand(5, -1))
    alike = dataclasses.replace(lib.experts[0], checkpoints=lib.experts[0].mean.expand(2, -1))
    with pytest.raises(ValueError, match="all the same numbers"):
        Basis.of(dataclasses.replace(lib, experts=(alike, alike)), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_goes_to_disk_and_back(tmp_path, kind):
    lib = library(tmp_path)
    made, one, _ = generators(lib)[kind]
    made.save(tmp_path / "kept")
    assert not [p for p in (tmp_path / "kept").iterdir() if p.suffix not in (".json", ".safetensors")]
    back = type(made).load(tmp_path / "kept", lib)
    assert torch.equal(back.vector(one, seed=1), made.vector(one, seed=1))
    with pytest.raises(ValueError, match="other experts"):
        type(made).load(tmp_path / "kept", lib.without(["e1"]))
    other = ICMLoRA if kind == "sg" else SGLoRA
    with pytest.raises(ValueError, match="is asked for"):
        other.load(tmp_path / "kept", lib)
    trained_on = dataclasses.replace(lib.experts[1], checkpoints=lib.experts[1].checkpoints + 1)
    with pytest.raises(ValueError, match="other experts"):  # of the same names
        type(made).load(
            tmp_path / "kept", dataclasses.replace(lib, experts=(lib.experts[0], trained_on, *lib.experts[2:]))
        )


@pytest.mark.parametrize("kind", [lambda: Convolutional(30, 3, (8, 8), 16, 8), lambda: Dense(30, 3, 16, 8)])
def test_one_sample_is_learned_by_heart_where_nothing_is_regularised(kind):
    torch.manual_seed(0)
    net = kind().double()
    X, t = (torch.randn(1, n, generator=seeded(6), dtype=torch.float64) for n in (30, 3))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        net.loss(X, t, 0.0, None).backward()
        optimiser.step()
    assert float(net.loss(X, t, 0.0, None)) < 1e-3
    assert float(net.loss(X, t, 1.0, None)) > float(net.loss(X, t, 0.0, None))


def test_the_condition_of_an_expert_is_made_of_others(tmp_path, monkeypatch):
    lib, asked = library(tmp_path), []
    whole = sglora.mixture

    def seen(of, query, *rest):
        asked.append((set(of.names), query))
        return whole(of, query, *rest)

    monkeypatch.setattr(sglora, "mixture", seen)
    SGLoRA.fit(lib, SG)
    for (names, query), expert in zip(asked, lib.experts, strict=True):
        assert names == set(lib.names) - {expert.name}
        assert torch.equal(query, expert.embedding)


def test_the_prior_of_sg_lora_learns_what_the_posterior_knows():
    """lam draws both together: after training on one sample their divergence is small, and its decoding near it."""
    torch.manual_seed(0)
    net = sglora.Net(6, 16, 2).double()
    X, c = (torch.randn(1, n, generator=seeded(7), dtype=torch.float64) for n in (6, 12))
    optimiser, draw = torch.optim.Adam(net.parameters(), lr=1e-2), seeded(8)
    first = kl(*net.posterior(X, c), *net.before(c)).item()
    for _ in range(300):
        optimiser.zero_grad()
        net.loss(X, c, 1.0, draw).backward()
        optimiser.step()
    assert kl(*net.posterior(X, c), *net.before(c)).item() < first
    z = drawn(*net.before(c), None)
    assert float((net.decode(z, c) - X).square().sum()) < 1e-2 * float(X.square().sum())


def test_a_library_takes_one_start_alone(tmp_path):
    lib = library(tmp_path)
    lib.layout.unpack(lib.start).save(tmp_path / "start")
    for i, expert in enumerate(lib.experts):
        folder = tmp_path / "experts" / expert.name
        folder.mkdir(parents=True)
        expert.save(folder, digest(lib.start + (i == 3)))
    lib.save()
    with pytest.raises(ValueError, match="e3 began at another start"):
        Library.load(tmp_path)
    found = Library.load(tmp_path, without=["e3"])
    assert found.names == ["e0", "e1", "e2", "e4"]
    for a, b in zip(found.experts, lib.without(["e3"]).experts, strict=True):
        assert torch.equal(a.checkpoints, b.checkpoints)
        assert (a.description, a.figures) == (b.description, b.figures)
    dataclasses.replace(lib.experts[1], mean=lib.experts[1].mean / 0).save(
        tmp_path / "experts" / "e1", digest(lib.start)
    )
    with pytest.raises(ValueError, match="mean holds NaN or infinity"):
        Library.load(tmp_path)
    lib.experts[1].save(tmp_path / "experts" / "e1", digest(lib.start))
    held = load_file(tmp_path / "experts" / "e4" / "expert.safetensors")
    save_file({**held, "mean": held["mean"] + 1}, tmp_path / "experts" / "e4" / "expert.safetensors")
    with pytest.raises(ValueError, match=r"e4/expert\.safetensors is damaged, or was exchanged"):
        Library.load(tmp_path, without=["e3"])
    lib.experts[1].save(tmp_path / "experts" / "e4", digest(lib.start))
    with pytest.raises(ValueError, match="e4 holds the expert e1"):
        Library.load(tmp_path, without=["e3"])
    said = json.loads((tmp_path / "library.json").read_text())
    (tmp_path / "library.json").write_text(json.dumps({k: v for k, v in said.items() if k != "model"}))
    with pytest.raises(ValueError, match="is no library of version 1"):
        Library.load(tmp_path)


def test_a_few_of_sorted_rows_have_every_class_in_its_share():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 30
    few = [labels[i] for i in spaced(len(labels), 12)]
    assert [few.count(c) for c in "abc"] == [6, 3, 3]
    assert spaced(3, 30) == [0, 1, 2]
    assert spaced(0, 30) == []
    assert spaced(31, 30) == sorted(set(spaced(31, 30)))


def test_of_many_lines_some_are_read_of_every_part_and_none_is_held_twice_over():
    for count in (1, 7, 8, 9, 100, 1000):
        found = list(map(int, evenly(map(str, range(count)), 8)))
        assert len(found) == min(count, 8)
        assert found == sorted(set(found))
        gaps = [b - a for a, b in zip(found, [*found[1:], count], strict=True)]
        assert max(gaps) <= 2 * count / len(found) + 1
