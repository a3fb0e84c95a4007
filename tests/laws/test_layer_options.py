"""Options of a layer that act beside its product: padding, renormalised look-ups, convolutions in groups."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from tests.support.zoo import INNER, ZOO
from undula import LoRA, Reweight

pytestmark = pytest.mark.usefixtures("float64")

GROUPED = [undula.LoRAN(r=2), undula.SHiRA(r=1), undula.DoRA(undula.LoRAN(r=2))]


@pytest.mark.every(3)
@pytest.mark.parametrize("padding", [0, 4, -1])
@pytest.mark.parametrize("method", ZOO, ids=repr)
def test_the_padding_of_an_embedding_stays_the_bases(method, padding):
    """Whatever trains, live and merged; all other rows are what they were without a padding row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 12, padding_idx=padding)).eval()
    x, base = torch.arange(11), model[0].weight.detach().clone()
    adapter = undula.attach(model, method, "*")
    shake(adapter)
    live = model(x)
    gradients = torch.autograd.grad(live.square().sum(), adapter.parameters(), allow_unused=True)
    torch.testing.assert_close(live[padding], base[padding])
    assert not torch.equal(live, base)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)
    if isinstance(adapter.method, Reweight):
        undula.merge(model)
        torch.testing.assert_close(model(x), live)
        torch.testing.assert_close(model[0].weight[padding], base[padding])


