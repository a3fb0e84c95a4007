"""Weights that a model reads itself: one law over all kinds of places that an adapter can stand at."""

import copy
import pickle
import threading
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import undula
from tests.support.numbers import shake
from undula import DoRA, Dropout, LoRA, LoRAN
from undula.host.matrices import layers_at, views

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _wide():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


class Calls(nn.Module):
    """What a model does with one module."""

    def __init__(self, module, call=lambda module, x: module(x)):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


class Reads(nn.Module):
    """Calls none of its layers but the embedding, which it reads too, as a head that is tied by hand."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.mixes = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x):
        h = F.linear(self.table(x), self.first.weight, self.first.bias)
        h = F.conv1d(h.transpose(1, 2), self.mixes.weight, padding=1).transpose(1, 2)
        return F.linear(h, self.table.weight)


class Loops(nn.Module):
    """Reads by variables: elements of a list, one by its place, a child under another name, and an argument."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.table, self.head = nn.Linear(8, 8), Head()

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight).tanh()
        x = F.linear(x, self.layers[0].weight)
        table = self.table
        return self.head(F.linear(x, table.weight), table)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, h, table):
        return F.linear(h * self.scale, table.weight)


class Peeks(nn.Module):
    """Reads its weight without gradients before it computes with it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)

    def forward(self, x):
        with torch.no_grad():
            scale = self.first.weight.norm()
        return F.linear(x, self.first.weight) / scale


def attend(module, x):
    return module(x, x, x)[0]


SIZES = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "vocab_size": 11,
    "pad_token_id": 0,
    "experts_implementation": "eager",
    "num_experts_per_tok": 3,  # all of them, so that each has a gradient
}


def experts(name, **more):
    def make():
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        return Calls(model, lambda module, x: module(input_ids=x, use_cache=False)[0])

    return make


def vectors():
    return torch.randn(2, 5, 8)


def tokens():
    return torch.arange(10).view(2, 5)


def image(*sides):
    return lambda: torch.randn(2, 4, *sides)


def ids():
    return torch.randint(0, 7, (2, 5))


ENCODER = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}


def attention(**more):
    return lambda: Calls(nn.MultiheadAttention(8, 2, batch_first=True, **more), attend)


def first(module, x):
    return module(x)[0]


KINDS = {
    "attention": (attention(), vectors, "*"),
    "attention's in_proj": (attention(), vectors, ["in_proj_weight"]),
    "attention's out_proj": (attention(), vectors, ["out_proj"]),
    "attention with q, k, v apart": (
        lambda: Calls(
            nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), lambda m, x: m(x, x[..., :6], x[..., :4])[0]
        ),
        vectors,
        "*",
    ),
    "encoder layer": (lambda: Calls(nn.TransformerEncoderLayer(**ENCODER)), vectors, "*"),
    "encoder": (lambda: Calls(nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2)), vectors, "*"),
    "transformer": (
        lambda: Calls(nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True), lambda m, x: m(x, x)),
        vectors,
        "*",
    ),
    "LSTM": (lambda: Calls(nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), first), vectors, "*"),
    "LSTM with a projection": (lambda: Calls(nn.LSTM(8, 6, proj_size=3), first), vectors, "*"),
    "GRU": (lambda: Calls(nn.GRU(8, 6), first), vectors, "*"),
    "RNN": (lambda: Calls(nn.RNN(8, 6), first), vectors, ["weight_hh_l0"]),
    "LSTMCell": (lambda: Calls(nn.LSTMCell(8, 6), lambda m, x: m(x[0], (x[1, :, :6],) * 2)[0]), vectors, "*"),
    "GRUCell": (lambda: Calls(nn.GRUCell(8, 6), lambda m, x: m(x[0], x[1, :, :6])), vectors, "*"),
    "RNNCell": (lambda: Calls(nn.RNNCell(8, 6), lambda m, x: m(x[0], x[1, :, :6])), vectors, "*"),
    "read by its parent": (Reads, ids, ["first", "mixes", "table"]),
    "read without gradients first": (Peeks, vectors, ["first"]),
    "read by variables": (Loops, vectors, "*"),
    "a parameter by its name": (
        lambda: Calls(nn.Embedding(7, 6), lambda m, x: F.linear(m(x), m.weight)),
        ids,
        ["module.weight"],
    ),
    "a stack of another kind": (lambda: Calls(nn.Bilinear(8, 8, 3), lambda m, x: m(x, x)), vectors, "*"),
    "Mixtral": (experts("Mixtral", num_local_experts=3), tokens, "*.experts.*"),
    "Qwen3-MoE": (experts("Qwen3Moe", num_experts=3, moe_intermediate_size=6), tokens, ["experts"]),
    "GPT-OSS": (experts("GptOss", num_local_experts=3), tokens, ["gate_up_proj", "down_proj"]),
    "one expert": (experts("Mixtral", num_local_experts=3), tokens, "*.experts.down_proj.1"),
    "ConvTranspose1d": (lambda: Calls(nn.ConvTranspose1d(4, 6, 3, stride=2)), image(5), "*"),
    "ConvTranspose2d": (lambda: Calls(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)), image(4, 5), "*"),
    "ConvTranspose3d": (lambda: Calls(nn.ConvTranspose3d(4, 6, (2, 1, 3))), image(2, 3, 4), "*"),
    "Conv1d": (lambda: Calls(nn.Conv1d(4, 6, 3)), image(5), "*"),
    "Conv2d": (lambda: Calls(nn.Conv2d(4, 6, 3)), image(5, 5), "*"),
    "Conv3d": (lambda: Calls(nn.Conv3d(4, 6, 2)), image(3, 3, 4), "*"),
    "Linear": (lambda: Calls(nn.Linear(8, 6)), vectors, "*"),
    "Embedding": (lambda: Calls(nn.Embedding(7, 6)), ids, "*"),
}
METHODS = [
    LoRA(r=2),
    LoRAN(r=2),
    DoRA(LoRA(r=2)),
    undula.SHiRA(r=1),
    undula.AuroRAStatic(r=2),
    undula.VeRA(r=3),
    undula.Sum((LoRA(r=1), LoRAN(r=2)), (0.5, -1.0)),
]


@pytest.mark.every(2)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_acts_wherever_it_stands(kind, method, tmp_path):
    """In training and in evaluation, with gradients and without; merged is live, what is saved loads, copies are equal,
    and without it the base is there to the bit."""
    make, data, where = KINDS[kind]
    model, x = make().double(), data()
    classes = {n: type(m) for n, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    bases = {training: model.train(training)(x).detach() for training in (True, False)}
    adapter = undula.attach(model, method, where)
    torch.testing.assert_close(model(x), bases[False])
    shake(adapter)
    live = {training: model.train(training)(x) for training in (True, False)}
    for training, y in live.items():
        assert not torch.allclose(y, bases[training])
        grads = torch.autograd.grad(y.square().sum(), adapter.parameters(), retain_graph=True, allow_unused=True)
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
    with torch.no_grad():
        torch.testing.assert_close(model(x), live[False])
    torch.testing.assert_close(copy.deepcopy(model)(x), live[False])
    with undula.rows(model, ["default"] * len(x)):
        torch.testing.assert_close(model(x), live[False])
    errors = undula.merge(model)
    assert set(errors) == set(adapter.factors)
    assert max(errors.values()) < 1e-9
    for training, y in live.items():
        torch.testing.assert_close(model.train(training)(x), y)
    undula.unmerge(model)
    torch.testing.assert_close(model(x), live[False])
    adapter.save(tmp_path / "a")
    undula.select(model, None)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    for training, y in bases.items():
        torch.testing.assert_close(model.train(training)(x), y)
    undula.attach(model, undula.Adapter.load(tmp_path / "a"), name="again")
    torch.testing.assert_close(model(x), live[False])
    undula.detach(model, "again")
    undula.detach(model, "default")
    assert classes == {n: type(m) for n, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (undula.AuroRA(), "stands on the rung Method"),
        (undula.LoRANActivation(), "stands on the rung Method"),
        (Dropout(LoRA(r=2), 0.5), "drops out beside W x"),
        (DoRA(Dropout(LoRA(r=2), 0.5)), "drops out beside W x"),
    ],
)
@pytest.mark.parametrize("kind", ["attention's out_proj", "LSTM", "one expert", "read by its parent"])
def test_a_method_without_an_adapted_weight_is_refused_by_name(kind, method, why):
    make, data, where = KINDS[kind]
    model, x = make(), data()
    base = model(x)
    with pytest.raises(TypeError, match=rf"\w+ is a weight that \w+ reads .*LoRA, LoRAN, DoRA.*{why}"):
        undula.attach(model, method, where)
    torch.testing.assert_close(model(x), base)
    assert undula.adapters(model) == {}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("LSTM", r"module \(the matrices of a LSTM are no linear layers: name them in `where`, as 'module'\)"),
        (
            "Qwen3-MoE",
            r"experts \(a Qwen3MoeExperts keeps its matrices in stacks.* name them in `where`, as 'experts'\)",
        ),
    ],
)
def test_all_linear_says_what_it_leaves_out(kind, told):
    make, _, _ = KINDS[kind]
    model = nn.Sequential(make(), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=rf"left out of where='all-linear': .*{told}"):
        adapter = undula.attach(model, LoRA(r=2))
    assert "1" in adapter.factors
    if kind == "LSTM":
        with pytest.raises(TypeError, match=told):
            undula.attach(make(), LoRA(r=2))


def test_all_linear_takes_the_matrices_of_attention():
    model = KINDS["encoder layer"][0]()
    leaves = {s.removeprefix("module.") for s in undula.attach(model, LoRA(r=2)).factors}
    assert leaves == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}


def test_rows_of_several_adapters_do_not_go_through_one_weight():
    """A batch has one weight: refused by its name, and the model is as it was; rows of one adapter go."""
    make, data, where = KINDS["attention"]
    model, x = make(), data()
    base, live = model(x), {}
    for name in "ab":
        shake(undula.attach(model, LoRA(r=2), where, name=name))
        live[name] = model(x)
    for names in (["a", "b"], ["a", None]):
        with pytest.raises(ValueError, match=r"in_proj_weight is a weight that MultiheadAttention reads once.*exclude"):
            undula.rows(model, names).__enter__()
        torch.testing.assert_close(model(x), live["b"])
    for name, wanted in (("a", live["a"]), (None, base)):
        with undula.rows(model, [name, name]):
            torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model(x), live["b"])
    undula.select(model, None)
    with undula.rows(model, ["a", "a"]):
        torch.testing.assert_close(model(x), live["a"])
    torch.testing.assert_close(model(x), base)
    assert type(model.module) is nn.MultiheadAttention


class Counting(LoRA):
    calls = 0

    def pair(self, f):
        Counting.calls += 1
        return super().pair(f)


@pytest.mark.parametrize(("kind", "sites"), [("attention", 2), ("Qwen3-MoE", 6), ("LSTM", 8)])
def test_an_adapted_weight_is_made_once_in_a_forward(kind, sites):
    """However often it is read."""
    make, data, where = KINDS[kind]
    model, x = make(), data()
    undula.attach(model, Counting(r=2), where)
    Counting.calls = 0
    model(x)
    assert Counting.calls == sites


def test_threads_have_adapted_weights_of_their_own():
    """Gradients of one forward are those of its own weight."""
    make, data, where = KINDS["LSTM"]
    model, x = make(), data()
    adapter = undula.attach(model, LoRA(r=2), where)
    shake(adapter)
    wanted = torch.autograd.grad(model(x).square().sum(), adapter.parameters())
    found = {}

    def step(i):
        found[i] = torch.autograd.grad(model(x).square().sum(), adapter.parameters())

    threads = [threading.Thread(target=step, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in (found[i] for i in range(4)):
        torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("kind", ["attention", "LSTM", "GPT-OSS", "read by its parent"])
def test_an_adapted_model_can_be_pickled_and_computed_again(kind):
    """Both kinds of gradient checkpointing come to the same gradients."""
    make, data, where = KINDS[kind]
    model, x = make(), data()
    adapter = undula.attach(model, LoRA(r=2), where)
    shake(adapter)
    wanted = torch.autograd.grad(model(x).square().sum(), adapter.parameters())
    for reentrant in (True, False):
        probe = torch.zeros((), requires_grad=True)
        again = torch.utils.checkpoint.checkpoint(lambda _: model(x), probe, use_reentrant=reentrant)
        again.square().sum().backward()
        torch.testing.assert_close(tuple(p.grad for p in adapter.parameters()), wanted)
        for p in adapter.parameters():
            p.grad = None
    module = getattr(model, "module", model)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    for name, t in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], t)


def test_one_weight_under_two_names_is_refused():
    model = nn.Sequential(OrderedDict(table=nn.Embedding(7, 6)))
    with pytest.raises(ValueError, match=r"table and table.weight are one weight: name it once"):
        undula.attach(model, LoRA(r=2), ["table", "table.weight"])


@pytest.mark.parametrize("kind", ["attention", "LSTM", "one expert"])
def test_what_asks_for_inputs_names_the_weight(kind):
    make, data, where = KINDS[kind]
    model, x = make(), data()
    adapter = undula.attach(model, LoRAN(r=2), where)
    sites = list(undula.detach(model).factors)
    bound = undula.Probe([x]).on(model, layers_at(model, sites))
    for ask in (bound.moments, bound.gradient):
        with pytest.raises(TypeError, match=rf"{sites[0]} is a weight that .* reads: .* cannot be seen"):
            ask(sites[0])
    shake(undula.attach(model, adapter))
    with pytest.raises(TypeError, match=r"is a weight that .* reads: what it is multiplied with cannot be seen"):
        undula.collapse(model, undula.LeastSquares(1, [x]))


@pytest.mark.parametrize("kind", ["attention", "LSTM", "GPT-OSS", "read by its parent", "ConvTranspose2d"])
def test_verbs_that_go_by_the_weights_alone(kind, tmp_path):
    """Truncation, spectra and switching; a plain LoRA of PEFT's knows no such weights, and is refused by name."""
    make, data, where = KINDS[kind]
    model, x = make(), data()
    base = model(x)
    shake(undula.attach(model, DoRA(LoRA(r=2)), where))
    live = model(x)
    collapsed = undula.collapse(model, undula.Truncate(99))
    assert {row.get("site") for row in undula.diagnose(model)} >= set(undula.selected(model).factors)
    undula.detach(model)
    undula.attach(model, collapsed.adapter)
    torch.testing.assert_close(model(x), live)
    adapter = undula.detach(model)
    with pytest.raises(ValueError, match=r"reads|whose forward takes more than x"):
        undula.io.export_lora(adapter, tmp_path / "lora")
    switch = undula.Switch(model)
    switch(adapter)
    torch.testing.assert_close(model(x), live)
    switch(None)
    assert torch.equal(model(x), base)


