"""Optimisers that see both factors of a layer: whose pairs they see, and what each does to a step."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

import undula
from undula.core.method import Additive
from undula.methods.lora import Fixed
from undula.optim.allora import ALLoRA, ALLoRAGradient, of_products
from undula.optim.by_peft import LoRAFA, Riemannian
from undula.optim.ggpo import LoRAGGPO
from undula.optim.gorp import GORP, widened
from undula.optim.lorapro import LoRAPro, corrected
from undula.optim.lorapro_full import LoRAProFull
from undula.optim.lorsum import LoRSum, summed
from undula.optim.mgpo import LoRAMGPO
from undula.optim.paired import Paired
from undula.optim.pairs import Stacked, alike, pairs
from undula.optim.sam import SAMReference, mixed, without_conflict
from undula.train.adapter_trainer import give_rate

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
        if not kind.__module__.startswith("undula.") or name in ("Sum", "Centred", "Dropout", "DoRA", "Restarted"):
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
    "lorapro, full": LoRAProFull,
    "ggpo": LoRAGGPO,
    "allora": lambda *given, **more: ALLoRA(*given, eta=3.0, **more),
    "allora, gradient": lambda *given, **more: ALLoRAGradient(*given, eta=3.0, rows=of_products, **more),
    "mgpo": LoRAMGPO,
    "gorp": GORP,
    "riemannian": Riemannian,
}
NOTHING = {  # of strength zero
    "allora": lambda *given, **more: ALLoRA(*given, eta=float("inf"), rows=ones, **more),
    "allora, gradient": lambda *given, **more: ALLoRAGradient(*given, eta=float("inf"), rows=ones, **more),
    "mgpo": lambda *given, **more: LoRAMGPO(*given, rho=0.0, **more),
    "ggpo": lambda *given, **more: LoRAGGPO(*given, sigma=0.0, beta=0.0, **more),
    "sam": lambda *given, **more: SAMReference(*given, rho=0.0, **more),
    "sam, lam": lambda *given, **more: SAMReference(*given, steer=mixed(0.0), **more),
    "gorp": GORP,  # in the first task
}


def ones(pair):
    """Rows of norm 1."""
    return torch.ones_like(pair.right[:, :, :1]), torch.ones_like(pair.left[:, :, :1])


@pytest.mark.parametrize("kind", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_of_strength_zero_it_is_its_base_bit_for_bit(kind, base):
    found = []
    for made in (lambda p, model: base(p, lr=0.05), lambda p, model: kind(p, model, base=base, lr=0.05)):
        model, adapter = attached(LORA)
        optimizer = made(adapter.parameters(), model)
        for _ in range(4):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                learnt(model)

            optimizer.step(closure)
        found.append([p.detach().clone() for p in adapter.parameters()])
    assert all(map(torch.equal, *found))


kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_lorsum = pytest.mark.parametrize("kind", [*KINDS.values(), LoRSum], ids=[*KINDS, "lorsum"])


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


@with_lorsum
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


@pytest.mark.parametrize("kind", [SAMReference, LoRAMGPO])
def test_a_move_that_narrow_numbers_lose_is_refused_and_leaves_them_as_they_were(kind):
    for rho in (0.05, 1e-4):
        model, adapter = attached(LORA, torch.float32)
        model.bfloat16()
        optimizer = kind(adapter.parameters(), model, base=torch.optim.SGD, lr=0.0, rho=rho)
        before = [p.detach().clone() for p in adapter.parameters()]

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            learnt(model)

        refused = pytest.raises(ValueError, match=r"of which bfloat16 keeps .*: keep the factors in float32")
        with contextlib.nullcontext() if rho == 0.05 else refused:
            for _ in range(2):  # LoRAMGPO has no momentum before the first
                optimizer.step(closure)
        assert all(map(torch.equal, adapter.parameters(), before))


def test_lorsum_keeps_wide_copies_of_both_factors():
    """B moves too little for bfloat16, and its own memory lies with A."""
    model, adapter = attached(LORA, torch.float32)
    model.bfloat16()
    optimizer = LoRSum(adapter.parameters(), model, lr=1e-3)
    before = [p.detach().clone() for p in adapter.parameters()]
    for _ in range(3):
        learnt(model)
        optimizer.step()
        optimizer.zero_grad()
    for p, was in zip(adapter.parameters(), before, strict=True):
        assert not torch.equal(optimizer.state[p]["undula_master"], was.float())


@with_lorsum
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


@pytest.mark.parametrize("kind", [KINDS[n] for n in KINDS if n not in ("allora", "lorapro, full")])
def test_clipping_comes_after_the_change(kind):
    """The norm of what the base is given, of all parameters together.  (ALLoRA changes what comes of it; the full form
    of LoRAPro divides by its moments.)"""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, base=torch.optim.SGD, lr=1.0, max_norm=1e-3)
    before = [p.detach().clone() for p in adapter.parameters()]
    learnt(model)
    optimizer.step()
    norm = torch.stack([(p - b).norm() for p, b in zip(adapter.parameters(), before, strict=True)]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


@with_lorsum
def test_gradients_are_what_they_were_after_a_step(kind):
    """Allocators score by them."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, lr=1e-3)
    learnt(model)
    before = [p.grad.clone() for p in adapter.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(adapter.parameters(), before, strict=True))