@pytest.mark.parametrize("inner", [LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.AuroRA(), undula.VeRA()], ids=repr)
def test_training_does_not_move_padding(inner):
    """Twenty steps of Adam with weight decay; of a LoRA the exported pair has nothing there either."""
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0))
    adapter = undula.attach(model, inner, ["0"])
    optimiser = torch.optim.AdamW(adapter.parameters(), 0.1, weight_decay=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        (model(torch.arange(9)) - 1).square().sum().backward()
        optimiser.step()
    assert float(model(torch.tensor([0])).detach().norm()) == 0.0
    if isinstance(inner, LoRA):
        assert float(adapter.delta("0")[:, 0].norm()) == 0.0
        assert float(adapter.delta("0").norm()) > 0.1


def test_an_embedding_that_renormalises_is_refused():
    model = nn.Sequential(nn.Embedding(10, 6, max_norm=1.0))
    with pytest.raises(TypeError, match=r"names only layers that cannot be adapted: 0 \(an embedding with max_norm=1"):
        undula.attach(model, LoRA(r=2), ["0"])


@pytest.mark.parametrize("method", [*INNER[:1], *INNER[2:], LoRA(r=16), undula.LoRAXS(r=2)], ids=repr)
@pytest.mark.parametrize("groups", [2, 16])
def test_a_bottleneck_on_groups_is_refused_at_attach(method, groups):
    """By its groups and not by its shape, naming the layer; the model is as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(16, 16, 3, groups=groups))
    with pytest.raises(ValueError, match=rf"1 is a convolution in {groups} groups without a common bottleneck"):
        undula.attach(model, method, "*")
    assert type(model[1]) is nn.Conv2d
    assert "_undula" not in model.__dict__


@pytest.mark.parametrize("method", GROUPED, ids=repr)
@pytest.mark.parametrize("groups", [2, 8])
def test_a_full_update_acts_on_groups(method, groups):
    model, x = nn.Sequential(nn.Conv2d(16, 8, 3, groups=groups, padding=1)), torch.randn(2, 16, 5, 5)
    base = model(x)
    undula.attach(model, method, "0")
    torch.testing.assert_close(model(x), base)
    shake(undula.selected(model))
    live = model(x)
    assert not torch.allclose(live, base)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


@pytest.mark.parametrize("method", [LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.VeRA()], ids=repr)
def test_padding_under_peft(method):
    """The second host keeps the padding row too, live and merged."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 12, padding_idx=0), nn.Linear(12, 3))
    base = model[0].weight.detach().clone()
    wrapped = peft.get_peft_model(model, undula.peft_config(method, ["0"]))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    embedding = wrapped.base_model.model[0]
    live = embedding(torch.arange(11)).detach()
    assert not torch.allclose(live[1:], base[1:])
    torch.testing.assert_close(live[0], base[0])
    merged = wrapped.merge_and_unload()[0].weight.detach()
    torch.testing.assert_close(merged, live)
    with pytest.raises(ValueError, match="an embedding with max_norm=1 rescales"):
        peft.get_peft_model(nn.Sequential(nn.Embedding(11, 12, max_norm=1.0)), undula.peft_config(method, ["0"]))


def test_weights_that_a_model_reads_are_adapted():
    """Mamba computes from dt_proj's weight, and its fused kernels from others'."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=11, state_size=4, intermediate_size=16
    )
    model, x = transformers.MambaForCausalLM(config), torch.arange(6)[None]
    base = model(x).logits
    adapter = undula.attach(model, LoRA(r=2))
    assert {s.rpartition(".")[2] for s in adapter.factors} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    torch.testing.assert_close(model(x).logits, base)
    shake(adapter)
    gradients = torch.autograd.grad(model(x).logits.square().sum(), adapter.parameters())
    assert all(g.abs().sum() > 0 for g in gradients)
    undula.detach(model)
    shake(undula.attach(model, LoRA(r=2), ["out_proj"]))
    live = model(x).logits
    assert not torch.allclose(live, base)
    undula.merge(model)
    torch.testing.assert_close(model(x).logits, live)


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shown(nn.Linear):
    """A forward of its own that is W x all the same."""

    def forward(self, x):
        return super().forward(x.contiguous())


class Scaled(nn.Embedding):
    def forward(self, x):
        return 3 * super().forward(x)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 2, 0, 2)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Halved(nn.Linear):
    def forward(self, x, scale=0.5):
        return super().forward(x) * scale


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Whitened(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class Squared(nn.Embedding):
    def forward(self, x):
        return super().forward(x).square()


class Conv(nn.Conv2d):
    """Its own `_conv_forward` alone."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.tanh(), bias)


FORWARDS = [
    (Normed(6, 6), torch.randn(3, 6)),
    (Doubled(6, 6), torch.randn(3, 6)),
    (Halved(6, 4), torch.randn(2, 3, 6)),
    (Clamped(6, 6), torch.randn(3, 6)),
    (Whitened(6, 4, bias=False), torch.randn(3, 6)),
    (Shown(6, 6), torch.randn(3, 6)),
    (Scaled(6, 6), torch.arange(6)),
    (Squared(6, 4), torch.arange(6)),
    (Padded(6, 6, 3, dilation=2, padding=1), torch.randn(2, 6, 7, 7)),
    (Standardised(6, 6, 3), torch.randn(2, 6, 7, 7)),
    (Conv(6, 4, 3), torch.randn(2, 6, 7, 7)),
]
STOCK = [
    (nn.Linear(6, 6), torch.randn(3, 6)),
    (nn.Conv2d(6, 4, 3), torch.randn(2, 6, 7, 7)),
    (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 7)),
    (nn.Conv3d(2, 4, 2), torch.randn(2, 2, 4, 3, 3)),
    (nn.Embedding(6, 4), torch.arange(6)),
]
METHODS = [LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.LoRAN(r=2), undula.SHiRA(r=1)]


def in_float64(*parts):
    """Copies of what is made when this file is read."""
    return [copy.deepcopy(p).double() if isinstance(p, nn.Module) or p.is_floating_point() else p for p in parts]


def with_weight(layer, W):
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(W.reshape(other.weight.shape) if W.shape[0] == other.weight.shape[0] else W)
    return other


def stored(layer):
    return layer


def old_weight_norm(layer):
    return nn.utils.weight_norm(layer, dim=None)


