"""The host: choosing layers, several adapters, what trains, tied weights, other people's hooks."""

import contextlib
import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula import LoRA
from undula.host.where import choose


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x).repeat(1, 1, 2)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Model(nn.Module):
    """Like a Hugging Face model: a body, and a head tied to the embedding."""

    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, 11, bias=False)
        self.head.weight = self.body.embed.weight

    def forward(self, ids):
        return self.head(self.body(ids))


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("all-linear", ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        ("*.q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        (["v_proj"], ["layers.0.v_proj", "layers.1.v_proj"]),
        (["layers.0.q_proj", "embed"], ["embed", "layers.0.q_proj"]),
        (re.compile(r".*1\.(q|v)_proj"), ["layers.1.q_proj", "layers.1.v_proj"]),
    ],
)
def test_choosing(where, found):
    assert list(choose(Model(), where)) == ["body." + n for n in found]


@pytest.mark.parametrize(
    ("where", "exclude", "found"),
    [
        ("all-linear", ["v_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        ("*", re.compile(r"body\.layers.*|head"), ["embed"]),
        (["q_proj", "v_proj"], "*.0.*", ["layers.1.q_proj", "layers.1.v_proj"]),
        (["layers.0.q_proj", "v_proj"], ["layers.0.q_proj"], ["layers.0.v_proj", "layers.1.v_proj"]),
    ],
)
def test_leaving_out(where, exclude, found):
    assert list(undula.attach(Model(), LoRA(r=2), where, exclude=exclude).factors) == ["body." + n for n in found]


def test_a_layer_has_one_host():
    """An adapter on the body and one on the whole model would undo each other."""
    model = Model()
    undula.attach(model.body, LoRA(r=2))
    live = model(IDS)
    with pytest.raises(TypeError, match=r"q_proj.*adapted already, by an adapter on a part of this model"):
        undula.attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match=r"body.layers.0.q_proj is adapted already, by an adapter on a part of this"):
        undula.attach(model, undula.attach(Model(), LoRA(r=2)))
    assert undula.adapters(model) == {}
    assert torch.equal(model(IDS), live)


@pytest.mark.parametrize("several", [False, True])
def test_a_classifier_is_no_part_of_the_body(several):
    """Models of timm tell theirs, or theirs: one with a body of convolutions has no linear layer beside."""

    class Backbone(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 5)

        def get_classifier(self):
            return (self.head, nn.Identity()) if several else self.head

    assert list(undula.attach(Backbone(nn.Linear(8, 8)), LoRA(r=2)).factors) == ["body"]
    with pytest.raises(LookupError, match="where='all-linear' matches none of the 2 layers"):
        undula.attach(Backbone(nn.Conv2d(3, 8, 3)), LoRA(r=2))


def test_leaving_out_nothing_or_everything_is_an_error():
    model = Model()
    with pytest.raises(LookupError, match=r"exclude='k_proj' matches none of the 6 layers"):
        undula.attach(model, LoRA(r=2), exclude=["k_proj"])
    with pytest.raises(LookupError, match=r"exclude='\*' leaves nothing of where='q_proj'"):
        undula.attach(model, LoRA(r=2), "q_proj", exclude="*")
    assert undula.adapters(model) == {}


@pytest.mark.parametrize("where", ["*.k_proj", ["q_proj", "k_proj"], re.compile("k_proj"), []])
def test_choosing_nothing_says_what_exists(where):
    model = Model()
    with pytest.raises(LookupError, match=r"matches none of the 6 layers that can be adapted.*embed, head, q_proj"):
        undula.attach(model, LoRA(), where)
    assert all(p.requires_grad for p in model.parameters())


def test_overrides():
    model = Model()
    adapter = undula.attach(model, LoRA(r=2), overrides={"*.1.v_proj": undula.LoRAN(r=3), "v_proj": LoRA(r=1)})
    assert [m.r for m in adapter.methods.values()] == [2, 1, 2, 3]
    assert adapter.method == LoRA(r=2)
    assert adapter.rung is undula.Additive
    with pytest.raises(LookupError, match=r"override '\*.k_proj' matches none of the chosen layers: body.layers"):
        undula.attach(model, LoRA(), overrides={"*.k_proj": LoRA(r=1)}, name="b")
    assert list(undula.adapters(model)) == ["default"]


def test_several_adapters():
    model = Model()
    base = model(IDS)
    a = shake(undula.attach(model, LoRA(r=2), name="a"))
    y = model(IDS)
    b = shake(undula.attach(model, undula.AuroRA(), "*.q_proj", name="b"))
    assert undula.selected(model) is b
    assert not torch.equal(model(IDS), y)
    undula.select(model, "a")
    assert torch.equal(model(IDS), y)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == a.num_parameters()
    undula.select(model, None)
    assert torch.equal(model(IDS), base)
    assert type(model.body.layers[0].q_proj) is nn.Linear
    with pytest.raises(LookupError, match="no adapter is called 'c'; attached are: a, b"):
        undula.select(model, "c")
    with pytest.raises(ValueError, match="'a' is attached already"):
        undula.attach(model, LoRA(), name="a")
    assert undula.detach(model, "a") is a
    undula.detach(model, "b")
    assert torch.equal(model(IDS), base)
    assert all(p.requires_grad for p in model.parameters())
    undula.attach(model, a)
    assert torch.equal(model(IDS), y)


def test_the_tree_does_not_grow_with_unselected_adapters():
    model = Model()
    undula.attach(model, LoRA(r=1), name="0")
    size = len(list(model.modules())), len(list(model.parameters()))
    for i in range(1, 50):
        undula.attach(model, LoRA(r=1), name=str(i))
    assert (len(list(model.modules())), len(list(model.parameters()))) == size


def test_what_was_frozen_before_stays_frozen():
    model = Model()
    model.body.layers[0].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    undula.attach(model, LoRA())
    undula.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_full_parameters_train_switch_and_return():
    model = Model()
    own = {n: p.clone() for n, p in model.named_parameters()}
    a = shake(undula.attach(model, LoRA(r=2), full=["layers.0.v_proj.bias", "layers.1.q_proj"], name="a"))
    assert sorted(a.full) == ["body.layers.0.v_proj.bias", "body.layers.1.q_proj.bias", "body.layers.1.q_proj.weight"]
    y = model(IDS)
    undula.select(model, None)
    assert all(torch.equal(own[n], p) for n, p in model.named_parameters())
    undula.select(model, "a")
    assert torch.equal(model(IDS), y)
    undula.merge(model)
    torch.testing.assert_close(model(IDS), y)
    undula.unmerge(model)
    assert torch.equal(model(IDS), y)
    with pytest.raises(ValueError, match="trains parameters in full"), undula.rows(model, ["a", None]):
        pass
    with pytest.raises(LookupError, match="full='classifier' matches no parameter"):
        undula.attach(model, LoRA(), full=["classifier"], name="b")


def test_merging_into_a_tied_weight_leaves_its_twin_alone():
    model = Model()
    embedding, y0 = model.body.embed.weight.clone(), model.body.embed(IDS)
    shake(undula.attach(model, LoRA(r=2), ["head"]))
    y = model(IDS)
    undula.merge(model)
    assert model.head.weight is not model.body.embed.weight
    assert torch.equal(model.body.embed.weight, embedding)
    assert torch.equal(model.body.embed(IDS), y0)
    torch.testing.assert_close(model(IDS), y)
    undula.unmerge(model)
    assert model.head.weight is model.body.embed.weight


def test_one_layer_under_two_names_is_adapted_once():
    model = nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer)
    adapter = undula.attach(model, LoRA(r=2), "*")
    assert list(adapter.factors) == ["0"]
    shake(adapter)
    x = torch.randn(3, 4)
    y = model(x)
    undula.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_into_a_narrow_base_reports_its_rounding(dtype):
    model = Model().to(dtype)
    weight = model.body.layers[0].q_proj.weight
    adapter = shake(undula.attach(model, LoRA(r=2), "*.0.q_proj"))
    exact = weight.double() + adapter.map(lambda f: {k: t.double() for k, t in f.items()}).delta("body.layers.0.q_proj")
    errors = undula.merge(model)
    stored = model.body.layers[0].q_proj.weight
    assert stored.dtype == dtype
    true = (stored.double() - exact).norm() / (exact - weight.double()).norm()
    assert errors["body.layers.0.q_proj"] == pytest.approx(float(true))
    assert float(true) > 1e-5
    undula.unmerge(model)
    assert model.body.layers[0].q_proj.weight is weight