@with_lorsum
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


# ALLoRA


@pytest.mark.parametrize("products", [False, True])
@torch.no_grad()
def test_alloras_rows_move_by_their_own_factor(products):
    """By the formula on whole matrices; recomputed for each step; a row that is zero moves eta times as far."""
    for kind in (ALLoRA, ALLoRAGradient):
        model, adapter = attached(LORA)
        adapter.factors["0"]["B"][3] = 0
        how = {"rows": of_products} if products else {}
        optimizer = kind(adapter.parameters(), model, base=torch.optim.SGD, lr=0.1, eta=5.0, **how)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.enable_grad():
                learnt(model)
            before = [(p.A.clone(), p.B.clone(), p.scale) for p in pairs(adapter)]
            optimizer.step()
            for p, (A, B, s) in zip(pairs(adapter), before, strict=True):
                rows_B = (s * B @ A if products else B).norm(dim=1, keepdim=True)
                c_A = torch.ones(len(A), 1) if products else 1 / (A.norm(dim=1, keepdim=True) + 1 / 25).sqrt()
                torch.testing.assert_close(p.A, A - 0.1 * c_A * p.A.grad)
                torch.testing.assert_close(p.B, B - 0.1 / (rows_B + 1 / 25).sqrt() * p.B.grad)
        assert 1 / (torch.zeros(()) + 1 / 25).sqrt() == 5


# MGPO


def test_mgpo_moves_factors_along_the_momentum_and_puts_them_back():
    """In one pass forward and backward, by a length of rho / n; before anything, and for evaluation, they are as they
    were, bit for bit."""
    model, adapter = attached(LORA)
    rho, mu, beta = 0.3, 0.8, 0.5
    optimizer = LoRAMGPO(adapter.parameters(), model, base=torch.optim.SGD, lr=0.05, rho=rho, mu=mu, beta=beta)
    seen, theta = [], adapter.parameters()
    model[2].register_forward_pre_hook(lambda *_: seen.append([p.detach().clone() for p in theta]))
    m, norm = [torch.zeros_like(p) for p in theta], None
    for step in range(4):
        before = [p.detach().clone() for p in theta]
        learnt(model)
        moved = [s - b for s, b in zip(seen[-1], before, strict=True)]
        if step == 0:
            assert not any(bool(e.any()) for e in moved)
        else:
            length = torch.stack([t.norm() for t in m]).norm()
            for e, t in zip(moved, m, strict=True):
                torch.testing.assert_close(e, rho * min(1 / norm, 10) * t / length)
        assert all(map(torch.equal, theta, before))  # after the backward pass already
        with torch.no_grad():
            model(torch.randn(3, 12, dtype=torch.float64))
        assert all(map(torch.equal, seen[-1], before))
        g = [p.grad.clone() for p in theta]
        optimizer.step()
        for p, b, each in zip(theta, before, g, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.05 * each)
        m = [mu * t + each for t, each in zip(m, g, strict=True)]
        size = torch.stack([t.norm() for t in g]).norm()
        norm = float(size) if norm is None else beta * norm + (1 - beta) * float(size)
        optimizer.zero_grad()
    assert len(seen) == 8