COMPUTED = [nn.utils.parametrizations.weight_norm, old_weight_norm, nn.utils.parametrizations.spectral_norm]
LAYERS = [(layer, x, stored) for layer, x in FORWARDS] + [(*layer, how) for layer in STOCK for how in COMPUTED]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("host", ["attach", "peft"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(("layer", "x", "computed"), LAYERS, ids=lambda p: getattr(p, "__name__", type(p).__name__))
def test_live_is_the_class_s_own_forward_with_the_adapted_weight(layer, x, computed, method, host):
    """Whatever a class does with its weight, stored or computed, an adapted layer does with the adapted one; and so
    does a merged one."""
    layer, x = in_float64(layer, x)
    model = nn.Sequential(OrderedDict(layer=computed(copy.deepcopy(layer)))).eval()
    W = model.layer.weight.detach().clone()
    base = model(x).detach()
    if host == "attach":
        adapter = undula.attach(model, method, ["layer"])
        torch.testing.assert_close(model(x), base)
        shake(adapter)
        f = adapter.factors["layer"]
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, undula.peft_config(method, ["layer"])).eval()
        f = model.base_model.model.layer.undula_factors["default"].factors()
        for t in f.values():
            if t.is_floating_point() and t.requires_grad:
                t.data += 0.1 * torch.randn_like(t)
    live = model(x)
    W_OI = W.T if isinstance(layer, nn.Embedding) else W.flatten(1)
    new_OI = method.weight(W_OI, f).detach()
    wanted = with_weight(layer, new_OI.T if isinstance(layer, nn.Embedding) else new_OI)(x)
    torch.testing.assert_close(live, wanted)
    assert not torch.allclose(live, base)
    if computed is stored:
        undula.merge(model) if host == "attach" else model.merge_adapter()
        torch.testing.assert_close(model(x), live)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("layer", [Halved(6, 4), Shown(6, 4), Whitened(6, 4)], ids=lambda part: type(part).__name__)
def test_rows_go_through_the_class_s_own_forward(layer, method):
    """Each row as its own adapter computes it alone."""
    model, x = nn.Sequential(*in_float64(layer)), torch.randn(3, 6)
    alone = {}
    for name in "ab":
        shake(undula.attach(model, method, "*", name=name))
        alone[name] = model(x)
    with undula.rows(model, ["b", None, "a"]):
        mixed = model(x)
    undula.select(model, None)
    for i, wanted in enumerate((alone["b"], model(x), alone["a"])):
        torch.testing.assert_close(mixed[i], wanted[i])


class Called(nn.Module):
    """A layer that is called with more than x, by position or by name."""

    def __init__(self, layer, by_name):
        super().__init__()
        self.layer, self.by_name = layer, by_name

    def forward(self, x, scale):
        return self.layer(input=x, scale=scale) if self.by_name else self.layer(x, scale)


class Turned(nn.Linear):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class TurnedConv(nn.Conv2d):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class TurnedEmbedding(nn.Embedding):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


@pytest.mark.parametrize("host", ["attach", "peft"])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Turned(6, 4), torch.randn(3, 6)),
        (TurnedConv(6, 4, 3), torch.randn(3, 6, 5, 5)),
        (TurnedEmbedding(6, 4), torch.arange(3)),
    ],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("method", [*METHODS, undula.AuroRA(r=2)], ids=repr)
