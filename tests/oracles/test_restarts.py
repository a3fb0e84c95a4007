"""Merge and restart: continuity, the papers' algebra replayed on dense weights, ranks."""

import copy
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import undula
from undula import Centred, Dropout, LoRA, Restarted
from undula.host.views import site, view
from undula.kernels import reference
from undula.kernels.frozen_pair import beside_frozen
from undula.methods.restarted import _Merged as Merged
from undula.ranks import LoRASC, ReLoRA, SRLoRA, XGBLoRA
from undula.ranks.relora import jagged
from undula.ranks.restart import Cleared, Pruned, ends
from undula.ranks.surgery import adopt
from undula.ranks.xgblora import layer_of
from undula.starts import Gaussian


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def batch(step, n=8):
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(step), dtype=torch.get_default_dtype())
    return x, torch.sin(3 * x)


def run(course, model, optimizer, steps, seen=lambda moment: None):
    """The loop of the allocators' documentation; `seen` is called around every moment of the course.  "before" is when
    the update is whole: entries that have begun again have their own bias correction."""
    turned = type(course).on_update.__get__(course)
    course.on_update = lambda: (seen("before"), turned())
    for step in range(course.step, steps):
        course.before_forward()
        seen("forward")
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        seen("after")
        optimizer.zero_grad()


def weights(model):
    """The effective weight of every site."""
    adapter = undula.selected(model)
    return {s: model.get_submodule(s).weight.detach() + adapter.delta(s) for s in adapter.factors}


def past(model):
    return {s: getattr(m, "past", 0) for s, m in undula.selected(model).methods.items()}


PLAIN = {
    "ReLoRA": ReLoRA(cycles=4),
    "LoRASC": LoRASC(cycles=4, noise=0.0),
    "XGBLoRA": XGBLoRA(every=3, layers=2, penalty=1e-3),
    "SRLoRA": SRLoRA(target=6, share=0.5),
}
each = pytest.mark.parametrize("allocator", [*PLAIN.values(), LoRASC(cycles=4, noise=0.3)], ids=[*PLAIN, "noise"])


@each
def test_the_effective_weight_is_continuous_and_the_base_untouched(allocator):
    torch.set_default_dtype(torch.float64)
    model = Net()
    base = {n: p.clone() for n, p in model.named_parameters()}
    adapter = undula.attach(model, LoRA(r=2, alpha=3.0))
    trained = adapter.parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    course = allocator.start(model, optimizer, steps=12)
    before, jumps, state = {}, [], torch.get_rng_state()

    def seen(moment):
        assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
        if moment == "before":
            before.update(weights(model), past=past(model))
        if moment == "after":
            for s, W in weights(model).items():
                torch.testing.assert_close(W, before[s])
            jumps.append(before["past"] != past(model))

    run(course, model, optimizer, 12, seen)
    course.finish()
    assert sum(jumps) >= 2
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in trained]  # what the optimiser knows
    assert torch.equal(torch.get_rng_state(), state)
    assert any((W - base[f"{s}.weight"]).norm() > 1e-2 for s, W in weights(model).items())
    assert not any(getattr(slot.layer, "clean", None) for slot in undula.host.state.host_of(model).slots.values())


def dense_gradient(W, x, y):
    return 2 / y.numel() * (x @ W.T - y).T @ x


