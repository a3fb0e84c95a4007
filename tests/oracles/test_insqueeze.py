"""In-Squeeze: what a stage ends with is the nearest update of its rank, and the optimiser goes on from there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.ranks.insqueeze import squeezed

pytestmark = pytest.mark.usefixtures("float64")


def begun(method=undula.GatedLoRA(r=4), how=ranks.InSqueeze((2,)), steps=10, optimizer=torch.optim.AdamW, rank=4):
    """A course on one layer whose update has that rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    adapter = undula.attach(model, method)
    f = adapter.factors["0"]
    with torch.no_grad():
        f["B"].copy_(torch.randn(7, rank) @ torch.randn(rank, 4))
    optimizer = optimizer(adapter.parameters(), lr=1e-3)
    return model, adapter, f, optimizer, how.start(model, optimizer, steps)


def gradients(model, f):
    x, y = torch.randn(32, 9, generator=torch.Generator().manual_seed(1)), torch.ones(32, 7)
    for t in (f["A"], f["B"]):
        t.grad = None
    F.mse_loss(model(x), y).backward()
    return f["A"].grad.clone(), f["B"].grad.clone()


def test_a_stage_ends_with_the_nearest_update_of_its_rank_balanced():
    model, adapter, f, _, course = begun()
    before = adapter.delta("0")
    course.squeeze(2)
    U, s, Vh = torch.linalg.svd(before)
    torch.testing.assert_close(adapter.delta("0"), U[:, :2] * s[:2] @ Vh[:2])
    torch.testing.assert_close(f["B"].T @ f["B"], f["A"] @ f["A"].T)
    assert f["g"].tolist() == [1, 1, 0, 0]
    assert not f["A"][2:].any()
    assert course.ranks() == {"0": 2}
    assert undula.prune(undula.selected(model).copy()).method.r == 2


def test_moments_are_those_of_the_new_factors_gradients():
    """Where nothing is lost (an update of rank 2 in four), an average of gradients becomes the average of what the new
    factors' gradients would have been; squares follow the same map squared."""
    model, _, f, optimizer, course = begun(rank=2)
    old = {k: f[k].detach().clone() for k in "AB"}
    g_A, g_B = gradients(model, f)
    squares = {k: torch.rand_like(f[k]) for k in "AB"}
    for k, g in (("A", g_A), ("B", g_B)):
        optimizer.state[f[k]] = {"step": torch.tensor(5.0), "exp_avg": g.clone(), "exp_avg_sq": squares[k].clone()}
    course.squeeze(2)
    new_A, new_B = gradients(model, f)
    memory = {k: optimizer.state[f[k]] for k in "AB"}
    torch.testing.assert_close(memory["A"]["exp_avg"], new_A)
    torch.testing.assert_close(memory["B"]["exp_avg"], new_B)
    B, A, T, P, dead = squeezed(old["B"], old["A"], 2)
    torch.testing.assert_close(B, old["B"] @ T)
    torch.testing.assert_close(A, P @ old["A"])
    assert not dead.any()
    torch.testing.assert_close(memory["A"]["exp_avg_sq"][:2], T.T.square() @ squares["A"])
    torch.testing.assert_close(memory["B"]["exp_avg_sq"][:, :2], squares["B"] @ P.T.square())
    assert not memory["A"]["exp_avg_sq"][2:].any()
    assert float(memory["A"]["step"]) == 5


def test_an_update_of_lower_rank_keeps_ranks_that_can_learn():
    """The rank that it has not begins again: B = 0, a row of A, nothing remembered."""
    model, adapter, f, optimizer, course = begun(rank=1)
    before = adapter.delta("0")
    ones = {"exp_avg": torch.ones(4, 9), "exp_avg_sq": torch.ones(4, 9)}
    optimizer.state[f["A"]] = {"step": torch.tensor(3.0), **ones}
    course.squeeze(2)
    torch.testing.assert_close(adapter.delta("0"), before)
    assert f["g"].tolist() == [1, 1, 0, 0]
    assert not f["B"][:, 1].any()
    assert f["A"][1].norm() > 0.1
    assert not optimizer.state[f["A"]]["exp_avg"][1].any()
    assert gradients(model, f)[1][:, 1].any()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_ranks_fall_by_stages_whatever_the_optimiser(optimizer):
    """Equal stages, the last rank in the end; also where the training ends early."""
    model, adapter, f, optimizer, course = begun(how=ranks.InSqueeze((3, 1)), steps=9, optimizer=optimizer)
    seen = []
    for _ in range(9):
        course.before_forward()
        gradients(model, f)
        course.before_update()
        optimizer.step()
        course.after_update()
        seen.append(course.ranks()["0"])
        assert torch.isfinite(adapter.delta("0")).all()
    assert seen == [4, 4, 3, 3, 3, 1, 1, 1, 1]
    *_, early = begun(how=ranks.InSqueeze((3, 1)), steps=9)
    early.finish()
    assert early.ranks() == {"0": 1}


def test_what_makes_no_sense_is_refused_and_the_rate_warms_up_in_each_stage():
    for wrong in ((), (4, 4), (2, 3)):
        with pytest.raises(ValueError, match="fall from stage to stage"):
            ranks.InSqueeze(wrong)
    with pytest.raises(ValueError, match="begins above rank 4; the adapter has 4 at most"):
        begun(how=ranks.InSqueeze((4, 2)))
    with pytest.raises(TypeError, match="works on GatedLoRA"):
        begun(method=undula.SoRA(r=4))
    how = ranks.InSqueeze((2, 1))
    assert how.counts_from(30) == 21
    rate = how.schedule().multiplier(30, 6)
    assert [rate(step) for step in (0, 10, 20)] == [0, 0, 0]
    assert min(rate(step) for step in (4, 14, 24)) > 0