def test_merge_states():
    model = Model()
    with pytest.raises(LookupError, match="no adapter is selected; attached are: none"):
        undula.merge(model)
    undula.attach(model, LoRA())
    undula.merge(model)
    for act in (
        lambda: undula.merge(model),
        lambda: undula.attach(model, LoRA(), name="b"),
        lambda: undula.select(model, None),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            act()
    undula.detach(model)
    adapter = shake(undula.attach(model, LoRA()))
    y = model(IDS)
    undula.merge(model, keep=False)
    torch.testing.assert_close(model(IDS), y)
    assert undula.adapters(model) == {}
    undula.attach(model, adapter.copy())
    assert not torch.allclose(model(IDS), y)


def test_a_forward_that_someone_replaced_on_the_instance_still_runs():
    """accelerate's hooks replace `forward` on the object: the adapter is neither skipped nor the hook lost."""
    model, calls = Model(), []
    layer = model.body.layers[0].q_proj
    inner = layer.forward
    layer.forward = lambda x: calls.append(1) or inner(x)
    base = model(IDS)
    shake(undula.attach(model, LoRA(r=2), "*.0.q_proj"))
    calls.clear()
    assert not torch.equal(model(IDS), base)
    assert len(calls) == 1
    undula.detach(model)
    assert torch.equal(model(IDS), base)
    assert len(calls) == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["accelerate", "closure"])
