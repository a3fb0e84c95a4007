"""Optimisers that see both factors of a layer: whose pairs they see, and what each does to a step."""

import dataclasses

import pytest
import torch
from torch import nn

import undula
from undula.core.method import Additive
from undula.methods.lora import Fixed
from undula.optim.lorapro import LoRAPro, corrected
from undula.optim.paired import Paired
from undula.optim.pairs import Stacked, alike, pairs

from ..support.courses import COURSES, STEPS, Loop, every
from ..support.layers import net

LORA = undula.LoRA(r=3, alpha=4.0)
SERVED = (
    LORA,
    undula.GatedLoRA(r=4, open=2),
    undula.SoRA(r=3),
    undula.AdaLoRA(r=3),
    undula.Restarted(LORA),
    undula.Centred(LORA),
    undula.Dropout(undula.Centred(LORA), 0.5),
    undula.DoRA(LORA),
    undula.Sum((LORA, undula.LoRA(r=2, alpha=1.0)), (0.5, -2.0)),
)


def attached(method, dtype=torch.float64):
    """A small network with the method's adapter, all of its factors moved away from where they begin."""
    torch.manual_seed(0)
    model = net().to(dtype)
    adapter = undula.attach(model, method, "*")
    with torch.no_grad():
        for _, _, t in adapter.tensors():
            if t.requires_grad:
                t.add_(torch.randn_like(t) / 4)
    return model, adapter


def learnt(model, scaled=lambda loss: loss):
    """The gradients of some data's loss."""
    torch.manual_seed(1)
    dtype = model[0].weight.dtype
    x, y = torch.randn(20, 12, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    scaled((model(x) - y).square().mean()).backward()


# Pairs


def update(method, f):
    """dW, of DoRA the change of the direction."""
    return (method.inner if isinstance(method, undula.DoRA) else method).delta(f)


@pytest.mark.parametrize("method", SERVED, ids=repr)
@torch.no_grad()
def test_a_change_of_the_pairs_is_the_change_of_the_update(method):
    """Wrapped, gated, centred and summed ones: whatever is around a product, its pair tells it whole."""
    _, adapter = attached(method)
    told = pairs(adapter)
    assert {p.site.partition("#")[0] for p in told} == {"0", "2"}

    def product():
        return {s: sum(p.scale * p.left @ p.A for p in told if p.site.partition("#")[0] == s) for s in "02"}

    before, was = product(), {s: update(adapter.methods[s], f) for s, f in adapter.factors.items()}
    for p in told:
        assert p.trains
        p.A.add_(torch.randn_like(p.A))
        p.B.mul_(1.5)
    after = product()
    for s, f in adapter.factors.items():
        change = update(adapter.methods[s], f) - was[s]
        assert change.abs().max() > 0.01
        torch.testing.assert_close(after[s] - before[s], change)


def test_every_method_has_pairs_or_is_refused_by_site_and_rung():
    """Of a method whose update is no product of two factors of its own no pair is made up."""
    for name, kind in undula.methods().items():
        if name in ("Sum", "Centred", "Dropout", "DoRA", "Restarted"):
            continue
        model = net()
        probe = undula.Probe([torch.randn(4, 12)], lambda model, x: model(x).square().mean())
        adapter = undula.attach(model, kind(), "*", probe=probe)
        if name in ("LoRA", "GatedLoRA", "SoRA", "AdaLoRA"):
            trained = {id(t) for t in adapter.parameters()}
            assert {id(t) for p in pairs(adapter) for t in (p.A, p.B)} <= trained
        else:
            with pytest.raises((TypeError, ValueError), match=r"(?s)\b[02]\b.*AdamW"):
                pairs(adapter)


def test_tied_factors_are_refused_by_both_sites():
    """Their gradient is the sum over both layers: no pair of one of them is to be had of it."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = undula.attach(model, LORA, "*")
    tied = dataclasses.replace(
        adapter, factors={"0": adapter.factors["0"], "1": {**adapter.factors["1"], "A": adapter.factors["0"]["A"]}}
    )
    with pytest.raises(ValueError, match="1 and 0 share the factor A"):
        pairs(tied)


# LoRAPro


def equivalent(p, g_A, g_B):
    return p.scale * (p.left @ g_A + g_B @ p.right)


@pytest.mark.parametrize("begun", [True, False], ids=["moved", "at B = 0"])
@pytest.mark.parametrize(
    "method", [LORA, undula.GatedLoRA(r=4, open=2, scaling=Fixed(0.7)), undula.AdaLoRA(r=2)], ids=repr
)
@torch.no_grad()
def test_lorapros_gradient_is_the_least_squares_optimum(method, begun):
    """By brute force, over all entries of both gradients; and of all optima it is the one nearest to what was there."""
    _, adapter = attached(method)
    for p in pairs(adapter):
        if not begun:
            p.B.zero_()
        g = torch.randn(p.B.shape[0], p.A.shape[1], dtype=p.A.dtype)
        old_A, old_B = p.scale * p.left.mT @ g, p.scale * g @ p.right.mT
        new = corrected(Stacked.of([p]), old_A[None], old_B[None], damping=0.0)
        new_A, new_B = (t[0] for t in new)
        O, I = g.shape
        J = p.scale * torch.cat(
            [torch.kron(p.left, torch.eye(I)), torch.kron(torch.eye(O), p.right.mT.contiguous())], 1
        )
        old = torch.cat([old_A.flatten(), old_B.flatten()])
        # the optimum nearest to `old`: old + the shortest solution for what is left
        best = old + torch.linalg.pinv(J, rtol=1e-10) @ (g.flatten() - J @ old)
        if begun:
            torch.testing.assert_close(torch.cat([new_A.flatten(), new_B.flatten()]), best)
        torch.testing.assert_close(equivalent(p, new_A, new_B).flatten(), J @ best)
        assert (g * equivalent(p, new_A, new_B)).sum() > 0


@torch.no_grad()
def test_lorapros_damping_is_relative():
    """Just after B = 0 the smallest numbers are those of B'B: a constant there would be wrong by a half."""
    _, adapter = attached(LORA)
    for p in pairs(adapter):
        p.B.mul_(1e-6)
        g = torch.randn(p.B.shape[0], p.A.shape[1], dtype=p.A.dtype)
        given = (p.scale * p.left.mT @ g)[None], (p.scale * g @ p.right.mT)[None]
        exact, damped = (equivalent(p, *(t[0] for t in corrected(Stacked.of([p]), *given, d))) for d in (0.0, 1e-6))
        assert (damped - exact).norm() < 1e-4 * exact.norm()


def wave(*shape):
    """Numbers that are the same everywhere."""
    size = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(size, dtype=torch.float64).reshape(shape) + sum(shape))


