"""Adapters attached with `frozen=True`: on shelves, where many are one stack, they compute what live ones do."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from tests.support.zoo import ZOO
from undula import LoRA
from undula.host.frame import Frame
from undula.host.ready import put, ready
from undula.host.state import host_of
from undula.host.tables import Kind, Runs
from undula.methods.dropout import Dropout

METHODS = {
    "one shelf": [LoRA(r=2)] * 5,
    "two ranks": [LoRA(r=2), LoRA(r=3), LoRA(r=2), LoRA(r=3), LoRA(r=2)],
    "two scales": [LoRA(r=2), LoRA(r=2, alpha=3.0), LoRA(r=2), LoRA(r=2), LoRA(r=2)],
    "other rungs": [LoRA(r=2), undula.AuroRA(r=2), undula.DoRA(LoRA(r=2)), undula.LoRAN(r=2), LoRA(r=2)],
    "shared factors": [undula.VeRA(r=3), LoRA(r=2), undula.VeRA(r=3), undula.S2LoRA(r=2), undula.AdaLoRA(r=2)],
}
ROWS = [
    ["0", "1", "2", "3", "4", None],  # each its own
    ["4", "4", "1", "1", "0", "0"],  # as many each
    ["3", "0", "0", "0", "0", "0"],
    ["2", None, "1", "2", None, "4"],
    ["1"] * 6,
]


def bodies(methods, dtype=torch.float64):
    """Two equal models with the same adapters: live ones, and frozen ones."""
    torch.manual_seed(0)
    live = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to(dtype).eval()
    held = copy.deepcopy(live)
    for i, method in enumerate(methods):
        adapter = undula.attach(live, method, name=str(i))
        shake(adapter)
        undula.attach(held, adapter.copy(), name=str(i), frozen=True)
    undula.select(live, None)
    return live, held, torch.randn(6, 8, dtype=dtype)


@pytest.mark.parametrize("names", ROWS, ids=str)
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_rows_are_those_of_live_adapters(methods, names):
    live, held, x = bodies(methods)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), undula.rows(live, names), undula.rows(held, names):
            torch.testing.assert_close(held(x), live(x))


def test_what_is_alike_lies_on_one_shelf():
    """Whatever its rank, scale and law: else the point of it is lost, and nobody would see."""
    for methods in METHODS.values():
        held = host_of(bodies(methods)[1])
        assert len(held.shelves) == 1
        assert sum(adapter.shelf is not None for adapter in held.adapters.values()) >= 2


def test_adapters_come_and_go_and_the_others_stay_what_they_are():
    """A place is used again, a shelf grows and goes."""
    live, held, x = bodies(METHODS["one shelf"])
    values = {name: a.copy() for name, a in undula.adapters(live).items()}
    place = undula.adapters(held)["1"].spots
    back = undula.detach(held, "1")
    assert type(back) is undula.Adapter
    for (site, name, t), (_, _, mine) in zip(values["1"].tensors(), back.tensors(), strict=True):
        torch.testing.assert_close(mine, t, msg=f"{site}.{name}")
        assert mine.requires_grad == t.requires_grad
    assert undula.attach(held, values["3"], name="again", frozen=True).spots == place
    with undula.rows(held, ["again"] * 6), undula.rows(live, ["3"] * 6):
        torch.testing.assert_close(held(x), live(x))
    torch.testing.assert_close(back.delta("0"), values["1"].delta("0"), msg="a value is its own, off the shelf")
    for names in (["0", "2", "3", "4", "0", None], ["4"] * 6):
        with undula.rows(held, names), undula.rows(live, names):
            torch.testing.assert_close(held(x), live(x))
    for name in ("0", "2", "3", "4", "again"):
        undula.detach(held, name)
    assert "_undula" not in held.__dict__
    assert all(p.requires_grad for p in held.parameters())


@pytest.mark.parametrize("kept", [0, 5, 11])
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_memory_goes_with_those_who_leave(methods, kept):
    """A table keeps the memory of the rows that were ever written.  So where most have left, those who stay are moved
    together: the first, one in the midst or the last, whose rows are others then and whose answers are the same."""
    live, held, x = bodies((methods * 12)[:12])
    (shelf,) = host_of(held).shelves
    there = [name for name, adapter in undula.adapters(held).items() if adapter.shelf is not None]
    stays = there[min(kept, len(there) - 1)]
    for name in there:
        if name != stays:
            undula.detach(held, name)
    tables = sum(t.nbytes for found in shelf.tables.values() for t in found.values())
    adapter = undula.adapters(held)[stays]
    beside = {id(t): t.nbytes for f in adapter.factors.rest.values() for t in f.values()}
    assert tables <= 1.5 * (adapter.nbytes - sum(beside.values()))
    more = undula.adapters(live)[there[0]].copy()
    undula.attach(held, more, name="more", frozen=True)
    for name, its in ((stays, stays), ("more", there[0])):
        for rows in ([name] * 6, [name, None] * 3):
            with undula.rows(held, rows), undula.rows(live, [its if r else None for r in rows]):
                torch.testing.assert_close(held(x), live(x))
    undula.select(live, stays)
    undula.select(held, stays)
    torch.testing.assert_close(held(x), live(x))


@pytest.mark.parametrize("method", [LoRA(r=2), undula.AuroRA(r=2), undula.VeRA(r=3)], ids=repr)
def test_a_frozen_adapter_is_selected_merged_saved_and_copied_like_any(method, tmp_path):
    live, held, x = bodies([method] * 2)
    undula.select(live, "1")
    undula.select(held, "1")
    torch.testing.assert_close(held(x), live(x))
    assert not [n for n, p in held.named_parameters() if p.requires_grad], "it does not train"
    undula.selected(held).save(tmp_path)
    other = copy.deepcopy(live)
    undula.detach(other, "1")
    undula.attach(other, undula.Adapter.load(tmp_path), name="read")
    torch.testing.assert_close(other(x), live(x))
    if isinstance(method, undula.LowRank):
        undula.merge(held)
        torch.testing.assert_close(held(x), live(x))
        undula.unmerge(held)
    twin = copy.deepcopy(held)
    undula.detach(held, "0")
    for each in (twin, torch.load(_pickled(held), weights_only=False)):
        with undula.rows(each, ["1"] * 6):
            torch.testing.assert_close(each(x), live(x))


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_moving_a_model_with_a_frozen_adapter_selected_leaves_its_shelf_alone():
    """`model.to` gives the selected one other tensors; the stack is still the adapter's own."""
    live, held, x = bodies(METHODS["one shelf"])
    undula.select(held, "1")
    held.float().double()
    with undula.rows(live, ["1", "0"] * 3), undula.rows(held, ["1", "0"] * 3):
        torch.testing.assert_close(held(x), live.float().double()(x))


