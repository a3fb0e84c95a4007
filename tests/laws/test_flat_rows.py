"""Flat batches: requests of different lengths in one row, each through its own adapter, as the loop over them."""

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula import LoRA
from undula.methods.dropout import Dropout

METHODS = [
    *(LoRA(r=2), LoRA(r=2), LoRA(r=4), LoRA(r=2, alpha=5.0), undula.DoRA(LoRA(r=2)), undula.LoRAN(r=2)),
    *(undula.AuroRA(r=2), undula.VeRA(r=3), undula.SHiRA(r=1)),
]
SEGMENTS = [
    [("0", 1)],
    [("0", 3), ("1", 3), ("2", 3)],
    [("3", 1), ("0", 5), (None, 2), ("0", 1), ("2", 4)],
    [("4", 2), ("5", 1), ("6", 3), ("7", 2), ("8", 1), (None, 1), ("0", 2)],
    [("1", 0), ("2", 2), ("4", 0), ("2", 0)],
    [(None, 4)],
    [("0", 4000), ("2", 90), ("6", 6)],
]


def body(dtype=torch.float64, frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False)).to(dtype).eval()
    for i, method in enumerate(METHODS):
        shake(undula.attach(model, method, name=str(i)))
        if frozen:
            undula.attach(model, undula.detach(model, str(i)), name=str(i), frozen=True)
    undula.select(model, None)
    return model


def one_by_one(model, x, segments):
    """Each request by itself, in a batch of its own."""
    found = []
    for part, (name, _) in zip(x.split([n for _, n in segments]), segments, strict=True):
        with undula.rows(model, [name]):
            found.append(model(part[None])[0])
    return torch.cat(found)


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("segments", SEGMENTS, ids=lambda s: " ".join(f"{name}x{n}" for name, n in s))
def test_a_flat_batch_is_its_requests_one_by_one(segments, frozen):
    model, total = body(frozen=frozen), sum(n for _, n in segments)
    x = torch.randn(total, 6, dtype=torch.float64)
    with torch.no_grad():
        want = one_by_one(model, x, segments)
        with undula.rows(model, [name for name, _ in segments], tokens=[n for _, n in segments]):
            torch.testing.assert_close(model(x[None])[0], want)
            torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("segments", SEGMENTS[1:5], ids=lambda s: " ".join(f"{name}x{n}" for name, n in s))
def test_its_gradients_are_theirs(segments):
    """Many jobs train in one batch: of the input and of every factor."""
    model, total = body(), sum(n for _, n in segments)
    x, g = torch.randn(2, total, 6, dtype=torch.float64)
    leaves = [t for a in undula.adapters(model).values() for t in a.parameters()]
    found = []
    for flat in (False, True):
        own = x.clone().requires_grad_()
        if flat:
            with undula.rows(model, [name for name, _ in segments], tokens=[n for _, n in segments]):
                y = model(own[None])[0]
        else:
            y = one_by_one(model, own, segments)
        found.append(torch.autograd.grad(y, [own, *leaves], g, allow_unused=True))
    for mine, want in zip(*reversed(found), strict=True):
        assert (mine is None) == (want is None) or not (want if mine is None else mine).any()
        if mine is not None and want is not None:
            torch.testing.assert_close(mine, want)


def test_an_embedding_is_looked_up_token_by_token():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double().eval()
    for name in ("a", "b"):
        shake(undula.attach(model, LoRA(r=2), where=["0", "1"], name=name))
    undula.select(model, None)
    ids = torch.tensor([[1, 6, 2, 2, 0]])
    with undula.rows(model, ["b", "a"], tokens=[2, 3]):
        y = model(ids)
    for name, part in (("b", slice(0, 2)), ("a", slice(2, 5))):
        undula.select(model, name)
        torch.testing.assert_close(y[:, part], model(ids[:, part]))


def test_dropout_drops_in_training():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    shake(undula.attach(model, Dropout(LoRA(r=2), p=0.5), name="a"))
    undula.select(model, None)
    x = torch.randn(1, 5, 6).double()
    with undula.rows(model, ["a", None], tokens=[3, 2]):
        first, again = model(x), model(x)
    assert not torch.equal(first[:, :3], again[:, :3])
    torch.testing.assert_close(first[:, 3:], again[:, 3:])


class Last(nn.Module):
    """A head on the last token alone, as language models have it while they write."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x)[:, -1:])


def test_what_is_no_flat_batch_is_refused():
    model = Last().eval()
    undula.attach(model, LoRA(r=1), name="a")
    undula.select(model, None)
    for tokens in ([3], [3, -1], [1, 2, 3]):
        with (
            pytest.raises(ValueError, match="how many each of the 2 names has"),
            undula.rows(model, ["a", "a"], tokens),
        ):
            pass
    with undula.rows(model, ["a"], tokens=[5]):
        with pytest.raises(ValueError, match="5 tokens in all, this layer sees 4"):
            model(torch.randn(1, 4, 4))
        with pytest.raises(ValueError, match=r"5 tokens in all, this layer sees 1: .* as a head may"):
            model(torch.randn(1, 5, 4))
    convolution = nn.Sequential(nn.Conv1d(4, 4, 1)).eval()
    undula.attach(convolution, LoRA(r=1), where=["0"], name="a")
    undula.select(convolution, None)
    with undula.rows(convolution, ["a"], tokens=[4]), pytest.raises(TypeError, match="no product of single tokens"):
        convolution(torch.randn(1, 4, 4))