@pytest.mark.parametrize(("merge", "noise"), [(1.0, 0.0), (0.4, 0.0), (0.4, 0.5), (0.0, 0.5)])
def test_the_cascade_replayed_on_dense_weights(merge, noise):
    """W_{t+1} = W_t + merge s B_t A_t with gradients at W_t + N_t + s B A, by hand on a linear layer."""
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    W0 = model[0].weight.detach().clone()
    adapter = undula.attach(model, LoRA(r=2, alpha=3.0))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    course = LoRASC(cycles=3, merge=merge, noise=noise).start(model, optimizer, steps=9)
    target, W, s = torch.randn(9, 12), W0.clone(), 1.5
    for step in range(9):
        f = adapter.factors["0"]
        if step % 3 == 0:
            assert not f["B"].any()
            A, B = f["A"].detach().clone(), torch.zeros(9, 2)
        x = batch(step)[0]
        course.before_forward()
        N = course._noisy["0"] - W0 if noise else torch.zeros_like(W0)
        nn.functional.mse_loss(model(x), x @ target.T).backward()
        course.before_update()
        G = dense_gradient(W + N + s * B @ A, x, x @ target.T)
        A, B = A - 0.5 * s * B.T @ G, B - 0.5 * s * G @ A.T
        optimizer.step()
        torch.testing.assert_close(adapter.factors["0"]["B"].detach(), B)
        course.after_update()
        optimizer.zero_grad()
        if step % 3 == 2 and step < 8:
            W = W + merge * s * B @ A
            torch.testing.assert_close(weights(model)["0"], W)
    course.finish()
    W = W + merge * s * B @ A
    torch.testing.assert_close(weights(model)["0"], W)
    assert torch.linalg.matrix_rank(W - W0) == (6 if merge else 0)  # T r
    assert torch.equal(model[0].weight, W0)
    if not merge:
        assert torch.equal(weights(model)["0"], W0)


def lbfgs(adapter):
    return torch.optim.LBFGS(adapter.parameters(), max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-15,
                             history_size=20, line_search_fn="strong_wolfe")  # fmt: skip


def boosted(allocator, method, target, cycles):
    """The error |W + dW - target| after each of `cycles` least-squares fits to convergence."""
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    model[0].weight.data.zero_()
    adapter = undula.attach(model, method)
    optimizer = lbfgs(adapter)
    course = allocator.start(model, optimizer, steps=cycles)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.eye(12)) - target.T).square().sum()
        loss.backward()
        course.before_update()
        return loss

    errors = []
    for _ in range(cycles):
        course.before_forward()
        optimizer.step(closure)
        course.after_update()
        errors.append((weights(model)["0"] - target).norm())
    return torch.stack(errors), model


@pytest.mark.parametrize(("allocator", "r"), [(XGBLoRA(every=1), 1), (ReLoRA(every=1, moments=Cleared()), 2)])
def test_fits_to_convergence_are_greedy_approximations(allocator, r):
    """Each fit takes the leading r singular triples of the residual (Eckart and Young): k boosters fit a target of
    rank k exactly, and a target of full rank is approached where one pair of rank r stands still."""
    torch.set_default_dtype(torch.float64)
    U, V = (torch.linalg.qr(torch.randn(n, n)).Q for n in (9, 12))
    S = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1])
    for rank in (3, 9):
        kept = S * (torch.arange(9) < rank)
        errors, model = boosted(allocator, LoRA(r=r, alpha=r), (U * kept) @ V[:, :9].T, 3)
        wanted = torch.stack([kept[k * r :].norm() for k in (1, 2, 3)])
        torch.testing.assert_close(errors, wanted, atol=1e-4, rtol=1e-4)
        assert torch.linalg.matrix_rank(undula.selected(model).delta("0"), atol=1e-4) <= 3 * r
    alone, _ = boosted(ReLoRA(cycles=1), LoRA(r=r, alpha=r), (U * S) @ V[:, :9].T, 1)
    assert alone > wanted[-1] + 1


