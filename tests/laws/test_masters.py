"""What trains in full trains in float32 whatever the base's type, and the base computes in its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import undula

NARROW = [torch.bfloat16, torch.float16]
each = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


class Net(nn.Module):
    """A module of every kind whose own parameters may train: tables, norms, convolutions, attention, bare ones."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.filter, self.body, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.filter(x.mT).mT
        return self.head(torch.tanh(self.body(x)) * self.gain)


IDS = torch.arange(10).view(2, 5)


def nets(dtype):
    torch.manual_seed(0)
    model = Net()
    return copy.deepcopy(model).to(dtype), model.to(dtype).float()


def trained(model, adapter, lr, steps=40):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        nn.functional.cross_entropy(model(IDS).flatten(0, 1).float(), torch.arange(10) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()


@each
@pytest.mark.parametrize("how", [("head",), ("*",), ("body.bias", "norm", "gain")], ids=["head", "all", "some"])
def test_what_trains_in_full_moves_over_a_narrow_base_as_over_a_wide_one(dtype, how):
    """Steps of 1e-4 round to nothing in bfloat16: nine in ten weights of a head used never to move."""
    moves = []
    for model in nets(dtype):
        adapter = undula.attach(model, undula.LoRA(r=2), ("body",), full=how)
        start = {n: t.detach().clone() for n, t in adapter.full.items()}
        trained(model, adapter, lr=1e-4)
        assert {t.dtype for t in adapter.full.values()} == {torch.float32}
        moves.append({n: t.detach() - start[n] for n, t in adapter.full.items()})
    narrow, whole = (torch.cat([t.flatten() for t in m.values()]) for m in moves)
    assert torch.equal(whole == 0, narrow == 0) or (narrow == 0).float().mean() <= (whole == 0).float().mean() + 0.01
    assert nn.functional.cosine_similarity(narrow, whole, dim=0) > 0.9


@each
def test_the_model_computes_in_its_own_type_and_is_itself_again(dtype, tmp_path):
    """At the start the function is the base's to the bit, and so is the model after `detach`; what is saved in float32
    computes the same when it is loaded."""
    model, _ = nets(dtype)
    classes = [type(m) for m in model.modules()]
    weights = dict(model.named_parameters())
    base = model(IDS)
    adapter = undula.attach(model, undula.LoRA(r=2), ("body",), full=("*",))
    assert torch.equal(model(IDS), base)
    assert model(IDS).dtype == dtype
    assert isinstance(model.head, nn.Linear)
    trained(model, adapter, lr=1e-2, steps=3)
    found = model(IDS)
    assert not torch.equal(found, base)
    adapter.save(tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), found)
        assert {p.dtype for n, p in twin.named_parameters() if ".undula." not in n} <= {torch.float32, dtype}
    undula.detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(p is weights[n] for n, p in model.named_parameters())
    assert torch.equal(model(IDS), base)
    again = undula.attach(model, undula.Adapter.load(tmp_path))
    assert {t.dtype for t in again.full.values()} == {torch.float32}
    assert torch.equal(model(IDS), found)


@each
@pytest.mark.parametrize("keep", [True, False])
def test_merged_models_keep_one_type(dtype, keep):
    """What leaves without its adapter is a plain model of the base's type, its function that of the casts."""
    model, _ = nets(dtype)
    adapter = undula.attach(model, undula.LoRA(r=2), ("body",), full=("head", "norm", "gain", "body.bias"))
    trained(model, adapter, lr=1e-2, steps=3)
    found = model(IDS)
    undula.merge(model, keep=keep)
    torch.testing.assert_close(model(IDS), found, atol=0.05, rtol=0.05)  # the merged layer rounds once more
    if keep:
        undula.unmerge(model)
        assert torch.equal(model(IDS), found)
    else:
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {type(m) for m in model.modules()} == {type(m) for m in Net().modules()}


@each
def test_a_model_that_changes_its_type_takes_the_casts_along(dtype):
    """`.float()` or `.double()` after `attach`: no mixture of types in the forward pass."""
    for to in (torch.float32, torch.float64):
        model, _ = nets(dtype)
        undula.attach(model, undula.LoRA(r=2), ("body",), full=("head", "norm", "gain"))
        model.to(to)
        assert model(IDS).dtype == to
        undula.detach(model)


def test_a_wide_base_trains_in_its_own_type():
    for dtype in (torch.float32, torch.float64):
        model = Net().to(dtype)
        adapter = undula.attach(model, undula.LoRA(r=2), ("body",), full=("head",))
        assert {t.dtype for t in adapter.full.values()} == {dtype}
        assert type(model.head) is nn.Linear


@each
@pytest.mark.parametrize("how", [("head",), ("*",), ("body.bias", "norm", "gain")], ids=["head", "all", "some"])
def test_a_collapse_over_a_narrow_base_is_measured_in_float32(dtype, how):
    """While a model is measured wide, its masters are used as they are; afterwards their casts are narrow again."""
    model, _ = nets(dtype)
    adapter = undula.attach(model, undula.LoRAN(r=2), ("body",), full=how)
    trained(model, adapter, lr=1e-2, steps=3)
    before = model(IDS)
    found = undula.collapse(model, undula.Truncate(2), held_out=[{"ids": IDS}])
    assert 0 <= found.error < 1
    assert torch.equal(model(IDS), before)
