"""diagnose against closed forms, independent algebra, and the published constants of LoRAN."""

import copy
import json
import math
import re

import pytest
import torch
from torch import nn

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from tests.support.zoo import ZOO
from undula import (
    AuroRA,
    AuroRAStatic,
    Centred,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
    SineLoRA,
    diagnose,
)
from undula.kernels import svd
from undula.methods.activations import Identity, Sine, Sinter, Tanh
from undula.methods.aurora import PerChannel
from undula.observe.diagnose import effective_rank, plot

pytestmark = pytest.mark.usefixtures("made_up_evidence", "float64")


def each(methods):
    return pytest.mark.parametrize("m", methods, ids=[repr(m) for m in methods])


def single(m, O=16, I=12):
    """An adapter of one trained site."""
    adapter = undula.attach(nn.Sequential(nn.Linear(I, O)), m, where="*")
    shake(adapter)
    return adapter, adapter.factors["0"]


# Spectra


def test_ranks_of_known_spectra():
    """Flat over k: effective and stable rank are k.  Geometric: the closed forms."""
    s = torch.tensor([3.0, 3.0, 3.0, 0.0])
    assert effective_rank(s) == pytest.approx(3.0)
    s = 0.5 ** torch.arange(60.0)
    assert effective_rank(s) == pytest.approx(4.0)  # the entropy of p = 1/2, 1/4, ... is 2 bits
    U, V = torch.linalg.qr(torch.randn(16, 8)).Q, torch.linalg.qr(torch.randn(12, 8)).Q
    adapter, f = single(LoRA(r=8, alpha=8.0))
    with torch.no_grad():
        f["B"].copy_(U * 0.5 ** torch.arange(8))
        f["A"].copy_(V.T)
    row, summary = diagnose(adapter)
    assert row["spectrum"] == pytest.approx((0.5 ** torch.arange(8)).tolist())
    assert row["stable_rank"] == pytest.approx((1 - 4.0**-8) / (1 - 0.25))
    assert row["norm"] == pytest.approx(math.sqrt((1 - 4.0**-8) / (1 - 0.25))) == summary["norm"]
    assert (row["parameters"], row["rank"], row["shape"]) == (8 * 28, 8, [16, 12])
    assert row["warnings"] == summary["warnings"] == []


