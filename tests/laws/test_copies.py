"""Private copies of weights: a frozen adapter computes with one what it does without."""

import pytest
import torch
from torch import nn

import undula
from tests.laws.test_frozen import bodies
from tests.support.numbers import shake
from tests.support.zoo import ZOO
from undula import LoRA
from undula.host.copies import copy_size, drop_copy, keep_copy
from undula.serve.copies import Copies

MIX = [undula.LoRAN(r=2), LoRA(r=2), undula.SHiRA(r=1), undula.VeRA(r=3), undula.LoRAN(r=2)]


@pytest.mark.parametrize("names", [["0", "1", "2", "3", "4", None], ["0"] * 6, ["4", "0", "4", "0", "2", "1"]], ids=str)
def test_a_copy_changes_no_output(names):
    live, held, x = bodies(MIX)
    for name in "024":
        keep_copy(held, name)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), undula.rows(live, names), undula.rows(held, names):
            torch.testing.assert_close(held(x), live(x))


@pytest.mark.usefixtures("float64", "made_up_evidence")
@pytest.mark.parametrize("method", ZOO, ids=repr)
def test_every_method_has_copies_or_has_no_use_for_them(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12, bias=False)).eval()
    shake(undula.attach(model, method, name="a"))
    undula.attach(model, undula.detach(model, "a"), name="a", frozen=True)
    x, names, size = torch.randn(5, 12), ["a", None, "a", "a", None], copy_size(model, "a")
    with torch.no_grad(), undula.rows(model, names):
        want = model(x)
    keep_copy(model, "a")
    held = undula.adapters(model)["a"]
    assert sum(copy.W_OI.nbytes for copy in held.copies.values()) == size
    with torch.no_grad(), undula.rows(model, names):
        torch.testing.assert_close(model(x), want)


def test_of_a_loose_adapter_the_law_is_not_computed_again(monkeypatch):
    _, held, x = bodies(MIX)
    assert copy_size(held, "0") == 3 * 8 * 8 * 8
    assert copy_size(held, "1") == 0, "a plain pair has its share of a product"
    keep_copy(held, "0")
    monkeypatch.setattr(undula.LoRAN, "forward", None)
    with undula.rows(held, ["0"] * 6):
        y = held(x)
    drop_copy(held, "0")
    monkeypatch.undo()
    with undula.rows(held, ["0"] * 6):
        torch.testing.assert_close(held(x), y)


def test_a_base_that_is_written_into_is_seen():
    live, held, x = bodies(MIX)
    keep_copy(held, "0")
    with torch.no_grad():
        for model in (live, held):
            model[1].weight.mul_(2)
    with undula.rows(live, ["0"] * 6), undula.rows(held, ["0"] * 6):
        torch.testing.assert_close(held(x), live(x))


def test_only_frozen_adapters_have_copies():
    model = nn.Sequential(nn.Linear(4, 4))
    undula.attach(model, undula.LoRAN(r=2), name="trains")
    with pytest.raises(ValueError, match="'trains' trains, or may: copies of weights are for adapters attached with"):
        keep_copy(model, "trains")


def test_the_copies_of_those_used_last_fit_their_budget():
    _, held, _x = bodies(MIX)
    size, left = copy_size(held, "0"), []
    copies = Copies(held, 2 * size, lambda: left.append(True))

    def kept():
        return {name for name, a in undula.adapters(held).items() if a.copies}

    copies.use("0", set())
    copies.use("1", set())
    copies.use("4", set())
    assert kept() == {"0", "4"}
    copies.use("0", set())
    copies.use("2", {"0", "4"})
    assert kept() == {"0", "4"}, "what is computed with stays"
    copies.use("2", {"0"})
    assert kept() == {"0", "2"}
    assert len(left) == 4, "the block around the steps is left for each that comes or goes"
    undula.detach(held, "2")
    copies.use("4", {"0"})
    assert kept() == {"0", "4"}


def test_a_budget_that_holds_no_copy_is_told(caplog):
    """Else who gives one believes that it is fast now."""
    _, held, _x = bodies(MIX)
    Copies(held, copy_size(held, "0") - 1, lambda: None).use("0", set())
    assert "takes 1,536 bytes, and copies may take 1,535" in caplog.text
    assert not undula.adapters(held)["0"].copies