def test_the_selected_adapter_stays_selected():
    live, held, x = bodies(METHODS["one shelf"])
    one = undula.attach(held, LoRA(r=4), name="trains")
    undula.attach(held, undula.adapters(live)["2"].copy(), name="more", frozen=True)
    assert undula.selected(held) is one
    held(x).sum().backward()
    assert all(p.grad is not None for p in one.parameters())


def test_dropout_of_a_frozen_adapter_is_off_in_evaluation_and_on_in_training():
    live, held, x = bodies([Dropout(LoRA(r=2), p=0.5)] * 2)
    with undula.rows(live, ["0", "1"] * 3), undula.rows(held, ["0", "1"] * 3):
        torch.testing.assert_close(held(x), live(x))
        held.train()
        torch.manual_seed(1)
        assert not torch.equal(held(x), held(x))


@pytest.mark.usefixtures("float64", "made_up_evidence")
@pytest.mark.parametrize("method", ZOO, ids=repr)
def test_every_method_computes_on_a_shelf_what_it_does_alive(method):
    """What settles, and what does not: with its rows among others' and with its gradient to what stands before."""
    torch.manual_seed(0)
    live = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12, bias=False)).eval()
    held = copy.deepcopy(live)
    for name in ("a", "b"):
        adapter = undula.attach(live, method, name=name)
        shake(adapter)
        undula.attach(held, adapter.copy(), name=name, frozen=True)
    undula.select(live, None)
    found = []
    for model in (live, held):
        x = torch.arange(60.0).view(5, 12).div(30).sub(1).requires_grad_()
        with undula.rows(model, ["b", None, "a", "b", "a"]):
            y = model(x)
        found.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("change", [lambda W: W.mul_(2), lambda W: W.copy_(torch.randn_like(W))], ids=["scaled", "new"])
