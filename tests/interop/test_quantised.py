"""Adapters over quantised bases, against the same layers written out densely."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import undula
from tests.support.bases import BASES, bits
from tests.support.zoo import ZOO
from undula import (
    AuroRA,
    DoRA,
    LeastSquares,
    LoRA,
    LoRAN,
    Reweight,
    collapse,
)
from undula.host import quantised as bases
from undula.host.views import view

pytestmark = pytest.mark.usefixtures("made_up_evidence")

each_base = pytest.mark.parametrize("base", BASES)
two_bases = pytest.mark.parametrize("base", ["torchao int8", "bitsandbytes nf4"])


def net(base, dtype=torch.float32):
    """(a quantised model, the same weights densely)."""
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)).to(dtype).eval()
    model = BASES[base](copy.deepcopy(plain)).eval().requires_grad_(False)
    with torch.no_grad():
        for layer, dense in zip(model, plain, strict=True):
            if isinstance(dense, nn.Linear):
                dense.weight.copy_(bases.dense(layer))
    return model, plain


def both(base, m):
    """A quantised and a dense model with the same trained adapter."""
    model, plain = net(base)
    adapter = undula.attach(model, m, where="*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    undula.attach(plain, adapter.copy())
    return model, plain


# What a method does over them


@each_base
def test_attaching_changes_nothing(base):
    """The frozen product stays the layer's own, to the bit; factors are float32; no fused product is used."""
    model, _ = net(base)
    x = torch.randn(5, 64)
    y = model(x)
    adapter = undula.attach(model, LoRA(r=4), where="*")
    assert torch.equal(model(x), y)
    assert adapter.shapes == {"0": (96, 64), "2": (32, 96)}
    assert {t.dtype for _, _, t in adapter.tensors()} == {torch.float32}
    assert not any(view(m).plain for m in (model[0], model[2]))
    undula.detach(model)
    assert torch.equal(model(x), y)


