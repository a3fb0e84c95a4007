"""squeeze: the nearest update of less rank, what that costs, and who gets how much of a budget.

Oracles: the dense decomposition of dW, every allocation by brute force, the files on the disk.
"""

import itertools
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from tests.support.zoo import LOW_RANK, MERGEABLE
from undula import Additive, DoRA, Dropout, LoRA, LoRAN, Masked, RankStabilised, SHiRA, Sum, compress
from undula.cli.main import app
from undula.cli.squeezing import sum_of
from undula.compress import ByBudget, ByEnergy, ByError, ByRank, BySize, Randomised
from undula.io.sites import Opened
from undula.kernels import svd
from undula.methods.activations import Sinter

pytestmark = pytest.mark.usefixtures("float64")
BENT = LoRAN(r=3, activation=Sinter(a=1.0, w=30.0))
PLAIN = LoRA(r=6, alpha=3.0)


def adapter_of(m, model=None, by=0.3):
    adapter = undula.attach((model or net()).eval(), m, where="*")
    return shake(adapter, by).copy()


def update(adapter, site):
    """What is squeezed: dW, of DoRA that of the method inside."""
    method = adapter.methods[site]
    while not isinstance(method, Additive):
        method = method.inner
    return method.delta(adapter.factors[site]).detach()


def spectra(adapter):
    return {s: torch.linalg.svdvals(update(adapter, s)) for s in adapter.factors}


def misses(adapter, ranks):
    return sum(float(s[ranks[site] :].square().sum()) for site, s in spectra(adapter).items())


KINDS = {
    f"{type(m).__name__} {type(m.unwrapped()).__name__}": m for m in MERGEABLE if isinstance(m.unwrapped(), Additive)
}
SQUEEZED = list(KINDS.values())


@pytest.mark.parametrize("m", SQUEEZED, ids=[repr(m) for m in SQUEEZED])
def test_it_is_the_nearest_of_its_rank_and_knows_by_how_much_it_misses(m):
    """Every method with an update, wrappers and DoRA included, against the dense decomposition; the factors balanced,
    the scale in them, the sites PEFT's plain LoRA where nothing is around it."""
    adapter = adapter_of(m)
    made = undula.squeeze(adapter, ByRank(2))
    for site, s in spectra(adapter).items():
        f, new = made.adapter.factors[site], made.adapter.methods[site]
        missed = (update(adapter, site) - f["B"] @ f["A"]).norm()
        torch.testing.assert_close(missed, s[2:].norm(), rtol=1e-6, atol=1e-9)
        assert made.errors[site] == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-9)
        torch.testing.assert_close(f["B"].T @ f["B"], f["A"] @ f["A"].T)
        torch.testing.assert_close(update(made.adapter, site), f["B"] @ f["A"])
        k = len(f["A"])
        assert k == made.ranks[site] == min(2, max(1, int((s > 1e-12 * s[0]).sum())))
        assert str(LoRA(r=k, alpha=float(k))) in str(new)
    assert made.error == pytest.approx(
        (misses(adapter, made.ranks) / misses(adapter, dict.fromkeys(made.ranks, 0))) ** 0.5, abs=1e-9
    )


@pytest.mark.parametrize("m", [PLAIN, DoRA(PLAIN), Dropout(PLAIN, 0.1), BENT], ids=repr)
def test_full_rank_costs_nothing_and_again_changes_nothing(m):
    """Also where more is asked for than the matrix has; the model computes what it did."""
    model = net().eval()
    adapter = shake(undula.attach(model, m, where="*"), 0.3)
    x = torch.randn(5, 12)
    y = model(x)
    made = undula.squeeze(adapter, ByRank(50))
    undula.detach(model)
    undula.attach(model, made.adapter)
    torch.testing.assert_close(model(x), y)
    assert made.error < 1e-7
    less = undula.squeeze(made.adapter, ByRank(3)).adapter
    again = undula.squeeze(less, ByRank(3))
    assert again.error == 0
    for site in less.factors:
        torch.testing.assert_close(update(again.adapter, site), update(less, site))