def test_any_low_rank_method_restarts():
    """Bent, centred (with frozen factors that a restart replaces), dropped out, tied among sites."""
    torch.set_default_dtype(torch.float64)
    for inner in (undula.AuroRAStatic(), Centred(LoRA(r=2), Gaussian(0.3)), Dropout(LoRA(r=2), 0.5), Tied()):
        model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        adapter = undula.attach(model, inner)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        course = ReLoRA(every=2, moments=Cleared()).start(model, optimizer, steps=5)
        before = {}

        def seen(moment, model=model, before=before, course=course, inner=inner, adapter=adapter):
            if moment == "before":
                before.update(weights(model))
            if moment == "after":
                torch.testing.assert_close(weights(model), before)
                for f in adapter.factors.values():
                    assert (inner.delta(f).norm() < 1e-12) == (course.step in (2, 4))

        run(course, model, optimizer, 5, seen)
        assert set(past(model).values()) == {8 if isinstance(inner, Centred) else 4}
        assert {id(p) for p in adapter.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    ties = {id(f[k]) for f in adapter.factors.values() for k in "AB"}
    assert len(ties) == 2


def test_a_stack_never_outgrows_the_layer():
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 12))
    adapter = undula.attach(model, LoRA(r=2))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    course = ReLoRA(every=2).start(model, optimizer, steps=12)
    before = {}

    def seen(moment):
        if moment == "before":
            before.update(weights(model))
        if moment == "after":
            torch.testing.assert_close(weights(model), before)

    run(course, model, optimizer, 12, seen)
    assert past(model) == {"0": 3, "2": 3}
    assert adapter.methods["0"].pair(adapter.factors["0"])[1].shape == (5, 12)


