"""What every procedure promises, whichever it is: gates, draws, restarts and penalties, alone and together, go through
the same battery."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.io import files
from undula.ranks import memory
from undula.ranks.surgery import adopt

from ..support.courses import ALL, COURSES, STEPS, Loop, assert_equal, batch, check_complete, every, net
from ..support.processes import together

each = pytest.mark.parametrize("name", ALL)


def test_every_procedure_is_in_the_battery():
    """One that no course stands for would pass everything below."""
    check_complete()


def pattern(loop):
    """What is decided for good: methods, and which ranks are live."""
    gates = {f"{s}.{n}": (t != 0).tolist() for s, n, t in loop.adapter.tensors() if n in ("g", "E")}
    return dict(loop.adapter.methods), gates


@each
def test_from_where_on_a_result_counts(name):
    """What `counts_from` says is when the course has settled: a study that chose its best point before would measure
    another adapter than the one that was asked for."""
    loop, seen = Loop(name, steps=20), []
    for step in range(20):
        loop.update(step)
        seen.append(pattern(loop))
    settled = next(k for k in range(1, 21) if all(p == seen[-1] for p in seen[k - 1 :]))
    counts = loop.how.counts_from(20, loop.adapter)
    assert 0 <= counts <= 20
    if name.startswith("SoRA"):  # its gates go on closing within the last level
        assert counts == loop.first.ends[-2] + 1
    elif name in ("LoRASC", "LoRASC + L2SP"):
        assert counts == 20  # only then is the portion of the last pair what stays
    elif name.startswith("DiffoRA, shared"):
        assert counts == loop.first.end + 1  # the next update makes the choice
    else:
        assert settled <= max(counts, 1) <= settled + 1
    if name == "SRLoRA":
        assert counts <= loop.how.counts_from(20) <= 20


def checkpoint(loop, folder):
    """Everything that a checkpoint holds, through files."""
    loop.adapter.save(folder / "adapter")
    tensors, values = loop.course.state()
    files.write_state(folder, "course", values, tensors)
    torch.save(loop.optimizer.state_dict(), folder / "optimizer.pt")


def resumed(name, folder, start_first):
    """A new process: everything made anew, then what the files hold.  Whether a course is started before the adapter is
    loaded or after makes no difference, since starting changes nothing."""
    loop = Loop(name, started=start_first)
    adopt(loop.model, undula.Adapter.load(folder / "adapter"))
    loop.optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    if not start_first:
        loop.start()
    values, tensors = files.read_state(folder, "course")
    loop.course.restore(tensors, values)
    return loop


@pytest.mark.every(2)
@each
@pytest.mark.parametrize("k", [0, 1, 5, 9])
def test_resumes_to_the_bit(name, k, tmp_path):
    """k updates, everything through files, the rest; against all of them at once.  Nothing advances the generators."""
    loop = Loop(name)
    for step in range(k):
        loop.update(step)
    checkpoint(loop, tmp_path)
    loops = loop, resumed(name, tmp_path, True), resumed(name, tmp_path, False)
    for each_loop in loops:
        assert each_loop.course.step == k
        for step in range(k, STEPS):
            each_loop.update(step)
        each_loop.course.finish()
        each_loop.course.finish()  # once is enough
    for again in loops[1:]:
        assert_equal(every(loop.adapter), every(again.adapter))
        assert dict(loop.adapter.methods) == dict(again.adapter.methods)
        assert trains(loop.adapter) == trains(again.adapter)
        assert_equal(loop.course.state()[0], again.course.state()[0])
        assert loop.course.state()[1] == again.course.state()[1]


def trains(adapter):
    return {f"{s}.{n}": t.requires_grad for s, n, t in adapter.tensors()}


@each
def test_parameters_stay_what_the_optimiser_knows(name):
    loop = Loop(name)
    known = {(s, n): (id(t), t.shape) for s, n, t in loop.adapter.tensors() if t.requires_grad}
    for step in range(STEPS):
        loop.update(step)
    assert {(s, n): (id(t), t.shape) for s, n, t in loop.adapter.tensors() if t.requires_grad} == known
    assert undula.selected(loop.model) is loop.adapter


@each
def test_global_generators_are_untouched(name):
    loop = Loop(name)
    for step in range(STEPS):
        loop.update(step, around=untouched)
    with untouched():
        loop.course.finish()


@contextlib.contextmanager
def untouched():
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_configuration_round_trip(name):
    how = ALL[name][1]
    assert ranks.Procedure.decode(json.loads(json.dumps(how.encode()))) == how


@each
def test_other_methods_are_refused(name):
    method, how = ALL[name]
    model = net()
    adapter = undula.attach(model, undula.AuroRA(), overrides={"2": method})
    if how.serves(undula.AuroRA()):
        how.start(model, torch.optim.AdamW(adapter.parameters()), STEPS)
    else:
        with pytest.raises(TypeError, match=r"works on .*, not on AuroRA\(.*\(0 and 1 other sites\)"):
            how.start(model, torch.optim.AdamW(adapter.parameters()), STEPS, quality=lambda: 0.0)


def worker(rank, file, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for name in COURSES:
        loop = Loop(name)
        x, target = batch(1000 + rank)  # measured on other data: only ALoRA asks
        quality = lambda model=loop.model, x=x, t=target: -float(F.mse_loss(model(x), t).detach())  # noqa: E731
        course = loop.how.start(loop.model, loop.optimizer, STEPS, quality)
        wrapped = nn.parallel.DistributedDataParallel(loop.model)
        for step in range(STEPS):
            x, target = batch(2 * step + rank)
            course.before_forward()
            F.mse_loss(wrapped(x), target).backward()
            course.before_update()
            loop.optimizer.step()
            course.after_update()
            loop.optimizer.zero_grad()
        torch.save(every(loop.adapter), f"{folder}/{name}.{rank}")


WORKER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.oracles.test_courses import worker
folder, rank, _ = sys.argv[1:]
worker(int(rank), f"{{folder}}/store", folder)
"""


