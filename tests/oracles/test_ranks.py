"""What all allocators promise: they resume bit for bit, agree between processes, refuse what does not fit."""

import copy
import json

import pytest
import safetensors.torch
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
@pytest.mark.parametrize("k", [1, 5, 10, 13, 17])
def test_resumes_to_the_bit(method, how, k, tmp_path):
    """k updates, everything through files, the rest; against all of them at once."""
    model = net()
    adapter = undula.attach(model, method)
    opt = optimiser(adapter)
    course = start(model, how, opt)
    train(model, opt, course, k)

    adapter.save(tmp_path / "adapter")
    tensors, values = course.state()
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "course.safetensors")
    (tmp_path / "course.json").write_text(json.dumps(values))
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")

    train(model, opt, course, STEPS, k)
    course.finish()

    again = net()
    undula.attach(again, undula.Adapter.load(tmp_path / "adapter"))
    new = undula.selected(again)
    opt2 = optimiser(adapter := new)
    opt2.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    second = start(again, how, opt2)
    second.restore(
        safetensors.torch.load_file(tmp_path / "course.safetensors"), json.loads((tmp_path / "course.json").read_text())
    )
    assert second.step == k
    train(again, opt2, second, STEPS, k)
    second.finish()
    assert_equal(every(undula.selected(model)), every(adapter))
    assert_equal(course.state()[0], second.state()[0])
    assert course.state()[1] == second.state()[1]


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
def test_global_generators_are_untouched(method, how):
    model = net()
    opt = optimiser(undula.attach(model, method))
    course = start(model, how, opt)
    state = torch.get_rng_state()
    train(model, opt, course, STEPS)
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_accumulated_gradients_are_one_update(method, how):
    """The hooks come once per update: two halves of a batch are the batch."""
    torch.set_default_dtype(torch.float64)
    found = []
    for micro in (1, 2):
        model = net()
        opt = optimiser(undula.attach(model, method))
        course = start(model, how, opt)
        train(model, opt, course, STEPS, micro=micro)
        assert course.step == STEPS
        found.append(every(undula.selected(model)))
    for k, t in found[0].items():
        torch.testing.assert_close(found[1][k], t)


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


@each
def test_configuration_round_trip(method, how):
    assert ranks.Allocator.decode(json.loads(json.dumps(how.encode()))) == how


@each
def test_other_methods_are_refused(method, how):
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=R), overrides={"2": method})
    with pytest.raises(TypeError, match=r"works on .*, not on LoRA\(.*\(0 and 1 other sites\)"):
        start(model, how, optimiser(adapter))


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


def worker(rank, file, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for i, (method, how) in enumerate(COURSES):
        model = net()
        adapter = undula.attach(model, method)
        opt = optimiser(adapter)
        x, target = batch(1000 + rank)  # measured on other data: only ALoRA asks
        quality = lambda model=model, x=x, t=target: -float(F.mse_loss(model(x), t).detach())  # noqa: E731
        course = how.start(model, opt, 10, quality) if i != 2 else how.start(model, opt, 12, quality)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for step in range(10):
            x, target = batch(2 * step + rank)
            course.before_forward()
            F.mse_loss(wrapped(x), target).backward()
            course.before_update()
            opt.step()
            course.after_update()
            opt.zero_grad()
        torch.save(every(adapter), f"{folder}/{i}.{rank}")
    torch.distributed.destroy_process_group()


def test_processes_agree(tmp_path):
    """Two processes under DDP, each with data of its own, end with the same gates and factors, bit for bit."""
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for i, (method, _) in enumerate(COURSES):
        a, b = (torch.load(tmp_path / f"{i}.{rank}") for rank in range(2))
        assert_equal(a, b)
        assert any(not torch.equal(t, every(undula.attach(net(), method))[k]) for k, t in a.items())


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
        how.start(model, optimiser(adapter), 1)
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