def test_nothing_is_lost_over_a_narrow_base():
    """An update far below the resolution of bf16 weights stays what it was."""
    model = nn.Sequential(nn.Linear(12, 9)).bfloat16()
    adapter = undula.attach(model, LoRA(r=2, alpha=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    course = ReLoRA(every=1, moments=Cleared()).start(model, optimizer, steps=3)
    torch.nn.init.constant_(adapter.factors["0"]["B"], 1e-6)
    before = adapter.delta("0")
    assert torch.equal(model[0].weight, (model[0].weight.float() + before).bfloat16())
    course.after_update()
    assert torch.equal(adapter.delta("0"), before)
    assert adapter.factors["0"]["B_past"].dtype == torch.float32


def test_the_pair_that_leaves_is_the_whole_stack(tmp_path):
    model = Net(1)
    adapter = undula.attach(model, LoRA(r=2))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    run(course := ReLoRA(cycles=3).start(model, optimizer, steps=9), model, optimizer, 9)
    undula.io.export_lora(adapter, tmp_path)
    again = undula.Adapter.load(tmp_path)
    assert course.step == 9
    assert {m.r for m in again.methods.values()} == {6}
    for s in adapter.factors:
        assert torch.equal(again.delta(s), adapter.delta(s))


# Restarted


def test_a_layer_with_a_past_is_one_layer():
    """To an inner method with a forward of its own: whether it calls the layer or computes with its weight."""
    layer, x = view(nn.Linear(6, 4)), torch.randn(3, 6)
    merged = Merged(layer, torch.randn(4, 2), torch.randn(2, 6))
    torch.testing.assert_close(merged(x), nn.functional.linear(x, merged.weight, merged.bias))
    assert not torch.allclose(merged(x), layer(x))


def with_past(inner, layer):
    m = Restarted(inner, past=3)
    f = m.init(site("l", layer))
    return m, {k: t.detach() + 0.3 * torch.randn_like(t) for k, t in f.items()}


@pytest.mark.parametrize("grad_x", [True, False])
def test_the_frozen_pair_beside_the_trained_one(grad_x):
    """Values and gradients against the sum of two updates, whichever inputs want gradients."""
    torch.set_default_dtype(torch.float64)
    layer, x = view(nn.Linear(12, 9).requires_grad_(False)), torch.randn(2, 5, 12, requires_grad=grad_x)
    A, B = torch.randn(2, 12, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    A_K, B_K = torch.randn(4, 12), torch.randn(9, 4)
    wanted = layer(x) + x @ A.T @ B.T + x @ (B_K @ A_K).T
    got = beside_frozen(x, layer, (B, A), (B_K, A_K))
    torch.testing.assert_close(got, wanted)
    inputs, g = [A, B] + [x] * grad_x, torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(a, b)
    (dB,) = torch.autograd.grad(beside_frozen(x.detach(), layer, (B, A.detach()), (B_K, A_K)), [B], g)
    torch.testing.assert_close(dB, g.reshape(-1, 9).T @ (x.reshape(-1, 12) @ A.T).detach())


@pytest.mark.parametrize("module", [nn.Linear(12, 16), nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(11, 6)])
def test_the_past_is_part_of_every_layer(module):
    torch.set_default_dtype(torch.float64)
    module = copy.deepcopy(module).double()
    x = torch.randint(0, 11, (2, 5)) if isinstance(module, nn.Embedding) else torch.randn(2, 12)
    x = torch.randn(2, 3, 6, 6) if isinstance(module, nn.Conv2d) else x
    layer = view(module.eval())
    for inner in (LoRA(r=2), Dropout(LoRA(r=2), 0.5), undula.AuroRAStatic()):
        m, f = with_past(inner, layer)
        B, A = inner.pair(f)
        W = layer.weight + B @ A + f["B_past"] @ f["A_past"]
        torch.testing.assert_close(m.forward(x, layer, f), reference.reweighted(x, layer, W))


def test_dropout_inside_spares_the_past():
    """What was merged belongs to the base: the layer sees all of x through it, in training too."""
    module = nn.Linear(12, 16).train()
    m, f = with_past(Dropout(LoRA(r=2), 0.9), layer := view(module))
    f["B"].zero_()
    x = torch.randn(5, 12)
    torch.testing.assert_close(m.forward(x, layer, f), module(x) + x @ f["A_past"].T @ f["B_past"].T)


def test_restarted_refuses():
    with pytest.raises(ValueError, match="inner is a LowRank, an object such as LoRA"):
        Restarted(undula.LoRAN())
    with pytest.raises(TypeError, match="on the rung LowRank that is not Restarted"):
        Restarted(Restarted())
    with pytest.raises(ValueError, match=r"Restarted\.past is at least 0 and at most 1,048,576, found -1"):
        Restarted(past=-1)


# ReLoRA


def adam_after_one_step():
    p = nn.Parameter(torch.randn(20, 10))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.randn(20, 10)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"].mul_(torch.rand(20, 10))  # as if gradients had varied
    return p, optimizer, {k: t.clone() for k, t in optimizer.state[p].items()}


def test_pruned_keeps_the_largest_entries():
    p, optimizer, before = adam_after_one_step()
    Pruned(0.99)(optimizer, p)
    m = before["exp_avg"].abs()
    largest = m > torch.quantile(m, 0.99)
    assert largest.sum() == 2
    for k in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][k], before[k] * largest)
    assert optimizer.state[p]["step"] == 1
    Cleared()(optimizer, p)
    assert not optimizer.state[p]


def test_pruned_moments_still_fit_together():
    """A deviation on purpose.  The authors' code prunes each moment by itself: an entry that keeps the first without
    the second then moves by m / eps, since the gradient of A is zero while B is."""
    for prune, longest in ((Pruned(0.9), 0.1), (by_themselves, 1e3)):
        p, optimizer, _ = adam_after_one_step()
        prune(optimizer, p)
        start = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        moved = (p.detach() - start).abs().max()
        assert moved < longest if prune is not by_themselves else moved > longest


def by_themselves(optimizer, p):
    for k in ("exp_avg", "exp_avg_sq"):
        t = optimizer.state[p][k]
        t.mul_(t.abs() > torch.quantile(t.abs(), 0.9))


def test_relora_prunes_and_forgets_nothing_else():
    model = Net(1)
    adapter = undula.attach(model, LoRA(r=2), full=["layers.0.up.bias"])
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    course = ReLoRA(every=4, moments=Pruned(0.9)).start(model, optimizer, steps=8)
    run(course, model, optimizer, 4)
    moments = {k: optimizer.state[t]["exp_avg"] for k, t in adapter.factors["layers.0.up"].items() if t.requires_grad}
    assert {k: t.count_nonzero().item() for k, t in moments.items()} == {"A": 2, "B": 3}  # of 24 and 32
    assert optimizer.state[adapter.full["layers.0.up.bias"]]["exp_avg"].all()
    A = adapter.factors["layers.0.up"]["A"]
    assert A.abs().max() <= 1 / math.sqrt(12)  # Kaiming again
    assert not adapter.factors["layers.0.up"]["B"].any()


def test_fresh_factors_follow_seed_cycle_and_site():
    def drawn(seed, other=0):
        torch.manual_seed(other)
        model = Net(2)
        adapter = undula.attach(model, LoRA(r=2))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        course = ReLoRA(every=1, seed=seed).start(model, optimizer, steps=3)
        found = []
        for step in (1, 2):
            run(course, model, optimizer, step)
            found += [adapter.factors[f"layers.{i}.up"]["A"].detach().clone() for i in range(2)]
        return found

    first = drawn(0)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, other=1), strict=True))
    every = first + drawn(1)
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_jagged():
    m = jagged(100, cycles=4, warmup=10, floor=0.1)
    assert [m(s) for s in (0, 25, 50, 75)] == [0.0] * 4
    envelope = lambda s: 0.1 + 0.9 * math.cos(math.pi * (s - 10) / 180) ** 2  # noqa: E731
    for s in (10, 20, 35, 60, 74, 85, 99):
        assert m(s) == pytest.approx(envelope(s))
    assert m(30) == pytest.approx(envelope(30) / 2)
    assert m(100) == pytest.approx(0.1)
    assert [jagged(10, every=4)(s) for s in (0, 10)] == pytest.approx([1, 0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, m)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [2.0]


def test_schedules_that_do_not_fit():
    assert ends(10, 3, None) == [3, 7, 10]
    assert ends(10, None, 4) == [4, 8, 10]
    assert ends(10, None, 5) == [5, 10]
    for make in (ReLoRA, LoRASC):
        with pytest.raises(ValueError, match="not both; found 2 and every=3"):
            make(cycles=2, every=3)
    model = Net(1)
    optimizer = torch.optim.SGD(undula.attach(model, LoRA()).parameters())
    with pytest.raises(ValueError, match="a cycle of 11 updates in 10 updates"):
        ReLoRA(every=11).start(model, optimizer, steps=10)
    with pytest.raises(ValueError, match="12 cycles in 10 updates"):
        XGBLoRA(boosters=12).start(model, optimizer, steps=10)
    undula.detach(model)
    undula.attach(model, undula.LoRAN())
    with pytest.raises(TypeError, match=r"works on LowRank, not on LoRAN\(.* \(layers.0.up and 1 other sites\)"):
        ReLoRA().start(model, optimizer, steps=10)


# LoRASC


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(40, 50), torch.randn(3, 40)),
        (nn.Conv2d(3, 40, 5), torch.randn(2, 3, 8, 8)),
        (nn.Embedding(50, 40), torch.arange(12)),
    ],
)
def test_noise_is_there_while_training_alone(module, x):
    """Its law, its draws, and that the layer computes with it and with nothing else."""
    base = module.weight.detach().clone()
    model = nn.Sequential(module)
    plain = model(x)
    optimizer = torch.optim.SGD(undula.attach(model, LoRA(r=2), "*").parameters())
    course = LoRASC(cycles=2, noise=0.25, seed=3).start(model, optimizer, steps=2)
    noises = []
    for _ in range(2):
        course.before_forward()
        noises.append((course._noisy["0"] - view(module).weight).flatten())
        noisy = copy.deepcopy(module)
        noisy.__class__ = type(module).original
        del noisy._modules["undula"]
        noisy.weight.data = view(noisy).put(course._noisy["0"]).data
        torch.testing.assert_close(model(x), noisy(x))
        assert torch.equal(module.weight, base)
        course.before_update()
        assert torch.equal(model(x), plain)
        course.after_update()
    a, b = (n / (0.25 * base.std()) for n in noises)
    assert abs(a.std() - 1) < 0.05
    assert abs(a.mean()) < 0.05
    assert abs(a.pow(4).mean() - 3) < 0.4  # normal
    assert abs((a * b).mean()) < 0.1  # another draw in the next cycle
    again = LoRASC(cycles=2, noise=0.25, seed=3).start(model, optimizer, steps=2)
    again.before_forward()
    assert torch.equal((again._noisy["0"] - view(module).weight).flatten(), noises[0])