def test_a_forward_without_a_backward_leaves_nothing_moved_for_evaluation():
    model, adapter = attached(LORA)
    optimizer = LoRAMGPO(adapter.parameters(), model, lr=0.05)
    for _ in range(2):
        learnt(model)
        optimizer.step()
    before = [p.detach().clone() for p in adapter.parameters()]
    model(torch.randn(3, 12, dtype=torch.float64))
    assert not all(map(torch.equal, adapter.parameters(), before))
    model.eval()
    model(torch.randn(3, 12, dtype=torch.float64))
    assert all(map(torch.equal, adapter.parameters(), before))


def test_several_batches_of_one_step_are_moved_alike():
    """The sum of their gradients is that of one batch of all their rows."""
    found = []
    for parts in (1, 4):
        model, adapter = attached(LORA)
        optimizer = LoRAMGPO(adapter.parameters(), model, lr=0.05, rho=0.5)
        torch.manual_seed(3)
        x = torch.randn(16, 12, dtype=torch.float64)
        for _ in range(3):
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_without_a_pass_of_the_layers_is_refused():
    model, adapter = attached(LORA)
    optimizer = LoRAMGPO(adapter.parameters(), model, lr=0.05)
    model.eval()
    learnt(model)
    with pytest.raises(RuntimeError, match=r"LoRAMGPO moves the weights.*model.train"):
        optimizer.step()


# SAMReference


@pytest.mark.parametrize("conflict", [False, True])
def test_sams_gradient_on_a_quadratic_is_its_formula(conflict):
    """g' = H t + lam rho H (H t) / |H t| exactly; or g without what goes against g_s."""
    model = nn.Sequential(nn.Linear(5, 4))
    adapter = undula.attach(model.double(), undula.LoRA(r=2), "*")
    theta = adapter.parameters()
    with torch.no_grad():
        for t in theta:
            t.copy_(torch.randn_like(t))
    n, rho, lam = sum(t.numel() for t in theta), 0.4, 0.3
    H = torch.randn(n, n, dtype=torch.float64)
    H = H + H.T if conflict else H @ H.T
    steer = without_conflict if conflict else mixed(lam)
    optimizer = SAMReference(theta, model, base=torch.optim.SGD, lr=1.0, rho=rho, steer=steer)
    before, passes = torch.cat([t.detach().flatten() for t in theta]), []

    def closure():
        optimizer.zero_grad()
        passes.append([t.detach().clone() for t in theta])
        t = torch.cat([t.flatten() for t in theta])
        (t @ H @ t / 2).backward()

    optimizer.step(closure)
    g = H @ before
    g_s = g + rho * H @ g / g.norm()
    due = g - min(float(g @ g_s), 0.0) * g_s / g_s.square().sum() if conflict else (1 - lam) * g + lam * g_s
    after = torch.cat([t.detach().flatten() for t in theta])
    torch.testing.assert_close(before - after, due)
    assert len(passes) == 2
    torch.testing.assert_close(torch.cat([t.grad.flatten() for t in theta]), g)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


def test_without_conflict_no_step_goes_against_the_reference():
    for trial in range(20):
        torch.manual_seed(trial)
        g, g_s = ([torch.randn(3, 4), torch.randn(4)] for _ in range(2))
        along = sum(float((a * b).sum()) for a, b in zip(g, g_s, strict=True))
        new = without_conflict(g, g_s)
        if along >= 0:
            torch.testing.assert_close(new, g)
        else:
            assert abs(sum(float((a * b).sum()) for a, b in zip(new, g_s, strict=True))) < 1e-5
    still = without_conflict([torch.ones(2)], [torch.zeros(2)])
    assert torch.equal(still[0], torch.ones(2))