def test_processes_agree(python, tmp_path):
    """Two processes under DDP, each with data of its own, end with the same gates and factors, bit for bit."""
    together(python, tmp_path, WORKER, 2)
    for name in COURSES:
        a, b = (torch.load(tmp_path / f"{name}.{rank}") for rank in range(2))
        assert_equal(a, b)
        start = every(Loop(name).adapter)
        assert any(k not in start or not torch.equal(t, start[k]) for k, t in a.items())


class Scaled(Loop):
    """The same loop with a gradient scaler.  An overflow's update comes again: the data do not know of it."""

    def __init__(self, name, overflows=()):
        super().__init__(name)
        self.scaler, self.overflows = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**9), overflows

    def attempt(self, number, factor):
        torch.manual_seed(number)
        self.course.before_forward()
        x, target = batch(number)
        self.scaler.scale(F.mse_loss(self.model(x), target) * factor).backward()
        self.scaler.unscale_(self.optimizer)
        self.course.before_update()
        self.scaler.step(self.optimizer)
        self.scaler.update(8.0)
        self.course.after_update()
        self.optimizer.zero_grad()

    def update(self, number, micro=1):
        if number in self.overflows:
            self.attempt(number, float("inf"))
            self.attempt(number, float("nan"))
        self.attempt(number, 1.0)


@each
def test_an_update_that_a_scaler_skips_has_not_been(name):
    """A scaler's first updates overflow as a rule.  Everything (gates, moments, scores, noise, counters) is afterwards
    what it is in a run that has none of these updates."""
    plain, scaled = Scaled(name), Scaled(name, overflows=(0, 3, 5, 6, 10))
    for loop in (plain, scaled):
        for step in range(STEPS):
            loop.update(step)
        loop.course.finish()
        assert loop.course.step == STEPS
    assert_equal(every(plain.adapter), every(scaled.adapter))
    assert_equal(plain.course.state()[0], scaled.course.state()[0])
    assert plain.course.state()[1] == scaled.course.state()[1]
    assert all(t.isfinite().all() for t in every(scaled.adapter).values())


@each
def test_plain_gradient_descent_will_do(name):
    """It keeps no moments that an entry's beginning again could reset."""
    loop = Loop(name, lambda parameters: torch.optim.SGD(parameters, lr=0.02))
    start = every(loop.adapter)
    for step in range(STEPS):
        loop.update(step)
    loop.course.finish()
    found = every(loop.adapter)
    assert all(t.isfinite().all() for t in found.values())
    assert any(k not in start or not torch.equal(t, start[k]) for k, t in found.items())