def test_noise_wants_frozen_weights():
    model = Net(1)
    adapter = undula.attach(model, LoRA(r=2), where=["up", "down"], full=["up.weight"])
    optimizer = torch.optim.SGD(adapter.parameters())
    with pytest.raises(ValueError, match=r"layers.0.up.weight trains in full: .*set noise=0"):
        LoRASC(noise=0.1).start(model, optimizer, steps=8)


# XGBLoRA


def test_layers_that_are_not_chosen_stay_to_the_bit():
    model = Net(5)
    adapter = undula.attach(model, LoRA(r=1))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.5)
    course = XGBLoRA(boosters=6, layers=2).start(model, optimizer, steps=12)
    drawn = [course.chosen(t) for t in range(6)]
    assert all(len(c) == 2 for c in drawn)
    assert len({frozenset(c) for c in drawn}) > 2
    for t in range(6):
        before = {s: {k: p.detach().clone() for k, p in f.items()} for s, f in adapter.factors.items()}
        W = weights(model)
        run(course, model, optimizer, 2 * t + 2)
        for s, f in adapter.factors.items():
            still = all(k in before[s] and torch.equal(p, before[s][k]) for k, p in f.items())
            assert still == (layer_of(s) not in drawn[t])
            assert torch.equal(weights(model)[s], W[s]) == (layer_of(s) not in drawn[t])
    for s in adapter.factors:
        assert torch.linalg.matrix_rank(adapter.delta(s)) <= sum(layer_of(s) in c for c in drawn)


