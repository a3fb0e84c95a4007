"""Every procedure (allocators, restarts, penalties) with a method that it works on, for the laws that hold for all.

The shares fit into 12 updates or more; sites need min(O, I) >= 4.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import ranks
from undula.methods.dylora import Frozen
from undula.ranks.diffora import Shared
from undula.ranks.sora import Linear

GATED = undula.GatedLoRA(r=3)
ADALORA = (undula.AdaLoRA(r=3), ranks.AdaLoRA(target=1, warmup=0.1, settle=0.3, every=2))
SHARED = ranks.DiffoRA(rho=0.3, search=0.5, rest=Shared())
SRLORA = ranks.SRLoRA(target=4)
NEAR = ranks.L2SP(weight=0.5)
COURSES = {
    "AdaLoRA": ADALORA,
    "SoRA": (undula.SoRA(r=3), ranks.SoRA(lr=5.0, levels=Linear(0.0, 0.1, 3))),
    "ALoRA": (undula.GatedLoRA(r=2, open=1), ranks.ALoRA(rounds=2, count=1, first=0.3, between=0.3)),
    "DyLoRA": (undula.Dropout(undula.DyLoRA(r=3), 0.1), ranks.DyLoRA()),
    "DyLoRA, frozen": (undula.DyLoRA(r=3, nesting=Frozen()), ranks.DyLoRA(low=2)),
    "DiffoRA": (GATED, ranks.DiffoRA(rho=0.5, search=0.5)),
    "DiffoRA, shared": (GATED, SHARED),
    "Budget": (GATED, ranks.Budget(total=8)),
    "InSqueeze": (GATED, ranks.InSqueeze(ranks=(2, 1))),
    "ReLoRA": (undula.LoRA(r=2), ranks.ReLoRA(cycles=3)),
    "LoRASC": (undula.LoRA(r=2), ranks.LoRASC(cycles=3, merge=0.5, noise=0.05)),
    "LoRASC, whole": (undula.LoRA(r=2), ranks.LoRASC(cycles=3, noise=0.05)),
    "XGBLoRA": (undula.LoRA(r=1), ranks.XGBLoRA(boosters=3, layers=1, penalty=1e-3)),
    "SRLoRA": (undula.LoRA(r=2), SRLORA),
    "L2SP": (undula.LoRA(r=2), NEAR),
    "Together": (ADALORA[0], ranks.Together((ADALORA[1], NEAR))),
}
TOGETHER = {  # an allocator of each kind beside a penalty
    f"{name} + L2SP": (COURSES[name][0], ranks.Together((COURSES[name][1], NEAR)))
    for name in ("SoRA", "ALoRA", "DyLoRA", "DiffoRA, shared", "Budget", "ReLoRA", "LoRASC", "XGBLoRA", "SRLoRA")
}
ALL = COURSES | TOGETHER
STEPS = 12


def check_complete():
    """Raises where a procedure of the library is not in the list."""
    here = {type(how) for _, how in COURSES.values()}
    missing = {a for a in ranks.Procedure.registry.values() if a.__module__.startswith("undula.")} - here
    assert not missing, f"no test course for {missing}"


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step):
    g = torch.Generator().manual_seed(step)
    kind = torch.get_default_dtype()
    return torch.randn(16, 6, generator=g, dtype=kind), torch.randn(16, 4, generator=g, dtype=kind)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


class Loop:
    """The loop of the allocators' documentation over a model of its own."""

    def __init__(self, name, optimizer=adamw, steps=STEPS, started=True, full=()):
        self.method, self.how = ALL[name]
        self.model, self.steps = net(), steps
        self.adapter = undula.attach(self.model, self.method, where="*" if not full else ["0", "2"], full=full)
        self.optimizer = optimizer(self.adapter.parameters())
        if started:
            self.start()

    def start(self):
        x, target = batch(1000)
        quality = lambda: -float(F.mse_loss(self.model(x), target).detach())  # noqa: E731
        self.course = self.how.start(self.model, self.optimizer, self.steps, quality)

    @property
    def first(self):
        """The course, or the first of several together."""
        return self.course.courses[0] if isinstance(self.how, ranks.Together) else self.course

    def backward(self, number, factor=1.0, micro=1):
        x, target = batch(number)
        for part, wanted in zip(x.chunk(micro), target.chunk(micro), strict=True):
            (F.mse_loss(self.model(part), wanted) * factor / micro).backward()

    def update(self, number, micro=1, around=contextlib.nullcontext):
        """One update; `around` is entered at every moment of the course."""
        torch.manual_seed(number)  # of dropout
        with around():
            self.course.before_forward()
        self.backward(number, micro=micro)
        with around():
            self.course.before_update()
        self.optimizer.step()
        with around():
            self.course.after_update()
        self.optimizer.zero_grad()


def every(adapter):
    return {f"{s}.{n}": t.detach().clone() for s, n, t in adapter.tensors()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