@each_base
def test_what_is_read_is_what_the_layer_computes_with(base):
    layer, x = net(base)[0][0].train(), torch.randn(5, 64)  # evaluating, bitsandbytes' int8 layers quantise x too
    torch.testing.assert_close(layer(x), F.linear(x, bases.dense(layer), layer.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.every(2)
@two_bases
@pytest.mark.parametrize("m", ZOO, ids=repr)
def test_every_method_is_what_it_is_over_dense_weights(base, m):
    """Values, input gradients and factor gradients."""
    model, plain = both(base, m)
    x, grads = torch.randn(3, 5, 64, requires_grad=True), []
    for net_ in (model, plain):
        y = net_(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, *undula.selected(net_).parameters()])])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(base, dtype):
    """The loss falls, through the quantised layers too, and the base stays what it was."""
    model, _ = net(base, dtype)
    adapter = undula.attach(model, LoRA(r=4), where="*")
    before = {k: copy.deepcopy(v) for k, v in model.state_dict().items() if "undula" not in k}
    x, target = torch.randn(64, 64, dtype=dtype), torch.randn(64, 32, dtype=dtype)
    optimiser, losses = torch.optim.Adam(adapter.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = F.mse_loss(model(x).float(), target.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert adapter.factors["0"]["B"].abs().max() > 0  # its gradient came down through layer 2
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    for k, v in before.items():
        assert same(model.state_dict()[k], v), k


def same(a, b):
    """Equal to the bit, also as torchao tensors."""
    if hasattr(a, "qdata"):
        return torch.equal(a.qdata.view(torch.int8), b.qdata.view(torch.int8)) and torch.equal(a.scale, b.scale)
    return torch.equal(a, b)


@each_base
def test_rows(base):
    model, _ = net(base)
    made = {"a": LoRA(r=4), "b": AuroRA()}
    for name, m in made.items():
        adapter = undula.attach(model, m, name=name, where="*")
        with torch.no_grad():
            adapter.factors["0"]["B"].normal_()
    x, names, want = torch.randn(4, 3, 64), ["b", None, "a", "b"], []
    for row, name in zip(x, names, strict=True):
        undula.select(model, name)
        want.append(model(row[None]))
    with undula.rows(model, names):
        torch.testing.assert_close(model(x), torch.cat(want))


@each_base
@pytest.mark.parametrize("m", [LoRA(r=4), DoRA(LoRA(r=4)), LoRAN(r=4)], ids=repr)
def test_merge_tells_its_rounding_and_unmerge_is_exact(base, m):
    model, plain = both(base, m)
    adapter, x = undula.selected(model), torch.randn(5, 64)
    own = {n: copy.deepcopy(model.get_submodule(n).weight) for n in ("0", "2")}
    y, W = model(x), {n: bases.dense(model.get_submodule(n)).float() for n in own}
    assert isinstance(m, Reweight)
    exact = {n: m.weight(W[n], adapter.factors[n]).detach() for n in own}
    errors = undula.merge(model)
    for n, W_new in exact.items():
        layer = model.get_submodule(n)
        assert type(layer.weight) is type(own[n])
        stored = bases.dense(layer).float()
        assert errors[n] == pytest.approx(float((stored - W_new).norm() / (W_new - W[n]).norm()), rel=1e-4)
        fresh, z = quantised(base, W_new, layer.bias), torch.randn(5, W_new.shape[1])
        assert same(layer.weight, fresh.weight)
        assert torch.equal(layer(z), fresh(z))  # what is stored is what the layer computes with
    undula.merge(plain)
    torch.testing.assert_close(plain[0].weight, exact["0"])
    undula.unmerge(model)
    assert torch.equal(model(x), y)
    undula.detach(model)
    for n, w in own.items():
        assert same(model.get_submodule(n).weight, w)


def quantised(base, W, bias):
    """A layer with the weight W, quantised afresh."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(W)
        if bias is not None:
            layer.bias.copy_(bias)
    return BASES[base](nn.Sequential(layer)).requires_grad_(False).eval()[0]


@each_base
def test_save_and_load(base, tmp_path):
    model, _ = net(base)
    twin = copy.deepcopy(model)
    adapter = undula.attach(model, DoRA(LoRA(r=4)), where="*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    adapter.save(tmp_path)
    undula.attach(twin, undula.Adapter.load(tmp_path))
    x = torch.randn(5, 64)
    torch.testing.assert_close(twin(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


@two_bases
def test_collapse(base):
    """Least squares sees the quantised layers' own inputs; DoRA truncates by what they hold."""
    model, _ = both(base, AuroRA())
    batches = [torch.randn(200, 64) for _ in range(2)]
    assert collapse(model, LeastSquares(2, batches), held_out=batches).error < 0.9
    model, _ = both(base, DoRA(LoRA(r=4)))
    assert collapse(model, undula.Truncate(64), held_out=batches).error < 1e-4


# What does not work says so


def test_quantised_activations_pass_no_gradient():
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no gradient passes through 2 layers of this model \(the first is 0\)"):
        undula.attach(model, LoRA(r=4), where="*")
    with pytest.raises(RuntimeError, match="no gradient passes through this AdaptedLinear with a Int8Tensor"):
        model(torch.randn(5, 64))
    with torch.no_grad():
        assert model(torch.randn(5, 64)).shape == (5, 32)
    undula.merge(model)
    assert model[0].weight.act_quant_kwargs is not None  # merged in its own format


def test_weight_only_bases_attach_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for base in BASES:
            undula.attach(net(base)[0], LoRA(r=4), where="*")


def test_unquantised_bitsandbytes_layers_are_refused():
    for layer in (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        with pytest.raises(TypeError, match=r"is not quantised yet.*Call model.to\('cpu'\)"):
            undula.attach(nn.Sequential(layer), LoRA(r=4), where="*")


def test_unreadable_weights_are_refused():
    model = nn.Sequential(nn.Linear(64, 32))
    model[0]._parameters["weight"] = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"cannot read a weight of type Parameter \(torch.int8\)"):
        undula.attach(model, LoRA(r=4), where="*")
    model, _ = net("torchao int8")
    model[0].weight.act_pre_scale = torch.ones(64)  # SmoothQuant: the layer is not its weight alone
    with pytest.raises(TypeError, match="cannot read a weight of type Int8Tensor"):
        undula.attach(model, LoRA(r=4), where="*")


def test_unwritable_weights_are_refused_and_kept(monkeypatch):
    model, _ = both("torchao int8", LoRA(r=4))
    x = torch.randn(5, 64)
    y = model(x)
    monkeypatch.delitem(bases.REQUANTISE, "Int8Tensor")
    with pytest.raises(TypeError, match="cannot write into a Int8Tensor; it can into IntxUnpackedToInt8Tensor"):
        undula.merge(model)
    assert torch.equal(model(x), y)


def repacked(weight):
    """bitsandbytes' 4-bit weight as an evaluation leaves it on CPUs with AVX512-BF16."""
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def test_an_evaluation_takes_no_gradient_from_4_bit_layers():
    """bitsandbytes' product after an evaluation, on CPUs with AVX512-BF16, has none; undula keeps the other one."""
    model = bits(bnb.nn.Linear4bit, quant_type="nf4", compute_dtype=torch.float32)(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    )
    for layer in model:
        layer.support_avx512bf16_for_cpu = True  # as found on such a CPU
    repacked(model[1].weight)  # by an evaluation before undula came
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    adapter, x = undula.attach(model, LoRA(r=2), ["0"]), torch.randn(5, 64)
    for own, layer in zip(model, dense, strict=True):
        layer.weight.copy_(bases.dense(own))
        layer.bias.copy_(own.bias)
    same = undula.attach(dense, adapter.copy())

    def gradient(model, adapter):
        adapter.factors["0"]["B"].grad = None
        model(x).square().sum().backward()
        return adapter.factors["0"]["B"].grad

    want = gradient(dense, same)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(gradient(model, adapter), want)
    with torch.no_grad():
        model.eval()(x)
    torch.testing.assert_close(gradient(model.train(), adapter), want)


def test_an_evaluation_takes_no_gradient_under_peft():
    from peft import get_peft_model

    model = bits(bnb.nn.Linear4bit, compute_dtype=torch.float32)(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    hosted, x = get_peft_model(model, undula.peft_config(LoRA(r=2), target_modules=["0"])), torch.randn(5, 64)
    (B,) = [p for name, p in hosted.named_parameters() if p.requires_grad and name.endswith("B")]
    gradients = []
    for _ in range(2):
        B.grad = None
        hosted.train()(x).square().sum().backward()
        gradients.append(B.grad)
        with torch.no_grad():
            hosted.eval()(x)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients)


def test_repacked_4_bit_weights_are_read():
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights (and rounds their scales to bf16) in evaluation."""
    layer = net("bitsandbytes nf4")[0][0]
    W, w = bases.dense(layer), layer.weight
    repacked(w)
    for _ in range(2):  # reading changes nothing
        again = bases.dense(layer)
        assert again.dtype == W.dtype
        assert (again - W).norm() < 0.01 * W.norm()
        assert w.quant_state.packing_format_for_cpu
    assert bases.outline(layer).shape == W.shape
    stored = bases.stored(layer, W)
    assert stored.quant_state.dtype == torch.float32
    assert stored.quant_state.nested


# A transformers model


def quantised_llama(path, how):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    ways = {
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, **four),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    }
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=ways[how](), dtype=torch.bfloat16, device_map="cpu"
    )


@pytest.mark.parametrize(
    ("how", "m"), [("nf4", LoRA(r=4)), ("nf4", AuroRA()), ("int8", LoRA(r=4)), ("torchao", LoRA(r=4))], ids=repr
)
def test_qlora(how, m, tmp_path):
    """A Llama that transformers quantised (nf4, double quantisation, bf16 compute: QLoRA's setting): trains, keeps its
    factors in float32, saves, loads, and says what a merge costs."""
    model = quantised_llama(tmp_path / "base", how)
    adapter = undula.attach(model, m)
    assert len(adapter.factors) == 14
    assert not any(view(model.get_submodule(s)).plain for s in adapter.factors)
    tokens = torch.randint(0, 64, (8, 16))
    optimiser, losses = torch.optim.Adam(adapter.parameters(), lr=2e-2), []
    model.train()
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    model.eval()
    adapter.save(tmp_path / "adapter")
    with torch.no_grad():
        y = model(input_ids=tokens).logits
        undula.detach(model)
        assert not torch.equal(model(input_ids=tokens).logits, y)
        again = undula.attach(model, undula.Adapter.load(tmp_path / "adapter"))
        assert all(torch.equal(t, again.factors[s][k]) for s, k, t in adapter.tensors())
        torch.testing.assert_close(model(input_ids=tokens).logits, y, rtol=0.016, atol=0.016)
        if isinstance(m, Reweight):
            assert max(undula.merge(model).values()) > 0
            undula.unmerge(model)
            assert torch.equal(model(input_ids=tokens).logits, y)


@pytest.mark.parametrize("make", [torch.optim.Muon, lambda p, lr: bnb.optim.Adam8bit(p, lr=lr, min_8bit_size=1)])
def test_optimisers_of_others_take_the_parameters_as_they_are(make):
    """Muon on matrices, and 8-bit states of bitsandbytes'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    adapter = undula.attach(model, LoRA(r=2, alpha=2.0), "*")
    optimiser = make(list(adapter.parameters()), lr=1e-2)
    x, y, losses = torch.randn(32, 12), torch.randn(32, 4), []
    for _ in range(20):
        losses.append(F.mse_loss(model(x), y))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
