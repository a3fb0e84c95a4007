"""What allocators that move gates promise; what all procedures do is in `test_courses.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.kernels import frozen
from undula.ranks.gates import GateAllocator, spread
from undula.ranks.memory import forget
from undula.ranks.sora import Linear

from ..support import courses

R = 4
COURSES = [course for course in courses.COURSES.values() if isinstance(course[1], GateAllocator)]
COURSES = [(method.undropped(), how) for method, how in COURSES]
each = pytest.mark.parametrize(("method", "how"), COURSES, ids=[repr(how) for _, how in COURSES])
STEPS = 20


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randn(16, 4, generator=g)


def optimiser(adapter):
    return torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.1)


def start(model, how, optimizer, steps=STEPS):
    x, target = batch(1000)

    def quality():
        with torch.no_grad():
            return -float(F.mse_loss(model(x), target))

    return how.start(model, optimizer, steps, quality)


def train(model, optimizer, course, steps, first=0, micro=1):
    for step in range(first, steps):
        x, target = batch(step)
        course.before_forward()
        for part, wanted in zip(x.chunk(micro), target.chunk(micro), strict=True):
            (F.mse_loss(model(part), wanted) / micro).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()


def every(adapter):
    return {f"{s}.{n}": t.detach().clone() for s, n, t in adapter.tensors()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@each
def test_shapes_and_parameters_stay(method, how):
    model = net()
    adapter = undula.attach(model, method)
    before = {(s, n): (id(t), t.shape) for s, n, t in adapter.tensors()}
    opt = optimiser(adapter)
    course = start(model, how, opt)
    train(model, opt, course, STEPS)
    assert {(s, n): (id(t), t.shape) for s, n, t in adapter.tensors()} == before
    assert undula.selected(model) is adapter


@each
def test_sees_the_method_inside_dropout(method, how):
    torch.set_default_dtype(torch.float64)
    found = []
    for m in (method, undula.Dropout(method, 0.0)):
        model = net()
        opt = optimiser(undula.attach(model, m))
        course = start(model, how, opt)
        train(model, opt, course, STEPS)
        found.append(every(undula.selected(model)))
    for k, t in found[0].items():
        torch.testing.assert_close(found[1][k], t)


UNFIT = [
    (undula.AdaLoRA(r=4), ranks.AdaLoRA(target=2, warmup=0.5, settle=0.5), "none is left between t_i=10 and T-t_f=10"),
    (undula.AdaLoRA(r=4), ranks.AdaLoRA(target=5), "asks for 15 ranks in all, the adapter has 12"),
    (undula.SoRA(r=4), ranks.SoRA(levels=Linear(0.0, 1.0, 21)), "21 levels do not fit into 20 updates"),
    (
        undula.GatedLoRA(r=4),
        ranks.ALoRA(rounds=8, first=0.5, between=0.1),
        "last round would come after update 24 of 20",
    ),
    (undula.DyLoRA(r=4), ranks.DyLoRA(low=5), "low lies between 1 and the least rank of the adapter, 4"),
    (undula.GatedLoRA(r=4), ranks.DiffoRA(search=0.05), "a search from update 1 to 1 does not fit into 20"),
    (undula.GatedLoRA(r=4), ranks.Budget(total=13), "room for 1 to 12 ranks"),
]


@pytest.mark.parametrize(("method", "how", "message"), UNFIT, ids=[m for _, _, m in UNFIT])
def test_what_does_not_fit_is_refused(method, how, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        start(model, how, optimiser(undula.attach(model, method)))


def test_bad_values_are_refused():
    for wrong in (
        lambda: ranks.AdaLoRA(every=0),
        lambda: ranks.SoRA(lr=0.0),
        lambda: ranks.ALoRA(rounds=0),
        lambda: ranks.DiffoRA(rho=0.0),
        ranks.Budget,
        lambda: ranks.Budget(ranks=("*=2",), total=3),
        lambda: ranks.Budget(ranks=("two",)),
        lambda: ranks.dylora.Geometric(p=1.0),
    ):
        with pytest.raises(
            ValueError, match=r"needed|needs at least one lambda|written| is (at least|greater than) \d"
        ):
            wrong()
    model = net()
    opt = optimiser(undula.attach(model, undula.GatedLoRA()))
    with pytest.raises(TypeError, match="methods with a trained gate"):
        ranks.SoRA().start(model, opt, 10)
    with pytest.raises(TypeError, match="give start"):
        ranks.ALoRA().start(model, opt, 100)


def test_spread():
    assert spread(8, [9, 9, 9]) == [3, 3, 2]
    assert spread(8, [1, 9, 2]) == [1, 5, 2]
    assert spread(8, [1, 1]) == [1, 1]
    assert spread(0, [1]) == [0]
    assert spread(3, []) == []


def test_budget():
    def opened(how, **kw):
        model = net()
        adapter = undula.attach(model, undula.GatedLoRA(r=R, **kw))
        how.start(model, optimiser(adapter), 1).begin()
        assert ranks.live(adapter) == {s: int(f["g"].sum()) for s, f in adapter.factors.items()}
        return list(ranks.live(adapter).values())

    assert opened(ranks.Budget(total=8)) == [3, 3, 2]
    assert opened(ranks.Budget(ranks=("0=1", "*=3"))) == [1, 3, 3]
    assert opened(ranks.Budget(ranks=("2=0",)), open=2) == [2, 0, 2]
    with pytest.raises(LookupError, match="'q' matches none of the adapter's sites: 0, 2, 4"):
        opened(ranks.Budget(ranks=("q=2",)))
    with pytest.raises(ValueError, match=r"room for fewer ranks at 0 \(4\)"):
        opened(ranks.Budget(ranks=("0=5",)))


def test_what_is_forgotten_is_that_alone():
    p = nn.Parameter(torch.randn(4, 3))
    opt = torch.optim.AdamW([p], lr=0.1)
    p.square().sum().backward()
    opt.step()
    forget(opt, p, torch.tensor([1]), 1)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not opt.state[p][moment][:, 1].any()
        assert opt.state[p][moment][:, [0, 2]].all()


def test_streams_of_draws_differ_by_seed_and_step():
    draws = {tuple(frozen.integers(s, ("DyLoRA", t), (1,), 2**31).tolist()) for s in range(3) for t in range(5)}
    assert len(draws) == 15


def test_a_model_with_a_course_can_be_copied():
    model = net()
    opt = optimiser(undula.attach(model, undula.AdaLoRA(r=R)))
    course = start(model, ranks.AdaLoRA(target=2), opt)
    train(model, opt, course, 3)
    twin = copy.deepcopy(model)
    assert_equal(every(undula.selected(model)), every(undula.selected(twin)))