def test_a_base_that_is_written_into_is_seen(change):
    """DoRA's norms are of the weight: they are made anew, for every adapter."""
    live, held, x = bodies([undula.DoRA(LoRA(r=2))] * 3)
    for names in (["0", "1", "2"] * 2, ["2"] * 6):
        with torch.no_grad():
            for model in (live, held):
                torch.manual_seed(1)
                change(model[1].weight)
        with undula.rows(live, names), undula.rows(held, names):
            torch.testing.assert_close(held(x), live(x))


def test_what_settles_shares_a_product():
    """Else nonlinear adapters and DoRA go one after the other, each with all of its own: many times as slow."""
    _, held, x = bodies([undula.AuroRA(r=2), undula.DoRA(LoRA(r=2)), undula.AdaLoRA(r=2)] * 2)
    assert len(host_of(held).shelves) == 1
    with undula.rows(held, ["0", "1", "2", "3", "4", "5"]):
        held(x)
        assert not host_of(held).routes[0].loose


def test_the_inputs_gradient_is_that_of_live_adapters():
    live, held, x = bodies(METHODS["other rungs"])
    found = []
    for model in (live, held):
        own = x.clone().requires_grad_()
        with undula.rows(model, ["0", "1", "2", "3", "4", None]):
            found.append(torch.autograd.grad(model(own).sin().sum(), own)[0])
    torch.testing.assert_close(*found)


def test_types_are_kept_apart():
    """One stack has one type: an adapter in bfloat16 does not round its neighbours."""
    _, held, x = bodies([LoRA(r=2)], torch.float32)
    value = undula.detach(held, "0")
    undula.attach(held, value, name="wide", frozen=True)
    undula.attach(held, value, name="narrow", frozen=True, dtype=torch.bfloat16)
    with undula.rows(held, ["wide", "narrow"] * 3):
        y = held(x)
    with undula.rows(held, ["wide"] * 6):
        torch.testing.assert_close(y[::2], held(x)[::2])
    assert undula.adapters(held)["narrow"].factors["0"]["A"].dtype == torch.bfloat16


