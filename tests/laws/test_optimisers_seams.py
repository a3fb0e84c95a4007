"""Optimisers that see pairs, where they meet something else: penalties, groups, other adapters, copies."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import undula
from undula import ranks
from undula.optim import optimisers
from undula.optim.by_peft import LoRAFA
from undula.optim.ggpo import LoRAGGPO
from undula.optim.gorp import GORP
from undula.optim.lorapro import LoRAPro
from undula.optim.lorapro_full import LoRAProFull
from undula.optim.lorsum import LoRSum
from undula.optim.mgpo import LoRAMGPO
from undula.optim.sam import SAMReference
from undula.penalties import BALoRA, KLToBase, Orthogonal
from undula.penalties.orthogonal import overlap
from undula.train import CausalLM, Recipe

from .test_optimisers import LORA, attached, learnt

SGD = {"base": torch.optim.SGD, "lr": 0.1}


def stepped(kind, how):
    """The factors after a step along the loss and what a penalty adds, as `undula train` takes it."""
    model, adapter = attached(LORA)
    optimizer = kind(adapter.parameters(), model, **SGD)
    course = how.start(model, optimizer, 3)
    course.before_forward()
    learnt(model)
    if kind is SAMReference:
        optimizer.twice(lambda: learnt(model))
    course.before_update()
    optimizer.step()
    return [p.detach().clone() for p in adapter.parameters()]


@pytest.mark.parametrize("kind", [LoRAPro, SAMReference, LoRAMGPO])
def test_a_penaltys_own_gradient_is_followed_as_it_is(kind):
    """What changes the loss's gradients once lost it (SAM), or took it for a gradient of W (LoRA-Pro).  Two of them
    add up."""
    adapter = attached(LORA)[1]
    own = torch.autograd.grad(0.7 * overlap(adapter), adapter.parameters())
    plain = stepped(kind, Orthogonal(0.0))
    for how in (Orthogonal(0.7), Orthogonal(0.5) + Orthogonal(0.2)):
        for was, now, g in zip(plain, stepped(kind, how), own, strict=True):
            torch.testing.assert_close(now, was - 0.1 * g)


def test_sams_closure_has_the_penalty_in_it_or_it_is_refused():
    """Within the closure it is as in the loss; before it the closure would clear it."""
    found = []
    for inside in (False, True):
        model, adapter = attached(LORA)
        optimizer = SAMReference(adapter.parameters(), model, **SGD)
        course = Orthogonal(1.0).start(model, optimizer, 3)

        def closure(model=model, adapter=adapter, optimizer=optimizer, course=course, inside=inside):
            optimizer.zero_grad()
            learnt(model)
            course.before_update() if inside else overlap(adapter).backward()

        optimizer.step(closure)
        found.append([p.detach().clone() for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    optimizer.zero_grad()
    learnt(model)
    course.before_update()
    with pytest.raises(RuntimeError, match="before_update of its course within the closure"):
        optimizer.step(closure)


def test_what_follows_the_loss_alone_is_refused_beside_a_gradient_of_its_own():
    """However small: below a hundredth of the loss's LoRSum once passed over it without a word."""
    for kind in (LoRSum, LoRAProFull):
        model, adapter = attached(LORA)
        optimizer = kind(adapter.parameters(), model, lr=0.1)
        Orthogonal(0.0).start(model, optimizer, 3)
        with pytest.raises(TypeError, match=rf"Orthogonal.* and {kind.__name__} follows the loss's alone"):
            Orthogonal(1e-9).start(model, optimizer, 3)
    model, adapter = attached(LORA)
    optimizer = LoRSum(adapter.parameters(), model, lr=0.1)
    course = ranks.L2SP(1e-9).start(model, optimizer, 3)
    course.before_forward()
    learnt(model)
    course.before_update()
    with pytest.raises(RuntimeError, match="a penalty has added its own"):
        optimizer.step()
    for how in (optimisers.LoRSum(), optimisers.LoRAPro(full=True)):
        with pytest.raises(ValueError, match=r"Orthogonal.* follows the loss's alone"):
            Recipe("m", "d", CausalLM(), LORA, optimiser=how, penalty=Orthogonal())
        Recipe("m", "d", CausalLM(), LORA, optimiser=how, penalty=Orthogonal(0.0) + KLToBase())


def test_what_the_base_answers_between_the_passes_moves_nothing_back():
    """A teacher's pass in evaluation mode is not one of the adapter: its factors stay moved for their gradients."""
    model, adapter = attached(LORA)
    optimizer = LoRAMGPO(adapter.parameters(), model, lr=1e-2, rho=1.0)
    course = (KLToBase(0.5) + BALoRA(after=0.0)).start(model, optimizer, 3)
    x = torch.randn(6, 12, dtype=torch.float64)
    for step in range(3):
        course.before_forward()
        before = [p.detach().clone() for p in adapter.parameters()]
        out = model(x)
        assert any(map(torch.equal, adapter.parameters(), before)) is (step == 0)
        moved = [p.detach().clone() for p in adapter.parameters()]
        term = course.term(x, out)
        assert all(map(torch.equal, adapter.parameters(), moved))
        (out.square().mean() + term).backward()
        assert all(map(torch.equal, adapter.parameters(), before))
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()