def test_layers_that_are_called_with_more_than_x(method, layer, x, by_name, host):
    """Live is merged, also where what is given changes what W does; a batch in `rows` gets its own part of it."""
    layer, x = in_float64(layer, x)
    model = Called(layer, by_name)
    scale = 0.5 + torch.rand(3, *(1,) * (layer(x).ndim - 1))
    base = model(x, scale)
    if host == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, undula.peft_config(method, ["layer"]))
        torch.testing.assert_close(wrapped(x, scale), base)
        for p in wrapped.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        live = wrapped(x, scale)
        assert not torch.allclose(live, base)
        if isinstance(method, Reweight):
            wrapped.merge_adapter()
            torch.testing.assert_close(wrapped(x, scale), live)
        return
    adapter = undula.attach(model, method, ["layer"])
    torch.testing.assert_close(model(x, scale), base)
    shake(adapter)
    live = model(x, scale)
    assert not torch.allclose(live, base)
    with undula.rows(model, ["default", None, "default"]):
        mixed = model(x, scale)
    torch.testing.assert_close(mixed[::2], live[::2])
    torch.testing.assert_close(mixed[1], base[1])
    if isinstance(adapter.method, Reweight):
        undula.merge(model)
        torch.testing.assert_close(model(x, scale), live)


def test_a_vector_beside_x_that_may_be_of_rows_or_of_channels_is_refused_within_rows():
    model = Called(Turned(6, 3), by_name=False).double()
    undula.attach(model, LoRA(r=2), ["layer"])
    x, scale = torch.randn(3, 6), torch.rand(3)
    model(x, scale)
    with undula.rows(model, ["default", None, None]), pytest.raises(TypeError, match="of a row or of a channel"):
        model(x, scale)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x.shape


class Blocks(nn.Linear):
    """A block-diagonal product: its inputs are not of size I."""

    def forward(self, x):
        return nn.functional.linear(x.unflatten(-1, (2, -1)), self.weight).flatten(-2)


class Routed(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router, self.out = router, nn.Linear(12, 4)

    def forward(self, x):
        y = self.router(x)
        return self.out(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize("router", [Router(12, 12), Blocks(6, 6), Normed(12, 12)], ids=lambda part: type(part).__name__)
def test_all_linear_leaves_out_what_is_no_product_and_says_so(router):
    """Named, such a layer is adapted through its own forward."""
    model, x = Routed(*in_float64(router)), torch.randn(3, 12)
    base = model(x)
    with pytest.warns(UserWarning, match=r"left out of where='all-linear': router .*forward is not W x \+ b"):
        assert list(undula.attach(model, LoRA(r=2)).factors) == ["out"]
    undula.detach(model)
    shake(undula.attach(model, LoRA(r=2), ["router"]))
    live = model(x)
    assert not torch.allclose(live, base)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (undula.AuroRA(r=2), "stands on the rung Method"),
        (undula.Dropout(LoRA(r=2), 0.1), "dropout acts beside W x alone"),
    ],
)
def test_a_method_that_cannot_go_through_a_forward_is_refused(method, why):
    model = Routed(Normed(12, 12))
    with pytest.raises(TypeError, match=rf"router: Normed.forward is not W x \+ b.*{why}"):
        undula.attach(model, method, ["router"])
    assert undula.adapters(model) == {}


def test_a_forward_on_the_object_that_is_no_product_is_refused():
    model = Routed(nn.Linear(12, 12))
    inner = model.router.forward
    model.router.forward = lambda x: 0.5 * inner(x)
    with pytest.raises(TypeError, match=r"router: .* is not W x \+ b \(`forward` was replaced on the object\)"):
        undula.attach(model, LoRA(r=2), ["router"])


class Computing(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("kernel", self._parameters.pop("weight").detach())

    @property
    def weight(self):
        return self.kernel.tanh()


def test_a_class_that_computes_its_weight_is_refused():
    """No other weight can be put in the place of a property."""
    with pytest.raises(TypeError, match=r"0: .* computes its weight"):
        undula.attach(nn.Sequential(Computing(3, 4, 3)), LoRA(r=2), "*")


def _as_fsdp(layer):
    """FSDP puts views of its flat parameter in the place of parameters, as plain attributes."""
    for name, p in list(layer._parameters.items()):
        if p is not None:
            del layer._parameters[name]
            object.__setattr__(layer, name, p.detach())
    return layer


COMPUTED = {
    "parametrized": nn.utils.parametrizations.weight_norm,
    "by a hook": nn.utils.weight_norm,
    "a plain attribute": _as_fsdp,
}
UNDER = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(2, 3, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), torch.randn(2, 2, 4, 4, 4)),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "a class that pads": (lambda: Padded(3, 4, 3), torch.randn(2, 3, 5, 5)),
    "Linear": (lambda: nn.Linear(3, 4), torch.randn(2, 3)),
    "Embedding": (lambda: nn.Embedding(7, 4), torch.arange(7)),
    "a class that scales": (lambda: Scaled(7, 4), torch.arange(7)),
}


