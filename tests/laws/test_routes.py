"""Rows of a batch on their ways: threads and tasks beside each other, training, adapters whose numbers move."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import undula
from undula import LoRA
from undula.host.host import change
from undula.host.state import host_of

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


def test_rows_beside_a_head_are_refused():
    """Rows have the base's own parameters; an adapter that is selected with others in their places stays selected."""
    model, x = body()
    with torch.no_grad():
        undula.attach(model, LoRA(r=2), ["0"], full=["2.bias"], name="head").full["2.bias"].add_(1)
    live = model(x)
    for names in ([None] * 6, ["head"] * 6):
        with pytest.raises(ValueError, match="'head' trains parameters in full"), undula.rows(model, names):
            pass
    assert torch.equal(model(x), live)


def test_generators_in_turns_do_not_get_each_others_rows():
    """They share the context of their caller.  One after another is right; in turns is refused."""
    model, x = body()

    def stream(name):
        with undula.rows(model, [name] * 6):
            for _ in range(2):
                yield model(x)

    for name in ("0", "1"):
        for y in stream(name):
            torch.testing.assert_close(y, wanted(body()[0], x, [name] * 6))
    with pytest.raises(RuntimeError, match=r"two generators are inside `undula.rows`"):
        for _ in zip(stream("0"), stream("1"), strict=True):
            pass
    gc.collect()  # the generators are closed
    torch.testing.assert_close(model(x), alone(model, x, "2"))


def test_a_generator_that_is_closed_elsewhere_leaves():
    """In another task, or in another copy of a context: nobody is inside afterwards, and verbs do not wait."""
    model, x = body()

    async def stream():
        with undula.rows(model, ["0"] * 6):
            for _ in range(3):
                yield model(x)
                await asyncio.sleep(0)

    async def first():
        async for y in stream():
            return y

    async def both():
        return await asyncio.create_task(first())

    torch.testing.assert_close(asyncio.run(both()), alone(body()[0], x, "0"))
    gc.collect()

    def plain():
        with undula.rows(model, ["1"] * 6):
            yield model(x)

    steps = plain()
    contextvars.copy_context().run(next, steps)
    contextvars.copy_context().run(steps.close)
    undula.select(model, "1")
    torch.testing.assert_close(model(x), alone(model, x, "1"))


def test_blocks_may_be_left_in_any_order():
    model, x = body()
    a, b = undula.rows(model, ["0"] * 6), undula.rows(model, ["1"] * 6)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    torch.testing.assert_close(model(x), wanted(body()[0], x, ["1"] * 6))
    b.__exit__(None, None, None)
    undula.select(model, "0")
    torch.testing.assert_close(model(x), alone(model, x, "0"))


def test_a_task_that_outlives_its_block_is_outside():
    model, x = body()

    async def late(left):
        await left.wait()
        if host_of(model).routes:
            with pytest.raises(RuntimeError, match="another thread is inside"):
                model(x)
            return None
        undula.select(model, "1")
        return model(x)

    async def main(again):
        left = asyncio.Event()
        with undula.rows(model, ["0"] * 6):
            task = asyncio.create_task(late(left))
            await asyncio.sleep(0)
        left.set()
        if again:
            with undula.rows(model, ["0"] * 6):
                return await task
        return await task

    assert asyncio.run(main(True)) is None
    torch.testing.assert_close(asyncio.run(main(False)), alone(model, x, "1"))


def test_verbs_of_a_task_of_the_same_thread_do_not_wait_for_ever():
    (model, x), (other, _) = body(), body()

    async def inside():
        with undula.rows(model, ["0"] * 6):
            await asyncio.sleep(0.05)

    async def main():
        task = asyncio.create_task(inside())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="nobody could leave while it waits"):
            undula.select(model, "0")
        await task
        undula.select(model, "0")

    asyncio.run(main())
    met, done = threading.Event(), threading.Event()

    def elsewhere():
        with undula.rows(model, ["0"] * 6):
            met.set()
            done.wait(20)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    met.wait(20)
    with (
        undula.rows(other, ["0"] * 6),
        pytest.raises(RuntimeError, match="a block of another model around it"),
    ):
        undula.select(model, "1")
    done.set()
    thread.join(20)
    torch.testing.assert_close(model(x), alone(model, x, "0"))


def test_verbs_come_in_though_blocks_overlap():
    """Threads that always have one of them inside: a verb that waits goes before the blocks that come later."""
    model, x = body()
    stop, done = threading.Event(), []

    def busy():
        while not stop.is_set():
            with torch.no_grad(), undula.rows(model, ["0"] * 6):
                model(x)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    verb = threading.Thread(target=lambda: (undula.select(model, "1"), done.append(True)))
    verb.start()
    verb.join(20)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert done == [True]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["outside", "another block"])
def test_a_recomputation_within_other_rows_is_refused(reentrant, where):
    model, x = body()
    undula.select(model, "2")
    x.requires_grad_()
    with undula.rows(model, ["0", "1", "1", "1", "1", "1"]):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    block = undula.rows(model, ["1", "0", "0", "0", "0", "0"]) if where == "another block" else contextlib.nullcontext()
    with block, pytest.raises(RuntimeError, match="computed again in a backward"):
        y.square().sum().backward()


def test_a_checkpointed_forward_without_its_backward_is_told():
    """With nothing selected the layers are plain again after the block: a backward there could not be refused."""
    model, x = body()
    undula.select(model, None)
    x.requires_grad_()
    for within in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with undula.rows(model, ["0"] * 6):
                y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
                if within:
                    y.sum().backward()
        assert [("no backward followed" in str(w.message)) for w in told] == [True] * (not within)