def test_factors_that_sites_share_are_shared_when_it_comes_back():
    """Else a file stores them once for each site, and training moves them apart."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    value = undula.attach(model, LoRA(r=2)).copy()
    A = value.factors["0"]["A"]
    tied = dataclasses.replace(value, factors={s: {**f, "A": A} for s, f in value.factors.items()})
    undula.attach(model, tied, name="tied", frozen=True)
    back = undula.detach(model, "tied")
    assert back.factors["0"]["A"] is back.factors["1"]["A"]
    assert back.num_parameters() == tied.num_parameters()


def test_what_cannot_be_frozen_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="frozen=True is for an Adapter that was trained"):
        undula.attach(model, LoRA(r=2), frozen=True)
    assert "_undula" not in model.__dict__


def test_entering_looks_at_no_factor(monkeypatch):
    """What makes a batch of hundreds cheap to enter: nothing is done for each adapter at each layer."""
    _, held, x = bodies([LoRA(r=2)] * 2)
    looked = []
    monkeypatch.setattr("undula.host.shelf.OnShelf.__getitem__", lambda self, path: looked.append(path))
    with undula.rows(held, ["0", "1"] * 3):
        held(x)
    assert not looked


LAWS = [
    *(LoRA(r=1), LoRA(r=2, alpha=3.0), LoRA(r=5), undula.DoRA(LoRA(r=2)), undula.DoRA(LoRA(r=3, alpha=1.0))),
    *(undula.AuroRA(r=2), undula.AuroRA(r=2), undula.AuroRA(r=3), undula.AuroRA(r=2, low=-2.0), undula.VeRA(r=2)),
]


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_in_any_turns_are_those_of_live_adapters(seed, monkeypatch):
    """Ranks, scales, gains and bends side by side; alone, in turn, and through a model with several tokens a row."""
    monkeypatch.setattr("undula.host.shelved.PAYS", (1, 8, 10**6)[seed % 3])
    g = torch.Generator().manual_seed(seed)
    live, held, _ = bodies(LAWS)
    rows, tokens = int(torch.randint(1, 20, (), generator=g)), int(torch.randint(1, 6, (), generator=g))
    numbers = (
        torch.randint(-1, len(LAWS), (rows,), generator=g).sort().values
        if seed % 2
        else torch.randint(-1, len(LAWS), (rows,), generator=g)
    )
    names = [None if n < 0 else str(int(n)) for n in numbers]
    x = torch.randn(rows, tokens, 8, dtype=torch.float64, generator=g)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), undula.rows(live, names), undula.rows(held, names):
            torch.testing.assert_close(held(x), live(x))


def test_sites_of_an_adapter_may_each_have_their_own_rank():
    live, held, x = bodies([])
    for name, ranks in (("0", (1, 4, 2)), ("1", (3, 1, 2)), ("2", (2, 2, 2))):
        overrides = {str(i): LoRA(r=r) for i, r in enumerate(ranks)}
        adapter = undula.attach(live, LoRA(r=1), overrides=overrides, name=name)
        shake(adapter)
        undula.attach(held, adapter.copy(), name=name, frozen=True)
    undula.select(live, None)
    for names in (["0", "1", "2", "2", "1", "0"], ["1", "1", "1", "1", "1", "0"]):
        with torch.no_grad(), undula.rows(live, names), undula.rows(held, names):
            torch.testing.assert_close(held(x), live(x))


def test_a_block_within_another_has_its_own_rows():
    """As an engine does: one block around all steps, in which no layer is looked at again."""
    live, held, x = bodies(METHODS["other rungs"])
    steps = [["0", "1", "2", None, "4", "4"], ["3"] * 6, ["0", "1", "2", None, "4", "4"], [None] * 6, ["2", "0"] * 3]
    with torch.no_grad(), undula.rows(held, ["0", "1"], tokens=[3, 3]):
        for names in steps:
            with undula.rows(live, names):
                want = live(x)
            with undula.rows(held, names, tokens=[1] * 6):
                torch.testing.assert_close(held(x[None])[0], want)
        with undula.rows(live, ["0"] * 3 + ["1"] * 3):
            want = live(x)
        torch.testing.assert_close(held(x), want)


def test_runs_are_given_out_taken_back_and_joined():
    """By chance, against a plain list of numbers: no number is given twice, and what is free at the end is gone."""
    g, runs, out = torch.Generator().manual_seed(0), Runs(), []
    for _ in range(400):
        if out and torch.rand((), generator=g) < 0.5:
            runs.give(*out.pop(int(torch.randint(len(out), (), generator=g))))
        else:
            n = int(torch.randint(1, 9, (), generator=g))
            out.append((runs.take(n), n))
        held = [i for start, n in out for i in range(start, start + n)]
        assert len(held) == len(set(held))
        assert sorted(held + [i for start, n in runs.free for i in range(start, start + n)]) == list(range(runs.end))
        assert max(held, default=-1) == runs.end - 1


def test_tables_with_room_for_a_budget_are_not_copied_to_grow():
    """A copy would stop whoever computes, for as long as all that is there takes."""
    model = nn.Sequential(nn.Linear(8, 8))
    value = undula.attach(model, LoRA(r=2)).copy()
    undula.detach(model)
    size = sum(t.nbytes for _, _, t in value.tensors())
    frame, seen = Frame(model), set()
    for i in range(6):
        put(model, ready(frame, value), str(i), reserve=5 * size)
        seen.add((i > 4, host_of(model).shelves[0].tables["0"][Kind("A", torch.float32)].data_ptr()))
    assert len(seen) == 2, "once, for the sixth"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", [LoRA(r=2), undula.DoRA(LoRA(r=3)), undula.AuroRA(r=2)], ids=repr)
def test_single_rows_of_a_layer_wider_than_the_factors_are_computed(method, dtype):
    """A float64 base and adapters of fewer bits: a gain and a bias meet in the wider type."""
    model, x = nn.Sequential(nn.Linear(8, 8)).double().eval(), torch.randn(6, 8, dtype=torch.float64)
    value = undula.attach(model, method, name="live")
    shake(value)
    value = undula.detach(model, "live")
    undula.attach(model, value, name="live", dtype=dtype)
    with torch.no_grad():
        want = model(x)
        undula.detach(model, "live")
        undula.attach(model, value, name="held", dtype=dtype, frozen=True)
        undula.select(model, None)
        with undula.rows(model, ["held", None] * 3):
            found = model(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[::2], want[::2], rtol=8 * eps, atol=8 * eps)
