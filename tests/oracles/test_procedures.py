"""The contract of procedures: a start that changes nothing, a beginning that a resumed run does not have, several in
one training, the states of earlier versions, and a penalty's gradient beside that of autograd."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import undula
from undula import ranks
from undula.io import files
from undula.ranks.procedure import Course
from undula.ranks.surgery import adopt

from ..support.courses import ALL, COURSES, GATED, NEAR, SHARED, STEPS, Loop, assert_equal, every

each = pytest.mark.parametrize("name", ALL)
OLD = Path(__file__).parents[1] / "fixtures" / "courses"


def whole(loop):
    """All that a training is made of: which objects there are, and their numbers."""
    model, optimizer, adapter = loop.model, loop.optimizer, undula.selected(loop.model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"{s}.{k}": t for s, k, t in adapter.tensors()}
    objects = {k: (id(t), t.requires_grad, t.grad) for k, t in tensors.items()}
    groups = [{**g, "params": [id(p) for p in g["params"]]} for g in optimizer.param_groups]
    slots = {s: (id(slot.layer), slot.method) for s, slot in undula.host.host.host_of(model).slots.items()}
    told = (objects, groups, slots, dict(adapter.methods), {id(p): sorted(m) for p, m in optimizer.state.items()})
    numbers = {k: t.detach().clone() for k, t in tensors.items()}
    for i, memory in enumerate(optimizer.state.values()):
        numbers |= {f"{i}.{k}": t.clone() for k, t in memory.items() if isinstance(t, torch.Tensor)}
    return told, numbers | {"generator": torch.get_rng_state()}


@each
@pytest.mark.parametrize("trained", [False, True])
def test_a_start_changes_nothing(name, trained):
    """Neither the model nor the adapter nor the optimiser nor the generators; also where they have been trained."""
    loop = Loop(name, started=False)
    if trained:
        for step in range(2):
            loop.backward(step)
            loop.optimizer.step()
        loop.optimizer.zero_grad()
    told, numbers = whole(loop)
    loop.start()
    found = whole(loop)
    assert found[0] == told
    assert_equal(found[1], numbers)


class Counted:
    """Counts how often courses begin."""

    def __init__(self, monkeypatch):
        self.count = 0
        for kind in {type(Loop(name).course) for name in ALL} | {type(Loop(name).first) for name in ALL}:
            if "on_begin" in vars(kind):
                monkeypatch.setattr(kind, "on_begin", self.counting(kind.on_begin))

    def counting(self, own):
        def on_begin(course):
            self.count += 1
            own(course)

        return on_begin


BEGIN = ("Budget", "SRLoRA", "L2SP")  # what has something to begin with


@pytest.mark.parametrize("name", BEGIN)
def test_a_fresh_run_begins_once_and_a_resumed_one_never(name, monkeypatch):
    seen, loop = Counted(monkeypatch), Loop(name)
    for step in range(3):
        loop.update(step)
    loop.course.begin()
    assert seen.count == 1
    adapter, state = undula.selected(loop.model).copy(), copy.deepcopy(loop.course.state())
    again = Loop(name)
    adopt(again.model, adapter)
    again.course.restore(*state)
    again.course.begin()
    for step in range(3, STEPS):
        again.update(step)
    again.course.finish()
    assert seen.count == 1


@each
def test_to_begin_by_name_is_what_the_first_forward_does(name):
    loops = Loop(name), Loop(name)
    loops[1].course.begin()
    for loop in loops:
        for step in range(3):
            loop.update(step)
    assert_equal(every(loops[0].adapter), every(loops[1].adapter))


@pytest.mark.parametrize("name", [*BEGIN, "Together"])
def test_a_loop_without_before_forward_is_told(name):
    """It would train by gradients of what was before the beginning, or never begin."""
    loop = Loop(name)
    before = every(loop.adapter)
    loop.backward(0)
    for late in (loop.course.before_update, loop.course.after_update):
        with pytest.raises(RuntimeError, match=rf"of {name} has not begun: call before_forward\(\) before the forward"):
            late()
    assert_equal(every(loop.adapter), before)
    loop.course.begin()
    loop.course.before_update()


def test_a_course_that_finishes_before_any_update_has_begun():
    loop = Loop("Budget")
    loop.course.finish()
    assert sum(ranks.live(loop.adapter).values()) == 8


@each
def test_the_state_of_another_procedure_is_refused(name):
    course = Loop(name).course
    tensors, values = course.state()
    with pytest.raises(ValueError, match="state of a course of Another, not of"):
        course.restore(tensors, {**values, "of": "Another"})


def test_states_of_several_that_do_not_fit_are_refused():
    loop, alone = Loop("Together"), Loop("AdaLoRA")
    with pytest.raises(ValueError, match="state of a course of AdaLoRA, not of Together"):
        loop.course.restore(*alone.course.state())
    three = ranks.Together((*COURSES["Together"][1].procedures, NEAR)).start(loop.model, loop.optimizer, STEPS)
    with pytest.raises(ValueError, match="state of 2 courses together, not of 3"):
        three.restore(*loop.course.state())


@pytest.mark.parametrize("name", ["AdaLoRA", "Budget", "DiffoRA, shared", "LoRASC", "SRLoRA"])
def test_states_of_earlier_versions_go_on(name):
    """Written after 7 of 12 updates, when courses began where they were started and states did not say so.  The end is
    what that version made of them."""
    torch.set_default_dtype(torch.float64)
    folder, (method, how) = OLD / name.lower().replace(", ", "-"), COURSES[name]
    model = fixed_net()
    undula.attach(model, method)
    adopt(model, undula.Adapter.load(folder))
    adapter = undula.selected(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    course = how.start(model, optimizer, STEPS)
    values, tensors = files.read_state(folder, "allocator")
    assert "of" not in values
    course.restore(tensors, values)
    assert course.begun
    for step in range(7, STEPS):
        x, target = (t.double() for t in seeded_batch(step))
        course.before_forward()
        F.mse_loss(model(x), target).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
    course.finish()
    end = load_file(folder / "end.safetensors")
    found = every(adapter)
    assert found.keys() == end.keys()
    for k, t in end.items():
        torch.testing.assert_close(found[k], t)


def fixed_net():
    """The model of the stored states, whatever `nn.Linear` draws."""
    g, layers = torch.Generator().manual_seed(1), []
    for i, o in ((6, 8), (8, 8), (8, 4)):
        layer = nn.Linear(i, o)
        layer.weight.data = torch.randn(o, i, generator=g) / i**0.5
        layer.bias.data.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def seeded_batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randn(16, 4, generator=g)


# Together


def test_two_allocators_are_refused_and_nothing_within_itself():
    with pytest.raises(ValueError, match="ReLoRA and AdaLoRA change the ranks of the same sites"):
        ranks.Together((ranks.ReLoRA(), NEAR, ranks.AdaLoRA()))
    with pytest.raises(ValueError, match="Together stands in no other"):
        ranks.Together((ranks.Together((NEAR,)),))
    with pytest.raises(ValueError, match="needs procedures"):
        ranks.Together(())


@pytest.mark.parametrize("name", [n for n in COURSES if n != "Together"])
def test_a_procedure_with_one_that_does_nothing_is_itself(name, monkeypatch):
    """To the bit: every moment reaches it, once, with the count of updates."""
    alone = Loop(name)
    monkeypatch.setitem(ALL, name, (alone.method, ranks.Together((alone.how, ranks.L2SP(weight=0.0)))))
    both = Loop(name)
    for loop in (alone, both):
        for step in range(STEPS):
            loop.update(step)
        loop.course.finish()
    assert_equal(every(alone.adapter), every(both.adapter))
    assert_equal(alone.course.state()[0], both.first.state()[0])
    assert alone.course.state()[1] == both.first.state()[1]
    rest = ("counts_from", (20, alone.adapter)), ("schedule", ()), ("serves", (alone.method,))
    assert all(getattr(alone.how, f)(*given) == getattr(both.how, f)(*given) for f, given in rest)
    assert (alone.how.needs_quality, alone.how.entrywise) == (both.how.needs_quality, both.how.entrywise)


def test_the_allocator_has_the_last_word_on_gradients():
    """Sites that train as one get one gradient, and what rests gets none, wherever the penalty stands."""
    for order in ((SHARED, NEAR), (NEAR, SHARED)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        adapter = undula.attach(model, GATED)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
        course = ranks.Together(order).start(model, optimizer, STEPS)
        shared = course.courses[order.index(SHARED)]
        for _ in range(STEPS):
            x, target = torch.randn(16, 8), torch.randn(16, 8)
            course.before_forward()
            F.mse_loss(model(x), target).backward()
            course.before_update()
            for group in shared.shared:
                for k in "AB":
                    one, *others = (adapter.factors[shared.sites[i]][k].grad for i in group)
                    assert all(torch.equal(one, g) for g in others)
            assert shared.choosing == (adapter.factors["0"]["A"].grad is None)
            optimizer.step()
            course.after_update()
            optimizer.zero_grad()
        assert [len(group) for group in shared.shared] == [2]


def test_a_course_that_overrides_a_moment_is_refused_together(monkeypatch):
    """Its own moment would not be called."""

    def before_update(self):
        Course.before_update(self)

    monkeypatch.setattr(type(Loop("L2SP").course), "before_update", before_update)
    with pytest.raises(TypeError, match="the course of L2SP overrides before_update: in Together it overrides on_"):
        Loop("Together")


# L2SP


@pytest.mark.parametrize(
    "method",
    [undula.LoRA(r=2), undula.LoRAN(r=2), undula.VeRA(r=4), undula.DoRA(undula.LoRA(r=2)), undula.UniLoRA(d=64)],
)
def test_the_gradient_is_that_of_the_loss_and_the_penalty(method):
    """By autograd, over all that trains: factors, shared ones once, and what trains in full."""
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    adapter = undula.attach(model, method, ["0", "2"], full=["4"])
    trained = adapter.parameters()
    course = ranks.L2SP(weight=0.3).start(model, torch.optim.SGD(trained, lr=0.1), 1)
    with torch.no_grad():  # the training begins elsewhere than the start
        for p in trained:
            p.add_(torch.randn_like(p))
    course.before_forward()
    origin = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p))
    x, target = torch.randn(16, 8), torch.randn(16, 4)
    loss = F.mse_loss(model(x), target)
    penalty = 0.15 * sum((p - o).square().sum() for p, o in zip(trained, origin, strict=True))
    wanted = torch.autograd.grad(loss + penalty, trained, retain_graph=True)
    loss.backward()
    course.before_update()
    for p, g in zip(trained, wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert course.penalty() == pytest.approx(penalty.item())


def test_what_has_no_gradient_is_passed_over():
    """The optimiser makes no step there, nor does the penalty."""
    loop = Loop("L2SP")
    loop.update(0)
    before = every(loop.adapter)
    loop.course.before_forward()
    loop.course.before_update()
    assert all(p.grad is None for p in loop.adapter.parameters())
    loop.optimizer.step()
    loop.course.after_update()
    assert_equal(every(loop.adapter), before)