@each
def test_a_training_that_ends_early_keeps_the_promise(name):
    """Stopped after five updates, or with the last ones skipped: ranks and sites are what was asked for."""
    loop = Loop(name)
    for step in range(4):
        loop.update(step)
    loop.course.finish()
    assert all(t.isfinite().all() for t in every(loop.adapter).values())
    live = ranks.live(loop.adapter)
    if name in ("AdaLoRA", "Together"):
        assert sum(live.values()) == 3
    if name == "DiffoRA":
        assert sorted(live.values()) == [0, 3, 3]
        assert {float(v) for f in loop.adapter.factors.values() for v in f["g"]} == {0.0, 1.0}
    if name.startswith("SoRA"):
        assert loop.first.path[-1].step == 4


@each
def test_accumulated_gradients_are_one_update(name):
    """Two halves of a batch are the batch."""
    torch.set_default_dtype(torch.float64)
    if isinstance(ALL[name][0], undula.Dropout):
        pytest.skip("halves draw other masks")
    loops = Loop(name), Loop(name)
    for micro, loop in zip((1, 2), loops, strict=True):
        for step in range(STEPS):
            loop.update(step, micro)
    found, wanted = (every(loop.adapter) for loop in loops)
    for k, t in wanted.items():
        torch.testing.assert_close(found[k], t)


ADAMS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99), weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "maximise": lambda p: torch.optim.AdamW(p, lr=0.1, maximize=True, foreach=False),
}


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("dim", [0, 1])
def test_entries_that_begin_again_step_as_a_new_optimiser_would(kind, dim):
    """Adam's count of steps goes on for the others: without a bias correction of their own, entries that an allocator
    made begin again took steps up to 6.5 times too long."""
    torch.set_default_dtype(torch.float64)
    rows, whole = torch.tensor([0, 3]), nn.Parameter(torch.randn(4, 4))
    old = ADAMS[kind]([whole])
    for step in range(60):
        if step == 50:
            memory.forget(old, whole, rows, dim)
            part = nn.Parameter(whole.detach().index_select(dim, rows).clone())
            new = ADAMS[kind]([part])
            held = copy.deepcopy(old.state_dict())  # through a checkpoint
            old = ADAMS[kind]([whole])
            old.load_state_dict(held)
        whole.grad = torch.randn(4, 4)
        if step >= 50:
            part.grad = whole.grad.index_select(dim, rows).clone()
            new.step()
        old.step()
        memory.correct_steps(old)
        if step >= 50:
            torch.testing.assert_close(whole.detach().index_select(dim, rows), part.detach())


def test_where_the_optimiser_made_no_step_there_is_nothing_to_correct():
    """It passes over a parameter without a gradient."""
    p = nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.Adam([p], lr=0.1)
    for step in range(6):
        if step == 4:
            memory.forget(optimizer, p, torch.tensor([0]), 0)
        p.grad = torch.ones_like(p) if step < 5 else None
        before = p.detach().clone()
        optimizer.step()
        memory.correct_steps(optimizer)
    assert torch.equal(p, before)


def test_no_step_after_a_restart_is_longer_than_the_rate():
    """Of a constant gradient, whatever has begun again, ReLoRA's pruned entries included."""
    torch.set_default_dtype(torch.float64)
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.Adam([p], lr=1.0)
    for step in range(300):
        if step == 200:
            ranks.restart.Pruned(0.9)(optimizer, p)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        memory.correct_steps(optimizer)
        assert (p - before).abs().max() < 1 + 1e-6


def test_ranks_that_rest_in_dylora_have_counts_of_their_own():
    """A row that trains for the first time late begins with a step of the rate, as the first rows did."""
    torch.set_default_dtype(torch.float64)
    p = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([p], lr=1.0)
    for step in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
        memory.correct_steps(optimizer)
        if step < 39:
            memory.stand_still(optimizer, p, slice(1, 3), 0)
            for t in memory.moments(optimizer, p).values():
                t[1:] = 0
    before = p.detach().clone()
    assert float(optimizer.state[p]["step"] - optimizer.state[p][memory.BEGAN][1]) == 1
    assert before.isfinite().all()


def test_quantised_moments_are_refused_by_name():
    """Zeroing a code is not zeroing what it stands for."""
    p = nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.Adam([p])
    optimizer.state[p] = {"state1": torch.zeros(4, 2, dtype=torch.uint8)}
    with pytest.raises(TypeError, match=r"Adam keeps state1 as torch\.uint8.*32-bit state"):
        memory.forget(optimizer, p, torch.tensor([0]), 0)
