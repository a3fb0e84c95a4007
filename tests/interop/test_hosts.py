"""One contract, two hosts: a model that undula hosts itself, and one that PEFT hosts through `undula.peft_config`.

The measure of both is a third host, written here in ten lines, that does nothing but call the method.
"""

import contextlib

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import undula
from tests.support.models import gpt2, llama, shake, tokens, trained
from undula import (
    AuroRA,
    AuroRAStatic,
    Centred,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
    Reweight,
    SineLoRA,
    Sum,
)
from undula.host.build import made
from undula.host.views import view
from undula.methods.activations import Sinter
from undula.methods.aurora import PerChannel
from undula.starts import Gaussian

BENT = LoRAN(r=2, activation=Sinter(a=0.5, w=2.0), learn=("a", "w"))
METHODS = [
    LoRA(r=3),
    LoRA(r=4, scaling=undula.RankStabilised()),
    LoRAN(r=2),
    BENT,
    SineLoRA(r=2),
    AuroRA(r=2),
    AuroRA(r=3, spline=PerChannel()),
    AuroRAStatic(r=2),
    DoRA(LoRA(r=2)),
    DoRA(BENT),
    Dropout(LoRA(r=2), 0.3),
    Dropout(AuroRA(), 0.3),
    Centred(BENT, Gaussian(0.1)),
    Sum((LoRA(r=2), BENT), (1.0, -0.5)),
]
LLAMA = ("q_proj", "v_proj", "down_proj")
GPT2 = ("c_attn", "c_fc")


class Called(nn.Module):
    """The third host's layer."""

    def __init__(self, module, method, factors):
        super().__init__()
        self.module, self.method = module, method
        self.factors = nn.ParameterDict(factors)

    def forward(self, x):
        return self.method.forward(x, view(self.module), dict(self.factors))


class Native:
    """undula's own host."""

    def put(self, model, method, targets, name="default"):
        undula.attach(model, method, list(targets), name=name)
        return model

    def parameters(self, model):
        return undula.selected(model).parameters()

    def factors(self, model):
        return undula.selected(model).factors

    def merge(self, model):
        undula.merge(model)

    def unmerge(self, model):
        undula.unmerge(model)

    def unload(self, model):
        undula.detach(model)
        return model

    def select(self, model, name):
        undula.select(model, name)

    def delete(self, model, name):
        undula.detach(model, name)

    @contextlib.contextmanager
    def disabled(self, model):
        name = next(n for n, a in undula.adapters(model).items() if a is undula.selected(model))
        undula.select(model, None)
        yield
        undula.select(model, name)

    def mixed(self, model, x, names):
        with undula.rows(model, names):
            return model(x).logits

    def save(self, model, path):
        undula.selected(model).save(path)

    def load(self, model, path):
        undula.attach(model, undula.Adapter.load(path))
        return model


class Bridge:
    """PEFT's host."""

    def put(self, model, method, targets, name="default"):
        config = undula.peft_config(method, list(targets))
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
            return model
        return peft.get_peft_model(model, config, name).eval()

    def parameters(self, model):
        return list(trained(model).values())

    def factors(self, model):
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "law")}
        return {n: m.undula_factors[model.active_adapter].factors() for n, m in layers.items()}

    def merge(self, model):
        model.merge_adapter()

    def unmerge(self, model):
        model.unmerge_adapter()

    def unload(self, model):
        return model.unload()

    def select(self, model, name):
        model.set_adapter(name)

    def delete(self, model, name):
        model.delete_adapter(name)

    def disabled(self, model):
        return model.disable_adapter()

    def mixed(self, model, x, names):
        return model(x, adapter_names=["__base__" if n is None else n for n in names]).logits

    def save(self, model, path):
        model.save_pretrained(path)

    def load(self, model, path):
        undula.enable_peft()
        return peft.PeftModel.from_pretrained(model, path)


HOSTS = {"undula": Native(), "peft": Bridge()}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)
MODELS = {"llama": (llama, LLAMA), "gpt2": (gpt2, GPT2)}
# GPT-2 keeps its matrices transposed: one method of every rung goes over both models
CASES = [("llama", m) for m in METHODS] + [("gpt2", m) for m in (LoRA(r=3), BENT, DoRA(LoRA(r=2)), AuroRA(r=2))]
each_case = pytest.mark.parametrize(
    ("make", "targets", "method"), [(*MODELS[k], m) for k, m in CASES], ids=[f"{k}-{m!r}" for k, m in CASES]
)
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")