def test_noise_is_of_passes_of_its_own_adapter():
    model, adapter = attached(LORA)
    optimizer = LoRAGGPO(adapter.parameters(), model, lr=1e-2, sigma=1.0)
    x = torch.randn(6, 12, dtype=torch.float64)
    assert not torch.equal(model(x), model.eval()(x))
    model.train()
    undula.select(model, None)
    assert torch.equal(model(x), model.eval()(x))
    assert optimizer.strength


def test_options_that_a_step_would_pass_over_are_refused():
    for kind in (LoRSum, SAMReference, LoRAMGPO, lambda *given, **more: GORP(*given, project=2, **more)):
        model, adapter = attached(LORA)
        with pytest.raises(ValueError, match="maximize is an option of the base, and "):
            kind(adapter.parameters(), model, lr=0.1, maximize=True)


def test_lorsum_has_one_rate_for_a_pair_and_stands_still_at_zero():
    model, adapter = attached(LORA)
    A, B = ([t for _, name, t in adapter.tensors() if name == each] for each in "AB")
    optimizer = LoRSum([{"params": A, "lr": 0.1}, {"params": B, "lr": 0.2}], model)
    before = [p.detach().clone() for p in adapter.parameters()]
    learnt(model)
    with pytest.raises(ValueError, match=r"0: LoRSum steps A and B together, .*; A has \(0.1, 0.01\), B \(0.2"):
        optimizer.step()
    optimizer = LoRSum(adapter.parameters(), model, lr=0.0)
    optimizer.zero_grad()
    learnt(model)
    optimizer.step()
    assert all(map(torch.equal, adapter.parameters(), before))
    with pytest.raises(ValueError, match="b_ratio gives B a rate beside A's"):
        Recipe("m", "d", CausalLM(), LORA, optimiser=optimisers.LoRSum(), b_ratio=16.0)


class Two(nn.Module):
    """Two layers whose names tell of LoRA; the second is used by the way."""

    def __init__(self):
        super().__init__()
        self.lora_a, self.lora_b, self.both = nn.Linear(12, 8), nn.Linear(12, 8), True

    def forward(self, x):
        return self.lora_a(x) + (self.lora_b(x) if self.both else 0)


def test_lora_fas_groups_keep_their_options_and_each_pair_a_state_of_its_own():
    """PEFT's takes pairs by names, and steps along gradients that are not there."""
    torch.manual_seed(0)
    model = Two().double()
    adapter = undula.attach(model, LORA, "*")
    first, second = (adapter.factors[site] for site in ("lora_a", "lora_b"))
    optimizer = LoRAFA([{"params": [*first.values()], "lr": 0.0}, {"params": [*second.values()], "lr": 0.01}], model)
    x = torch.randn(6, 12, dtype=torch.float64)
    for model.both in (True, False, True):
        was = second["B"].detach().clone()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        assert bool((second["B"] != was).any()) is model.both
        optimizer.zero_grad()
    assert not first["B"].any()
    assert len(optimizer.state) == 2
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    with pytest.raises(ValueError, match="lora_b: its factor B trains and is not among the parameters"):
        LoRAFA([first["B"]], model)
    with pytest.raises(TypeError, match="bfloat16 would lose its steps"):
        LoRAFA(adapter.parameters(), model.bfloat16())


def test_a_state_of_other_layers_is_refused_and_a_copy_is_of_the_same_class():
    for kind in (GORP, LoRAGGPO):
        model, adapter = attached(LORA)
        optimizer = kind(adapter.parameters(), model, lr=1e-2)
        learnt(model)
        optimizer.step()
        if kind is GORP:
            optimizer.close_task()
        other = nn.Sequential(nn.Identity(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        found = undula.attach(other, LORA, "*")
        with pytest.raises(ValueError, match=r"0.*which is no (factor|layer)"):
            kind(found.parameters(), other, lr=1e-2).load_state_dict(optimizer.state_dict())
        assert type(copy.deepcopy(optimizer)) is type(optimizer)


def test_rounding_of_a_narrow_base_is_no_other_gradient():
    """LoRSum sees S in the base's type, here with gradients that nearly cancel; what is added in earnest it refuses."""
    model, adapter = attached(LORA, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    optimizer = LoRSum(adapter.parameters(), model, lr=0.1)
    torch.manual_seed(0)
    x = torch.randn(64, 12, dtype=torch.bfloat16)
    x, sign = torch.cat([x, x + 0.01]), torch.ones(128, 1).index_fill_(0, torch.arange(64), -1)
    for more in (0.0, 1.0):
        (model(x).float() * sign).mean().backward()
        (more * sum(p.square().sum() for p in adapter.parameters())).backward()
        refused = pytest.raises(RuntimeError, match="its gradient is not that of the rows")
        with refused if more else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
