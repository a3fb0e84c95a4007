"""What differential privacy promises: one step is the clipped gradients of rows, noise is what it is said to be, and
epsilon is that of what was done."""

import math
from dataclasses import MISSING, fields

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import undula
from undula.core.method import Method
from undula.federated.private import DPSGD, epsilon, noise_for
from undula.federated.private.accounting import generator
from undula.federated.private.gradients import Again
from undula.host.state import host_of
from undula.kernels import draws
from undula.methods.dropout import Dropout
from undula.optim.lorapro import LoRAPro

ROWS, CLIP, MODES = 7, 0.05, ("hooks", "ghost", "functorch")
BY_ITSELF = [m() for m in Method.members() if all(f.default is not MISSING for f in fields(m))]


class Net(nn.Module):
    """Rows of 3 positions through two adapted layers, and a head that trains in full."""

    def __init__(self, sides=(8, 12, 8)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(sides[0], sides[1]), nn.Linear(sides[1], sides[2])
        self.head = nn.Linear(sides[2], 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def prepared(method, model=None, where=("first", "second"), full=("head.weight", "head.bias")):
    """An adapted model whose factors are no start, and rows for it."""
    model = (model or Net()).double()
    adapter = undula.attach(model, method, where, full=full)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, adapter, torch.randn(ROWS, 3, 8, dtype=torch.float64), torch.arange(ROWS) % 3


def rows_of(model, x, y):
    return lambda numbers: cross_entropy(model(x[numbers]), y[numbers], reduction="none")


def by_hand(model, adapter, losses, numbers):
    """(1 / batch) sum_n g_n min(1, clip / |g_n|), row by row."""
    own, total = adapter.parameters(), [torch.zeros_like(p) for p in adapter.parameters()]
    for n in numbers:
        found = torch.autograd.grad(losses([n]).sum(), own, allow_unused=True)
        g = [torch.zeros_like(p) if t is None else t for p, t in zip(own, found, strict=True)]
        norm = torch.cat([t.flatten() for t in g]).norm()
        factor = min(1.0, CLIP / (float(norm) + 1e-6))
        for t, part in zip(total, g, strict=True):
            t += factor * part
    return [t / ROWS for t in total]


def stepped(model, adapter, losses, mode, numbers, at_once=None, noise=0.0):
    """What a step of plain descent with rate 1 takes away."""
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    how = DPSGD(noise=noise, clip=CLIP, mode=mode, seed=0)
    with how.training(model, optimizer, losses, rows=ROWS, batch=ROWS, steps=1, at_once=at_once) as private:
        private.take(numbers)
    return [a - p.detach() for a, p in zip(before, adapter.parameters(), strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", BY_ITSELF, ids=repr)
def test_a_step_is_the_clipped_gradients_of_rows(method, mode):
    model, adapter, x, y = prepared(method)
    losses = rows_of(model, x, y)
    numbers = [0, 2, 3, 5]
    wanted = by_hand(model, adapter, losses, numbers)
    assert max(float(t.norm()) for t in wanted) > 0
    for found, expected in zip(stepped(model, adapter, losses, mode, numbers), wanted, strict=True):
        assert_close(found, expected)


class Mixed(nn.Module):
    """Rows through an embedding, a convolution and a linear layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look, self.conv, self.twice = nn.Embedding(11, 6), nn.Conv1d(6, 6, 2, groups=2), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids):
        h = self.conv(self.look(ids).mT).mT
        return self.head(self.norm(self.twice(torch.tanh(self.twice(h)))).mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_layers_of_every_kind_and_parameters_in_full(mode):
    methods = {"look": undula.LoRA(r=2), "twice": undula.DoRA(undula.LoRA(r=2))}
    model = Mixed().double()
    full = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    adapter = undula.attach(model, undula.LoRAN(r=2), ("look", "conv", "twice"), overrides=methods, full=full)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    losses = rows_of(model, torch.randint(11, (ROWS, 4)), torch.arange(ROWS) % 3)
    wanted = by_hand(model, adapter, losses, range(ROWS))
    for found, expected in zip(stepped(model, adapter, losses, mode, range(ROWS)), wanted, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_narrow_base(mode):
    """Over bfloat16 factors and head are float32, and so is a step: as near to that over float32 as by hand."""
    found = []
    for kind in (torch.float32, torch.bfloat16):
        model = Net().to(kind)
        adapter = undula.attach(model, undula.LoRA(r=2), ("first", "second"), full=("head.weight", "head.bias"))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn_like(p))
        x, y = torch.randn(ROWS, 3, 8).to(kind), torch.arange(ROWS) % 3

        def losses(numbers, model=model, x=x, y=y):
            return cross_entropy(model(x[numbers]).to(torch.float64), y[numbers], reduction="none")

        found.append(torch.cat([t.flatten() for t in by_hand(model, adapter, losses, range(ROWS))]))
    step = torch.cat([t.flatten() for t in stepped(model, adapter, losses, mode, range(ROWS))])
    wide, hand = found
    assert step.dtype == torch.float32
    assert float((step - wide).norm()) < 2 * float((hand - wide).norm()) < 0.2 * float(wide.norm())
    with DPSGD(noise=0.0).training(
        model, torch.optim.SGD(adapter.parameters(), lr=1.0), losses, rows=ROWS, batch=ROWS, steps=1
    ) as private:
        private.check([0, 1])


@pytest.mark.parametrize("mode", MODES)
def test_factors_that_layers_share_are_clipped_as_one(mode):
    model, adapter, x, y = prepared(undula.LoRTA(r=2, heads=2), Net((8, 8, 8)))
    shared = [t for _, _, t in adapter.tensors() if t.requires_grad]
    assert len({id(t) for t in shared}) < len(shared)
    losses = rows_of(model, x, y)
    wanted = by_hand(model, adapter, losses, range(ROWS))
    for found, expected in zip(stepped(model, adapter, losses, mode, range(ROWS)), wanted, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", [undula.LoRA(r=2), undula.AuroRA(r=2), undula.LoRAN(r=2)], ids=repr)
def test_what_dropout_lets_fall_falls_in_the_gradients_of_rows_too(mode, inner):
    """The sum of the rows' gradients is that of one ordinary pass over the same masks."""
    model, adapter, x, y = prepared(Dropout(inner, 0.5))
    losses = rows_of(model, x, y)
    torch.manual_seed(5)
    how = DPSGD(noise=0.0, clip=1e6, mode=mode, seed=0)
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with how.training(model, optimizer, losses, rows=ROWS, batch=ROWS, steps=1) as private:
        total = []
        hear = private.hooks.hear

        def heard(method, x, y, *rest):
            total.append(rest[-1])
            return hear(method, x, y, *rest)

        for slot in private.hooks.slots:
            slot.method.told = heard
        private.take(range(ROWS))
    moved = [a - p.detach() for a, p in zip(before, adapter.parameters(), strict=True)]
    masks = [m for each in total for m in each]
    assert len(masks) == 2
    assert all((m == 0).any() for m in masks)
    with torch.no_grad():
        for p, a in zip(adapter.parameters(), before, strict=True):
            p.copy_(a)
    with draws.drawing(Again(masks)):
        found = torch.autograd.grad(losses(list(range(ROWS))).mean(), adapter.parameters())
    for a, b in zip(moved, found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_rows_in_parts_and_no_rows_at_all(mode):
    """A batch in memory by twos is the same step; a step without rows is noise alone, and counts."""
    model, adapter, x, y = prepared(undula.LoRA(r=2))
    losses = rows_of(model, x, y)
    wanted = by_hand(model, adapter, losses, range(5))
    for found, expected in zip(stepped(model, adapter, losses, mode, range(5), at_once=2), wanted, strict=True):
        assert_close(found, expected)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with DPSGD(noise=1.0, mode=mode, seed=0).training(model, optimizer, losses, rows=ROWS, batch=2, steps=3) as private:
        before = [p.detach().clone() for p in adapter.parameters()]
        assert private.take([]) is None
        assert all((a != p).all() for a, p in zip(before, adapter.parameters(), strict=True))
        private.take([1])
        assert private.history == ((1.0, 2 / ROWS, 2),)
    assert not any(hasattr(p, name) for p in model.parameters() for name in ("grad_sample", "summed_grad"))
    assert all(slot.method is adapter.methods[site] for site, slot in host_of(model).slots.items())


def test_lora_pro_changes_gradients_after_the_noise():
    """What an optimiser makes of a gradient with noise costs nothing: it is given that and the factors alone."""
    model, adapter, x, y = prepared(undula.LoRA(r=2), full=())
    losses, before = rows_of(model, x, y), [p.detach().clone() for p in adapter.parameters()]
    wanted = by_hand(model, adapter, losses, range(ROWS))
    for p, g in zip(adapter.parameters(), wanted, strict=True):
        p.grad = g
    LoRAPro(adapter.parameters(), model, lr=0.1).step()
    expected = [p.detach().clone() for p in adapter.parameters()]
    with torch.no_grad():
        for p, a in zip(adapter.parameters(), before, strict=True):
            p.copy_(a)
    optimizer = LoRAPro(adapter.parameters(), model, lr=0.1)
    how = DPSGD(noise=0.0, clip=CLIP, seed=0)
    with how.training(model, optimizer, losses, rows=ROWS, batch=ROWS, steps=1) as private:
        private.take(range(ROWS))
    for p, e in zip(adapter.parameters(), expected, strict=True):
        assert_close(p.detach(), e)


def test_noise_is_what_it_is_said_to_be():
    """Of a step without rows what moves is N(0, (noise clip / batch)^2)."""
    model, adapter, x, y = prepared(undula.LoRA(r=8), Net((8, 64, 8)))
    moved = []
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    how = DPSGD(noise=2.0, clip=0.5, seed=3)
    with how.training(model, optimizer, rows_of(model, x, y), rows=ROWS, batch=4, steps=10) as private:
        for _ in range(10):
            before = [p.detach().clone() for p in adapter.parameters()]
            private.take([])
            moved += [(a - p.detach()).flatten() for a, p in zip(before, adapter.parameters(), strict=True)]
    drawn = torch.cat(moved) * 4
    assert len(drawn) > 10_000
    assert abs(float(drawn.std()) - 1.0) < 5 / (2 * len(drawn)) ** 0.5
    assert abs(float(drawn.mean())) < 5 / len(drawn) ** 0.5


def test_noise_from_the_system_never_comes_again():
    first, second = (torch.randn(4, generator=generator(None)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(torch.randn(4, generator=generator(1, "noise", "north", 2)) for _ in range(2)))
    many = torch.randn(100_000, generator=generator(None))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
    state = generator(None).get_state().view(torch.int64)[3:627]
    assert len(state.unique()) > 600
    assert 0 <= int(state.min()) < int(state.max()) < 1 << 32


@pytest.mark.parametrize("rows", [3, 400])
def test_epsilon_is_that_of_the_steps_that_were_taken(rows):
    """A client with fewer rows than a batch takes all of them each time."""
    model, adapter, x, y = prepared(undula.LoRA(r=2))
    x, y = x.repeat(60, 1, 1)[:rows], y.repeat(60)[:rows]
    how = DPSGD(epsilon=2.0, delta=1e-3, accountant="rdp", seed=0)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with how.training(model, optimizer, rows_of(model, x, y), rows=rows, batch=8, steps=6) as private:
        rate = min(1.0, 8 / rows)
        assert private.rate == rate
        assert private.epsilon == 0.0
        for _ in range(3):
            private.step()
        assert private.history == ((private.noise, rate, 3),)
        half, spent = private.epsilon, private.history
    with how.training(
        model, optimizer, rows_of(model, x, y), rows=rows, batch=8, steps=6, history=spent
    ) as private:  # a training that is gone on with
        for _ in range(3):
            private.step()
        assert half < private.epsilon <= 2.0
        assert private.epsilon == epsilon(((private.noise, rate, 6),), 1e-3, "rdp") > 1.9


def test_no_step_goes_beyond_those_that_the_noise_was_set_for():
    """With a target; a multiplier that is named promises nothing."""
    model, adapter, x, y = prepared(undula.LoRA(r=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    given = {"rows": ROWS, "batch": 2, "steps": 3, "history": ((9.0, 2 / ROWS, 1),)}
    how = DPSGD(epsilon=2.0, delta=1e-3, accountant="rdp", seed=0)
    with how.training(model, optimizer, rows_of(model, x, y), **given) as private:
        private.step()
        private.step()
        before = [p.detach().clone() for p in adapter.parameters()]
        with pytest.raises(RuntimeError, match="keeps 3 steps to epsilon=2"):
            private.step()
        assert all(torch.equal(a, p) for a, p in zip(before, adapter.parameters(), strict=True))
    with DPSGD(noise=1.0, seed=0).training(model, optimizer, rows_of(model, x, y), **given) as private:
        for _ in range(4):
            private.step()


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 1.0, 1), (5.0, 1.0, 30), (1.0, 0.1, 1), (0.8, 0.9, 1)])
def test_epsilon_is_above_the_exact_one_and_near_it(noise, rate, steps):
    """Where it can be had by integrating what two sets of rows make likely: steps of all rows are one of less noise."""
    sigma = noise / math.sqrt(steps)
    z = torch.linspace(-15 * sigma, 15 * sigma + 1, 300_001, dtype=torch.float64)
    without, whole = (torch.distributions.Normal(at, sigma).log_prob(z).exp() for at in (0.0, 1.0))
    pair = (without, (1 - rate) * without + rate * whole)

    def delta(e):
        return max(float((a - math.exp(e) * b).clamp_min(0).sum() * (z[1] - z[0])) for a, b in (pair, pair[::-1]))

    low, high = 0.0, 20.0
    for _ in range(40):
        low, high = (low, middle) if delta(middle := (low + high) / 2) < 1e-5 else (middle, high)
    for kind, above in (("prv", 0.02), ("rdp", 0.6)):
        assert low <= epsilon(((noise, rate, steps),), 1e-5, kind) < low + above


def test_accountants_known_values():
    """Sheet 21: epsilon 6, delta 1e-5, rate 0.01, 500 steps."""
    assert abs(noise_for(6.0, 1e-5, 0.01, 500, "rdp") - 0.630) < 1e-3
    assert abs(epsilon(((0.594, 0.01, 500),), 1e-5) - 6.0) < 0.02
    assert epsilon((), 1e-5) == 0.0
    assert epsilon(((0.0, 0.1, 1),), 1e-5) == math.inf
    two = epsilon(((1.0, 0.1, 3), (1.0, 0.1, 2)), 1e-5, "rdp")
    assert two == epsilon(((1.0, 0.1, 5),), 1e-5, "rdp") > epsilon(((1.0, 0.1, 4),), 1e-5, "rdp")


def test_rows_are_drawn_by_chance_each_by_itself():
    model, adapter, *_ = prepared(undula.LoRA(r=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with DPSGD(noise=1.0, delta=1e-6, seed=0).training(
        model, optimizer, lambda numbers: None, rows=1000, batch=50, steps=1
    ) as private:
        sizes = torch.tensor([float(len(private.draw())) for _ in range(400)])
    assert abs(float(sizes.mean()) - 50) < 1.5
    assert abs(float(sizes.std()) - (1000 * 0.05 * 0.95) ** 0.5) < 1


class Batch(nn.Module):
    """Takes the mean of a batch away."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.first(x.mean(1)))


def test_what_mixes_rows_is_refused():
    def begun(model, losses=None, batch=2, **options):
        x, y = torch.randn(ROWS, 3, 8), torch.arange(ROWS) % 3
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        private = DPSGD(noise=1.0, seed=0).training(
            model, optimizer, losses or rows_of(model, x, y), rows=ROWS, batch=batch, steps=9, **options
        )
        with private:
            private.check([0, 1])
        return private

    model = Batch()
    undula.attach(model, undula.LoRA(r=2), ("first",))
    with pytest.raises(ValueError, match="norm is a BatchNorm1d that takes the statistics"):
        begun(model.train())
    model.norm.eval()
    begun(model)  # its own statistics are numbers like others
    model = Net()
    undula.attach(model, undula.LoRA(r=2), ("first", "second"), full=("head.weight",))
    x = torch.randn(ROWS, 3, 8)
    none = torch.zeros(ROWS, dtype=torch.int64)

    def centred(numbers):
        logits = model(x[numbers])
        return cross_entropy(logits - logits.mean(0), none[: len(numbers)], reduction="none")

    with pytest.raises(ValueError, match="depends on the other rows"):
        begun(model, centred)
    for drawn in ([], [2]):  # also where the first step has not two rows to compare
        private = DPSGD(noise=1.0, seed=0).training(
            model,
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad]),
            centred,
            rows=ROWS,
            batch=1,
            steps=1,
        )
        private.draw = lambda drawn=drawn: drawn
        with private, pytest.raises(ValueError, match="depends on the other rows"):
            private.step()
    still, other = Net().requires_grad_(False), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="nothing trains"):
        DPSGD(noise=1.0).training(still, other, None, rows=2, batch=1, steps=1)
    undula.detach(model)
    undula.attach(model, undula.LoRA(r=2), ("first",), full=("first.bias",))
    with pytest.raises(ValueError, match="first is adapted and trains in full"):
        begun(model)
    with pytest.raises(ValueError, match="allows to tell one of them outright"):
        DPSGD(epsilon=1.0, delta=0.5).multiplier(2, 1, 1)
    for wrong in ({}, {"epsilon": 1.0, "noise": 1.0}):
        with pytest.raises(ValueError, match="one of them"):
            DPSGD(**wrong)