@pytest.mark.parametrize("method", [LoRA(r=2), LoRA(r=4), undula.SHiRA(r=1), undula.LoRAN(r=2)], ids=repr)
@pytest.mark.parametrize("kind", UNDER)
@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_whose_weight_is_computed_acts_as_the_same_layer_with_that_weight(computed, kind, method):
    """Whatever hides the name `weight`: a bottleneck must run with A, not with the layer's own matrix (which goes
    unnoticed where A has as many rows)."""
    make, x = UNDER[kind]
    x = x.double() if x.is_floating_point() else x
    if kind == "Conv2d in groups" and isinstance(method, undula.LowRank):
        pytest.skip("refused: no common bottleneck")
    torch.manual_seed(0)
    plain = nn.Sequential(make()).double()
    odd = nn.Sequential(COMPUTED[computed](copy.deepcopy(plain[0])))
    torch.testing.assert_close(odd(x), plain(x))
    adapter = undula.attach(plain, method, "*")
    shake(adapter)
    undula.attach(odd, adapter.copy())
    torch.testing.assert_close(odd(x), plain(x))
    assert not torch.allclose(plain(x), make()(x))


@pytest.mark.parametrize(
    ("normed", "parts"),
    [
        (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0"),
        (nn.utils.parametrizations.orthogonal, "parametrizations.weight.original"),
        (nn.utils.weight_norm, "weight_g, weight_v"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_merge_into_a_computed_weight_is_refused(normed, parts):
    """It names the layer and what its weight comes from; under PEFT too."""
    model, x = nn.Sequential(OrderedDict(plain=nn.Linear(6, 6), odd=normed(nn.Linear(6, 6)))), torch.randn(3, 6)
    base = model(x)
    shake(undula.attach(model, LoRA(r=2), ["plain", "odd"]))
    live = model(x)
    assert not torch.allclose(live, base)
    with pytest.raises(TypeError, match=f"odd: its weight is no parameter but computed \\({parts}"):
        undula.merge(model)
    assert torch.equal(model(x), live)
    adapter = undula.detach(model)
    with pytest.raises(TypeError, match="odd: its weight is no parameter but computed"):
        undula.Switch(model)(adapter)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, undula.peft_config(LoRA(r=2), ["plain", "odd"]))
    with pytest.raises(TypeError, match=f"odd: its weight is no parameter but computed \\({parts}"):
        wrapped.merge_adapter()
    assert not wrapped.base_model.model.plain.merged


class Gained(nn.Linear):
    """A class with a parameter beside the weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.full((sizes[1],), 1.7))

    def forward(self, x):
        return self.gain * nn.functional.linear(x, self.weight) + self.bias


class GainedConv(nn.Conv2d):
    """One gain for each output: no gain for the rows of a bottleneck."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.gain = nn.Parameter(torch.linspace(1, 2, sizes[1])[:, None, None])

    def forward(self, x):
        return self.gain * super().forward(x)


class Dropping(nn.Linear):
    """W x + b in evaluation alone."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Shifted(nn.Embedding):
    """Row x + 1 for x: its padding's row is another one than the padding's index."""

    def forward(self, x):
        return super().forward(x + 1)


OWN_STATE = {
    "a gain": (lambda: Gained(6, 4), lambda: torch.randn(3, 6)),
    "a gain on a convolution": (lambda: GainedConv(2, 4, 3), lambda: torch.randn(3, 2, 5, 5)),
    "a gain for as many outputs as the rank": (lambda: GainedConv(2, 2, 3), lambda: torch.randn(3, 2, 5, 5)),
    "dropout of its own": (lambda: Dropping(6, 4), lambda: torch.randn(3, 6)),
    "shifted": (lambda: Shifted(9, 4, padding_idx=0), lambda: torch.arange(8)),
    "shifted, padding within": (lambda: Shifted(9, 4, padding_idx=3), lambda: torch.arange(8)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [LoRA(r=2), undula.LoRAN(r=2), undula.DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize("layer", OWN_STATE)
def test_live_is_merged_whatever_else_a_class_holds_and_in_training(layer, method, training):
    make, inputs = OWN_STATE[layer]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), inputs()
    adapter = undula.attach(model, method, ["0"])
    shake(adapter)
    model.train(training)
    torch.manual_seed(1)
    live = model(x)
    if not training:
        with undula.rows(model, ["default"] * len(x)):
            torch.testing.assert_close(model(x), live)
    undula.merge(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), live)


class Observing(nn.Linear):
    """What quantisation-aware training and auxiliary losses do: the forward keeps what it saw."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("most", torch.zeros(()))
        self.calls, self.loss = 0, None

    def forward(self, x):
        self.most.copy_(torch.maximum(self.most, x.detach().abs().max()))
        self.calls += 1
        x = nn.functional.dropout(nn.functional.normalize(x, dim=-1), 0.5, self.training)
        y = super().forward(x)
        self.loss = y.square().mean()
        return y


def test_what_a_forward_writes_is_the_models_and_attach_writes_nothing():
    model, x = nn.Sequential(Observing(6, 4)), torch.randn(3, 6)
    layer, state = model[0], torch.get_rng_state()
    adapter = undula.attach(model, LoRA(r=2), ["0"])
    assert (float(layer.most), layer.calls, layer.loss, layer.training) == (0.0, 0, None, True)
    undula.detach(model)
    torch.set_rng_state(state)
    undula.attach(model, adapter)
    assert torch.equal(torch.get_rng_state(), state)
    shake(adapter)
    y = model(x)
    torch.testing.assert_close(layer.loss, y.square().mean())
    assert (float(layer.most), layer.calls) == (float(x.abs().max()), 1)
    layer.loss.backward()
    assert adapter.factors["0"]["A"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.LazyLinear(4), "0 is a LazyLinear that has not seen an input: .*Call the model once"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "0 has a complex weight, factors are real"),
    ],
)
@pytest.mark.parametrize("where", [["0"], "all-linear"])
def test_a_weight_without_a_shape_or_with_two_parts_is_refused(layer, why, where):
    with pytest.raises(ValueError, match=why):
        undula.attach(nn.Sequential(layer()), LoRA(r=2), where)


class Mixing(nn.Module):
    """Reads a convolution's kernel for a product of its own, as hybrid language models do."""

    def __init__(self):
        super().__init__()
        self.mix, self.last = nn.Conv1d(6, 6, 3, groups=6, padding=2, bias=False), nn.Conv1d(6, 4, 1)
        self.dtype = self.last.weight.dtype

    def forward(self, x):
        x = x.to(self.last.weight.dtype)
        return self.last(nn.functional.conv1d(x, self.mix.weight, groups=6, padding=2))


def test_a_convolution_whose_weight_its_parent_reads_is_adapted():
    model, x = Mixing(), torch.randn(2, 6, 5)
    base = model(x)
    adapter = undula.attach(model, undula.LoRAN(r=2), "*")
    assert list(adapter.factors) == ["mix", "last"]
    undula.detach(model)
    shake(undula.attach(model, undula.LoRAN(r=2), ["mix"]))
    live = model(x)
    assert not torch.allclose(live, base)
    undula.merge(model)
    torch.testing.assert_close(model(x), live)