def test_the_penalty_is_part_of_the_objective():
    torch.set_default_dtype(torch.float64)
    model = Net(1)
    adapter = undula.attach(model, LoRA(r=1))
    for p in adapter.parameters():
        nn.init.normal_(p)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    course = XGBLoRA(boosters=1, penalty=0.3).start(model, optimizer, steps=1)
    x, y = batch(0)
    loss = nn.functional.mse_loss(model(x), y)
    whole = loss + 0.3 * sum(p.square().sum() for p in adapter.parameters())
    wanted = torch.autograd.grad(whole, adapter.parameters(), retain_graph=True)
    loss.backward()
    course.before_update()
    for p, g in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_layers_by_name():
    assert layer_of("model.layers.3.mlp.up_proj") == "model.layers.3"
    assert layer_of("blocks.2.1.conv") == "blocks.2"
    assert layer_of("head") == "head"
    model = Net(2)
    optimizer = torch.optim.SGD(undula.attach(model, LoRA(r=1)).parameters())
    with pytest.raises(ValueError, match="3 layers are to be drawn; the adapter has 2"):
        XGBLoRA(layers=3).start(model, optimizer, steps=8)


PARALLEL = """
import sys, torch, undula
from torch import distributed, nn
from tests.oracles.test_restarts import Net, batch
from undula.ranks import XGBLoRA
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
torch.manual_seed(0)
model = Net(4)
adapter = undula.attach(model, undula.LoRA(r=1))
torch.manual_seed(rank + 1)  # whatever else a process draws
optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
course = XGBLoRA(every=2, layers=2, penalty=1e-3).start(model, optimizer, steps=8)
parallel = nn.parallel.DistributedDataParallel(model)
for step in range(8):
    course.before_forward()
    x, y = (t.chunk(size)[rank] for t in batch(step))
    nn.functional.mse_loss(parallel(x), y).backward()
    course.before_update()
    optimizer.step()
    course.after_update()
    optimizer.zero_grad()
adapter.save(f"{folder}/{size}-{rank}")
"""


def test_two_processes_draw_and_train_the_same(tmp_path, python):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(p) for p in sys.path if p] + ["."])}
    ranks = [(0, 2), (1, 2), (0, 1)]
    at_work = [subprocess.Popen([python, "-c", PARALLEL, str(r), str(n), tmp_path], env=env) for r, n in ranks]
    assert [p.wait(300) for p in at_work] == [0, 0, 0]
    a, b, alone = (undula.Adapter.load(tmp_path / f"{n}-{r}") for r, n in ranks)
    assert a.methods == b.methods == alone.methods
    assert len(set(a.methods.values())) > 1
    for s, k, t in a.tensors():
        assert torch.equal(t, b.factors[s][k])
    for s in a.factors:  # and what one process makes of the whole batch
        torch.testing.assert_close(a.delta(s), alone.delta(s), atol=1e-5, rtol=1e-3)


