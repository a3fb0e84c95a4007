"""Options of a layer that act beside its product: padding, renormalised look-ups, convolutions in groups."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import undula
from undula import LoRA, Reweight

from .test_laws import shake
from .zoo import INNER, ZOO

GROUPED = [undula.LoRAN(r=2), undula.SHiRA(r=1), undula.DoRA(undula.LoRAN(r=2))]


@pytest.fixture(autouse=True)
def _wide():
    torch.set_default_dtype(torch.float64)


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


def test_weights_that_a_model_reads_are_left_out():
    """Mamba computes from dt_proj's weight: "all-linear" says so, and naming it alone is refused."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=11, state_size=4, intermediate_size=16
    )
    model = transformers.MambaForCausalLM(config)
    with pytest.warns(
        UserWarning, match=r"left out of where='all-linear': .*dt_proj.*reads its weight without calling it"
    ):
        sites = undula.attach(model, LoRA(r=2)).factors
    assert sites
    assert not any(site.endswith(("dt_proj", "out_proj", "x_proj")) for site in sites)
    undula.detach(model)
    with pytest.raises(TypeError, match=r"dt_proj .*reads its weight"):
        undula.attach(model, LoRA(r=2), ["dt_proj"])


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


FORWARDS = [
    (Normed(6, 6), torch.randn(3, 6), False),
    (Doubled(6, 6), torch.randn(3, 6), False),
    (Shown(6, 6), torch.randn(3, 6), True),
    (Scaled(6, 6), torch.arange(6), True),
    (Padded(6, 6, 3, dilation=2, padding=1), torch.randn(2, 6, 7, 7), True),
    (Standardised(6, 6, 3), torch.randn(2, 6, 7, 7), False),
]


@pytest.mark.parametrize("method", [LoRA(r=2), undula.DoRA(LoRA(r=2)), undula.LoRAN(r=2)], ids=repr)
@pytest.mark.parametrize(("layer", "x", "adds_up"), FORWARDS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merge_into_a_forward_of_its_own_is_right_or_refused(layer, x, adds_up, method, dtype):
    """A class that scales or normalises its weight gives no W' x: the merge says so, and changes nothing."""
    model = copy.deepcopy(nn.Sequential(layer)).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    shake(undula.attach(model, method, "*"))
    live = model(x).detach()
    if adds_up:
        undula.merge(model)
        near = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
        assert float((model(x).detach() - live).double().norm() / live.double().norm()) < near
        return
    with pytest.raises(TypeError, match=rf"0: {type(layer).__name__}.forward does not add up over weights"):
        undula.merge(model)
    assert torch.equal(model(x), live)


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
