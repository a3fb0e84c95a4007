"""LoRAPro's full form, GGPO's noise, and GORP's part on matrices that train in full."""

import pytest
import torch
from torch import nn

import undula
from undula.optim.ggpo import LoRAGGPO
from undula.optim.gorp import GORP
from undula.optim.lorapro import LoRAPro
from undula.optim.lorapro_full import LoRAProFull
from undula.optim.optimisers import GORP as Gorp
from undula.optim.optimisers import SGD, Adafactor, AdamW
from undula.optim.optimisers import LoRAPro as Pro
from undula.optim.pairs import pairs

from ..support.layers import net
from .test_optimisers import LORA, attached, learnt, wave

# LoRAPro's full form


def test_the_full_forms_steps_are_those_of_lora_pro_adamw():
    """Of lora-pro-adamw 0.2.1, `lorapro_full_adjustment` at steps 0 (B = 0) and 1, betas 0.9 and 0.99.  It keeps what
    it adds to the second moment as bfloat16."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    adapter = undula.attach(model, undula.LoRA(r=2, alpha=3.0), "*")
    (p,) = pairs(adapter)
    A, B, s = wave(2, 4), wave(3, 2), 1.5
    optimizer = LoRAProFull(adapter.parameters(), model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, damping=0.0)
    for at, g in ((torch.zeros_like(B), wave(3, 4)), (B, wave(3, 4).flip(0) + 0.3)):
        with torch.no_grad():
            p.A.copy_(A)
            p.B.copy_(at)
        p.A.grad, p.B.grad = s * at.T @ g, s * g @ A.T
        optimizer.step()
    theirs_A = [[-0.14168186, 0.03169647, 0.16026368, 0.03256772], [0.11984531, -0.02578078, -0.09100018, -0.03844739]]
    theirs_B = [[-0.86640081, 1.03947345], [-1.60338634, 1.88891353], [-0.83908847, 1.04228283]]
    for moved, theirs in (((A - p.A), theirs_A), ((B - p.B), theirs_B)):
        torch.testing.assert_close(moved.detach(), torch.tensor(theirs, dtype=torch.float64), rtol=1e-2, atol=2e-3)


def test_the_full_form_without_moments_is_lorapro_over_gradient_descent():
    """With eps beyond all gradients, and no memory, G is g~ / eps, and what comes back of g~ are the gradients that it
    was made of."""
    found = []
    for kind, how in (
        (LoRAProFull, {"lr": 1e-2 * 1e9, "betas": (0.0, 0.0), "eps": 1e9, "weight_decay": 0.0}),
        (LoRAPro, {"lr": 1e-2, "base": torch.optim.SGD}),
    ):
        model, adapter = attached(LORA)
        optimizer = kind(adapter.parameters(), model, damping=0.0, **how)
        for _ in range(3):
            learnt(model)
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_what_the_full_form_cannot_be_beside_is_said():
    assert (Pro().follows, Pro().apart) == (True, "")
    assert not Pro(full=True).follows
    assert "two numbers" in Pro(full=True).apart
    model, adapter = attached(LORA)
    for option in ("maximize", "amsgrad"):
        with pytest.raises(ValueError, match=f"{option} is an option of the base"):
            LoRAProFull(adapter.parameters(), model, lr=0.1, **{option: True})


# GGPO


def noise_of(optimizer):
    """E of each site in this update."""
    return {p.site: torch.matmul(*optimizer.noise(p.site)) for p in optimizer.pairs()}


def test_ggpos_noise_is_the_formula():
    """Of many updates: no mean, the variances c_i^2 of every row, and no covariance; what a step has seen counts."""
    model, adapter = attached(LORA)
    optimizer = LoRAGGPO(adapter.parameters(), model, base=torch.optim.SGD, lr=0.0, sigma=0.2, beta=0.3)
    learnt(model)
    optimizer.step()
    g, many = {}, []
    for p in pairs(adapter):
        g[p.site] = (p.scale * (p.B @ p.A.grad + p.B.grad @ p.A)).norm(dim=1).detach()
        torch.testing.assert_close(optimizer.norms[p.site], g[p.site])
    for _ in range(4000):
        many.append(noise_of(optimizer))
        optimizer.moved()
    for p in pairs(adapter):
        W = model[int(p.site)].weight.detach()
        w = (W.norm(dim=1).mean() ** 2 + (p.scale * p.B @ p.A).detach().square().sum(1)).sqrt()
        c = (0.2 * w + 0.3 * g[p.site] ** 2) / len(w) ** 0.5
        E = torch.stack([each[p.site] for each in many]) / c[:, None]
        assert E.mean(0).abs().max() < 0.1
        torch.testing.assert_close(E.var(0), torch.ones_like(W), rtol=0.2, atol=0)
        flat = E.flatten(1)
        covariance = (flat.T @ flat / len(flat)).fill_diagonal_(0)
        assert covariance.abs().max() < 0.12


def test_ggpos_noise_is_one_of_an_update_and_none_when_measured():
    """Added to what the layer gives; the same for several batches of an update, another for the next."""
    model, adapter = attached(LORA)
    optimizer = LoRAGGPO(adapter.parameters(), model, lr=0.01, sigma=0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        clean = model(x)
    model.eval()
    assert torch.equal(model(x), clean)
    model.train()
    one = model(x)
    assert not torch.allclose(one, clean)
    assert torch.equal(one, model(x))
    E = noise_of(optimizer)
    hidden = model[1](model[0](x))  # as it computes in this update
    for site, given, seen in (("0", x, model[0](x)), ("2", hidden, one)):
        layer = model[int(site)]
        W = layer.weight + adapter.methods[site].delta(adapter.factors[site]) + E[site]
        torch.testing.assert_close(seen, nn.functional.linear(given, W, layer.bias))
    learnt(model)
    optimizer.step()
    assert not torch.equal(noise_of(optimizer)["0"], E["0"])
    model.eval()
    learnt(model)
    with pytest.raises(RuntimeError, match=r"model\.train"):
        optimizer.step()
    model, adapter = attached(undula.Sum((LORA, LORA), (1.0, 1.0)))
    with pytest.raises(TypeError, match="at 0#0 stands several products"):
        LoRAGGPO(adapter.parameters(), model)


# GORP


def with_head(**how):
    """A network whose last layer trains in full, under GORP."""
    torch.manual_seed(0)
    model = net().double()
    adapter = undula.attach(model, LORA, ["0"], full=["2"])
    return model, adapter, GORP(adapter.parameters(), model, lr=0.02, **how)


def steps(model, optimizer, number, seed):
    for step in range(number):
        torch.manual_seed(seed + step)
        (model(torch.randn(20, 12, dtype=torch.float64)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_matrix_that_trains_in_full_is_followed_at_a_rank_and_away_from_earlier_tasks():
    """Each span of steps moves it within k directions; a second task moves nothing in what the first has used."""
    model, adapter, optimizer = with_head(project=2, every=4, energy=0.9, weight_decay=0.0)
    W = adapter.full["2.weight"]
    for _ in range(2):
        before = W.detach().clone()
        steps(model, optimizer, 4, 5)
        moved = torch.linalg.svdvals((W - before).detach())
        assert moved[1] > 1e-4
        assert moved[2:].max() < 1e-12
    bases = optimizer.close_task()
    assert {"0.A", "0.B", "2.weight"} == set(bases)
    before, S = W.detach().clone(), bases["2.weight"]
    steps(model, optimizer, 5, 50)
    assert 1 <= S.shape[1] <= 2
    assert (S.T @ (W.detach() - before)).abs().max() < 1e-12
    assert (W.detach() - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"have used 2\.weight, which is no factor here"):
        with_head(bases=bases)


def test_a_projected_matrixs_state_goes_out_and_comes_back():
    found = []
    for resume in (False, True):
        model, adapter, optimizer = with_head(project=2, every=3)
        steps(model, optimizer, 4, 5)
        if resume:
            state = optimizer.state_dict()
            optimizer = GORP(adapter.parameters(), model, lr=0.02, project=2, every=3)
            optimizer.load_state_dict(state)
        steps(model, optimizer, 4, 9)
        found.append([p.detach().clone() for p in adapter.parameters()])
    assert all(map(torch.equal, *found))


def test_of_full_rank_the_projected_step_is_adams_in_the_gradients_own_directions():
    """One step of U adam(U'G V) V': all singular values by their signs, U V'."""
    model, adapter, optimizer = with_head(project=3, weight_decay=0.0)
    W = adapter.full["2.weight"]
    before = W.detach().clone()
    (model(torch.randn(20, 12, dtype=torch.float64)) - 1).square().mean().backward()
    g = W.grad.clone()
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    optimizer.step()
    assert torch.equal(W.grad, g)
    torch.testing.assert_close(before - W.detach(), 0.02 * U[:, :3] @ Vh[:3], rtol=1e-4, atol=1e-6)


def test_a_base_without_a_first_moment_is_refused_early():
    for base in (SGD(momentum=0.0), Adafactor()):
        with pytest.raises(ValueError, match="first moment"):
            Gorp(base=base)
    assert [Gorp(base=base).base for base in (AdamW(), SGD(), Adafactor(beta1=0.9))]