def test_lorapros_gradients_are_those_of_lora_pro_adamw():
    """Of lora-pro-adamw 0.2.1, `lorapro_efficient_adjustment` with its solver "eig" at step 3: its damping, 1e-6, is
    nothing to factors of this size.  (Its usual solver, "vec", gives another X, which changes the factors alone.)"""
    A, B, g, s = wave(2, 4), wave(3, 2), wave(3, 4), 1.5
    pair = Stacked(B[None], A[None], torch.tensor(s))
    new_A, new_B = corrected(pair, (s * B.T @ g)[None], (s * g @ A.T)[None], damping=0.0)
    theirs_A = [[-0.03366047, -0.03525589, 0.04274553, 0.02424084], [0.17596607, -0.02215492, -0.17025699, 0.06602827]]
    theirs_B = [[-0.44107369, 0.91239772], [-1.39237478, 1.63636190], [-1.03598735, 0.87116043]]
    torch.testing.assert_close(new_A[0], torch.tensor(theirs_A, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_B[0], torch.tensor(theirs_B, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_lorapro_over_gradient_descent_steps_along_the_projection():
    """Through autograd, layers of unlike shapes at once: dW falls by lr (g - (I - P_B) g (I - P_A)), to first order."""
    model, adapter = attached(LORA)
    optimizer = LoRAPro(adapter.parameters(), model, base=torch.optim.SGD, lr=1e-7, damping=0.0)
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(True)
    learnt(model)
    found = {p.site: (p.A.detach().clone(), p.B.detach().clone(), p.scale) for p in pairs(adapter)}
    optimizer.step()
    for site, (A, B, s) in found.items():
        g = model[int(site)].weight.grad
        f = adapter.factors[site]
        moved = s * (f["B"] @ f["A"] - B @ A).detach() / -1e-7
        outside = [torch.eye(len(P), dtype=P.dtype) - P for P in (B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A)]
        torch.testing.assert_close(moved, g - outside[0] @ g @ outside[1], rtol=1e-5, atol=1e-7)


# What holds of all of them

KINDS = {
    "lorapro": LoRAPro,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def trained(kind, steps, method=LORA, dtype=torch.float64, resume_at=None, **more):
    """(factors after so many steps, optimiser)."""
    model, adapter = attached(method, dtype)
    optimizer = kind(adapter.parameters(), model, **more)
    for step in range(steps):
        if step == resume_at:
            state = optimizer.state_dict()
            optimizer = kind(adapter.parameters(), model, **more)
            optimizer.load_state_dict(state)
        learnt(model)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in adapter.parameters()], optimizer


@kinds
@pytest.mark.parametrize(
    "base", [{"lr": 1e-2}, {"base": torch.optim.SGD, "lr": 1e-2, "momentum": 0.9}], ids=["adamw", "sgd"]
)
def test_a_state_goes_out_and_comes_back(kind, base):
    """An optimiser made anew with the old one's state goes on as if nothing had been."""
    whole, _ = trained(kind, 5, **base)
    again, _ = trained(kind, 5, resume_at=3, **base)
    assert all(map(torch.equal, whole, again))


@kinds
def test_narrow_parameters_train_by_wide_copies(kind):
    """Steps of 1e-5 on bfloat16 numbers would round to nothing; also with the state of another day."""
    begun = [p.detach().clone() for p in attached(LORA, torch.float32)[1].parameters()]
    for resume_at in (None, 20):
        model, adapter = attached(LORA, torch.float32)
        model.bfloat16()
        optimizer = kind(adapter.parameters(), model, lr=1e-5)
        for step in range(40):
            if step == resume_at:
                state = optimizer.state_dict()
                optimizer = kind(adapter.parameters(), model, lr=1e-5)
                optimizer.load_state_dict(state)
            learnt(model)
            optimizer.step()
            optimizer.zero_grad()
        for p, was in zip(adapter.parameters(), begun, strict=True):
            assert p.dtype == torch.bfloat16
            held = optimizer.state[p]
            assert all(t.dtype == torch.float32 for k, t in held.items() if t.shape == p.shape), held
            assert (held["undula_master"] - was).abs().max() > 1e-4
            torch.testing.assert_close(held["undula_master"].bfloat16(), p.detach(), rtol=0, atol=0)


@kinds
def test_a_scaler_unscales_first_and_skips_what_is_not_finite(kind):
    """A fused base would take scaled gradients as they are, and step on infinite ones."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 1.0):
        before = [p.detach().clone() for p in adapter.parameters()]
        learnt(model, lambda loss, by=factor: scaler.scale(loss) * by)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(map(torch.equal, before, adapter.parameters())) == (factor > 1)
    plain, _ = trained(kind, 2, lr=1e-2, fused=True)
    for one, other in zip(adapter.parameters(), plain, strict=True):
        torch.testing.assert_close(one.detach(), other)


@kinds
def test_clipping_comes_after_the_change(kind):
    """The norm of what the base is given, of all parameters together."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, base=torch.optim.SGD, lr=1.0, max_norm=1e-3)
    before = [p.detach().clone() for p in adapter.parameters()]
    learnt(model)
    optimizer.step()
    norm = torch.stack([(p - b).norm() for p, b in zip(adapter.parameters(), before, strict=True)]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


@kinds
def test_gradients_are_what_they_were_after_a_step(kind):
    """Allocators score by them."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, lr=1e-3)
    learnt(model)
    before = [p.grad.clone() for p in adapter.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(adapter.parameters(), before, strict=True))


@kinds
def test_hooks_on_a_step_run_once(kind):
    """The base's own step has been wrapped by torch where one of its kind was made before."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model, adapter = attached(LORA)
    optimizer, seen = kind(adapter.parameters(), model, lr=1e-3), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    learnt(model)
    optimizer.step()
    assert len(seen) == 1
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, Paired)


def test_what_no_pair_can_come_of_is_refused_before_the_first_step():
    model, adapter = attached(undula.VeRA(r=2))
    with pytest.raises(TypeError, match=r"VeRA.* at 0 .*AdamW"):
        LoRAPro(adapter.parameters(), model)
    model, adapter = attached(LORA)
    with pytest.raises(TypeError, match="LBFGS computes several itself"):
        LoRAPro(adapter.parameters(), model, base=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="0: its factors train and are not among the parameters"):
        LoRAPro([nn.Parameter(torch.zeros(2))], model)
    with pytest.raises(LookupError, match="no adapter"):
        LoRAPro([nn.Parameter(torch.zeros(2))], net())
    adapter.factors["2"]["A"].requires_grad_(False)
    with pytest.raises(ValueError, match="2: the factor A does not train, and LoRAPro moves both"):
        LoRAPro(adapter.parameters(), model)


def test_layers_of_one_shape_are_one_batch():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 2))
    told = alike(pairs(undula.attach(model, LORA, "*")))
    assert [len(those) for those in told] == [3, 1]
    assert all(isinstance(m, Additive) for m in undula.adapters(model)["default"].methods.values())


# Beside what acts while an adapter trains


class Beside(Loop):
    """An allocator's course over an optimiser that sees pairs."""

    def __init__(self, name, kind):
        super().__init__(name, lambda _: kind(self.adapter.parameters(), self.model, lr=0.02, weight_decay=0.1))


@kinds
@pytest.mark.parametrize("name", COURSES)
def test_an_allocator_trains_over_it_or_it_is_refused(name, kind):
    """What a restart begins anew, what a gate closes, what rests in a step: pairs are those of the adapter as it is."""
    if "DyLoRA" in name:
        with pytest.raises(TypeError, match=r"DyLoRA.* at 0 .*no product"):
            Beside(name, kind)
        return
    loop = Beside(name, kind)
    before = every(loop.adapter)
    for number in range(STEPS):
        loop.update(number)
    loop.course.finish()
    after = every(loop.adapter)
    assert all(bool(torch.isfinite(t).all()) for t in after.values())
    assert any(not torch.equal(t, after[k]) for k, t in before.items() if k in after and t.shape == after[k].shape)