def test_a_weight_that_was_replaced_is_told():
    make, _, where = KINDS["attention"]
    model = make()
    shake(undula.attach(model, LoRA(r=2), where))
    model.module = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(RuntimeError, match="in_proj_weight was changed after the adapter was attached"):
        undula.merge(model)


@pytest.mark.parametrize("kind", ["attention", "LSTM", "Mixtral", "read by its parent"])
def test_a_narrow_base_stores_what_it_computes_with(kind):
    """W' has the base's type, as a merged weight has."""
    make, data, where = KINDS[kind]
    model, x = make().bfloat16(), data()
    x = x.bfloat16() if x.is_floating_point() else x
    adapter = undula.attach(model, LoRA(r=2), where)
    shake(adapter)
    live = model(x)
    assert live.dtype == torch.bfloat16
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


@pytest.mark.parametrize("kind", ["attention", "GRU"])
def test_a_compiled_model_reads_adapted_weights(kind):
    make, data, where = KINDS[kind]
    model, x = make(), data()
    shake(undula.attach(model, LoRA(r=2), where))
    live = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), live)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Bloom", "OPT"])
def test_layers_that_a_model_calls_are_not_taken_for_weights(name):
    """A weight that is read costs more and refuses methods: what libraries ask of weights beside (types, sizes, starts,
    tying) is no read."""
    sizes = {k: v for k, v in SIZES.items() if not k.startswith("num_experts")}
    config = getattr(transformers, f"{name}Config")(**sizes, ffn_dim=6, word_embed_proj_dim=8)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert {n for n, layer in views(model).items() if layer.reader is not None} == set()


