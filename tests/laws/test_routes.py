"""Rows of a batch on their ways: threads and tasks beside each other, training, adapters whose numbers move."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import undula
from undula import LoRA
from undula.host import host_of

ALIKE = [LoRA(r=2), LoRA(r=2), LoRA(r=3)]  # two in one pool, one apart
MIXED = [LoRA(r=2), LoRA(r=2), undula.AuroRA(r=2), undula.DoRA(LoRA(r=2)), undula.VeRA(r=4)]


def body(methods=ALIKE, layers=3):
    """A model and what its adapters 0, 1, 2 ... and the base (None) make of an input."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).double().eval()
    for i, method in enumerate(methods):
        live = undula.attach(model, method, name=str(i))
        with torch.no_grad():
            for p in live.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(6, 8).double()


def alone(model, x, name):
    before = host_of(model).selected
    undula.select(model, name)
    y = model(x)
    undula.select(model, before)
    return y


def wanted(model, x, names):
    return torch.stack([alone(model, x[i : i + 1], name)[0] for i, name in enumerate(names)])


@pytest.mark.parametrize("methods", [ALIKE, MIXED], ids=["low rank", "mixed"])
def test_threads_are_inside_at_the_same_time(methods):
    """Each with its own names; all of them wait for each other inside, so that they truly meet."""
    model, x = body(methods)
    ways = [["0"] * 6, ["1", "2"] * 3, [None] * 6, ["2", None, "0"] * 2]
    want, got = [wanted(model, x, names).detach() for names in ways], {}
    undula.select(model, "1")
    meet = threading.Barrier(len(ways), timeout=20)

    def walk(i):
        for k in range(5):
            with torch.set_grad_enabled(k % 2 == 0), undula.rows(model, ways[i]):
                meet.wait()
                got.setdefault(i, []).append(model(x).detach())
                meet.wait()

    threads = [threading.Thread(target=walk, args=(i,)) for i in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in got.items():
        assert len(outputs) == 5
        for y in outputs:
            torch.testing.assert_close(y, want[i])
    torch.testing.assert_close(model(x), alone(model, x, "1"))


def test_tasks_of_one_thread_have_their_own_rows():
    model, x = body()
    ways = [["0"] * 6, ["2", None, "1"] * 2]
    want = [wanted(model, x, names) for names in ways]

    async def walk(i):
        with undula.rows(model, ways[i]):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(model(x), want[i])

    async def both():
        await asyncio.gather(walk(0), walk(1))

    asyncio.run(both())
    torch.testing.assert_close(model(x), alone(model, x, "2"))


def test_verbs_wait_until_nobody_is_inside():
    """Another thread's `select` takes effect between batches, not in the middle of one."""
    model, x = body()
    names = ["0", "1"] * 3
    want, done = wanted(model, x, names), threading.Event()

    def change():
        undula.select(model, "0")
        undula.detach(model, "1")
        done.set()

    thread = threading.Thread(target=change)
    with undula.rows(model, names):
        thread.start()
        assert not done.wait(0.1)
        torch.testing.assert_close(model(x), want)
    thread.join(20)
    assert done.is_set()
    torch.testing.assert_close(model(x), alone(model, x, "0"))
    assert list(undula.adapters(model)) == ["0", "2"]


def test_two_models_in_one_context():
    """The rows of one model are not those of another, nor those of its copy."""
    (a, x), (b, _) = body(), body([LoRA(r=2)])
    with undula.rows(a, ["0"] * 6):
        want = alone(b, x, "0")
        with undula.rows(b, [None] * 6):
            torch.testing.assert_close(a(x), wanted_outside(x, "0"))
        torch.testing.assert_close(b(x), want)
        twin = copy.deepcopy(a)
    torch.testing.assert_close(a(x), alone(a, x, "2"))
    undula.detach(twin, "0")


def wanted_outside(x, name):
    return alone(body()[0], x, name)


MOVES = {
    "in place": lambda model, p: p.data.mul_(2),
    "by an optimiser": lambda model, p: torch.optim.SGD([p], lr=1.0).step() if p.grad is not None else p.data.add_(1),
    "another tensor": lambda model, p: setattr(p, "data", p.data * 3),
    "its own tensor": lambda model, p: setattr(p, "data", p.data.clone() + 1),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("site", ["0", "2"])
def test_numbers_that_move_are_seen(move, grad, site):
    """Whatever changes one factor of an adapter between batches, `rows` has what the adapter alone has."""
    model, x = body([LoRA(r=2)] * 4)
    names = ["0", "1", "2", "3", "1", "0"]
    with torch.set_grad_enabled(grad):
        for name in ("1", "3"):
            with undula.rows(model, names):
                before = model(x).detach()
            with torch.no_grad():
                MOVES[move](model, undula.adapters(model)[name].factors[site]["B"])
            want = wanted(model, x, names)
            assert not torch.allclose(want, before)
            with undula.rows(model, names):
                torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("method", [LoRA(r=2), undula.VeRA(r=4), undula.S2LoRA(r=2)], ids=repr)
def test_numbers_that_move_within_a_block_are_seen(method):
    """What is stacked for one forward without gradients is not kept for the next where it has changed."""
    model, x = body([method] * 2)
    with torch.no_grad(), undula.rows(model, ["0", "1"] * 3):
        before = model(x)
        for p in undula.adapters(model)["1"].parameters():
            p.mul_(3)
        after = model(x)
    torch.testing.assert_close(after, wanted(model, x, ["0", "1"] * 3))
    assert not torch.allclose(after[1::2], before[1::2])
    torch.testing.assert_close(after[::2], before[::2])


def test_a_model_that_changes_its_type_between_batches():
    model, x = body([LoRA(r=2)] * 3)
    names = ["0", "1", "2"] * 2
    want = wanted(model, x, names)
    for dtype in (torch.float32, torch.float64):
        with undula.rows(model, names):
            model(x.to(model[0].weight.dtype))
        model.to(dtype)  # the selected adapter's factors too
        with torch.no_grad(), undula.rows(model, names):
            torch.testing.assert_close(model(x.to(dtype)), want.to(dtype), rtol=1e-5, atol=1e-5)


def test_adapters_come_and_go():
    """Attached, detached, attached again: the others' numbers stay theirs, and one that left has its own memory."""
    model, x = body([LoRA(r=2)] * 3)
    values = {name: live.copy() for name, live in undula.adapters(model).items()}
    for step in range(8):
        name = str(step % 3)
        gone = undula.detach(model, name)
        other = str((step + 1) % 3)
        if step % 2:
            with torch.no_grad():
                for p in gone.parameters():
                    p.zero_()
        undula.attach(model, values[name], name=name)
        names = [name, other, None] * 2
        with undula.rows(model, names):
            torch.testing.assert_close(model(x), wanted_of(values, x, names))
    for live in undula.adapters(model).values():
        undula.detach(model, next(n for n, a in undula.adapters(model).items() if a is live))
        assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in live.parameters())


def wanted_of(values, x, names):
    model = body([])[0]
    for name, value in values.items():
        undula.attach(model, value, name=name)
    return wanted(model, x, names)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_the_model_is_its_own(how):
    model, x = body([LoRA(r=2)] * 3)
    names = ["0", "1", "2"] * 2
    want = wanted(model, x, names)
    with undula.rows(model, names):
        pass
    twin = how(model)
    with torch.no_grad():
        for live in undula.adapters(twin).values():
            for p in live.parameters():
                p.zero_()
    with undula.rows(model, names), undula.rows(twin, names):
        torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(twin(x), alone_base(x))


def alone_base(x):
    return body([])[0](x)


@pytest.mark.parametrize("methods", [ALIKE, [undula.VeRA(r=4)] * 3], ids=["plain pairs", "others"])
@pytest.mark.parametrize("names", [["0", "1"] * 3, ["0", "0", "1", None, "2", "0"], ["1"] * 6, ["1", "1", "0", "0"]])
def test_low_rank_rows_are_grouped_while_they_train(names, methods):
    """One frozen product a layer, as in evaluation; the gradients are those of each row alone."""
    model, x = body(methods)
    x = x[: len(names)]
    model.train()
    want = wanted(model, x, names)
    used = dict.fromkeys(n for n in names if n is not None)
    parameters = [p for n in used for p in undula.adapters(model)[n].parameters()]
    gradients = torch.autograd.grad(want.square().sum(), parameters)
    calls = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))
    products, plain = [], nn.functional.linear
    undula.select(model, None)
    try:
        nn.functional.linear = lambda *a: products.append(1) or plain(*a)
        with undula.rows(model, names):
            got = model(x)
    finally:
        nn.functional.linear = plain
    assert len(calls) == len(products) == len(model)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.square().sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(g, w)