def test_scales_and_gauges_are_no_part_of_it():
    """The same update at another alpha, with rsLoRA's scale or in other factors is squeezed to the same update."""
    adapter = adapter_of(PLAIN)
    wanted = undula.squeeze(adapter, ByEnergy(0.8))
    G = torch.randn(6, 6)
    others = []
    for method, s in ((LoRA(r=6, alpha=24.0), 4.0), (LoRA(r=6, alpha=6**0.5, scaling=RankStabilised()), 1.0)):
        turned = {
            site: {"A": torch.linalg.solve(G, f["A"].detach()), "B": 0.5 / s * f["B"].detach() @ G}
            for site, f in adapter.factors.items()
        }
        others.append(undula.Adapter(dict.fromkeys(adapter.methods, method), turned, adapter.shapes))
    for other in others:
        found = undula.squeeze(other, ByEnergy(0.8))
        assert found.ranks == wanted.ranks
        for site in adapter.factors:
            torch.testing.assert_close(found.adapter.delta(site), wanted.adapter.delta(site))


@pytest.mark.parametrize("m", [PLAIN, BENT, SHiRA(r=2)], ids=repr)
def test_energy_and_error_take_the_least_rank(m):
    adapter = adapter_of(m)
    for share in (0.3, 0.9, 0.999, 1.0):
        for target in (ByEnergy(share), ByError((1 - share) ** 0.5)):
            made = undula.squeeze(adapter, target)
            for site, s in spectra(adapter).items():
                kept = s.square().cumsum(0) / s.square().sum()
                least = 1 + int((kept < share - 1e-11).sum())
                assert (
                    made.ranks[site] in (least, int((s > 1e-9 * s[0]).sum()))
                    if share == 1.0
                    else made.ranks[site] == least
                )
                assert made.errors[site] <= (1 - share) ** 0.5 + 1e-7
            assert made.error <= (1 - share) ** 0.5 + 1e-7


@pytest.mark.parametrize("m", [PLAIN, BENT], ids=repr)
def test_a_budget_goes_where_it_keeps_most(m):
    """Against every allocation of so many ranks."""
    adapter = adapter_of(m)
    with torch.no_grad():  # one site matters less, so that it is left out of a small budget
        next(iter(adapter.factors.values()))["B"].mul_(0.05)
    most = {site: int((s > 1e-12 * s[0]).sum()) for site, s in spectra(adapter).items()}
    for total in (1, 3, 7):
        made = undula.squeeze(adapter, ByBudget(total))
        every = itertools.product(*(range(k + 1) for k in most.values()))
        best = min(misses(adapter, dict(zip(most, ks, strict=True))) for ks in every if sum(ks) == total)
        assert sum(made.ranks.values()) == total
        assert misses(adapter, made.ranks) == pytest.approx(best, rel=1e-9)
        assert set(made.adapter.methods) == {site for site, k in made.ranks.items() if k}
        assert made.error == pytest.approx((best / misses(adapter, dict.fromkeys(most, 0))) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("m", [PLAIN, DoRA(BENT)], ids=repr)
def test_a_size_is_met_on_the_disk_and_used(m, tmp_path):
    """What is said is what lies there; with a rank more at any site it would be too much."""
    adapter = adapter_of(m, nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9)))
    for number, size in enumerate((5_000, 8_000, 100_000)):
        made = undula.squeeze(adapter, BySize(size))
        made.adapter.save(tmp_path / str(number))
        assert sum_of(tmp_path / str(number)) == made.bytes[1] <= size
        for site, k in made.ranks.items():
            if k and k < min(*adapter.shapes[site], 6) and size < 100_000:
                assert made.bytes[1] + 8 * sum(adapter.shapes[site]) > size
    with pytest.raises(
        ValueError, match=r"300 bytes hold no rank of this adapter: one, with its names .* takes [\d,]+"
    ):
        undula.squeeze(adapter, BySize(300))