class Hidden(nn.Module):
    """Reads a weight in a way that no class shows."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.seen(x), self.get_submodule("unseen").weight)


def test_a_site_that_never_computed_is_told_when_it_is_merged():
    model, x = Hidden(), vectors()
    shake(undula.attach(model, LoRA(r=2), ["seen", "unseen"]))
    model(x)
    with pytest.warns(UserWarning, match=r"has computed since .*, and never with unseen: .*where=\['layer.weight'\]"):
        undula.merge(model)
    model = Hidden()
    shake(undula.attach(model, LoRA(r=2), ["seen", "unseen.weight"]))
    live = model(x)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


class Two(nn.Module):
    """`a` is called; a subclass reads the weight of `b` in one way or another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)


class ByAMethod(Two):
    def get_weight(self):
        return self.b.weight

    def forward(self, x):
        return F.linear(self.a(x), self.get_weight())


class UnderAnotherName(Two):
    def forward(this, x):
        return F.linear(this.a(x), this.b.weight)


class ByAVariable(Two):
    def forward(self, x):
        me = self
        part = me.b
        return F.linear(self.a(x), part.weight)


class AtOnce(Two):
    def forward(self, x):
        return F.linear(self.a(x), (b := self.b).weight) + b.bias


class InLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"b": nn.Linear(6, 6)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer["b"].weight)
        return x


