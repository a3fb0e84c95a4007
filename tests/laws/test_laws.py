"""What every method obeys on every kind of layer.  A new method is tested by existing."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from tests.support.layers import Conv1D, net
from tests.support.numbers import shake, shaken
from tests.support.zoo import ADDITIVE, LOW_RANK, MERGEABLE, ZOO
from undula import DoRA, LowRank, Reweight
from undula.host.host import fresh
from undula.host.views import outline, site, view
from undula.kernels import frozen, reference

pytestmark = pytest.mark.usefixtures("float64")


LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), lambda: torch.randn(3, 5, 12)),
    "no bias": (lambda: nn.Linear(12, 7, bias=False), lambda: torch.randn(4, 12)),
    "conv1d": (lambda: Conv1D(16, 12), lambda: torch.randn(3, 5, 12)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 6, 6)),
    "conv in one dimension": (lambda: nn.Conv1d(4, 8, 3, padding=2, dilation=2), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 5))),
}


def each(methods):
    return pytest.mark.parametrize("m", methods, ids=[repr(m) for m in methods])


each_layer = pytest.mark.parametrize("kind", LAYERS)


def perturbed(m, layer):
    return shaken(m, site("l", layer), 0.1)


@pytest.mark.every(3)
@each(ZOO)
@each_layer
def test_starts_at_the_base(m, kind):
    make, data = LAYERS[kind]
    module, x = make().eval(), data()
    layer = view(module)
    y, base = m.forward(x, layer, m.init(site("l", layer))), module(x)
    if m.starts_at_base:
        torch.testing.assert_close(y, base)
    else:  # by design; near it all the same
        assert 0 < (y - base).norm() < 0.5 * base.norm()


@pytest.mark.every(3)
@each(ZOO)
@each_layer
def test_moves_when_trained(m, kind):
    """From its start, two steps of SGD change the function and lower the loss."""
    make, data = LAYERS[kind]
    module, x = make().eval(), data()
    layer = view(module)
    f = m.init(site("l", layer))
    trained = [t for t in f.values() if t.requires_grad]
    with torch.no_grad():
        target = module(x) + 0.1 * torch.randn_like(module(x))
    losses = []
    for _ in range(3):
        loss = F.mse_loss(m.forward(x, layer, f), target)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            norm = torch.stack([g.norm() for g in grads]).norm()
            for t, g in zip(trained, grads, strict=True):
                t -= 1e-3 * g / norm
    assert losses[2] < losses[0]


@pytest.mark.every(2)
@each(MERGEABLE)
@each_layer
def test_forward_is_weight(m, kind):
    make, data = LAYERS[kind]
    module, x = make().eval(), data()
    layer = view(module)
    f = perturbed(m, layer)
    torch.testing.assert_close(m.forward(x, layer, f), reference.reweighted(x, layer, m.weight(layer.weight, f)))


@each(ADDITIVE)
def test_weight_is_delta(m):
    layer = view(nn.Linear(12, 16))
    f = perturbed(m, layer)
    torch.testing.assert_close(m.weight(layer.weight, f), layer.weight + m.delta(f))


@each(LOW_RANK)
def test_delta_is_pair(m):
    layer = view(nn.Linear(12, 16))
    f = perturbed(m, layer)
    B_OR, A_RI = m.pair(f)
    assert B_OR.shape == (16, A_RI.shape[0])
    assert A_RI.shape == (B_OR.shape[1], 12)
    torch.testing.assert_close(m.delta(f), B_OR @ A_RI)


@pytest.mark.every(3)
@each([m for m in ZOO if not isinstance(m, DoRA) and not isinstance(getattr(m, "inner", None), DoRA)])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_gradients(m, kind):
    """Analytic against numerical, inputs included.  (DoRA holds its norms constant by design: see its oracle.)"""
    make, data = LAYERS[kind]
    layer, x = view(make().eval()), data()
    layer.module.requires_grad_(False)
    f = perturbed(m, layer)
    keys = [k for k, t in m.init(site("l", layer)).items() if t.requires_grad]
    moving = [f[k].requires_grad_() for k in keys]
    if x.is_floating_point():
        fn = lambda x, *ts: m.forward(x, layer, {**f, **dict(zip(keys, ts, strict=True))})  # noqa: E731
        assert torch.autograd.gradcheck(fn, [x.requires_grad_(), *moving])
    else:
        fn = lambda *ts: m.forward(x, layer, {**f, **dict(zip(keys, ts, strict=True))})  # noqa: E731
        assert torch.autograd.gradcheck(fn, moving)


@each(ZOO)
def test_only_the_declared_factors_train(m):
    model = net()
    adapter = undula.attach(model, m)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert adapter.num_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


def count(m, O, I):
    """The documented formula, evaluated; a wrapper's speaks of its inner methods' counts."""
    names = {"O": O, "I": I, "len": len, "sum": sum, **vars(m)}
    if hasattr(m, "inner"):
        names["inner"] = count(m.inner, O, I)
    if hasattr(m, "parts"):
        names["parts"] = [count(part, O, I) for part in m.parts]
    return eval(type(m).parameters, names)


@each(ZOO)
def test_rebuilt_factors(m):
    """What no file holds is frozen, follows from the seed and not from the global generator, and `init` has it."""
    where = site("l", view(nn.Linear(12, 16)))
    f, state = m.init(where), torch.get_rng_state()
    again = m.rebuilt(dataclasses.replace(where, shared={}))
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in again.items():
        assert torch.equal(f[name], t)
        assert not f[name].requires_grad
    alone = m.rebuilt(dataclasses.replace(outline("l", (16, 12)), device=torch.device("cpu")))
    assert {k: frozen.checksum(t) for k, t in again.items()} == {k: frozen.checksum(t) for k, t in alone.items()}


@each(ZOO)
def test_shapes_do_not_depend_on_peers(m):
    """A part of an adapter, and a sum of adapters of unlike sites, still fit their files and models."""
    where = outline("a.1.b", (16, 12))
    among = dataclasses.replace(where, peers={"a.0.b": (16, 12), "a.1.b": (16, 12), "a.0.c": (7, 12), "head": (5, 5)})
    shapes = [{k: t.shape for k, t in m.init(s).items()} for s in (where, among)]
    assert shapes[0] == shapes[1]


@each(ZOO)
def test_parameter_formula(m):
    f = m.init(site("l", view(nn.Linear(12, 16))))
    assert sum(t.numel() for t in f.values() if t.requires_grad) == count(m, 16, 12)


@each(ZOO)
def test_merge_and_unmerge(m):
    model = net().eval()
    ref, x = copy.deepcopy(model), torch.randn(4, 12)
    adapter = undula.attach(model, m)
    if m.starts_at_base:
        torch.testing.assert_close(model(x), ref(x))
    shake(adapter)
    y = model(x)
    assert not torch.allclose(y, ref(x))
    if not isinstance(m, Reweight):
        with pytest.raises(TypeError, match="rung Method"):
            undula.merge(model)
        assert torch.equal(model(x), y)
        return
    errors = undula.merge(model)
    assert set(errors) == {"0", "2"}
    assert max(errors.values()) < 1e-12
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(x), y)
    undula.unmerge(model)
    assert torch.equal(model[0].weight, ref[0].weight)
    assert torch.equal(model(x), y)
    undula.detach(model)
    torch.testing.assert_close(model(x), ref(x))
    assert model.state_dict().keys() == ref.state_dict().keys()


@each(ZOO)
def test_copies_and_pickles(m):
    model = net().eval()
    shake(undula.attach(model, m))
    x = torch.randn(4, 12)
    y = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), y)
    shake(undula.selected(twin))  # the copy's adapter is the copy's alone
    assert torch.equal(model(x), y)
    assert not torch.equal(twin(x), y)
    assert pickle.loads(pickle.dumps(m)) == m


@each(ZOO)
def test_configuration_round_trip(m):
    assert undula.Method.decode(m.encode()) == m


@each([m for m in ZOO if isinstance(m, LowRank)])
def test_fused_is_reference(m):
    """The fused products against the law as written: values and every gradient."""
    layer, x = view(nn.Linear(12, 16).eval()), torch.randn(3, 5, 12, requires_grad=True)
    layer.module.requires_grad_(False)
    f = {k: t.requires_grad_(t.is_floating_point()) for k, t in perturbed(m, layer).items()}
    B_OR, A_RI = m.pair(f)
    want = reference.bottleneck(x, layer, A_RI, lambda z: z, B_OR)
    got = m.forward(x, layer, f)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    inputs = [x, *(t for t in f.values() if t.requires_grad)]  # indices have no gradient
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@each(ZOO)
def test_rows_is_a_loop(m):
    """A mixed batch gives each row what its own adapter gives alone, gradients included."""
    model = net().eval()
    a = undula.attach(model, m, name="a")
    b = undula.attach(model, undula.LoRA(r=2), name="b")
    shake(a)
    shake(b)
    x, names = torch.randn(5, 3, 12), ["a", None, "b", "a", "b"]
    want, grads = [], []
    for i, name in enumerate(names):
        undula.select(model, name)
        want.append(model(x[i : i + 1]))
    want = torch.cat(want)
    parameters = [*a.parameters(), *b.parameters()]
    grads = torch.autograd.grad(want.square().sum(), parameters)
    undula.select(model, "b")
    with undula.rows(model, names):
        got = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want.detach())
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.square().sum(), parameters), grads, strict=True):
        torch.testing.assert_close(g, w)
    assert undula.selected(model) is b


@each(ZOO)
def test_compiles(m):
    model = net().eval()
    shake(undula.attach(model, m))
    x = torch.randn(4, 12)
    torch.compiler.reset()  # one cache serves every parametrisation of this test: it would fill up
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@each([m for m in ZOO if isinstance(m, undula.Dropout)])
def test_dropout_compiles_into_one_graph(m):
    """In training; and what it computes has gradients."""
    model = net().train()
    adapter = undula.attach(model, m)
    shake(adapter)
    torch.compiler.reset()
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 12)).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@each(ADDITIVE)
def test_arithmetic(m):
    model = net().eval()
    a, b = fresh(model, m, "*", {}, ()), fresh(model, undula.LoRA(r=2), ["2"], {}, ())
    shake(a)
    shake(b)
    c = 2 * a - b
    torch.testing.assert_close(c.delta("0"), 2 * a.delta("0"))
    torch.testing.assert_close(c.delta("2"), 2 * a.delta("2") - b.delta("2"))
    assert c.rung is a.rung
    ref = copy.deepcopy(model)
    undula.attach(model, c)
    ref[0].weight.data += 2 * a.delta("0")
    ref[2].weight.data += 2 * a.delta("2") - b.delta("2")
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), ref(x))


@pytest.mark.parametrize("names", [["a", "b", "c"], ["b", "a", "c", "a", "b", "c"], ["c", None, "a", "a"], ["d", "a"]])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12)])
def test_rows_of_low_rank_adapters(names, shape):
    """Every grouping (one row each, equal groups, unequal ones, unequal ranks) gives what each row gets alone."""
    model = net().eval()
    for name, r in {"a": 2, "b": 2, "c": 2, "d": 3}.items():
        shake(undula.attach(model, undula.LoRA(r=r), name=name))
    x, want = torch.randn(len(names), *shape), []
    for i, name in enumerate(names):
        undula.select(model, name)
        want.append(model(x[i : i + 1]))
    with undula.rows(model, names):
        torch.testing.assert_close(model(x), torch.cat(want))
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.cat(want))
            with pytest.raises(ValueError, match=f"given {len(names)} names, this layer sees a batch of 1"):
                model(x[:1])
    with (
        pytest.raises(LookupError, match="no adapter is called 'e'; attached are: a, b, c, d"),
        undula.rows(model, ["e"]),
    ):
        pass


def test_rows_follow_training():
    """What `rows` prepares for inference is prepared anew after a training step within the same context."""
    model, x = net().eval(), torch.randn(2, 12)
    for name in "ab":
        shake(undula.attach(model, undula.LoRA(r=2), name=name))
    every = [p for a in undula.adapters(model).values() for p in a.parameters()]
    with undula.rows(model, ["a", "b"]):
        with torch.no_grad():
            model(x)
        gradients = torch.autograd.grad(model(x).square().sum(), every)
        with torch.no_grad():
            for p, g in zip(every, gradients, strict=True):
                p -= 0.1 * g
            now = model(x)
        torch.testing.assert_close(now, model(x).detach())
