"""What every allocator promises, whichever it is: gates, draws and restarts go through the same battery."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula

from ..support.courses import COURSES, check_complete

each = pytest.mark.parametrize("name", COURSES)
STEPS = 12


def test_every_allocator_is_in_the_battery():
    """An allocator that no course stands for would pass everything below."""
    check_complete()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step):
    g = torch.Generator().manual_seed(step)
    kind = torch.get_default_dtype()
    return torch.randn(16, 6, generator=g, dtype=kind), torch.randn(16, 4, generator=g, dtype=kind)


class Loop:
    """The loop of the allocators' documentation over a model of its own."""

    def __init__(self, name, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), steps=STEPS):
        method, self.how = COURSES[name]
        self.model = net()
        self.adapter = undula.attach(self.model, method)
        self.optimizer = optimizer(self.adapter.parameters())
        x, target = batch(1000)
        quality = lambda: -float(F.mse_loss(self.model(x), target).detach())  # noqa: E731
        self.course = self.how.start(self.model, self.optimizer, steps, quality)

    def backward(self, number, factor=1.0, micro=1):
        torch.manual_seed(number)  # of dropout
        self.course.before_forward()
        x, target = batch(number)
        for part, wanted in zip(x.chunk(micro), target.chunk(micro), strict=True):
            (F.mse_loss(self.model(part), wanted) * factor / micro).backward()

    def update(self, number, micro=1):
        self.backward(number, micro=micro)
        self.course.before_update()
        self.optimizer.step()
        self.course.after_update()
        self.optimizer.zero_grad()


def every(adapter):
    return {f"{s}.{n}": t.detach().clone() for s, n, t in adapter.tensors()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


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
        assert counts == loop.course.ends[-2] + 1
    elif name == "LoRASC":
        assert counts == 20  # only then is the portion of the last pair what stays
    elif name == "DiffoRA, shared":
        assert counts == loop.course.end + 1  # the next update makes the choice
    else:
        assert settled <= max(counts, 1) <= settled + 1
    if name == "SRLoRA":
        assert counts <= loop.how.counts_from(20) <= 20
