"""An adapter is a value: no training, no allocator and no host changes one that was given, nor what is made of a live
one."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from undula import Adapter, LoRA, LoRAN
from undula.core.adapter import Live

from ..support import courses

STEPS = 12


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def train(model, how=None, steps=STEPS):
    adapter = undula.selected(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    x, target = torch.randn(16, 6).double(), torch.randn(16, 4).double()

    def quality():
        with torch.no_grad():
            return -float(F.mse_loss(model(x), target))

    course = None if how is None else how.start(model, optimizer, steps, quality)
    for _ in range(steps):
        if course is not None:
            course.before_forward()
        F.mse_loss(model(x), target).backward()
        if course is not None:
            course.before_update()
        optimizer.step()
        if course is not None:
            course.after_update()
        optimizer.zero_grad()
    if course is not None:
        course.finish()


def numbers(adapter):
    tensors = {(s, n): t.detach().clone() for s, n, t in adapter.tensors()} | dict(adapter.full)
    return dict(adapter.methods), {k: t.detach().clone() for k, t in tensors.items()}


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert [k for k in a[1] if not torch.equal(a[1][k], b[1][k])] == []


@pytest.mark.parametrize("name", courses.COURSES)
def test_no_course_changes_the_adapter_that_was_attached(name):
    method, how = courses.COURSES[name]
    model = net()
    undula.attach(model, method)
    given = undula.detach(model).copy()
    before, deep = numbers(given), copy.deepcopy(given)
    live = undula.attach(model, given)
    assert live is not given
    train(model, how)
    moved = numbers(live)
    assert moved[0] != before[0] or any(not torch.equal(moved[1][k], before[1][k]) for k in before[1])
    assert_same(numbers(given), before)
    assert_same(numbers(given), numbers(deep))
    second = net()
    undula.attach(second, given)  # and it fits as it did
    assert_same(numbers(undula.selected(second)), before)


@pytest.mark.parametrize("held", [False, True], ids=["an adapter", "with a head"])
def test_what_is_made_of_a_live_adapter_is_untouched_by_its_training(held, tmp_path):
    model = net()
    live = undula.attach(model, LoRA(r=2), ["0", "2"], full=["4.bias"] if held else [])
    train(model)
    made = {
        "copy": live.copy(),
        "replace": dataclasses.replace(live, about={"task_type": "SEQ_CLS"}),
        "without a head": dataclasses.replace(live, full={}),
        "map": live.map(dict),
        "half and half": 0.5 * live + 0.5 * live,
        "pickle": pickle.loads(pickle.dumps(live.copy())),
        "shallow copy": copy.copy(live),
        "data": live.map(lambda f: {k: t.data for k, t in f.items()}),
        "arrays": live.map(lambda f: {k: torch.from_numpy(t.detach().numpy()) for k, t in f.items()}),
        "deepcopy": copy.deepcopy(live),
    }
    before = {name: numbers(value) for name, value in made.items()}
    assert isinstance(live, Live)
    assert all(name == "deepcopy" or not isinstance(value, Live) for name, value in made.items())
    was = numbers(live)
    train(model)
    assert not torch.equal(numbers(live)[1]["0", "B"], was[1]["0", "B"])
    for name, value in made.items():
        assert_same(numbers(value), before[name])
    live.save(tmp_path / "live")
    assert_same(numbers(Adapter.load(tmp_path / "live")), numbers(live))


def test_a_value_cannot_be_written_into():
    model = net()
    value = undula.attach(model, LoRA(r=2), full=["4.bias"]).copy()
    for write in (
        lambda: value.methods.__setitem__("0", LoRAN()),
        lambda: value.factors.__setitem__("0", {}),
        lambda: value.factors["0"].__setitem__("A", torch.zeros(1)),
        lambda: value.full.__setitem__("4.bias", torch.zeros(1)),
    ):
        with pytest.raises((TypeError, AttributeError), match=r"mappingproxy|__setitem__"):
            write()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.weight = 2.0


def test_the_mappings_that_a_value_is_made_of_may_change_afterwards():
    value = undula.attach(net(), LoRA(r=2)).copy()
    methods, factors = dict(value.methods), {s: dict(f) for s, f in value.factors.items()}
    again = Adapter(methods, factors, dict(value.shapes))
    methods["0"], factors["2"]["A"] = LoRAN(), torch.zeros(1)
    del factors["4"]
    assert_same(numbers(again), numbers(value))


def test_a_detached_adapter_goes_on_where_its_optimiser_left_it():
    """The same object and parameters when it is attached again; while it is attached elsewhere, another is a copy."""
    model = net()
    live = undula.attach(model, LoRA(r=2))
    parameters = live.parameters()
    undula.detach(model)
    second = net()
    assert undula.attach(second, live) is live
    assert all(a is b for a, b in zip(live.parameters(), parameters, strict=True))
    undula.detach(second)
    for dtype in (torch.bfloat16, None):  # the parameters stay whatever becomes of their type
        third = net().float()
        assert undula.attach(third, live, dtype=dtype) is live
        assert all(a is b for a, b in zip(live.parameters(), parameters, strict=True))
        assert {p.dtype for p in parameters} == {dtype or torch.float32}
        optimiser = torch.optim.SGD(parameters, lr=1.0)
        x = torch.randn(3, 6)
        before = third(x)
        before.square().sum().backward()
        optimiser.step()
        assert not torch.equal(third(x), before)
        undula.detach(third)
    undula.attach(second, live)
    other = undula.attach(net(), live)
    assert other is not live
    assert not {id(p) for p in other.parameters()} & {id(p) for p in parameters}


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAN(r=2)], ids=repr)
def test_averages_of_averages_stay_one_sum(method):
    """acc = (acc + x) / 2, again and again: each part once, and no more rank than the layer has."""

    def shaken(seed):
        live = undula.attach(net(), method)
        torch.manual_seed(seed)
        for p in live.parameters():
            p.data.normal_()
        return live.copy()

    a, b = shaken(1), shaken(2)
    acc = a
    for _ in range(4):
        acc = 0.5 * acc + 0.5 * b
    assert len(acc.methods["0"].parts) == 2
    torch.testing.assert_close(acc.delta("0"), a.delta("0") / 16 + b.delta("0") * 15 / 16)
    acc, want = a, a.delta("4")
    for seed in range(3, 12):
        x = shaken(seed)
        acc, want = 0.5 * acc + 0.5 * x, 0.5 * want + 0.5 * x.delta("4")
    torch.testing.assert_close(acc.delta("4"), want)
    if isinstance(method, undula.LowRank):
        B, A = acc.methods["4"].pair(acc.factors["4"])
        assert B.shape[1] == len(A) <= 2 + 4  # the layer is 4 x 8
    else:
        assert len(acc.methods["4"].parts) == 10


def test_combinations_whose_weights_sum_to_one_average_what_trains_in_full(tmp_path):
    """FedAvg of classifiers; other sums of heads have no meaning and are refused, at the latest when they are used."""
    values = []
    for seed in range(3):
        model = net()
        torch.manual_seed(seed)
        live = undula.attach(model, LoRA(r=2), ["0"], full=["4"])
        for p in live.parameters():
            p.data.normal_()
        values.append(live.copy())
    a, b, c = values
    mean = 0.25 * a + 0.25 * b + 0.5 * c
    for n in ("4.weight", "4.bias"):
        torch.testing.assert_close(mean.full[n], 0.25 * a.full[n] + 0.25 * b.full[n] + 0.5 * c.full[n])
    mean.save(tmp_path / "mean")
    model = net()
    undula.attach(model, Adapter.load(tmp_path / "mean"))
    torch.testing.assert_close(model[4].weight, mean.full["4.weight"])
    half = 0.5 * a
    for use in (
        lambda: undula.attach(net(), half),
        lambda: half.save(tmp_path / "half"),
        lambda: undula.io.export_lora(half, tmp_path / "half"),
        lambda: undula.collapse(half, undula.Truncate(1)),
    ):
        with pytest.raises(ValueError, match=r"4.bias, 4.weight in full with weights that sum to 0.5"):
            use()
    assert not (tmp_path / "half").exists()
    plain = dataclasses.replace(b, full={})
    for sum_ in (lambda: a + b, lambda: a - b, lambda: 0.5 * a + 0.5 * plain, lambda: 2 * a, lambda: -a):
        with pytest.raises(ValueError, match=r"in full cannot be added: 4.bias, 4.weight. They have an average"):
            sum_()


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAN(r=2), undula.DoRA(LoRA(r=2)), undula.AuroRA(r=2)], ids=repr)
@pytest.mark.parametrize("given", ["a method", "a value", "a file"])
def test_factors_keep_a_type_that_was_asked_for(method, given, tmp_path):
    """bf16 stays bf16: attached, saved, loaded and attached again, alone and among rows; what trains in full and
    integer factors are as ever."""
    model = net().float()
    adapter = undula.attach(model, method, full=["4.bias"], dtype=torch.bfloat16)
    if given != "a method":
        for p in adapter.parameters():
            p.data += 0.1 * torch.randn_like(p)
        value = adapter.copy()
        if given == "a file":
            value.save(tmp_path / "a")
            value = Adapter.load(tmp_path / "a")
        model = net().float()
        adapter = undula.attach(model, value, dtype=torch.bfloat16)
        assert_same(numbers(adapter), numbers(value))
    assert {t.dtype for _, _, t in adapter.tensors() if t.is_floating_point()} == {torch.bfloat16}
    assert {t.dtype for t in adapter.full.values()} == {torch.float32}
    x = torch.randn(3, 6)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    narrow = model(x)
    wide = net().float()
    undula.attach(wide, adapter.copy())
    torch.testing.assert_close(narrow, wide(x), rtol=0.05, atol=0.05)


def test_a_type_that_factors_cannot_have_is_refused():
    for dtype in (torch.int8, "bfloat16", torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="factors are floating-point numbers of 16 bits or more"):
            undula.attach(net(), LoRA(r=2), dtype=dtype)
    value = undula.attach(net(), LoRA(r=2)).copy()
    big = value.map(lambda f: {k: t.detach() + 1e6 for k, t in f.items()})
    with pytest.raises(ValueError, match=r"the adapter's 0.A holds numbers beyond the range of torch.float16"):
        undula.attach(net(), big, dtype=torch.float16)


def test_heads_of_other_classes_are_not_averaged(tmp_path):
    """The same classes in another order are other numbers of the head; their names go with the value."""
    live = undula.attach(net(), LoRA(r=2), ["0"], full=["4"])
    a, b, c = (
        dataclasses.replace(live, about={"classes": names} if names else {})
        for names in (["good", "bad"], ["bad", "good"], None)
    )
    with pytest.raises(
        ValueError, match=r"other classes, or the same in another order: \['bad', 'good'\] and \['good'"
    ):
        0.5 * a + 0.5 * b
    mean = 0.5 * a + 0.5 * a
    mean.save(tmp_path / "mean")
    assert Adapter.load(tmp_path / "mean").about["classes"] == ["good", "bad"]
    assert "classes" not in (0.5 * a + 0.5 * c).about
    for place, odd in (("undula", 3), ("undula", [1]), (None, 3)):  # of the whole file nothing of that name is read
        config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
        (config if place is None else config[place])["classes"] = odd
        (tmp_path / "mean" / "adapter_config.json").write_text(json.dumps(config))
        if place is None:
            config["undula"].pop("classes")
            (tmp_path / "mean" / "adapter_config.json").write_text(json.dumps(config))
            assert "classes" not in Adapter.load(tmp_path / "mean").about
        else:
            with pytest.raises(ValueError, match="`classes` lists texts"):
                Adapter.load(tmp_path / "mean")


def test_sum_adds():
    a = undula.attach(net(), LoRA(r=2)).copy()
    torch.testing.assert_close(sum([0.5 * a, 0.25 * a]).delta("0"), 0.75 * a.delta("0"))
    with pytest.raises(TypeError):
        sum([a], 1)


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAN(r=2), undula.DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_of_a_merge_is_that_against_float64(dtype, method):
    """Also where the exact weight has no more digits than the stored one: small updates cost much of themselves."""
    model = nn.Sequential(nn.Linear(12, 16)).to(dtype)
    live = undula.attach(model, method)
    with torch.no_grad():
        for p in live.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    W, f = model[0].weight.detach().double(), {k: t.detach().double() for k, t in live.factors["0"].items()}
    exact = live.methods["0"].weight(W, f)
    errors = undula.merge(model)
    true = float((model[0].weight.double() - exact).norm() / (exact - W).norm())
    assert errors["0"] == pytest.approx(true, rel=1e-6, abs=1e-12)
    if dtype != torch.float64:
        assert true > 1e-6
