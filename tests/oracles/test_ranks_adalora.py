"""AdaLoRA's budget against the paper's equations by hand, and against PEFT's allocator on the same gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.ranks.adalora import MeanNorm, SumOfSquares, cubic

R = 4


@pytest.fixture(autouse=True)
def _wide():
    torch.set_default_dtype(torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def begun(how, steps, model=None, lr=0.05):
    model = net() if model is None else model
    adapter = undula.attach(model, undula.AdaLoRA(r=R, alpha=6.0))
    opt = torch.optim.AdamW(adapter.parameters(), lr=lr)
    return model, adapter, opt, how.start(model, opt, steps)


def update(model, opt, course, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, target = torch.randn(16, 6, generator=g), torch.randn(16, 5, generator=g)
    course.before_forward()
    F.mse_loss(model(x), target).backward()
    course.before_update()
    opt.step()
    course.after_update()
    grads = {(s, n): t.grad.clone() for s, n, t in undula.selected(model).tensors()}
    opt.zero_grad()
    return grads


def test_schedule():
    b = [cubic(t, 20, 80, 30, 10) for t in range(101)]
    assert b[:21] == [30] * 21
    assert b[80:] == [10] * 21
    assert all(x >= y for x, y in itertools.pairwise(b))
    assert b[50] == int(10 + 20 * 0.125)


def test_schedule_is_pefts():
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=12, target_r=4, tinit=20, tfinal=30, deltaT=5, total_step=100, target_modules=["0", "2"]
    )
    theirs = get_peft_model(net(), config).base_model.rankallocator
    for t in range(101):
        budget, masks = theirs.budget_schedule(t)
        assert budget == cubic(t, 20, 70, 24, 8)
        if t <= 70:
            assert masks == (t > 20 and t % 5 == 0)


def test_at_the_first_update_nothing_is_scored_away():
    """P and Q have no gradient of the loss yet: even with no warm-up the budget waits."""
    _, _, _, course = begun(ranks.AdaLoRA(target=1, warmup=0.0, settle=0.0, every=1), 10)
    assert [course.wait, course.end] == [1, 10]
    course.step = 1
    assert course.budget == 8


def test_scores_by_hand_over_two_updates():
    how = ranks.AdaLoRA(target=2, warmup=0.5, settle=0.1, beta1=0.8, beta2=0.6)
    model, adapter, opt, course = begun(how, 20)
    mean = {(s, n): torch.zeros_like(t) for s, n, t in adapter.tensors()}
    spread = {k: torch.zeros_like(t) for k, t in mean.items()}
    for step in range(2):
        grads = update(model, opt, course, step)
        for s, n, t in adapter.tensors():
            now = (t.detach() * grads[s, n]).abs()
            mean[s, n] = 0.8 * mean[s, n] + (1 - 0.8) * now
            spread[s, n] = 0.6 * spread[s, n] + (1 - 0.6) * (now - mean[s, n]).abs()
    for site, got in zip(("0", "2"), course.scores(), strict=True):
        s = {n: mean[site, n] * spread[site, n] for n in "ABE"}
        want = [s["E"][k] + s["B"][:, k].mean() + s["A"][k].mean() for k in range(R)]
        torch.testing.assert_close(got, torch.stack(want), atol=0, rtol=1e-9)  # they are small


@pytest.mark.parametrize("penalty", [MeanNorm(), SumOfSquares()], ids=repr)
def test_penalty_and_its_gradient(penalty):
    _, adapter, _, course = begun(ranks.AdaLoRA(target=2, weight=0.3, orthogonality=penalty), 20)
    for p in adapter.parameters():
        p.data = torch.randn_like(p)
    factors = [f["A"] for f in adapter.factors.values()] + [f["B"].T for f in adapter.factors.values()]
    norms = [torch.linalg.matrix_norm(M @ M.T - torch.eye(R)) for M in factors]
    value = torch.stack(norms).mean() if penalty == MeanNorm() else torch.stack(norms).square().sum()
    assert course.penalty() == pytest.approx(value.item())
    pq = [f[k] for f in adapter.factors.values() for k in "AB"]
    want = torch.autograd.grad(0.3 * value, pq)
    adapter.factors["0"]["A"].grad = torch.ones(R, 6)  # the loss's own gradient stays
    course.before_update()
    for p, w in zip(pq, want, strict=True):
        torch.testing.assert_close(p.grad, w + (p is adapter.factors["0"]["A"]))
    for f in adapter.factors.values():
        f["A"].data, f["B"].data = torch.eye(*f["A"].shape), torch.eye(*f["B"].shape)
        f["A"].grad = f["B"].grad = None
    assert course.penalty() == 0
    course.before_update()
    assert not any(p.grad.any() for p in pq)  # no division by the norm zero


def test_exactly_k_stay_and_of_equal_ones_the_first():
    """PEFT's threshold (score <= k-th smallest) would take all of several equal ones."""
    _, adapter, _, course = begun(ranks.AdaLoRA(target=2), 20)
    for f in adapter.factors.values():
        f["E"].data.fill_(1.0)
    assert not torch.cat(course.scores()).any()  # all tied
    with torch.no_grad():
        course._apply(course._keep(3))
    assert [f["E"].tolist() for f in adapter.factors.values()] == [[1, 1, 1, 0], [0, 0, 0, 0]]


