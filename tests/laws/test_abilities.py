"""What a method can, it says itself: a nonlinear method of another package is one file, and everything serves it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import undula
from undula import (
    Additive,
    Centred,
    Dropout,
    LowRank,
    Method,
    Site,
    Substitute,
    Truncate,
)
from undula.core.bend import Bottleneck, Elementwise
from undula.kernels import reference
from undula.starts import Gaussian, Kaiming, Start


def pair(site, r, start):
    B, A = start(site, r)
    return {"A": A.requires_grad_(), "B": B.requires_grad_()}


@dataclass(frozen=True)
class Cubic(Method):
    """y = W x + B (z + a z^3), z = A x.  Deployed as B A; cut at any rank."""

    formula = "y = W x + B (z + a z^3), z = A x"
    parameters = "r*(O + I)"
    r: int = 3
    a: float = 0.5

    def init(self, site: Site, start: Start = Kaiming()):
        return pair(site, self.r, start)

    def sigma(self, z):
        return z + self.a * z**3

    def forward(self, x, layer, f):
        z = self.sigma(reference.project(x, layer, f["A"]))
        return reference.added(layer(x), reference.restore(nn.functional.linear(z, f["B"]), layer))

    def bend(self, f):
        return Bottleneck(self.sigma, A_RI=f["A"], low=-2.0, high=2.0)

    def static_pair(self, f):
        return f["B"], f["A"]

    def at_rank(self, f, b):
        return Cubic(b, self.a), {"A": f["A"][:b], "B": f["B"][:, :b]}


@dataclass(frozen=True)
class Rippled(Additive):
    """W' = W + f(B A), f(u) = u + a sin(u)."""

    formula = "W' = W + u + a sin(u), u = B A"
    parameters = "r*(O + I)"
    r: int = 3
    a: float = 0.25

    def init(self, site: Site, start: Start = Kaiming()):
        return pair(site, self.r, start)

    def f(self, u):
        return u + self.a * torch.sin(u)

    def delta(self, f):
        return self.f(f["B"] @ f["A"])

    def bend(self, f):
        return Elementwise(self.f, f["B"] @ f["A"], about_u=True, swing=self.a, swing_of="a")


@dataclass(frozen=True)
class Switched(LowRank):
    """W' = W + B diag(on) A, `on` its gate."""

    formula = "W' = W + B diag(on) A"
    parameters = "r*(O + I)"
    gate = "on"
    r: int = 3

    def init(self, site: Site, start: Start = Kaiming()):
        return pair(site, self.r, start) | {"on": torch.ones(self.r, dtype=site.dtype)}

    def pair(self, f):
        return f["B"] * f["on"], f["A"]


for own in (Cubic, Rippled, Switched):  # laws over all registered methods do not meet these
    del Method.registry[own.__name__.lower()]


def trained(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)).double(), torch.randn(200, 6, dtype=torch.float64)
    adapter = undula.attach(model, method, "0")
    with torch.no_grad():
        for t in adapter.parameters():
            t.normal_()
    return model, adapter, x


@pytest.mark.parametrize("around", [lambda m: m, Dropout], ids=["itself", "in dropout"])
def test_a_bend_between_A_and_B_is_measured_on_the_inputs(around):
    """By the definition: what the best affine map of z leaves of sigma(z)."""
    model, adapter, x = trained(around(Cubic()))
    z = x @ adapter.factors["0"]["A"].detach().T
    basis = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    y = z + 0.5 * z**3
    left = y - basis @ torch.linalg.lstsq(basis, y).solution
    row = undula.diagnose(model, [x])[0]
    assert row["nonlinearity"] == pytest.approx(float(left.norm() / (y - y.mean(0)).norm()))
    assert row["outside"] == pytest.approx(float((z.abs() > 2).double().mean()))
    assert any("lie outside [-2, 2]" in text for text in row["warnings"])
    assert undula.diagnose(model)[0]["nonlinearity"] is None  # the weights alone do not tell it


def test_a_bend_of_the_update_is_measured_from_the_weights():
    _, adapter, _ = trained(Rippled())
    u = (adapter.factors["0"]["B"] @ adapter.factors["0"]["A"]).detach()
    row = undula.diagnose(adapter)[0]
    assert row["nonlinearity"] == pytest.approx(float((0.25 * u.sin()).norm() / u.norm()))
    assert row["stability"] == 0.25


def test_what_a_start_has_bent_already_is_not_counted():
    _, adapter, _ = trained(Centred(Rippled(), Gaussian()))
    f = adapter.factors["0"]
    u, u0 = (f["B"] @ f["A"]).detach(), (f["B0"] @ f["A0"]).detach()
    bent = 0.25 * (u.sin() - u0.sin())
    assert undula.diagnose(adapter)[0]["nonlinearity"] == pytest.approx(float(bent.norm() / (u - u0).norm()))


def test_a_static_form_is_what_substitute_puts_in_its_place():
    model, adapter, x = trained(Dropout(Cubic()))
    made = undula.collapse(model, Substitute(), held_out=[x]).adapter
    f = adapter.factors["0"]
    torch.testing.assert_close(made.delta("0"), (f["B"] @ f["A"]).detach())
    with pytest.raises(TypeError, match=r"Rippled.* has no static form to substitute .*Truncate"):
        undula.collapse(trained(Rippled())[1], Substitute())
    assert undula.collapse(trained(Rippled())[1], Truncate(6)).error < 1e-9


def test_a_method_that_was_trained_at_every_rank_is_cut_at_one():
    _, adapter, _ = trained(Cubic())
    cut = adapter.copy().at_rank(2)
    assert cut.methods["0"] == Cubic(2)
    assert cut.factors["0"]["A"].shape == (2, 6)
    with pytest.raises(TypeError, match=r"Rippled.* was not trained to be cut"):
        trained(Rippled())[1].at_rank(2)


def test_a_gate_is_pruned_by_and_counted():
    model, adapter, x = trained(Dropout(Switched()))
    with torch.no_grad():
        adapter.factors["0"]["on"][1] = 0
    model.eval()
    y, pruned = model(x), undula.prune(adapter)
    assert undula.ranks.live(adapter) == {"0": 2}
    assert pruned.methods["0"].undropped().r == 2
    undula.detach(model)
    undula.attach(model, pruned)
    torch.testing.assert_close(model(x), y)


def test_a_gate_without_a_pair_is_refused_by_name():
    @dataclass(frozen=True)
    class Odd(Cubic):
        gate = "A"

    del Method.registry["odd"]
    with pytest.raises(TypeError, match=r"Odd.* at 0 has a gate, but no pair"):
        undula.prune(trained(Odd())[1])


def test_no_core_file_asks_which_method_it_has():
    """Only what makes a method (allocators, formats, arithmetic) knows one by name."""
    import ast
    from pathlib import Path

    source = Path(undula.__file__).parent
    methods = set(undula.methods()) - {"Sum"}
    for folder in ("core", "kernels", "host", "observe", "compress", "combine", "optim"):
        for path in (source / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                asked = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} if asked else set()
                assert not named & methods, f"{path.name} asks for {named & methods}"
