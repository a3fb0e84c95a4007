"""What a training step does on an accelerator, found without one: it neither waits for the device nor leaves it.

See `tests.support.away`: tensors there have no numbers, so a step that wants to read one stops with an error, and so
does one that brings a tensor of the CPU along.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import undula
from tests.support.away import Filled, Waits, away
from tests.support.courses import COURSES, Loop
from tests.support.layers import net
from undula import Centred, DoRA, Dropout, LoRA, LoRAN, Sum
from undula.kernels import elementwise

PLAIN = [cls() for cls in undula.methods().values() if not issubclass(cls, Dropout | Centred | Sum)]
WRAPPED = [
    Dropout(LoRA(r=2)),
    Dropout(DoRA(LoRA(r=2))),
    DoRA(LoRAN(r=2)),
    DoRA(undula.SHiRA(r=1)),
    Sum((LoRA(r=2), LoRAN(r=2)), (0.5, 1.0)),
]
BLOCKS = [LoRAN(r=2), undula.SHiRA(r=1)]
OTHER = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), lambda: torch.randn(2, 3, 6, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=0)), lambda: torch.randint(0, 11, (3, 5))),
}


def each(methods):
    return pytest.mark.parametrize("m", methods, ids=[repr(m) for m in methods])


def stepped(model, x):
    """A whole step of the selected adapter: forward, backward, clipping, update."""
    x = x.requires_grad_() if x.is_floating_point() else x
    model(x).square().sum().backward()
    parameters = list(undula.selected(model).parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters).step()
    return parameters


def check(m, model, x):
    undula.attach(model.train(), m, "*")
    model.to("meta")
    x = x.to("meta")
    with away():
        parameters = stepped(model, x.clone())
        assert {p.grad.device.type for p in parameters} == {"meta"}


@pytest.mark.filterwarnings("ignore:.* has more numbers than the .* entries")
@each(PLAIN + WRAPPED)
def test_a_step_neither_waits_for_the_device_nor_leaves_it(m):
    check(m, net(), torch.randn(4, 12))


@each([LoRA(r=2), Dropout(LoRA(r=2)), LoRAN(r=2), undula.AuroRA(), DoRA(LoRA(r=2)), undula.SHiRA(r=1)])
def test_a_step_over_a_narrow_base_does_not_wait_either(m):
    check(m, net().bfloat16(), torch.randn(4, 12).bfloat16())


@each(BLOCKS)
def test_a_step_in_several_blocks_does_not_wait_either(m, monkeypatch):
    """Of larger weights than there is room for at once."""
    monkeypatch.setattr(elementwise, "LEAST_ROWS", 4)
    monkeypatch.setattr(elementwise, "BLOCK", 1)
    monkeypatch.setattr(elementwise, "AWAY", 1)
    check(m, net(), torch.randn(4, 12))


@each([LoRA(r=2), undula.AuroRA(), DoRA(LoRA(r=2))])
@pytest.mark.parametrize("kind", OTHER)
def test_a_step_of_other_layers_stays_on_the_device(m, kind):
    make, data = OTHER[kind]
    check(m, make(), data())


MIXED = {
    "pairs": [LoRA(r=2), LoRA(r=2)],
    "pairs of other ranks": [LoRA(r=2), LoRA(r=3), undula.VeRA(r=4)],
    "laws of other rungs": [LoRA(r=2), LoRAN(r=2), DoRA(LoRA(r=2)), undula.AuroRA()],
    "dropout": [Dropout(LoRA(r=2)), Dropout(LoRAN(r=2))],
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", MIXED)
def test_a_mixed_batch_tells_the_device_its_rows_once(kind, frozen):
    """Which rows go through which adapter is copied for the first layer that asks; a second one makes no tensor from
    numbers of Python, forward and backward."""
    model = net().train(not frozen)
    for i, m in enumerate(MIXED[kind]):
        undula.attach(model, m, name=str(i))
        if frozen:
            undula.attach(model, undula.detach(model, str(i)), name=str(i), frozen=True)
    names = [*map(str, range(len(MIXED[kind]))), None, "0"]
    x = torch.randn(len(names), 3, 12, requires_grad=True)
    with undula.rows(model, names):
        y = model[1](model[0](x))
        with Filled("cpu"):
            model[2](y).square().sum().backward()


@pytest.mark.parametrize("name", COURSES)
def test_an_allocator_looks_at_the_device_once_a_step(name):
    """Whether all gradients are finite has to be known before an update; decisions look too, in the steps that they
    are made in."""
    torch.set_default_dtype(torch.float64)
    loop, looks = Loop(name, started=True), []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            read = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            if func in read and (args[0].is_floating_point() or args[0].dtype == torch.bool):
                looks[-1] += 1  # integers are drawn: on the CPU
            return func(*args, **(kwargs or {}))

    loop.course.begin()
    for step in range(6):
        looks.append(0)
        loop.update(step, around=Looks)
    assert sorted(looks)[2] <= 1


@pytest.mark.filterwarnings("ignore:.* has more numbers than the .* entries", "ignore:rounding takes")
@each(PLAIN + WRAPPED)
def test_the_default_device_of_torch_is_the_users_own(m):
    """Tensors go where the layers are (`torch.set_default_device`, `with torch.device(...)`)."""
    model, x = net().train(), torch.randn(4, 12)
    with torch.device("meta"):
        adapter = undula.attach(model, m, "*")
        model(x).square().sum().backward()
        undula.diagnose(model.eval(), [x])
        if isinstance(m, undula.Reweight):
            undula.merge(model)
    assert {t.device.type for _, _, t in adapter.tensors()} == {"cpu"}


WAITING = {
    "a number": lambda x: x.sum().item(),
    "a branch": lambda x: x if (x > 0).any() else -x,
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a list": lambda x: x.tolist(),
    "the cpu's tensor": lambda x: x + torch.ones(4, 12),
    "a copy from the cpu": lambda x: x + torch.ones(4, 12).to(x.device),
    "a copy to the cpu": lambda x: x.cpu(),
    "numbers of python": lambda x: x[torch.tensor([1, 2], device=x.device)],
    "a copy into": lambda x: torch.empty(4, 12).copy_(x),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_seen(what):
    """The laws above can fail."""
    with pytest.raises((Waits, RuntimeError)) as seen, away():
        WAITING[what](torch.randn(4, 12, device="meta"))
    assert "meta" in str(seen.value) or "aten." in str(seen.value) or "device" in str(seen.value)