@pytest.mark.parametrize(
    "m", [m for m in MERGEABLE if type(m).__mro__[0] in (LoRAN, SHiRA) or isinstance(m, Sum)], ids=repr
)
def test_rows_are_those_of_the_whole(m):
    adapter = adapter_of(m)
    for site, f in adapter.factors.items():
        for some in (slice(0, 3), slice(2, 7), slice(7, 8)):
            torch.testing.assert_close(adapter.methods[site].rows(f, some), adapter.delta(site)[some])


def test_a_large_update_goes_through_block_by_block(monkeypatch):
    """The operator's decomposition is the matrix's, and no more than a block is ever computed."""
    from undula.compress import updates

    monkeypatch.setattr(updates, "BLOCK", 100 * 300)
    adapter = adapter_of(BENT, nn.Sequential(nn.Linear(300, 400)))
    asked = []
    rows = LoRAN.rows
    monkeypatch.setattr(LoRAN, "rows", lambda self, f, some: asked.append(some) or rows(self, f, some))
    monkeypatch.setattr(
        LoRAN, "delta", lambda self, f, delta=LoRAN.delta: delta(self, f) if len(f["B"]) <= 100 else 1 / 0
    )
    made = undula.squeeze(adapter, ByRank(3), solver=Randomised(iterations=6))
    assert {some.stop - some.start for some in asked} == {100}
    monkeypatch.undo()
    s = torch.linalg.svdvals(adapter.delta("0"))
    missed = (adapter.delta("0") - made.adapter.delta("0")).norm()
    assert s[3:].norm() * (1 - 1e-12) <= missed <= 1.003 * s[3:].norm()
    assert made.errors["0"] == pytest.approx(float(missed / s.norm()), rel=1e-9)  # of what it made, not of the best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_sixteen_bits_round_is_in_the_error(dtype):
    adapter = adapter_of(PLAIN)
    narrow = adapter.map(lambda f: {k: t.detach().to(dtype) for k, t in f.items()})
    for r in (2, 6):
        made = undula.squeeze(narrow, ByRank(r))
        for site, f in made.adapter.factors.items():
            assert f["A"].dtype == f["B"].dtype == dtype
            wide = 0.5 * narrow.factors[site]["B"].double() @ narrow.factors[site]["A"].double()
            missed = (wide - f["B"].double() @ f["A"].double()).norm()
            assert made.errors[site] == pytest.approx(float((missed / wide.norm()).detach()), rel=1e-2)
            assert made.errors[site] > 0


def test_nothing_stays_nothing_and_can_still_learn():
    """An adapter that is zero keeps a rank at each site, with B = 0 and A not."""
    adapter = undula.attach(net(), PLAIN, where="*").copy()
    for target in (ByRank(4), ByEnergy(0.9), ByError(0.1), ByBudget(2)):
        made = undula.squeeze(adapter, target)
        assert made.error == 0
        for f in made.adapter.factors.values():
            assert not f["B"].any()
            assert f["A"].norm() > 0.5
            assert all(t.requires_grad for t in f.values())


def test_full_parameters_ties_padding_and_the_rest_stay():
    """Sites that share a pair go on sharing one; the row of padding is no part of an embedding's update."""
    embedding = nn.Sequential(nn.Embedding(11, 6, padding_idx=3))
    adapter = adapter_of(LoRA(r=4), embedding)
    assert adapter.kernels["0"] == (3,)
    made = undula.squeeze(adapter, ByRank(2))
    assert not made.adapter.factors["0"]["A"][:, 3].any()
    wanted = adapter.delta("0").index_fill(1, torch.tensor([3]), 0.0)
    s = torch.linalg.svdvals(wanted)
    torch.testing.assert_close((wanted - made.adapter.delta("0")).norm(), s[2:].norm())
    model = net()
    adapter = shake(undula.attach(model, PLAIN, where=["0"], full=["2.weight"]))
    tied = undula.Adapter(
        {"a": PLAIN, "b": PLAIN}, dict.fromkeys("ab", adapter.factors["0"]), dict.fromkeys("ab", (16, 12)),
        adapter.full, about={"base_model_name_or_path": "x/y", "classes": ["p", "q"]},
    )  # fmt: skip
    made = undula.squeeze(tied, ByBudget(3)).adapter
    assert made.factors["a"]["A"] is made.factors["b"]["A"]
    assert torch.equal(made.full["2.weight"], adapter.full["2.weight"])
    assert made.full["2.weight"] is not adapter.full["2.weight"]
    assert made.about == tied.about