def on_the_object():
    model = Two()
    model.forward = types.MethodType(UnderAnotherName.forward, model)
    return model


def patched():
    """The class gets another forward after an adapter was there once."""

    class Patched(Two):
        def forward(self, x):
            return self.b(self.a(x))

    undula.attach(Patched(), undula.LoRA(r=1), "b")
    Patched.forward = UnderAnotherName.forward
    return Patched()


@pytest.mark.parametrize("make", [ByAMethod, UnderAnotherName, ByAVariable, AtOnce, InLists, on_the_object, patched])
def test_however_a_weight_is_read_its_adapter_acts(make):
    model, x = make(), torch.randn(4, 6)
    base = model(x)
    shake(undula.attach(model, undula.LoRA(r=2), ["*.b"] if make is InLists else ["b"]))
    live = model(x)
    assert not torch.allclose(live, base)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


def test_a_weight_that_changes_within_a_forward_is_made_anew():
    """Other parameters for a part, and a step on the factors, between two reads of one forward."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 4), nn.Linear(4, 4)
            self.between = lambda: None

        def forward(self, x):
            first = self.rnn(x)[0]
            self.between()
            doubled = {n: 2 * p.detach() for n, p in self.rnn.named_parameters() if "undula" not in n}
            other = torch.func.functional_call(self.rnn, doubled, (x,))[0]
            return first, self.rnn(x)[0], other, F.linear(x, self.head.weight)

    model, x = Twice(), torch.randn(3, 2, 4)
    adapter = shake(undula.attach(model, undula.LoRA(r=2), ["rnn", "head"]))
    with torch.no_grad():
        first, again, other, _ = model(x)
        torch.testing.assert_close(again, first)
        assert not torch.allclose(other, first)
        model.between = lambda: adapter.factors["rnn.weight_ih_l0"]["B"].add_(1.0)
        first, again, _, _ = model(x)
        assert not torch.allclose(again, first)


def test_all_linear_in_a_list_takes_what_is_named_beside():
    """What "all-linear" leaves out, and says to name, is named beside it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.GRU(4, 4))
    with pytest.warns(UserWarning, match="matrices of a GRU") as said:
        sites = undula.attach(model, undula.LoRA(r=2), ["all-linear", "1"]).factors
    assert set(sites) == {"0", "1.weight_ih_l0", "1.weight_hh_l0"}
    assert not any("LSTM" in str(w.message) for w in said)


def test_naming_attention_takes_all_of_it():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert set(undula.attach(model, undula.LoRA(r=2), ["0"]).factors) == {"0.in_proj_weight", "0.out_proj"}


def test_a_merged_recurrent_module_computes_with_the_list_that_it_keeps():
    model = nn.LSTM(4, 4)
    shake(undula.attach(model, undula.LoRA(r=2), "*"))
    undula.merge(model, keep=False)
    kept = zip(model._flat_weights, model._flat_weights_names, strict=True)
    assert all(t is getattr(model, name) for t, name in kept)