@pytest.mark.parametrize("method", [LoRA(r=2), undula.AuroRA(r=2)], ids=repr)
def test_a_forward_replaced_before_or_after_an_adapter_survives_every_verb(method, how, when):
    """Hooks stay on the layer through select, rows, a second attach, merge and detach."""
    model, calls = Model(), []
    layer = model.body.layers[0].q_proj

    def hook():
        if how == "closure":
            inner = layer.forward
            layer.forward = lambda *args, **named: calls.append(1) or inner(*args, **named)
            return
        hooks = pytest.importorskip("accelerate.hooks")

        class Counting(hooks.ModelHook):
            def pre_forward(self, module, *args, **named):
                calls.append(1)
                return args, named

        hooks.add_hook_to_module(layer, Counting())

    def called(times=1):
        calls.clear()
        y = model(IDS)
        assert len(calls) == times
        return y

    base = model(IDS)
    if when == "before":
        hook()
    shake(undula.attach(model, method, "*.0.q_proj", name="a"))
    if when == "after":
        hook()
    a = called()
    assert not torch.equal(a, base)
    undula.select(model, None)
    assert torch.equal(called(), base)
    shake(undula.attach(model, method, ["layers.0.q_proj"], name="b"))
    b = called()
    assert not torch.equal(a, b)
    undula.select(model, "a")
    torch.testing.assert_close(called(), a)  # a wrapped forward may take another kernel
    with undula.rows(model, ["b", None]):
        mixed = called(times=1 if method.bottleneck else 2)  # for all rows; where W is needed for its own too
    torch.testing.assert_close(mixed[0], b[0])
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(called(), a)
    if isinstance(method, undula.Reweight):
        undula.merge(model)
        torch.testing.assert_close(called(), a)
        undula.unmerge(model)
        torch.testing.assert_close(called(), a)
    undula.detach(model, "a")
    undula.detach(model, "b")
    assert torch.equal(called(), base)
    assert type(layer) is nn.Linear


def test_state_dict_keys_of_the_base_do_not_change():
    model, twin = Model(), Model()
    keys = set(model.state_dict())
    undula.attach(model, LoRA(r=2))
    now = set(model.state_dict())
    assert keys < now
    assert {k.split(".undula.")[1] for k in now - keys} == {"A", "B"}
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in keys})


def test_optimiser_steps_train_only_the_adapter():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    adapter = undula.attach(model, undula.LoRAN(r=2))
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten().flip(0))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    undula.detach(model)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_model_moves_with_its_adapter():
    model = Model()
    adapter = undula.attach(model, LoRA(r=2))
    model.double()
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    model(IDS)


def test_asking_and_refusals_leave_no_trace():
    """A query, or an attach that raised, makes no host: the model pickles without undula and can be written into."""
    model = Model()
    assert undula.adapters(model) == {}
    for ask in (
        lambda: undula.selected(model),
        lambda: undula.select(model, "a"),
        lambda: undula.attach(model, LoRA(), "nothing"),
        lambda: undula.merge(model),
    ):
        with pytest.raises(LookupError):
            ask()
    undula.select(model, None)
    assert not any("undula" in key for key in model.__dict__)
    undula.Switch(model)


@pytest.mark.parametrize("given", ["loaded", "mapped", "copied"])
def test_what_an_allocator_does_leaves_the_given_adapter_as_it_was(given, tmp_path):
    """ReLoRA gives a live adapter other methods and factors: those of the model, not of the value it came from."""
    undula.attach(Model(), LoRA(r=2)).save(tmp_path / "a")
    start = undula.Adapter.load(tmp_path / "a")
    start = {"loaded": start, "mapped": start.map(dict), "copied": start.copy()}[given]
    before = start.copy()
    for seed in (0, 1):
        model = Model()
        live = undula.attach(model, start)
        optimiser = torch.optim.AdamW(live.parameters(), 1e-2)
        course = undula.ranks.ReLoRA(cycles=2, seed=seed).start(model, optimiser, 4)
        for _ in range(4):
            course.before_forward()
            model(IDS).square().mean().backward()
            course.before_update()
            optimiser.step()
            course.after_update()
            optimiser.zero_grad()
        course.finish()
        assert live.methods != start.methods
    assert start.methods == before.methods
    for site, name, t in before.tensors():
        assert torch.equal(start.factors[site][name], t)