def test_sam_moves_the_factors_of_every_method_and_puts_them_back_bit_for_bit():
    for name, kind in undula.methods().items():
        if kind.__module__.startswith("undula.") and name not in ("Sum", "Dropout"):  # which draws anew in each pass
            check_sam(kind(LORA) if name in ("Centred", "DoRA", "Restarted") else kind())
    check_sam(LORA, frozen="A")


def check_sam(method, frozen=None, rho=0.3, lam=0.4):
    """Its step over gradient descent is the mixed gradient, whatever the factors are; of length 0 it moves none."""
    torch.manual_seed(0)
    model = net().double()
    probe = undula.Probe([wave(4, 12)], lambda model, x: model(x).square().mean())
    adapter = undula.attach(model, method, "*", probe=probe)
    for _, factor, t in adapter.tensors():
        t.requires_grad_(t.requires_grad and factor != frozen)
    theta = adapter.parameters()
    with torch.no_grad():
        for t in theta:
            t.add_(0.1 * torch.randn_like(t))

    def gradients():
        return torch.autograd.grad(model(wave(6, 12)).square().mean(), theta)

    begun = [t.detach().clone() for _, _, t in adapter.tensors()]
    was = [t.detach().clone() for t in theta]
    g = gradients()
    length = torch.stack([t.norm() for t in g]).norm()
    with torch.no_grad():
        torch._foreach_add_(theta, torch._foreach_mul(g, rho / length))
    g_s = gradients()
    with torch.no_grad():
        torch._foreach_copy_(theta, was)
    for lr in (0.0, 0.5):
        optimizer = SAMReference(theta, model, base=torch.optim.SGD, lr=lr, rho=rho, steer=mixed(lam))

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            model(wave(6, 12)).square().mean().backward()

        optimizer.step(closure)
        if lr == 0:
            assert all(torch.equal(t, one) for (_, _, t), one in zip(adapter.tensors(), begun, strict=True)), method
        for t, one, first, second in zip(theta, was, g, g_s, strict=True):
            torch.testing.assert_close(t.detach(), one - lr * ((1 - lam) * first + lam * second), msg=repr(method))


def test_sam_under_a_gradient_scaler_is_sam_and_skips_what_is_not_finite_at_the_moved_factors():
    def loss():
        return model(wave(6, 12)).square().mean()

    def scaled(times=1.0):
        (scaler.scale(loss()) * times).backward()

    ends, scaler = [], torch.amp.GradScaler("cpu", init_scale=1024.0)
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = net().double()
        theta = undula.attach(model, LORA, "*").parameters()
        optimizer = SAMReference(theta, model, base=torch.optim.SGD, lr=0.1, rho=0.3)
        for _ in range(2):
            optimizer.zero_grad()
            if not by_hand:
                optimizer.step(lambda: loss().backward())
                continue
            scaled()
            optimizer.twice(scaled)
            scaler.step(optimizer)
            scaler.update()
        ends.append([t.detach().clone() for t in theta])
    torch.testing.assert_close(*ends)
    optimizer.zero_grad()
    scaled()
    optimizer.twice(lambda: scaled(torch.inf))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(t, was) for t, was in zip(theta, ends[1], strict=True))
    assert scaler.get_scale() == 512


# GORP