def test_the_row_of_padding_is_in_the_norms_of_dora():
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=3))
    adapter = shake(undula.attach(model, DoRA(LoRA(r=2)), where="*"), 0.3)
    y = model(torch.arange(11))
    made = undula.squeeze(adapter, ByRank(9))
    undula.detach(model)
    undula.attach(model, made.adapter)
    torch.testing.assert_close(model(torch.arange(11)), y)


def test_factors_that_their_type_cannot_hold_are_refused_by_name():
    adapter = adapter_of(LoRA(r=2, alpha=1e9)).map(lambda f: {k: (1e3 * t.detach()).half() for k, t in f.items()})
    with pytest.raises(ValueError, match=r"^0: the update is too large for factors of float16: .*adapter.map"):
        undula.squeeze(adapter, ByRank(1))


@pytest.mark.parametrize("m", [PLAIN, BENT], ids=repr)
def test_inputs_that_a_mask_has_closed_are_no_part_of_the_update(m):
    adapter = adapter_of(Masked(m), nn.Sequential(nn.Linear(12, 16)))
    f = adapter.factors["0"]
    f["mask"][::2] = 0
    made = undula.squeeze(adapter, ByRank(2))
    new, wanted = made.adapter.factors["0"], m.delta({k: t for k, t in f.items() if k != "mask"}) * f["mask"]
    s = torch.linalg.svdvals(wanted)
    missed = (wanted - new["B"] @ new["A"] * new["mask"]).norm()
    torch.testing.assert_close(missed, s[2:].norm(), rtol=1e-6, atol=1e-9)
    assert made.errors["0"] == pytest.approx(float((s[2:].norm() / s.norm()).detach()))


def test_an_adapter_without_layers_has_no_rank_to_lose(tmp_path):
    undula.Adapter({}, {}, {}, {"2.weight": torch.randn(8, 16)}).save(tmp_path / "a")
    for target in ("--rank", "--budget", "--size"):
        done = CliRunner().invoke(app, ["squeeze", str(tmp_path / "a"), target, "9000", "--out", str(tmp_path / "b")])
        assert done.exit_code == 2
        assert "adapts no layer" in " ".join(done.output.split())
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_squeezed_is_refused_by_name():
    """Below the Additive rung; numbers that are none; a value out of range."""
    with pytest.raises(TypeError, match=r"AuroRA.* at 0 stands on the rung Method.*undula.collapse"):
        undula.squeeze(adapter_of(undula.AuroRA()), ByRank(2))
    adapter = adapter_of(PLAIN)
    with pytest.raises(TypeError, match=r"target says .* ByRank\(8\).*found 2"):
        undula.squeeze(adapter, 2)
    with torch.no_grad():
        adapter.factors["2"]["B"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="2: the factor B holds NaN or infinity"):
        undula.squeeze(adapter, ByRank(2))
    for wrong in (
        lambda: ByRank(0),
        lambda: ByEnergy(0.0),
        lambda: ByEnergy(1.5),
        lambda: ByError(-0.1),
        lambda: BySize(0),
    ):
        with pytest.raises(ValueError, match="found"):
            wrong()