# SRLoRA


def test_switches():
    assert SRLoRA(target=12, share=0.5).plan(4, 100) == (2, [20, 40, 60, 80])
    assert SRLoRA(target=8, share=1.0).plan(4, 100) == (4, [50])
    assert SRLoRA(target=3, share=0.1).plan(2, 10) == (1, [5])
    for bad in (SRLoRA(target=4), SRLoRA(target=11), SRLoRA(target=400)):
        with pytest.raises(ValueError, match=r"Choose target = r \+ k \* 2 with 1 <= k < 100"):
            bad.plan(4, 100)
    model = Net(1)
    optimizer = torch.optim.SGD(undula.attach(model, LoRA(r=2)).parameters())
    with pytest.raises(ValueError, match=r"layers.0.up \(16, 12\) \(O, I\) has fewer singular directions"):
        SRLoRA(target=14).start(model, optimizer, steps=100)
    undula.detach(model)
    undula.attach(model, LoRA(r=2), overrides={"up": LoRA(r=3)})
    with pytest.raises(TypeError, match=r"LoRA of one rank; found LoRA of ranks \[2, 3\]"):
        SRLoRA().start(model, optimizer, steps=100)


def sr(lr, steps=12, target=6, r=2):
    torch.set_default_dtype(torch.float64)
    model = Net(1)
    adapter = undula.attach(model, LoRA(r=r, alpha=3.0))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    return model, adapter, optimizer, SRLoRA(target=target, share=0.5).start(model, optimizer, steps=steps)


def test_slots_start_along_the_directions_of_the_weight_and_never_twice():
    model, adapter, optimizer, course = sr(lr=0.0)
    W, used = model.layers[0].up.weight.detach(), []
    U, S, Vh = torch.linalg.svd(W)

    def seen(moment):
        f = adapter.factors["layers.0.up"]
        used.append((1.5 * f["B"] @ f["A"]).detach())
        torch.testing.assert_close(weights(model)["layers.0.up"], W)

    run(course, model, optimizer, 12, seen)
    torch.testing.assert_close(used[0], (U[:, :2] * S[:2]) @ Vh[:2])
    assert torch.linalg.matrix_rank(torch.stack(used).sum(0)) == 6  # r + N r' = target directions, all different
    directions = torch.linalg.svd(torch.cat([*used])).Vh[:6]
    torch.testing.assert_close(directions.T @ directions, Vh[:6].T @ Vh[:6])  # and they are the leading ones
    for update in used:  # two whole directions at any time
        s = torch.linalg.svdvals(update)
        assert all(torch.isclose(S[:6], v).any() for v in s[:2])
        assert s[2] < 1e-12


def test_the_rank_of_what_was_learnt():
    model, adapter, optimizer, course = sr(lr=0.02, target=4)
    run(course, model, optimizer, 12)
    assert torch.linalg.matrix_rank(adapter.delta("layers.0.up")) == 8  # 2 (r + N r'): a pair and its start per slot
    assert past(model)["layers.0.up"] == 2 + 2 * 2 * 1