def called(make, targets, method, factors):
    """The model in the third host, with the given factors (copied)."""
    model = make().requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if n.endswith(targets)}
    assert set(layers) == set(factors)
    for name, module in layers.items():
        own = {k: nn.Parameter(t.detach().clone(), t.requires_grad) for k, t in factors[name].items()}
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Called(module, method, own))
    return model


@each_host
@each_case
def test_values_and_gradients(host, method, make, targets):
    """The same logits and the same gradient for every factor; the untouched model at the start."""
    x, untouched = tokens(), make()(tokens()).logits
    torch.manual_seed(5)
    model = host.put(make(), method, targets)
    torch.testing.assert_close(model(x).logits, untouched)
    torch.manual_seed(5)
    layers = {n: view(m) for n, m in make().named_modules() if n.endswith(targets)}
    fresh = made(layers, dict.fromkeys(layers, method))
    for site, f in host.factors(model).items():
        assert all(torch.equal(t, fresh.factors[site][k]) for k, t in f.items())  # the same seed makes the same adapter
    assert sum(p.numel() for p in trained(model).values()) == fresh.num_parameters()
    shake(host.parameters(model))
    oracle = called(make, targets, method, host.factors(model))
    for m in (model, oracle):
        m.train()
        torch.manual_seed(7)  # dropout
        m(x, labels=x).loss.backward()
    wanted = {n: m.factors for n, m in oracle.named_modules() if isinstance(m, Called)}
    for site, f in host.factors(model).items():
        for k, t in f.items():
            assert (t.grad is None) == (wanted[site][k].grad is None)
            assert t.grad is None or t.grad.any()
            torch.testing.assert_close(t.grad, wanted[site][k].grad)
    torch.testing.assert_close(model.eval()(x).logits, oracle.eval()(x).logits)


@each_host
@each_case
def test_merge_and_unmerge(host, method, make, targets):
    x, untouched = tokens(), make()
    model = host.put(make(), method, targets)
    shake(host.parameters(model))
    y = model(x).logits
    if not isinstance(method, Reweight):
        with pytest.raises(TypeError, match=r"cannot be merged: it stands on the rung Method.*undula\.collapse"):
            host.merge(model)
        assert torch.equal(model(x).logits, y)
        return
    host.merge(model)
    torch.testing.assert_close(model(x).logits, y)
    host.unmerge(model)
    assert torch.equal(model(x).logits, y)
    model = host.unload(model)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(t, untouched.state_dict()[k]) for k, t in model.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]


@each_host
@each_case
def test_either_loads_what_the_other_saves(host, method, make, targets, tmp_path):
    x, model = tokens(), host.put(make(), method, targets)
    shake(host.parameters(model))
    y = model(x).logits
    host.save(model, tmp_path)
    for reader in HOSTS.values():
        again = reader.load(make(), tmp_path)
        torch.testing.assert_close(again(x).logits, y)
        reader.save(again, tmp_path / "again")
        before, after = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[k]) for k, t in before.items())


@each_host
@each_method
def test_several_adapters(host, method):
    """Of different methods: switched, mixed row by row, disabled, deleted."""
    x, y = tokens(), {None: llama()(tokens()).logits}
    model = host.put(llama(), method, LLAMA, "french")
    shake(host.parameters(model))
    y["french"] = model(x).logits
    model = host.put(model, AuroRA(), ("q_proj", "o_proj"), "german")
    shake(host.parameters(model))
    y["german"] = model(x).logits
    assert not torch.allclose(y["german"], y["french"])
    names = ["german", None, "french", "german"]
    rows = torch.stack([y[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(host.mixed(model, x, names), rows)
    with host.disabled(model):
        assert torch.equal(model(x).logits, y[None])
    host.select(model, "french")
    assert torch.equal(model(x).logits, y["french"])
    host.delete(model, "german")
    assert torch.equal(model(x).logits, y["french"])