def test_a_recomputation_does_not_take_another_threads_rows():
    model, x = body()
    undula.select(model, "0")
    x.requires_grad_()
    with undula.rows(model, ["1"] * 6):
        pass
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
    met, done = threading.Event(), threading.Event()

    def elsewhere():
        with undula.rows(model, ["1"] * 6):
            met.set()
            done.wait(20)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    met.wait(20)
    with pytest.raises(RuntimeError, match="another thread is inside"):
        y.square().sum().backward()
    done.set()
    thread.join(20)


REPLACED = {
    "load_state_dict": lambda model, live: model.load_state_dict(
        {k: v * 3 for k, v in model.state_dict().items()}, assign=True
    ),
    "a dictionary": lambda model, live: live.factors["0"].__setitem__("B", nn.Parameter(live.factors["0"]["B"] * 3)),
    "parts of both": lambda model, live: [
        setattr(live.factors["0"][k], "data", live.factors["0"][k].data[at])
        for k, at in (("A", slice(1)), ("B", (slice(None), slice(1))))
    ],
}


@pytest.mark.parametrize("how", REPLACED)
def test_parameters_that_are_replaced_are_seen(how):
    model, x = body()
    undula.select(model, "1")
    with torch.no_grad():
        with undula.rows(model, ["1"] * 6):
            before = model(x)
        REPLACED[how](model, undula.adapters(model)["1"])
        want = model(x)
        assert not torch.allclose(want, before)
        with undula.rows(model, ["1"] * 6):
            torch.testing.assert_close(model(x), want)


def test_a_live_adapters_methods_are_changed_by_allocators_alone():
    live = undula.attach(body()[0], LoRA(r=2), name="new")
    with pytest.raises(TypeError, match="does not support item assignment"):
        live.methods["0"] = LoRA(r=2, alpha=64.0)


def test_an_adapter_that_changes_its_rank_between_blocks():
    """An allocator's change is seen by the next block, and refused within one."""
    model, x = body()
    undula.select(model, "1")
    with undula.rows(model, ["0", "1"] * 3):
        model(x)
        with pytest.raises(RuntimeError, match="an allocator changes an adapter within"):
            change(model, "0", LoRA(r=4), dict(undula.selected(model).factors["0"]))
    wide = {"A": torch.randn(4, 8).double(), "B": torch.randn(8, 4).double()}
    change(model, "0", LoRA(r=4, alpha=3.0), wide)
    want = wanted(model, x, ["0", "1"] * 3)
    with undula.rows(model, ["0", "1"] * 3):
        torch.testing.assert_close(model(x), want)


def test_inference_leaves_nothing_behind():
    """What a block made in inference mode, or an adapter that came in it, can be trained later."""
    for methods in (ALIKE, [undula.VeRA(r=4)] * 3):
        model, x = body(methods)
        with undula.rows(model, ["0", "1", "2"] * 2):
            with torch.inference_mode():
                model(x)
            model(x).square().sum().backward()
        assert all(p.grad is not None for p in undula.adapters(model)["1"].parameters())
        for live in undula.adapters(model).values():
            assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in live.parameters())


def test_a_bare_model_within_a_block():
    model, x = body([])
    base = model(x)
    with undula.rows(model, [None] * 6):
        torch.testing.assert_close(model(x), base)
        with pytest.raises(RuntimeError, match=r"`attach` within `undula.rows`"):
            undula.attach(model, LoRA())
    assert "_undula" not in model.__dict__
    undula.attach(model, LoRA())


def test_threads_that_attach_to_a_bare_model():
    for _ in range(5):
        model, _ = body([])
        threads = [threading.Thread(target=undula.attach, args=(model, LoRA(r=2)), kwargs={"name": n}) for n in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(undula.adapters(model)) == ["a", "b"]
        for name in "ab":
            undula.detach(model, name)
        assert [type(layer) for layer in model] == [nn.Linear] * 3


class Positions(nn.Module):
    """Its first layer sees one row whatever the batch is."""

    def __init__(self):
        super().__init__()
        self.places, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(x + self.places(torch.ones(1, 8).to(x)))


def test_a_layer_with_no_law_of_the_batch_may_see_any():
    torch.manual_seed(0)
    model, x = Positions().double(), torch.randn(6, 8).double()
    for name, where in (("a", ["last"]), ("p", ["places"])):
        for p in undula.attach(model, LoRA(r=2), where, name=name).parameters():
            p.data.normal_()
    want = alone(model, x, "a")
    assert host_of(model).selected == "p"
    with undula.rows(model, ["a"] * 6):
        torch.testing.assert_close(model(x), want)


def test_one_text_is_no_list_of_names():
    model, _ = body()
    with pytest.raises(TypeError, match=r"a name for each row of the batch, as \['012'\]"):
        undula.rows(model, "012").__enter__()


def test_rows_of_nothing():
    model, _ = body()
    with undula.rows(model, ["0", "1"] * 3):
        assert model(torch.zeros(6, 0, 8).double()).shape == (6, 0, 8)


def test_a_layer_that_was_resized_between_two_adapters_is_told():
    model = nn.Sequential(nn.Linear(8, 1))
    undula.attach(model, undula.AuroRA(r=2), name="old")
    undula.select(model, None)
    model[0] = nn.Linear(8, 5)
    undula.attach(model, LoRA(r=2), name="new")
    with pytest.raises(RuntimeError, match=r"0 was changed after the adapter was attached"):
        undula.rows(model, ["old", "new"]).__enter__()