def test_dropout_acts_on_the_rows_of_its_own_adapter_while_it_trains():
    model, x = body([undula.Dropout(LoRA(r=2), 0.5), undula.Dropout(LoRA(r=2), 0.5), LoRA(r=2)])
    names = ["0", "1", "2"] * 2
    want = wanted(model, x, names)
    for training in (False, True):
        model.train(training)
        with undula.rows(model, names):
            moved = (model(x) - want).abs().amax(1) > 1e-9
        assert moved.tolist() == [training, training, False] * 2


def test_a_recomputation_follows_the_rows_of_its_batch():
    """Gradient checkpointing computes the layers again in the backward, within the block."""
    model, x = body()
    names = ["0", "1", None] * 2
    parameters = undula.adapters(model)["0"].parameters()
    (want,) = [torch.autograd.grad(wanted(model, x, names).square().sum(), parameters)]
    x.requires_grad_()
    for reentrant in (False, True):
        with undula.rows(model, names):
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            y.square().sum().backward()
        for p, w in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, w)
            p.grad = None


def test_entering_again_makes_nothing_anew():
    """Layers are looked at once; a second batch of other names finds their slots."""
    model, x = body()
    undula.select(model, None)
    with undula.rows(model, ["0"] * 6):
        first = dict(host_of(model).slots)
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    assert host_of(model).slots == {}
    with undula.rows(model, ["1", "2"] * 3):
        second = dict(host_of(model).slots)
    assert all(first[path] is second[path] for path in first)
    model[1] = nn.Linear(8, 8).double()  # and one that was replaced since is not mistaken for the old one
    with undula.rows(model, ["0"] * 6):
        got = model(x)
    torch.testing.assert_close(got, alone(model, x, "0"))


def test_the_head_of_a_selected_adapter_is_not_that_of_the_rows():
    model, x = body()
    base = alone(model, x, None)
    with torch.no_grad():
        undula.attach(model, LoRA(r=2), ["0"], full=["2.bias"], name="head").full["2.bias"].add_(1)
    live = model(x)
    assert not torch.allclose(live, base)
    with undula.rows(model, [None] * 6):
        torch.testing.assert_close(model(x), base)
    torch.testing.assert_close(model(x), live)