def _resized(model):
    model.head = nn.Linear(8, 13, bias=False)


def _smaller(model):
    model.head.weight = nn.Parameter(torch.zeros(7, 8))


@pytest.mark.parametrize("replaced", [_resized, _smaller])
@pytest.mark.parametrize("trains", [{"where": ["head"]}, {"where": ["q_proj"], "full": ["head"]}], ids=["site", "full"])
@pytest.mark.parametrize(
    "verb",
    [undula.selected, undula.merge, lambda m: undula.select(m, "default")],
    ids=["selected", "merge", "select"],
)
def test_a_layer_that_was_replaced_is_noticed_by_the_next_verb(replaced, trains, verb):
    """What a replaced layer's adapter trains no longer counts: an error that names it, and `detach` still works."""
    model = Model()
    model.head = nn.Linear(8, 11, bias=False)
    adapter = undula.attach(model, LoRA(r=2), **trains)
    replaced(model)
    with pytest.raises(RuntimeError, match=r"head.* was changed after the adapter was attached: .* Detach the adapter"):
        verb(model)
    rows = model.head.weight.shape[0]
    assert undula.detach(model) is adapter
    assert model.head.weight.shape[0] == rows
    assert model(IDS).shape[-1] == rows


@pytest.mark.parametrize(
    "move", [lambda m: m.double(), lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(11, 8)))]
)
def test_a_switch_says_when_the_weights_lie_elsewhere(move):
    """After `model.double()` the memory that was written into is no longer the model's: the base cannot be put back."""
    model = Model()
    model.head = nn.Linear(8, 11, bias=False)
    adapter = shake(undula.attach(model, LoRA(r=2), ["head"]))
    undula.detach(model)
    switch = undula.Switch(model)
    switch(adapter)
    move(model)
    written = model.head.weight.detach().clone()
    for next_one in (None, adapter):
        with pytest.raises(RuntimeError, match=r"the weight of head lies elsewhere .* Call switch\(None\) before"):
            switch(next_one)
    assert torch.equal(model.head.weight, written)


class Attending(nn.Module):
    """torch's own attention and encoder, which read weights of layers below them."""

    def __init__(self, nested=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x, padding=None):
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.out(self.attention(x, x, x, key_padding_mask=padding)[0])


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("method", [LoRA(r=2), undula.AuroRA(), undula.DoRA(LoRA(r=2)), undula.SHiRA()], ids=repr)
def test_an_adapter_counts_in_training_and_in_evaluation(method, weights, nested, padding):
    """torch's encoder layer computes from its layers' weights in evaluation, and gives nested tensors: not where an
    adapter is.  Afterwards its fast path is as it was.  With the weights that attention reads, and without."""
    model, x = Attending(nested).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    kept = ~PADDING if padding is not None else torch.ones(2, 5, dtype=torch.bool)
    fast = [m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    reads = weights and isinstance(method, undula.Reweight)  # else it has no weight for those who read one
    told = pytest.warns(UserWarning, match=r"in_proj_weight.* has no adapted weight")
    without = () if weights else ["attention", "self_attn", "out_proj"]
    with told if weights and not reads else contextlib.nullcontext():
        adapter = shake(undula.attach(model, method, exclude=without))
    assert any("out_proj" in site for site in adapter.factors) == reads
    live = model(x, padding)
    undula.select(model, None)
    base = model(x, padding)
    undula.select(model, "default")
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x, padding)[kept], live[kept])
            for names, wanted in ((["default", "default"], live), ([None, None], base)):
                with undula.rows(model, names):
                    torch.testing.assert_close(model(x, padding)[kept], wanted[kept])
            if reads:
                with pytest.raises(
                    ValueError, match=r"is a weight that MultiheadAttention .* once for the whole batch"
                ):
                    undula.rows(model, ["default", None]).__enter__()
                continue
            with undula.rows(model, ["default", None]):
                mixed = model(x, padding)
        torch.testing.assert_close(mixed[0], live[0])
        torch.testing.assert_close(mixed[1][kept[1]], base[1][kept[1]])
    if issubclass(adapter.rung, undula.Reweight):
        undula.merge(model)
        torch.testing.assert_close(model(x, padding)[kept], live[kept])
        undula.unmerge(model)
    undula.detach(model)
    assert fast == [m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)]