@each(ZOO)
def test_every_method_with_and_without_a_model(m):
    """Spectra are those of W' - W wherever that exists; what a method has not is None; looking changes nothing."""
    model, data = net().train(), [torch.randn(40, 12)]
    adapter = undula.attach(model, m, where="*")
    shake(adapter)
    before, state = model.eval()(data[0]), copy.deepcopy(model.train().state_dict())
    alone, (*rows, summary) = diagnose(adapter), diagnose(model, data)
    assert model.training
    assert undula.selected(model) is adapter
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.eval()(data[0]), before)
    json.dumps([alone, rows, summary], allow_nan=False)
    assert [row["site"] for row in alone] == ["0", "2", "all"]
    assert {frozenset(row) for row in [*alone, *rows, summary]} == {frozenset(summary)}
    trained = [t.numel() for _, _, t in adapter.tensors() if t.requires_grad]  # a shared tensor counts at each site
    assert summary["parameters"] == adapter.num_parameters()
    assert sum(row["parameters"] for row in rows) == sum(trained)
    for row in rows:
        f, W = adapter.factors[row["site"]], model.get_submodule(row["site"]).weight.detach()
        if not isinstance(m, undula.Reweight):
            assert row["spectrum"] is None
            continue
        delta = (m.weight(W, f) - W).detach()
        s = torch.linalg.svdvals(delta)
        want = s[: len(row["spectrum"])].tolist()
        assert row["spectrum"] == pytest.approx(want, rel=1e-5, abs=1e-5 * want[0])  # dense ones are in float32
        assert row["relative_norm"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(float((s / s[0]).square().sum()), rel=1e-5)
    if isinstance(m, DoRA):
        assert alone[0]["spectrum"] is None  # W' - W needs W


def test_low_rank_needs_no_matrix():
    """A matrix of 300000 x 200000 would take 240 GB."""
    method, shape = LoRA(r=3), (300_000, 200_000)
    factors = {"A": torch.randn(3, shape[1]), "B": torch.randn(shape[0], 3)}
    row, _ = diagnose(undula.Adapter({"x": method}, {"x": factors}, {"x": shape}))
    assert row["norm"] == pytest.approx(16 / 3 * math.sqrt(3 * shape[0] * shape[1]), rel=0.01)
    assert 2.9 < row["effective_rank"] <= 3


def test_large_spectra_have_the_right_energy():
    """The leading values, and a tail of which the sum of squares is known."""
    M = torch.randn(300, 8) @ torch.randn(8, 200) + 0.01 * torch.randn(300, 200)
    s, want = svd.values(M, exact_below=100, leading=20), torch.linalg.svdvals(M)
    assert len(s) == 200
    torch.testing.assert_close(s[:8], want[:8])
    torch.testing.assert_close(s.norm(), want.norm())
    torch.testing.assert_close(svd.values(M), want)


# LoRAN


@pytest.mark.parametrize(
    ("b", "a", "w", "nonlinearity", "changed", "warning"),
    [
        (1e-3, 5e-5, 1e4, 3.7e-5, 0.0, "the nonlinearity is invisible in bfloat16"),
        (1e-2, 5e-5, 1e4, 3.5e-5, 0.0, "the nonlinearity is invisible in bfloat16"),
        (1e-2, 5e-4, 1e3, 3.7e-4, 0.0, "the nonlinearity is invisible in bfloat16"),
        (1e-2, 1e-2, 1e4, 7.1e-3, 0.82, "unstable"),
        (1e-2, 1.0, 1e4, 0.71, 1.0, "unstable"),
    ],
)
def test_what_the_published_constants_do(b, a, w, nonlinearity, changed, warning):
    """1024 x 1024, r = 64, A Kaiming-uniform, B normal of deviation b."""
    torch.set_default_dtype(torch.float32)
    adapter = undula.attach(nn.Sequential(nn.Linear(1024, 1024)), LoRAN(r=64, activation=Sinter(a=a, w=w)), where="*")
    with torch.no_grad():
        adapter.factors["0"]["B"].normal_(std=b)
    row, summary = diagnose(adapter)
    assert row["nonlinearity"] == pytest.approx(nonlinearity, rel=0.02)
    assert row["bf16_changed"] == (0.0 if changed == 0 else pytest.approx(changed, abs=0.005))
    f = adapter.factors["0"]
    assert row["stability"] == pytest.approx(a * w * float((f["B"] @ f["A"]).detach().abs().max()))
    assert [text.split(":")[0] for text in row["warnings"]] == [warning]
    assert summary["warnings"] == [f"{warning}: 1 of 1 sites"]
    dW = adapter.delta("0")
    assert row["stable_rank"] == pytest.approx(
        float(dW.square().sum() / torch.linalg.matrix_norm(dW, 2) ** 2), rel=1e-3
    )
    assert row["effective_rank"] > 600 if a == 1.0 else 60 < row["effective_rank"] < 80


def test_learned_constants_count():
    adapter, f = single(LoRAN(r=2, activation=Sinter(a=1e-3, w=1.0), learn=("a", "w")))
    with torch.no_grad():
        f["a"].fill_(0.5)
        f["w"].fill_(-30.0)
    X = f["B"] @ f["A"]
    row, _ = diagnose(adapter)
    assert row["stability"] == pytest.approx(15 * float(X.detach().abs().max()))
    assert row["nonlinearity"] == pytest.approx(float(((0.5 * X * torch.sin(-30 * X)).norm() / X.norm()).detach()))
    assert any(text.startswith(f"unstable: a*w*|u| reaches {row['stability']:.1f}") for text in row["warnings"])


WRAPS = {"bare": lambda m: m, "dropout": lambda m: Dropout(m, 0.5), "dora": DoRA, "centred": Centred}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_sine_lora_is_measured_against_its_best_multiple(wrap):
    for w, low, high in ((1e-3, 0.0, 1e-5), (30.0, 0.3, 1.0)):
        adapter, f = single(wrap(SineLoRA(r=2, activation=Sine(w=w))))
        X = (f["B"] @ f["A"]).detach().flatten()
        X0 = (f["B0"] @ f["A0"]).detach().flatten() if "A0" in f else torch.zeros_like(X)
        Y = torch.sin(w * X) - torch.sin(w * X0)  # under Centred the change since the start
        slope = torch.linalg.lstsq((X - X0)[:, None], Y[:, None]).solution.flatten()
        left = Y - slope * (X - X0)
        row, _ = diagnose(adapter)
        assert row["nonlinearity"] == pytest.approx(float(left.norm() / Y.norm()), abs=1e-12)
        assert low <= row["nonlinearity"] <= high
        assert row["stability"] is None
        assert any("invisible in bfloat16" in text for text in row["warnings"]) == (w == 1e-3)


def test_identity_is_no_nonlinearity():
    for m, seen in ((LoRAN(r=2, activation=Identity()), 0.0), (LoRAN(r=2, activation=Tanh()), None)):
        row, _ = diagnose(single(m)[0])
        assert row["nonlinearity"] == seen if seen is not None else row["nonlinearity"] > 0
        assert row["warnings"] == [] or seen is None


# AuroRA


@pytest.mark.parametrize("m", [AuroRA(r=3), AuroRA(r=3, spline=PerChannel()), Dropout(AuroRA(r=3), 0.5)], ids=repr)
def test_aurora_departs_from_the_best_affine_map(m):
    """sqrt(1 - R^2) of lstsq on [z 1], padding left out; the share of z beyond the grid."""
    model = nn.Sequential(nn.Linear(12, 16)).eval()
    adapter = undula.attach(model, m, where="*")
    shake(adapter)
    data = [torch.randn(40, 12) + 0.5, torch.randn(60, 12) - 1.0]
    row, summary = diagnose(model, data)
    f = adapter.factors["0"]
    z = (torch.cat(data) @ f["A"].T).detach()
    h = getattr(m, "inner", m).sigma(z, f).detach()
    fit = torch.cat([z, torch.ones(len(z), 1)], 1)
    left = h - fit @ torch.linalg.lstsq(fit, h).solution
    assert row["nonlinearity"] == pytest.approx(float(left.norm() / (h - h.mean(0)).norm())) == summary["nonlinearity"]
    assert row["outside"] == pytest.approx(float((z.abs() > 1).double().mean()))
    assert row["outside"] > 0.1
    assert row["warnings"] == [f"the spline fades: {row['outside']:.0%} of its inputs lie outside [-1, 1]"]
    near, _ = diagnose(model, [0.6 * x for x in data])
    assert 0 < near["outside"] < 0.1
    assert near["warnings"] == []
    assert diagnose(adapter)[0]["nonlinearity"] is None


def test_an_affine_sigma_is_called_so():
    """H and S = constant on small z: the bases sum to 1, so S(z) is the constant, and tanh is its argument."""
    model = nn.Sequential(nn.Linear(12, 16)).eval()
    adapter = undula.attach(model, AuroRA(), where="*")
    with torch.no_grad():
        f = adapter.factors["0"]
        f["S"].fill_(0.3)
        f["A"].mul_(1e-3)
        f["B"].normal_()
    row, _ = diagnose(model, [torch.randn(50, 12)])
    assert row["nonlinearity"] < 1e-4
    assert row["warnings"][0].startswith("sigma is affine")
    assert diagnose(model, [torch.randn(8, 12)])[0]["nonlinearity"] is None  # too few positions to tell


def test_static_aurora_is_seen_without_data():
    """kappa = sqrt(I) bends A's columns, kappa = 1 on a wide layer does not (affine to 0.2 % or so)."""
    rows = []
    for m in (AuroRAStatic(), AuroRAStatic(kappa=1.0, centred=False)):
        adapter = undula.attach(nn.Sequential(nn.Linear(4096, 8)), m, where="*")
        with torch.no_grad():
            adapter.factors["0"]["B"].normal_()
        rows.append(diagnose(adapter)[0])
    assert rows[0]["nonlinearity"] > 0.03
    assert rows[0]["warnings"] == []
    assert rows[1]["nonlinearity"] < 0.003
    assert rows[1]["warnings"][0].startswith("sigma is affine")


def test_padding_does_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(12, 16)

        def forward(self, x, attention_mask=None):
            return self.body(x)

    model, x, mask = Masked().eval(), torch.randn(4, 20, 12), torch.rand(4, 20) < 0.6
    shake(undula.attach(model, AuroRA(), where="*"))
    got = diagnose(model, [{"x": torch.where(mask[..., None], x, 50.0), "attention_mask": mask.long()}])
    want = diagnose(model, [x[mask]])
    for key in ("nonlinearity", "outside"):
        assert got[0][key] == pytest.approx(want[0][key])


# Warnings and refusals


def test_warnings_in_plain_words():
    fresh = undula.attach(net(), LoRA(r=8), where="*")
    assert diagnose(fresh)[0]["warnings"] == ["not trained: the adapter changes nothing"]
    assert diagnose(fresh)[-1]["warnings"] == ["not trained: 2 of 2 sites"]
    assert diagnose(undula.attach(net(), AuroRA(), where="*"))[0]["warnings"][0].startswith("not trained")
    with torch.no_grad():
        fresh.factors["0"]["B"][:, 0] = 1.0
        fresh.factors["2"]["A"][0, 0] = float("nan")
    first, second, summary = diagnose(fresh)
    assert first["warnings"] == ["ranks lie idle: the update uses 1.0 of 8"]
    assert second["warnings"][0].startswith("factors hold NaN or infinity")
    assert second["spectrum"] is None
    assert len(summary["warnings"]) == 2


def test_refusals():
    with pytest.raises(TypeError, match="give the model with the adapter selected"):
        diagnose(single(AuroRA())[0], [torch.randn(5, 12)])
    with pytest.raises(LookupError, match="no adapter is selected"):
        diagnose(net())
    merged = net()
    undula.attach(merged, LoRA(r=2), where="*")
    undula.merge(merged)
    with pytest.raises(RuntimeError, match="unmerge it before diagnosing"):
        diagnose(merged)


@each([LoRAN(r=4, activation=Sinter(a=0.3, w=5.0)), LoRA(r=4), AuroRA(), DoRA(LoRA(r=4))])
def test_plot(m, tmp_path):
    model = net()
    shake(undula.attach(model, m, where="*"))
    rows = diagnose(model, [torch.randn(40, 12)])
    plot(rows, tmp_path / "a.png")
    plot(rows[:1], tmp_path / "b.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "b.svg").read_text()
    assert ("singular values of dW" in drawn) == isinstance(m, undula.Reweight)
    if isinstance(m, AuroRA):
        with pytest.raises(ValueError, match=r"nothing that can be drawn.*diagnose\(model, data\)"):
            plot(diagnose(model), tmp_path / "c.png")


def test_each_site_has_a_row_of_its_own_in_the_plot(tmp_path):
    """Lines of many sites in one frame hide each other: the spectra are rows of one image, named, the first on top."""
    sites = [f"layers.{i}.query" for i in range(37)]
    blank = {"nonlinearity": None, "bf16_changed": None, "rank": 4, "method": "LoRA(r=4)", "parameters": 1}
    rows = [blank | {"site": s, "spectrum": [2.0, 1.0, 0.5, 0.01], "effective_rank": 2.0} for s in sites]
    rows[3]["spectrum"] = [0.0] * 4  # of a layer that has not learned
    plot(rows, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert [s for s in re.findall(r"<text.*?>(\S+)</text>", drawn) if s.endswith("query")] == [s[7:] for s in sites]
    assert len(re.findall("<image", drawn)) == 2  # the spectra, and the colours' scale
    assert "number of the singular value" in drawn
    assert "share of the largest" in drawn
    plot([rows[3]], tmp_path / "b.svg")
    plot([rows[0] | {"spectrum": [2.0], "rank": 1}], tmp_path / "c.svg")


def test_under_centred_the_nonlinearity_is_that_of_the_change():
    """f(BA) - f(B0 A0): nothing at the start; of a small step the slopes of f, against the step."""
    m = undula.Centred(undula.LoRAN(r=2, activation=Sinter(a=0.3, w=5.0)), undula.starts.Gaussian(0.5))
    adapter = undula.attach(nn.Sequential(nn.Linear(12, 9)), m)
    assert undula.diagnose(adapter)[0]["nonlinearity"] is None
    f = adapter.factors["0"]
    with torch.no_grad():
        f["B"].add_(0.1 * torch.randn_like(f["B"]))
    X, X0 = (f["B"] @ f["A"]).detach().float(), (f["B0"] @ f["A0"] if "A0" in f else f["B0"] @ f["A"]).detach().float()
    bend = lambda u: u + 0.3 * u * torch.sin(5.0 * u)  # noqa: E731
    want = float((bend(X) - bend(X0) - (X - X0)).norm() / (X - X0).norm())
    assert undula.diagnose(adapter)[0]["nonlinearity"] == pytest.approx(want, rel=1e-4)


def test_the_effective_rank_is_exact_above_a_thousand():
    """Of an update with a spectrum that is not flat behind its first values."""
    m = undula.SineLoRA(r=2)
    adapter = undula.attach(nn.Sequential(nn.Linear(1030, 1100, bias=False)), m)
    with torch.no_grad():
        adapter.factors["0"]["B"].normal_()
    row = undula.diagnose(adapter)[0]
    s = torch.linalg.svdvals(adapter.delta("0").detach())
    assert row["effective_rank"] == pytest.approx(effective_rank(s), rel=1e-3)