def test_masks_are_pefts():
    """The same factors and gradients, through both allocators: the same ranks at zero after every update."""
    from peft import AdaLoraConfig, get_peft_model

    steps = 40
    how = ranks.AdaLoRA(target=2, warmup=0.25, settle=0.25, every=4, weight=0.0)
    model, adapter, opt, course = begun(how, steps)
    config = AdaLoraConfig(
        init_r=R, target_r=2, tinit=10, tfinal=10, deltaT=4, total_step=steps, target_modules=["0", "2"]
    )
    theirs = get_peft_model(net(), config)
    names = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    layers = {s: theirs.base_model.model.get_submodule(s) for s in adapter.factors}
    masked = []
    for step in range(1, steps + 1):
        keep = course.after_update
        course.after_update = lambda: None
        grads = update(model, opt, course, step)
        course.after_update = keep
        for s, n, t in adapter.tensors():
            p = getattr(layers[s], names[n])["default"]
            p.data, p.grad = t.detach().clone().view(p.shape), grads[s, n].view(p.shape)
            t.grad = grads[s, n]
        course.after_update()
        theirs.base_model.update_and_allocate(step)
        for s, f in adapter.factors.items():
            torch.testing.assert_close(f["E"].detach(), layers[s].lora_E["default"].detach().flatten(), rtol=0, atol=0)
        masked.append(sum(course.ranks().values()))
        opt.zero_grad()
    assert masked[:10] == [8] * 10
    assert min(masked[10:30]) < 8
    assert masked[29:] == [4] * 11


def test_the_pattern_is_settled_at_the_end():
    how = ranks.AdaLoRA(target=2, warmup=0.1, settle=0.4, every=3)
    model, adapter, opt, course = begun(how, 50)
    seen = []
    for step in range(50):
        update(model, opt, course, step)
        seen.append([tuple((f["E"] != 0).tolist()) for f in adapter.factors.values()])
    assert sum(course.ranks().values()) == 4
    assert all(s == seen[29] for s in seen[29:])
    assert sum(map(sum, seen[28])) > 4  # between maskings all get gradients
    pruned = undula.prune(adapter)
    assert sum(m.r for m in pruned.methods.values()) == 4


def test_ranks_go_where_they_are_needed():
    """Two layers side by side; the target differs from the base in the second one, by rank 4."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], -1)

    model = Two()
    change = torch.zeros(16, 8)
    change[8:] = torch.randn(8, R) @ torch.randn(R, 8)
    base = Two()
    base.load_state_dict(model.state_dict())
    _, _, opt, course = begun(ranks.AdaLoRA(target=2, every=5), 200, model, lr=0.02)
    for step in range(200):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), base(x).detach() + x @ change.T).backward()
        course.before_update()
        opt.step()
        course.after_update()
        opt.zero_grad()
    assert course.ranks() == {"a": 0, "b": 4}