class Mixed(nn.Module):
    """Several kinds of layers under one last name."""

    def __init__(self):
        super().__init__()
        self.patch = nn.ModuleDict({"proj": nn.EmbeddingBag(3, 8)})
        self.attn = nn.ModuleDict({"proj": nn.Linear(8, 8)})


def test_layers_that_cannot_be_adapted_are_named():
    """A pattern that names a layer of another kind says so; one that names nothing else is refused."""
    with pytest.warns(
        UserWarning, match=r"left out of where='proj': patch.proj \(no adapter acts on a EmbeddingBag as"
    ):
        assert list(undula.attach(Mixed(), LoRA(r=2), ["proj"]).factors) == ["attn.proj"]
    with pytest.raises(
        TypeError, match=r"where='patch.proj' names only layers that cannot be adapted: patch.proj \(no"
    ):
        undula.attach(Mixed(), LoRA(r=2), "patch.proj")
    with pytest.raises(TypeError, match=r"attention.out_proj is a weight that MultiheadAttention reads.*AuroRA.*rung"):
        undula.attach(Attending(), undula.AuroRA(), ["linear1", "attention.out_proj"])


def three(model):
    """Adapters a and b on the model, and what they and the base give."""
    x, want = torch.randn(2, 5, 8), {}
    for name in "ab":
        shake(undula.attach(model, LoRA(r=2), name=name))
        want[name] = model(x)
    undula.select(model, None)
    want[None] = model(x)
    return x, {name: y.detach() for name, y in want.items()}


def body():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def test_rows_nest():
    """An inner `rows` counts until it is left, by an exception too; then the outer one counts again."""
    model = body()
    x, want = three(model)
    undula.select(model, "b")
    with undula.rows(model, ["a", None]):
        for inner in (["b", "b"], ["a", "a", "b"], ["nobody"]):
            with contextlib.suppress(LookupError), undula.rows(model, inner):
                if len(inner) == 2:
                    torch.testing.assert_close(model(x), want["b"])
                raise LookupError
            torch.testing.assert_close(model(x), torch.stack([want["a"][0], want[None][1]]))
    torch.testing.assert_close(model(x), want["b"])


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: undula.select(m, "b"),
        lambda m: undula.select(m, None),
        lambda m: undula.detach(m, "a"),
        lambda m: undula.attach(m, LoRA(), name="c"),
        undula.merge,
    ],
    ids=["select", "select none", "detach", "attach", "merge"],
)
def test_verbs_within_rows_are_refused(verb):
    model = body()
    x, want = three(model)
    with undula.rows(model, ["a", "b"]):
        with pytest.raises(RuntimeError, match=r"within `undula.rows`: leave the block first"):
            verb(model)
        torch.testing.assert_close(model(x), torch.stack([want["a"][0], want["b"][1]]))
    torch.testing.assert_close(model(x), want[None])


def test_threads_with_rows_of_their_own_get_their_own_outputs():
    """One thread at a time is inside `rows`; another's plain forward meanwhile is refused, never another's output."""
    model = body()
    x, want = three(model)
    faults, refused = [], []

    def reader(name):
        for _ in range(40):
            with torch.no_grad(), undula.rows(model, [name] * 2):
                y = model(x)
            if not torch.allclose(y, want[name], atol=1e-5):
                faults.append(name)

    threads = [threading.Thread(target=reader, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults

    def plain():
        try:
            model(x)
        except RuntimeError as e:
            refused.append(str(e))

    with undula.rows(model, ["a", "b"]):
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "another thread is inside `undula.rows`" in refused[0]
    torch.testing.assert_close(copy.deepcopy(model)(x), want[None])
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), want[None])


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_is_called_by_a_text(name):
    """By None it would be attached and never selected: nothing would train."""
    model = body()
    with pytest.raises(TypeError, match="called by a text, found name="):
        undula.attach(model, LoRA(r=2), name=name)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_trains_in_full_is_not_adapted_beside():
    """ "all-linear" leaves it out, so that the adapter exports; where it is named as a site, it is both."""
    model = body()
    assert list(undula.attach(model, LoRA(r=2), full=["3"]).factors) == ["0", "1", "2"]
    undula.detach(model)
    assert list(undula.attach(model, LoRA(r=2), ["2", "3"], full=["3"]).factors) == ["2", "3"]