def test_the_blocks_of_a_matrix_are_the_matrix():
    M = torch.randn(50, 40)
    blocks = svd.Blocks((50, 40), lambda some: M[some], 7, M.device)
    X, Y = torch.randn(40, 3), torch.randn(50, 3)
    torch.testing.assert_close(blocks.times(X), M @ X)
    torch.testing.assert_close(blocks.back(Y), M.T @ Y)
    assert blocks.square() == pytest.approx(float(M.square().sum()))
    torch.testing.assert_close(blocks.leading(3, 0, 8, 0)[1], torch.linalg.svdvals(M)[:3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("target", [ByRank(2), ByBudget(5), BySize(6_000)], ids=repr)
@pytest.mark.parametrize("m", [PLAIN, Dropout(DoRA(BENT), 0.1)], ids=repr)
def test_a_directory_is_squeezed_layer_by_layer_to_the_same(m, target, tmp_path, monkeypatch):
    """No more than one layer's factors are read at a time; the numbers, the heads in full and the figures are those of
    memory."""
    model = nn.Sequential(*(nn.Linear(20, 20, dtype=torch.float32) for _ in range(4)))
    adapter = shake(undula.attach(model, m, where=["0", "1", "2"], full=["3.weight"])).copy()
    adapter.save(tmp_path / "a")
    adapter = undula.Adapter.load(tmp_path / "a")
    wanted, read = undula.squeeze(adapter, target), []
    site = Opened.site
    monkeypatch.setattr(Opened, "site", lambda self, name: read.append(name) or site(self, name))
    made = compress.squeeze_directory(tmp_path / "a", tmp_path / "b", target)
    assert len(read) == 3 * (1 if target == ByRank(2) else 2)
    assert (made.errors, made.error, made.ranks, made.bytes) == (
        wanted.errors,
        wanted.error,
        wanted.ranks,
        wanted.bytes,
    )
    found = undula.Adapter.load(tmp_path / "b")
    assert (found.methods, found.shapes) == (wanted.adapter.methods, wanted.adapter.shapes)
    for s, k, t in wanted.adapter.tensors():
        assert torch.equal(found.factors[s][k], t)
    assert torch.equal(found.full["3.weight"], adapter.full["3.weight"])
    assert found.about == adapter.about


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "2"], lambda found: all(row["rank"] == 2 for row in found["layers"])),
        (["--energy", "0.9"], lambda found: found["error"] <= 0.1**0.5),
        (["--error", "0.5"], lambda found: found["error"] <= 0.5),
        (["--budget", "3"], lambda found: found["ranks"] == 3),
        (["--size", "6k"], lambda found: found["bytes"] <= 6000),
    ],
)
def test_the_verb(options, said, tmp_path):
    adapter = adapter_of(PLAIN)
    adapter.save(tmp_path / "a")
    told = tmp_path / "told.json"
    done = CliRunner().invoke(
        app, ["squeeze", str(tmp_path / "a"), *options, "--out", str(tmp_path / "b"), "--json", str(told)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(told.read_text())
    assert said(found)
    assert found["bytes"] == sum_of(tmp_path / "b")
    made = undula.Adapter.load(tmp_path / "b")
    ranks = {row["layer"]: row["rank"] for row in found["layers"]}
    assert {s: len(f["A"]) for s, f in made.factors.items()} == {s: k for s, k in ranks.items() if k}
    assert "relative error of the update" in (tmp_path / "b" / "README.md").read_text()


def test_the_verb_takes_a_folder_or_nothing(tmp_path):
    """One that cannot be squeezed leaves nothing there, and is named."""
    for name in ("a", "b"):
        adapter_of(PLAIN).save(tmp_path / "many" / name)
    run = CliRunner().invoke
    done = run(app, ["squeeze", str(tmp_path / "many"), "--rank", "2", "--out", str(tmp_path / "less")])
    assert done.exit_code == 0, done.output
    assert all(undula.Adapter.load(tmp_path / "less" / n).method == LoRA(r=2, alpha=2.0) for n in ("a", "b"))
    adapter_of(undula.AuroRA()).save(tmp_path / "many" / "c")
    done = run(app, ["squeeze", str(tmp_path / "many"), "--rank", "2", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert not (tmp_path / "other").exists()
    for wrong in ([], ["--rank", "2", "--error", "0.1"]):
        assert run(app, ["squeeze", str(tmp_path / "many" / "a"), *wrong, "--out", str(tmp_path / "x")]).exit_code == 2


def test_every_plain_pair_leaves_as_a_lora_of_pefts(tmp_path):
    adapter = adapter_of(LOW_RANK[0])
    made = undula.squeeze(adapter, ByRank(2)).adapter
    undula.io.export_lora(made, tmp_path)
    for site in adapter.factors:
        torch.testing.assert_close(
            undula.Adapter.load(tmp_path).delta(site), made.delta(site).float(), check_dtype=False
        )