def test_gorps_bases_hold_the_energy_and_grow():
    torch.manual_seed(0)
    M = torch.randn(9, 4, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    S = widened(None, M, 0.9)
    share = [float((S[:, :k].T @ M).square().sum() / M.square().sum()) for k in range(S.shape[1] + 1)]
    assert share[-1] >= 0.9 > share[-2]
    more = widened(S, torch.randn(9, 4, dtype=torch.float64), 0.9)
    assert torch.equal(more[:, : S.shape[1]], S)
    assert more.shape[1] > S.shape[1]
    torch.testing.assert_close(more.T @ more, torch.eye(more.shape[1], dtype=torch.float64))
    full = widened(more, torch.randn(9, 9, dtype=torch.float64), 1.0)
    assert full.shape == (9, 9)
    assert torch.equal(widened(full, M, 1.0), full)


@pytest.mark.parametrize("base", [{}, {"base": torch.optim.SGD, "momentum": 0.9}], ids=["adamw", "sgd"])
def test_a_second_task_moves_nothing_within_what_the_first_has_used(base):
    """Whatever the base makes of the gradients, entry by entry; and the bases come back with the state."""
    model, adapter = attached(LORA)
    optimizer = GORP(adapter.parameters(), model, lr=0.05, energy=0.9, **base)
    with pytest.raises(RuntimeError, match="first moment"):
        optimizer.close_task()
    for _ in range(3):
        learnt(model)
        optimizer.step()
    optimizer.close_task()
    again = GORP(adapter.parameters(), model, lr=0.05, energy=0.9, **base)
    again.load_state_dict(optimizer.state_dict())
    before = {id(t): t.detach().clone() for t in adapter.parameters()}
    for _ in range(3):
        torch.manual_seed(9)
        model(torch.randn(7, 12, dtype=torch.float64)).square().sum().backward()
        again.step()
    for name, t, across in again.sides():
        S, moved = again.bases[name], (t - before[id(t)]).detach()
        moved = moved.T if across else moved
        assert S.shape[1] > 0
        assert (S.T @ moved).abs().max() < 1e-12
        assert across or moved.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_has_diverged_goes_on_as_such(kind):
    """Numbers that are none end in no solver: the training tells it."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, lr=0.1)
    for _ in range(2):
        learnt(model)
        for p in adapter.parameters():
            p.grad.fill_(torch.nan)
        optimizer.step()
    assert not any(torch.isfinite(p).any() for p in adapter.parameters())


# PEFT's


def test_riemannians_and_lora_fas_steps_are_the_formulae():
    """With a head beside that has a rate of its own, and a state that goes out and comes back."""
    model, adapter = attached(LORA)
    optimizer = Riemannian(adapter.parameters(), model, base=torch.optim.SGD, lr=0.1, reg=0.01)
    learnt(model)
    old = {p.site: (p.A.detach().clone(), p.B.detach().clone()) for p in pairs(adapter)}
    optimizer.step()
    for p in pairs(adapter):
        A, B = old[p.site]
        damp = 0.01 * torch.eye(len(A), dtype=A.dtype)
        torch.testing.assert_close(p.A.detach(), A - 0.1 * torch.linalg.inv(B.T @ B + damp) @ p.A.grad)
        torch.testing.assert_close(p.B.detach(), B - 0.1 * p.B.grad @ torch.linalg.inv(A @ A.T + damp))

    model, adapter = attached(LORA, torch.float32)
    head = nn.Parameter(torch.ones(3))
    spare = nn.Parameter(torch.ones(3))
    optimizer = LoRAFA(
        [{"params": [*adapter.parameters(), spare, head], "weight_decay": 0.0}], model, lr=0.1, eps=1e-12
    )
    give_rate(optimizer, [head], 0.5)
    A = [p.A.detach().clone() for p in pairs(adapter)]
    B = [p.B.detach().clone() for p in pairs(adapter)]
    learnt(model)
    head.grad, spare.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert all(torch.equal(p.A, a) for p, a in zip(pairs(adapter), A, strict=True))
    torch.testing.assert_close(head.detach(), torch.full((3,), 0.5))
    torch.testing.assert_close(spare.detach(), torch.full((3,), 0.9))
    for p, b in zip(pairs(adapter), B, strict=True):  # the first step of Adam: by the sign
        torch.testing.assert_close((p.B.detach() - b).abs(), torch.full_like(b, 0.1), rtol=1e-3, atol=1e-3)
    state = optimizer.state_dict()
    assert len(state["state"]) == 4  # two pairs, and each of the others by itself


# LoRSum


def target(seed=4):
    """(B_0, A_0, terms, B_0 A_0 + their sum)."""
    torch.manual_seed(seed)
    B, A, S, X = (torch.randn(*s, dtype=torch.float64) for s in ((6, 2), (2, 5), (9, 6), (9, 5)))
    return B, A, [(-0.3, S.T, X)], B @ A - 0.3 * S.T @ X


def test_lorsums_rounds_converge_to_the_truncated_svd_and_never_rise():
    B, A, terms, whole = target()
    M_U, M_V = torch.ones(6, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    U, s, V = torch.linalg.svd(whole)
    found = summed(B, A, terms, M_U, M_V, 1e-14, 400)
    torch.testing.assert_close(found[0] @ found[1], (U[:, :2] * s[:2]) @ V[:2])
    values = []
    for rounds in range(1, 8):
        b, a = summed(B, A, terms, M_U, M_V, 0.5, rounds)
        near = 0.25 * ((b - B).square().sum() + (a - A).square().sum())
        values.append(float((whole - b @ a).square().sum() / 2 + near))
    assert values == sorted(values, reverse=True)
    assert values[-1] < float((whole - B @ A).square().sum() / 2)


def test_lorsums_metric_is_that_of_its_least_squares():
    """One round's A and then B by brute force, over a dense change; and the sums of pairs are those of matrices."""
    B, A, terms, whole = target()
    M_U, M_V = torch.rand(6, dtype=torch.float64) + 0.5, torch.rand(5, dtype=torch.float64) + 0.5
    aim = M_U[:, None].sqrt() * (B @ A) * M_V.sqrt() + (whole - B @ A) / M_U[:, None].sqrt() / M_V.sqrt()
    new_B, new_A = summed(B, A, terms, M_U, M_V, 1e-14, 1)
    best_A = torch.linalg.pinv(M_U[:, None].sqrt() * B) @ aim / M_V.sqrt()
    torch.testing.assert_close(new_A, best_A)
    torch.testing.assert_close(new_B, aim @ torch.linalg.pinv(new_A * M_V.sqrt()) / M_U[:, None].sqrt())


def test_lorsum_without_rounds_is_scaled_gradient_descent():
    """From what it sees at the layers; the scale is in B."""
    model, adapter = attached(LORA)
    how = {"rounds": 0, "fraction": 0.0, "pull": 0.0, "damping": 0.0, "lr": 1e-3, "weight_decay": 0.0}
    optimizer = LoRSum(adapter.parameters(), model, **how)
    learnt(model)
    old = {p.site: (p.A.detach().clone(), p.scale * p.B.detach()) for p in pairs(adapter)}
    optimizer.step()
    for p in pairs(adapter):
        A, B = old[p.site]
        g_A, g_B, rho = p.A.grad, p.B.grad / p.scale, 1e-5 * torch.eye(len(A), dtype=A.dtype)
        inverse_A, inverse_B = torch.linalg.inv(A @ A.T + rho), torch.linalg.inv(B.T @ B + rho)
        torch.testing.assert_close(p.A.detach(), A - 1e-3 * inverse_B @ g_A)
        torch.testing.assert_close(p.scale * p.B.detach(), B - 1e-3 * g_B @ inverse_A)


def test_lorsum_learns_and_takes_batches_of_a_step_as_one():
    found = []
    for parts in (1, 4):
        model, adapter = attached(LORA)
        optimizer = LoRSum(adapter.parameters(), model, lr=0.5)
        torch.manual_seed(3)
        x, losses = torch.randn(16, 12, dtype=torch.float64), []
        for _ in range(6):
            for part in x.chunk(parts):
                ((model(part) - 1).square().mean() / parts).backward()
            with torch.no_grad():
                losses.append(float((model(x) - 1).square().mean()))
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]
        found.append([p.detach().clone() for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_lorsum_refuses_what_it_does_not_see():
    model, adapter = attached(undula.Dropout(LORA, 0.5))
    with pytest.raises(TypeError, match=r"plain LoRA; at 0 stands Dropout.*LoRAPro"):
        LoRSum(adapter.parameters(), model)
    model, adapter = attached(LORA)
    optimizer = LoRSum(adapter.parameters(), model, lr=0.1)
    learnt(model)
    (0.1 * sum(p.square().sum() for p in adapter.parameters())).backward()
    with pytest.raises(RuntimeError, match="0: its gradient is not that of the rows"):
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    learnt(model)
    with pytest.raises(RuntimeError, match="saw no call of 0 in training mode"):
        optimizer.step()
