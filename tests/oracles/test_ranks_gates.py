"""SoRA, ALoRA, DyLoRA and DiffoRA: what their sources' equations say, and planted problems."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.methods.dylora import Frozen, Full
from undula.methods.lora import Fixed
from undula.ranks.diffora import Shared
from undula.ranks.dylora import Geometric as Often
from undula.ranks.dylora import Uniform
from undula.ranks.gates import agreed
from undula.ranks.sora import Constant, Geometric, Linear, Listed, prox


@pytest.fixture(autouse=True)
def _wide():
    torch.set_default_dtype(torch.float64)


class Parallel(nn.Module):
    """Layers side by side, each with its own slice of the output."""

    def __init__(self, n=4):
        super().__init__()
        self.m = nn.ModuleList(nn.Linear(6, 5) for _ in range(n))

    def forward(self, x):
        return torch.cat([m(x) for m in self.m], -1)


def planted(model, where, r=2):
    """A function of x: the base's output, plus an update of rank r at one layer."""
    with torch.no_grad():
        change = torch.randn(5, r) @ torch.randn(r, 6)
        W, b = torch.cat([m.weight for m in model.m]), torch.cat([m.bias for m in model.m])
        W[5 * where : 5 * where + 5] += change
    return lambda x: F.linear(x, W, b)


def train(model, target, course, opt, steps):
    for step in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        course.before_forward()
        F.mse_loss(model(x), target(x)).backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
    course.finish()


def adam(adapter, lr=0.02):
    return torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.1)


# SoRA


@pytest.mark.parametrize("xi", [0.0, 0.3, 1.0])
def test_prox_is_the_argmin(xi):
    v, u = torch.linspace(-2, 2, 41), torch.linspace(-3, 3, 60001)
    best = u[(0.5 * (u - v[:, None]) ** 2 + xi * u.abs()).argmin(1)]
    torch.testing.assert_close(prox(v, xi), best, atol=1e-4, rtol=0)
    np.testing.assert_allclose(prox(v, xi), np.sign(v) * np.maximum(np.abs(v) - xi, 0))


def test_prox_keeps_what_the_published_code_loses():
    """Three masks one after another, as there: everything below 2 xi goes."""
    v, xi = torch.linspace(-1, 1, 201), 0.305
    theirs = v.clone()
    theirs[v > xi] -= xi
    theirs[v < -xi] += xi
    theirs[theirs.abs() < xi] = 0
    differ = (theirs - prox(v, xi)).abs() > 1e-12
    assert torch.equal(differ, (v.abs() > xi) & (v.abs() < 2 * xi))


class Gate(nn.Module):
    """A model whose output is its gate: A = 1, B = 1, W = 0."""

    def __init__(self, r):
        super().__init__()
        self.l = nn.Linear(r, r, bias=False)
        self.l.weight.data.zero_()

    def forward(self, x):
        return self.l(x)


def gate_alone(r, how, steps, values=None):
    model = Gate(r)
    adapter = undula.attach(model, undula.SoRA(r=r, alpha=float(r)))
    f = adapter.factors["l"]
    f["A"].data, f["B"].data = torch.eye(r), torch.eye(r)
    if values is not None:
        f["g"].data = values.clone()
    opt = torch.optim.AdamW([f["g"]], lr=0.5, weight_decay=0.5)
    return model, f["g"], opt, how.start(model, opt, steps)


def test_a_convex_problem_ends_at_the_soft_threshold():
    """min_g |t - g|^2 / 2 + lambda |g|_1 has the solution T_lambda(t)."""
    t = torch.tensor([2.0, 0.5, -0.3, -1.5, 0.1])
    model, g, opt, course = gate_alone(5, ranks.SoRA(lr=0.3, levels=Constant(0.4)), 200)
    for _ in range(200):
        (0.5 * (t - model(torch.eye(5)).diagonal()).square().sum()).backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
    torch.testing.assert_close(g.detach(), prox(t, 0.4))
    assert sum(course.ranks().values()) == 3