def test_the_least_important_slots_begin_again():
    model, adapter, optimizer, course = sr(lr=0.02, r=3, target=5, steps=8)
    f = adapter.factors["layers.0.up"]
    mean, deviation = ({k: torch.zeros_like(f[k]) for k in "AB"} for _ in range(2))
    assert course.switches == [4]
    for step in range(4):
        course.before_forward()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        f = adapter.factors["layers.0.up"]
        for k in "AB":  # AdaLoRA's smoothing, written out
            sensitivity = (f[k] * f[k].grad).abs().detach()
            mean[k] = 0.85 * mean[k] + 0.15 * sensitivity
            deviation[k] = 0.85 * deviation[k] + 0.15 * (sensitivity - mean[k]).abs()
        course.before_update()
        optimizer.step()
        if step == 3:
            scores = (mean["A"] * deviation["A"]).sum(1) / 12 + (mean["B"] * deviation["B"]).sum(0) / 16
            torch.testing.assert_close(course.scores()[0], scores)
            before = {k: f[k].detach().clone() for k in "AB"}
        course.after_update()
        optimizer.zero_grad()
    least = set(scores.argsort()[:2].tolist())
    moments = {k: optimizer.state[f[k]]["exp_avg"] for k in "AB"}
    for i in range(3):
        begun_again = i in least
        assert torch.equal(f["A"][i], before["A"][i]) != begun_again
        assert torch.equal(f["B"][:, i], before["B"][:, i]) != begun_again
        assert moments["A"][i].any() != begun_again
        assert moments["B"][:, i].any() != begun_again
    assert not any(t.any() for t in course.mean + course.deviation)


def test_what_was_trained_before_stays():
    model, adapter, _, course = sr(lr=0.0)
    for p in adapter.parameters():
        nn.init.normal_(p)
    before = weights(model)
    course.before_forward()
    for s, W in weights(model).items():
        torch.testing.assert_close(W, before[s])


# adopt


@dataclasses.dataclass(frozen=True)
class Tied(undula.LowRank):
    """One trained B and one frozen A for all layers."""

    parameters = "r*O"
    r: int = 2

    def init(self, where):
        A = where.once("A", lambda: where.frozen(0, "A", shape=(self.r, where.shape[1])))
        return {"A": A, "B": where.once("B", lambda: where.zeros(where.shape[0], self.r).requires_grad_())}

    def pair(self, f):
        return f["B"], f["A"]


def test_adopt_keeps_objects_ties_and_refuses_strangers(tmp_path):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    tied = Tied()
    adapter = undula.attach(model, tied, full=["1.bias"])
    trained = adapter.parameters()
    nn.init.normal_(trained[0])
    saved = adapter.copy()
    frozen = {"A_past": torch.randn(1, 12), "B_past": torch.randn(12, 1)}
    saved = dataclasses.replace(
        saved,
        methods=dict.fromkeys("01", Restarted(tied, past=1)),
        factors={s: {**f, **frozen} for s, f in saved.factors.items()},
    )
    saved.full["1.bias"].detach().add_(1)
    saved.factors["0"]["B"].detach().add_(1)
    saved.save(tmp_path)
    adopt(model, again := undula.Adapter.load(tmp_path))
    live = undula.selected(model)
    assert live is adapter
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in trained]
    assert adapter.factors["0"]["B"] is adapter.factors["1"]["B"] is trained[0]
    assert adapter.factors["0"]["A_past"] is adapter.factors["1"]["A_past"]
    assert isinstance(adapter.factors["0"]["A_past"], nn.Parameter)
    assert not adapter.factors["0"]["A_past"].requires_grad
    for s, k, t in again.tensors():
        assert torch.equal(t, adapter.factors[s][k])
    torch.testing.assert_close(model[1].bias, saved.full["1.bias"])
    x = torch.randn(3, 12)
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="other sites"):
        adopt(model, undula.Adapter({"0": LoRA()}, {"0": {}}, {"0": (12, 12)}))
    untied = again.map(lambda f: {**f, "B": f["B"].detach().clone().requires_grad_()})
    with pytest.raises(ValueError, match="shares other tensors"):
        adopt(model, untied)
    less = {k: t for k, t in again.factors["0"].items() if k != "B"}
    other = dataclasses.replace(again, factors={**again.factors, "0": less})
    with pytest.raises(ValueError, match=r"0: the live adapter trains \['B'\], the saved one \[\]"):
        adopt(model, other)
    with pytest.raises(TypeError, match="shares what it trains with another layer"):
        XGBLoRA().start(model, torch.optim.SGD(trained), steps=8)