def test_the_optimiser_leaves_gates_alone():
    """Neither its step nor weight decay: without a gradient and with lambda = 0 nothing moves."""
    start = torch.randn(5)
    _, g, opt, course = gate_alone(5, ranks.SoRA(levels=Constant(0.0)), 20, start)
    for _ in range(20):
        course.before_update()
        opt.step()
        course.after_update()
    assert torch.equal(g, start)
    g.grad = torch.ones(5)
    course.before_update()
    assert g.grad is None
    torch.testing.assert_close(g.detach(), start - 0.1)


def test_rate_warms_up_and_gates_may_revive():
    _, g, _, course = gate_alone(
        3, ranks.SoRA(lr=0.2, warmup=0.5, levels=Constant(0.5)), 8, torch.tensor([1.0, -1.0, 0.0])
    )
    seen = []
    for _ in range(6):
        course.before_update()
        course.after_update()
        seen.append(float(g[0].detach()))
    eta = np.array([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(seen, 1 - np.cumsum(eta * 0.5))
    g.grad = torch.tensor([0.0, 0.0, -3.0])
    course.before_update()
    assert g[2].item() == pytest.approx(0.2 * 3 - 0.2 * 0.5)


def test_levels():
    np.testing.assert_allclose(Linear(0.0, 0.3, 4).values(), [0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(Geometric(0.01, 1.0, 3).values(), [0.01, 0.1, 1.0])
    assert Listed((3.0, 1.0)).values() == (3.0, 1.0)
    assert Constant(0.2).values() == Linear(0.2, 9.0, 1).values() == Geometric(0.2, 9.0, 1).values() == (0.2,)


def test_one_run_gives_a_path():
    torch.manual_seed(0)
    model = Parallel(3)
    adapter = undula.attach(model, undula.SoRA(r=4))
    opt = adam(adapter)
    target = planted(model, 1)
    how = ranks.SoRA(levels=Listed((0.0, 0.2, 1.0, 20.0)))
    course = how.start(model, opt, 200, quality=lambda: 7.0)
    train(model, target, course, opt, 200)
    assert [(p.step, p.penalty, p.quality) for p in course.path] == [
        (50, 0.0, 7),
        (100, 0.2, 7),
        (150, 1.0, 7),
        (200, 20.0, 7),
    ]
    alive = [p.live for p in course.path]
    assert alive == sorted(alive, reverse=True)
    assert alive[0] == 12
    assert alive[-1] == 0


@dataclass(frozen=True)
class _Other(undula.LowRank):
    """A method of another package that only names its gate."""

    gate = "e"

    def init(self, site):
        O, I = site.shape
        f = {"U": site.normal(2, I, std=1.0), "V": site.normal(O, 2, std=1.0), "e": site.zeros(2)}
        return {k: t.requires_grad_() for k, t in f.items()}

    def pair(self, f):
        return f["V"] * f["e"], f["U"]


def test_any_trained_gate_will_do():
    model = Parallel(1)
    adapter = undula.attach(model, _Other())
    opt = adam(adapter)
    course = ranks.SoRA(levels=Constant(1.0)).start(model, opt, 100)
    train(model, planted(model, 0, r=1), course, opt, 100)
    pruned = undula.prune(adapter)
    torch.testing.assert_close(pruned.delta("m.0"), adapter.delta("m.0").detach())


# ALoRA


def gated(n=4, r=6, start=2, **kw):
    model = Parallel(n)
    adapter = undula.attach(model, undula.GatedLoRA(r=r, open=start))
    return model, adapter, adam(adapter)


def test_scores_are_ablations():
    model, adapter, opt = gated(2)
    for f in adapter.factors.values():
        f["B"].data.normal_()
    x, target = torch.randn(8, 6), torch.randn(8, 10)

    def quality():
        return -float(F.mse_loss(model(x), target))

    course = ranks.ALoRA(rounds=1).start(model, opt, 100, quality)
    before = {s: f["g"].clone() for s, f in adapter.factors.items()}
    scores = course.scores()
    for s, f in adapter.factors.items():
        assert torch.equal(f["g"], before[s])
    base = model.m[0], model.m[1]

    def brute(keep):
        """The quality with these ranks (module, k) alone, from matrices."""
        out = []
        for i, layer in enumerate(base):
            f = adapter.factors[f"m.{i}"]
            change = sum((8.0 * torch.outer(f["B"][:, k], f["A"][k]) for j, k in keep if j == i), torch.zeros(5, 6))
            out.append(F.linear(x, layer.weight + change, layer.bias))
        return -float(F.mse_loss(torch.cat(out, -1), target).detach())

    every = [(i, k) for i in range(2) for k in range(2)]
    for i, k in every:
        want = brute([(i, k)]) - brute([e for e in every if e != (i, k)])
        assert float(scores[i][k]) == pytest.approx(want)
    assert all(s[2:].isinf().all() for s in scores)


def test_moving_ranks():
    model, adapter, opt = gated(4, r=6, start=4)
    train(model, planted(model, 1), ranks.Budget(ranks=("*=4",)).start(model, opt, 3), opt, 3)
    course = ranks.ALoRA(rounds=1, count=3).start(model, opt, 100, lambda: 0.0)
    scores = [torch.full((6,), torch.inf) for _ in range(4)]
    for i, s in enumerate(scores):
        s[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0]) + i
    scores[2][:4] = torch.tensor([0.0, 0.1, 0.2, 9.0])  # the three worst of all
    A = adapter.factors["m.3"]["A"].detach().clone()
    for f in adapter.factors.values():  # as if the closed ranks had been open once
        f["B"].data[:, 4:] = 1.0
        for k in "AB":
            opt.state[f[k]]["exp_avg"].fill_(1.0)
    closed = {(s, k) for s, f in adapter.factors.items() for k in range(6) if f["g"][k] == 0}
    assert len(closed) == 8
    before = model(torch.eye(6)).detach()
    for k in range(3):
        adapter.factors["m.2"]["B"].data[:, k] = 0  # closing these changes nothing: what is left is growth
    before = model(torch.eye(6)).detach()
    course.move(scores)
    assert course.ranks() == {"m.0": 5, "m.1": 5, "m.2": 1, "m.3": 5}
    assert torch.equal(model(torch.eye(6)), before)  # new ranks change nothing, to the bit
    f = adapter.factors["m.3"]
    assert torch.equal(f["A"][:4], A[:4])
    assert not torch.equal(f["A"][4], A[4])
    assert f["A"][4].abs().max() <= 1 / 6**0.5
    for p, rows in (f["A"], (4,)), (f["B"], (slice(None), 4)):
        assert opt.state[p]["exp_avg"].any()
        assert not opt.state[p]["exp_avg"][rows].any()


@pytest.mark.parametrize(("room", "after"), [(6, [7, 7, 6]), (1, [5, 5, 5])])
def test_freed_ranks_are_shared(room, after):
    """Eight over three sites: 3, 3, 2, the remainder to the highest means; no more than there is room for."""
    model, _, opt = gated(5, r=4 + room, start=4)
    course = ranks.ALoRA(rounds=1, count=8).start(model, opt, 100, lambda: 0.0)
    scores = [torch.full((4 + room,), torch.inf) for _ in range(5)]
    for s, mean in zip(scores, (1.0, 3.0, 0.0, 2.0, 0.0), strict=True):
        s[:4] = mean
    course.move(scores)
    alive = course.ranks()
    assert [alive["m.1"], alive["m.3"], alive["m.0"]] == after
    assert alive["m.2"] == alive["m.4"] == 0
    assert sum(alive.values()) <= 20


def test_where_every_site_lost_a_rank_nothing_opens():
    model, _, opt = gated(3, r=6, start=2)
    course = ranks.ALoRA(rounds=1).start(model, opt, 100, lambda: 0.0)
    scores = [torch.full((6,), torch.inf) for _ in range(3)]
    for s in scores:
        s[:2] = torch.tensor([0.0, 5.0])
    course.move(scores)
    assert list(course.ranks().values()) == [1, 1, 1]


def test_alora_finds_where_ranks_are_needed():
    torch.manual_seed(3)
    model, _, opt = gated(4, r=8, start=2)
    target, x = planted(model, 2, r=5), torch.randn(64, 6)
    quality = lambda: -float(F.mse_loss(model(x), target(x)))  # noqa: E731
    course = ranks.ALoRA(rounds=3, count=2, first=0.3, between=0.1).start(model, opt, 200, quality)
    train(model, target, course, opt, 200)
    assert course.ranks()["m.2"] >= 5
    assert sum(course.ranks().values()) <= 8


# DyLoRA


def test_distributions():
    u = (torch.arange(4000) + 0.5) / 4000
    counts = np.bincount([Uniform()(v, 5) for v in u.tolist()], minlength=6)
    np.testing.assert_allclose(counts[1:], 800)
    counts = np.bincount([Often(0.4)(v, 5) for v in u.tolist()], minlength=6)
    want = 0.6 ** np.arange(1, 6)
    np.testing.assert_allclose(counts[1:] / 4000, want / want.sum(), atol=1e-3)
    assert Often(0.4)(1 - 2**-53, 5) == 5


@pytest.mark.parametrize("nesting", [Full(), Frozen()], ids=repr)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_unselected_ranks_do_not_move(nesting, kind):
    model = Parallel(2)
    adapter = undula.attach(model, undula.DyLoRA(r=5, nesting=nesting))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    opt = getattr(torch.optim, kind)(adapter.parameters(), lr=1e-3, weight_decay=0.1, **options)
    target, course, seen = planted(model, 0), ranks.DyLoRA(seed=1).start(model, opt, 40), set()
    for f in adapter.factors.values():
        f["B"].data.normal_()
    for _ in range(40):
        b = course.b
        seen.add(b)
        memory = {(s, n): {k: t.clone() for k, t in ranks.memory.moments(opt, p).items()}
                  for s, n, p in adapter.tensors() if n in "AB"}  # fmt: skip
        before = {(s, n): p.detach().clone() for s, n, p in adapter.tensors()}
        course.before_forward()
        assert all(int(f["b"]) == b for f in adapter.factors.values())
        F.mse_loss(model(x := torch.randn(16, 6)), target(x)).backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
        moves = [b - 1] if nesting == Frozen() else list(range(b))
        for s, f in adapter.factors.items():
            for n, dim in ("A", 0), ("B", 1):
                moved = (f[n] != before[s, n]).any(1 - dim).nonzero().flatten().tolist()
                assert moved == moves
                rest = [i for i in range(5) if i not in moves]
                for k, t in ranks.memory.moments(opt, f[n]).items():  # of ranks that never trained it knows nothing
                    if k not in memory[s, n] and t.ndim:
                        assert not t.index_select(dim, torch.tensor(rest, dtype=torch.int64)).any()
                for k, t in memory[s, n].items():
                    assert torch.equal(opt.state[f[n]][k].index_select(dim, torch.tensor(rest, dtype=torch.int64)),
                                       t.index_select(dim, torch.tensor(rest, dtype=torch.int64)))  # fmt: skip
    assert seen == {1, 2, 3, 4, 5}
    assert all(int(f["b"]) == 5 for f in adapter.factors.values())


def test_every_rank_is_the_best_of_its_rank():
    """Eckart and Young at all ranks at once, with a scale that does not depend on b."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    U, _, V = torch.linalg.svd(torch.randn(6, 6))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    T = U[:, :4] * values @ V[:4]
    adapter = undula.attach(model, undula.DyLoRA(r=4, scaling=Fixed(1.0)))
    opt = torch.optim.Adam(adapter.parameters(), lr=0.03)
    steps = 1500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    course = ranks.DyLoRA().start(model, opt, steps)
    base = model[0].weight
    for _ in range(steps):
        course.before_forward()
        (model(torch.eye(6)).T - base - T).square().sum().backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
        schedule.step()
    for b in range(1, 5):
        error = (adapter.at_rank(b).delta("0") - T).square().sum().item()
        assert error == pytest.approx(float(values[b:].square().sum()), abs=0.02)


# DiffoRA


def test_theta_has_the_gradient_of_its_gate():
    model, adapter, opt = gated(3, r=2, start=2)
    for f in adapter.factors.values():
        f["B"].data.normal_()
    course = ranks.DiffoRA(rho=0.4, warmup=0.1, search=0.9, lr=0.1).start(model, opt, 20)
    course.step = 2
    course.theta_N.copy_(torch.tensor([0.3, -0.2, 0.1]))
    before = course.theta_N.clone()
    x, target = torch.randn(8, 6), torch.randn(8, 15)
    course.before_forward()
    F.mse_loss(model(x), target).backward()
    course.before_update()
    theta = before.clone().requires_grad_()
    own = [F.linear(x, m.weight + g * 8 * f["B"].detach() @ f["A"].detach(), m.bias)
           for m, g, f in zip(model.m, theta.sigmoid(), adapter.factors.values(), strict=True)]  # fmt: skip
    (want,) = torch.autograd.grad(F.mse_loss(torch.cat(own, -1), target), theta)
    torch.testing.assert_close(before - course.theta_N, 0.1 * want / want.square().mean().sqrt())
    assert all(f[k].grad is None for f in adapter.factors.values() for k in "AB")  # theta's update alone


def test_theta_waits_for_a_gradient():
    """While B = 0 it is zero: the warm-up is at least one update."""
    model, _, opt = gated(3, r=2)
    course = ranks.DiffoRA(warmup=0.0).start(model, opt, 20)
    assert not course.choosing
    course.step = 1
    assert course.choosing


def test_everything_kept_is_lora():
    found = []
    for m, how in (undula.GatedLoRA(r=2), ranks.DiffoRA(rho=1.0)), (undula.LoRA(r=2), None):
        torch.manual_seed(0)
        model = Parallel(2)
        adapter = undula.attach(model, m)
        opt = adam(adapter)
        torch.manual_seed(1)
        target = planted(model, 1)
        course = ranks.Course(_Any(), model, opt, 30) if how is None else how.start(model, opt, 30)
        train(model, target, course, opt, 30)
        found.append([f[k].detach() for f in adapter.factors.values() for k in "AB"])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class _Any(ranks.Allocator):
    works_on = (undula.Method,)

    def start(self, model, optimizer, steps, quality=None):
        raise NotImplementedError


def test_diffora_finds_where_an_adapter_is_needed():
    torch.manual_seed(0)
    model, adapter, opt = gated(4, r=2)
    target = planted(model, 2)
    how = ranks.DiffoRA(rho=0.3, warmup=0.1, search=0.5)
    course = how.start(model, opt, 100)
    noisy = lambda x: target(x) + 0.5 * torch.randn(len(x), 20)  # noqa: E731
    train(model, noisy, course, opt, 50)
    x = torch.randn(4, 6)
    before = model(x).view(4, 4, 5)
    course.before_forward()  # makes the choice
    assert sorted(course.ranks().values()) == [0, 0, 2, 2]
    assert course.ranks()["m.2"] == 2  # ceil(0.3 * 4) = 2 sites stay, this one among them
    chosen = course.chosen
    after = model(x).view(4, 4, 5)
    torch.testing.assert_close(after[:, chosen], before[:, chosen])  # no jump where it stays
    still = {s: f["A"].detach().clone() for s, f in adapter.factors.items()}
    train(model, noisy, course, opt, 5)
    for (s, f), kept in zip(adapter.factors.items(), chosen, strict=True):
        assert torch.equal(f["A"], still[s]) != kept
        assert bool(adapter.delta(s).any()) == kept
    assert set(undula.prune(adapter).methods) == {s for s, kept in zip(adapter.factors, chosen, strict=True) if kept}


def sharing(steps=60, until=40):
    """Five layers of two shapes, one of them to be chosen, under a course that lets the rest share.

    The target is noisy: otherwise the layers that need no adapter get a gradient of exactly zero, or of rounding."""
    torch.manual_seed(0)
    model = Parallel(5)
    model.m[4] = nn.Linear(6, 7)
    target = planted(model, 1)
    adapter = undula.attach(model, undula.GatedLoRA(r=2))
    opt = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.1)
    course = ranks.DiffoRA(rho=0.2, warmup=0.1, search=0.5, rest=Shared()).start(model, opt, steps)
    for step in range(until):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        course.before_forward()
        y = target(x)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1000 + step))
        F.mse_loss(model(x), y + 0.1 * noise).backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
        yield model, adapter, course, step + 1, target


def test_at_the_choice_the_rest_becomes_one_pair():
    *_, (_, adapter, course, _, _) = sharing(until=30)
    f = list(adapter.factors.values())
    gamma = course.theta_N.sigmoid()
    before = {k: [g[k].detach().clone() for g in f] for k in "AB"}
    course.before_forward()
    assert course.chosen == [False, True, False, False, False]
    assert course.shared == [[0, 2, 3], [4]]
    for i in (0, 2, 3):
        torch.testing.assert_close(f[i]["A"].detach(), sum(before["A"][j] for j in (0, 2, 3)) / 3)
        torch.testing.assert_close(f[i]["B"].detach(), sum(gamma[j] * before["B"][j] for j in (0, 2, 3)) / 3)
    assert torch.equal(f[4]["A"], before["A"][4])  # alone of its shape
    assert all(torch.equal(g["g"], torch.ones(2)) for g in f)
    assert [len(course.optimizer.state[g["A"]]) for g in f] == [0, 3, 0, 0, 0]


def test_a_shared_pair_is_one_throughout(tmp_path):
    for model, adapter, course, step, _ in sharing(until=60):  # noqa: B007
        f = list(adapter.factors.values())
        same = [torch.equal(f[0][k], f[i][k]) for i in (2, 3) for k in "AB"]
        assert all(same) if step > 30 else not any(same)
        assert f[0]["A"] is not f[2]["A"]
    x = torch.randn(4, 6)
    before = model(x)
    assert adapter.num_parameters() == 2 * (4 * (5 + 6) + (7 + 6))
    course.finish()
    assert torch.equal(model(x), before)
    f = list(adapter.factors.values())
    assert all(f[i][k] is f[0][k] for i in (2, 3) for k in "ABg")
    assert adapter.num_parameters() == 2 * (5 + 6) + 2 * (5 + 6) + 2 * (7 + 6)  # chosen + a pair for each shape
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.num_parameters()
    for made in (undula.prune(adapter), adapter):
        made.save(tmp_path / type(made.method).__name__)
        loaded = undula.Adapter.load(tmp_path / type(made.method).__name__)
        assert loaded.num_parameters() == adapter.num_parameters()
        assert all(torch.equal(loaded.delta(s), adapter.delta(s)) for s in adapter.factors)


def test_a_shared_pair_moves_as_a_tied_one():
    """One step of SGD, against a model in which the three sites have the same parameters."""
    *_, (model, adapter, course, _, target) = sharing(until=35)
    tied = adapter.copy()
    first = {k: tied.factors["m.0"][k] for k in "AB"}
    tied = dataclasses.replace(
        tied, factors={s: {**f, **first} if s in ("m.2", "m.3") else f for s, f in tied.factors.items()}
    )
    undula.detach(model)
    x, found = torch.randn(16, 6), []
    for one in (adapter, tied):
        live = undula.attach(model, one)
        opt = torch.optim.SGD(live.parameters(), lr=0.1)
        F.mse_loss(model(x), target(x)).backward()
        if one is adapter:
            course.before_update()
        opt.step()
        undula.detach(model)
        found.append([f[k].detach() for f in live.factors.values() for k in "AB"])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(found[0][k], found[0][2 * i + k]) for i in (2, 3) for k in (0, 1))


class Somewhere:
    """What a tensor says of its place, without the device."""

    def __init__(self, device):
        self.device = torch.device(device)

    def to(self, device):
        return Somewhere(device)


def test_scores_are_agreed_on_where_the_adapter_is(monkeypatch):
    """A group of processes on GPUs (nccl) exchanges no tensor of the CPU; the scores are there again afterwards."""
    seen = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda t, source: seen.append((t.device.type, source)))
    assert agreed(Somewhere("cpu"), torch.device("cuda")).device.type == "cpu"
    assert seen == [("cuda", 0)]
