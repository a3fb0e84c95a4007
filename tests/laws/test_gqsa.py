"""A base in 4-bit groups of which a part is kept: storage, products, and what adapters and tuning make of it."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.quantizers import auto

import undula
from undula.compress import bqpo
from undula.compress.gqsa import (
    METHOD,
    Form,
    GQSALinear,
    coded,
    compress,
    compressed_layers,
    quantised,
    ranges,
)
from undula.compress.refit import refitted
from undula.integrations.gqsa import dequantised, marked
from undula.kernels import gqsa as kernel
from undula.kernels import in_c

COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="needs a C compiler")
FORMS = [Form(), Form(0.25, 8), Form(0.0, 6), Form(0.9, 4)]
each = pytest.mark.parametrize("form", FORMS, ids=repr)
IDS = torch.arange(36).reshape(3, 12) * 7 % 30


def matrix(form, rows=9, groups=12):
    torch.manual_seed(0)
    return torch.randn(rows, groups * form.group, dtype=torch.float64) * torch.logspace(-3, 1, rows)[:, None].double()


def llama():
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, initializer_range=0.3, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def pieces(form):
    """(codes, index, scale, zero, columns) of a random matrix."""
    W = matrix(form)
    made = quantised(W, form)
    return made, W


@each
def test_bytes_hold_the_codes_and_groups_go_back_to_their_places(form):
    q = torch.randint(0, 16, (5, 3, form.group))
    assert torch.equal(kernel.unpack(kernel.pack(q)).long(), q)
    index = torch.tensor([[0, 4, 7]]).expand(5, 3)
    W = kernel.spread(q.double(), index, 8 * form.group)
    assert torch.equal(kernel.gathered(W, index, form.group), q.double())
    assert int((W != 0).sum()) == int((q != 0).sum())


@each
def test_kept_weights_are_half_a_step_away_at_most_and_the_largest_groups_of_a_row_are_kept(form):
    made, W = pieces(form)
    K = form.kept(W.shape[1])
    assert made.index.shape == (len(W), K)
    assert all(len(set(row)) == K for row in made.index.tolist())
    w = kernel.gathered(W, made.index, form.group)
    s, z = ranges(w)
    q = coded(w, s, z)
    assert ((q >= 0) & (q <= 15)).all()
    assert torch.equal(kernel.unpack(made.codes).double(), q)
    assert torch.equal(s.half().double(), s)
    off = ((q - z[..., None]) * s[..., None] - w).abs()
    assert (off <= s[..., None] / 2 * (1 + 1e-12)).all()
    sizes = W.view(len(W), -1, form.group).square().sum(-1)
    least = sizes.gather(1, made.index.long()).amin(1)
    gone = sizes.scatter(1, made.index.long(), 0.0).amax(1)
    assert (gone <= least).all()


def test_without_sparsity_it_rounds_as_torchao_does():
    """Equal but for the scale, which is stored in 16 bits."""
    W, G = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), 16
    s, z = choose_qparams_affine(W, MappingType.ASYMMETRIC, (1, G), torch.uint8, 0, 15, zero_point_dtype=torch.int32)
    q = quantize_affine(W, (1, G), s, z, torch.uint8, 0, 15)
    theirs = dequantize_affine(q, (1, G), s, z, torch.uint8, 0, 15)
    layer = GQSALinear.of(nn.Linear(96, 24), Form(0.0, G), quantised(W, Form(0.0, G)))
    off, wanted = ((found - W).norm() / W.norm() for found in (layer.format.dense(layer), theirs))
    assert 0.05 < off == pytest.approx(float(wanted), rel=0.01)


def test_what_is_kept_makes_up_for_what_goes():
    """Against the normal equations of each row; a few iterations miss less already than none."""
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (6, 50))
    x = x @ torch.randn(24, 24, generator=generator, dtype=torch.float64)  # inputs that tell of each other
    H, form = x.T @ x, Form(0.5, 4)
    index = quantised(W, form, H.diagonal()).index
    D = H + 0.01 * H.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    found = [kernel.spread(refitted(W, H, index, 4, n), index, 24) for n in (0, 3, 200)]
    for o in range(6):
        on = (index[o].long()[:, None] * 4 + torch.arange(4)).flatten()
        torch.testing.assert_close(found[2][o, on], torch.linalg.solve(D[on][:, on], D[on] @ W[o]))
    missed = [(((W - V) @ D) * (W - V)).sum() for V in found]
    assert missed[2] < missed[1] < missed[0]
    assert torch.equal(found[0], W * (found[0] != 0))


def test_inputs_that_are_larger_keep_their_groups():
    W, h = torch.ones(2, 32), torch.ones(32)
    h[16:24] = 9.0
    assert quantised(W, Form(0.75, 8), h).index.tolist() == [[2], [2]]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=COMPILER), False])
@each
def test_the_product_is_that_of_the_dense_weight(form, compiled, monkeypatch):
    """From packed codes and from a weight made dense, for one token and for many; gradients too."""
    if not compiled:
        monkeypatch.setattr(kernel, "library", lambda: None)
    made, W = pieces(form)
    O, I = W.shape
    layer = GQSALinear.of(nn.Linear(I, O), form, made)
    q, s, z = kernel.unpack(made.codes).float(), made.scale, made.zero
    D = kernel.spread((q - z[..., None]) * s[..., None], made.index, I)
    torch.testing.assert_close(layer.format.dense(layer), D)
    for shape in ((I,), (1, I), (2, 2, I), (7, I)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert kernel.applies(x, layer.scale) == (compiled and x.numel() <= 4 * I)
            torch.testing.assert_close(layer(x), F.linear(x, D, layer.bias), rtol=1e-4, atol=1e-3)
    x = torch.randn(3, I, requires_grad=True)
    layer.scale.requires_grad_(), layer.zero.requires_grad_()
    free = [t.detach().clone().requires_grad_() for t in (s, z)]
    dense = kernel.spread((q - free[1][..., None]) * free[0][..., None], made.index, I)
    g = torch.randn(3, O)
    found = torch.autograd.grad(layer(x), [x, layer.scale, layer.zero], g)
    want = torch.autograd.grad(F.linear(x, dense, layer.bias), [x, *free], g)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@COMPILER
def test_what_a_compiler_makes_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(kernel, "SOURCE", kernel.SOURCE.replace("(float)(both >> 4)", "(float)(both >> 3)"))
    assert kernel.library.__wrapped__() is None
    monkeypatch.setenv("UNDULA_COMPILE", "0")
    assert in_c.built(kernel.SOURCE) is None


def test_a_layer_that_does_not_come_out_even_is_named_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(20, 8))
    with pytest.raises(
        ValueError, match=r"^1: its 20 columns are no multiple of group=16: groups of 2, 4, 10, 20 would"
    ):
        compress(model)
    assert not compressed_layers(model)
    compress(model, exclude=["1"])
    assert list(compressed_layers(model)) == ["0"]
    for form, told in (((1.0, 16), "below 1"), ((0.5, 7), "even number")):
        with pytest.raises(ValueError, match=told):
            Form(*form)
    with pytest.raises(ValueError, match=r"'3' matches none of the 1 layers"):
        compress(model, exclude=["3"])


def test_blocks_learn_what_they_gave():
    """The output comes nearer to that of the dense model, by the fit and by the steps after it, and the rest of the
    model stays what it was."""
    dense, batches = llama(), [{"input_ids": IDS[i : i + 1]} for i in range(3)]
    with torch.no_grad():
        y = dense(input_ids=IDS).logits
    off, seen = {}, []
    for steps in (None, 0, 30):
        model = llama()
        if steps is None:
            made = compress(model, Form(0.5, 8))
        else:
            learning = bqpo.Learning(steps, lr=3e-3)
            made = bqpo.calibrated(model, batches, Form(0.5, 8), learning, progress=lambda *at: seen.append(at))
        with torch.no_grad():
            off[steps] = float((model(input_ids=IDS).logits - y).norm())
        assert len(made.errors) == len(compressed_layers(model)) == 14
        assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
        assert all(p.grad is None for p in model.parameters())
    assert off[30] < off[0] < off[None]
    assert off[30] < 0.8 * off[None]
    assert seen[:2] == [(1, 2), (2, 2)]


@pytest.mark.parametrize("steps", [0, 3])
def test_padding_tells_nothing_whatever_it_holds(steps):
    """BERT gives its blocks the mask by place, not by name.  What stands in padding changes nothing that is stored."""
    mask = torch.ones_like(IDS)
    mask[:, 7:] = 0
    found = []
    for other in (0, 9):
        torch.manual_seed(3)
        config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, initializer_range=0.3)  # fmt: skip
        model = BertForMaskedLM(config).eval()
        batch = {"input_ids": IDS.masked_fill(mask == 0, other), "attention_mask": mask}
        bqpo.calibrated(model, [batch], Form(0.5, 8), bqpo.Learning(steps, lr=1e-3))
        found.append({n: m for n, m in compressed_layers(model).items() if ".layer." in n})
    assert len(found[0]) == 12
    for n, layer in found[0].items():
        assert torch.equal(layer.index, found[1][n].index)
        W, V = (each.format.dense(each) for each in (layer, found[1][n]))
        assert (W - V).norm() < 1e-2 * W.norm()


def test_a_layer_that_no_row_comes_to_keeps_its_largest_groups():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return x + self.used(x)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids):
            for layer in self.layers:
                input_ids = layer(input_ids)
            return input_ids

    model = Chain()
    want = {n: quantised(m.weight, Form(0.5, 8)) for n, m in model.named_modules() if n.endswith("spare")}
    bqpo.calibrated(model, [{"input_ids": torch.randn(3, 16)}], Form(0.5, 8), bqpo.Learning(2))
    for n, packed in want.items():
        assert torch.equal(compressed_layers(model)[n].index, packed.index)


def test_models_that_are_no_one_chain_are_refused_and_stay():
    model = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(TypeError, match="an encoder and a decoder, no one chain of blocks: compress it without data"):
        bqpo.calibrated(model, [{"input_ids": IDS}], Form(0.5, 8))
    assert not compressed_layers(model)


def test_a_model_that_casts_to_the_type_of_a_weight_computes_what_it_should():
    """T5's feed-forward blocks do, unless that is int8."""
    torch.manual_seed(3)
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(30)
        compress(model, Form(0.5, 8))
        given = {"input_ids": IDS, "decoder_input_ids": IDS}
        y = model(**given).logits
        torch.testing.assert_close(dequantised(model)(**given).logits, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"was given torch.int64: .*\(exclude\)"):
        GQSALinear(16, 8, Form())(torch.ones(2, 16, dtype=torch.long))


def test_heads_stay_dense_and_other_classes_open_what_one_has_written(tmp_path):
    """With another head, and without."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).eval()
    compress(model, Form(0.5, 8))
    assert all(n.startswith("bert.encoder.") for n in compressed_layers(model))
    marked(model, Form(0.5, 8)).save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = model.bert(input_ids=IDS).last_hidden_state
        for found in (bare, headed.bert):
            torch.testing.assert_close(found(input_ids=IDS).last_hidden_state, want)
    undula.attach(headed, undula.LoRA(r=2), full=["classifier"])


@pytest.mark.parametrize("shared", ["the module", "its weight"])
def test_a_weight_that_stands_at_two_places_is_refused_by_name(shared):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    if shared == "the module":
        model[2] = model[0]
    else:
        model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"^0: its weight is 2\.weight too, .*leave it out \(exclude\)"):
        compress(model, Form(0.5, 8))
    assert not compressed_layers(model)
    compress(model, Form(0.5, 8), exclude=["0"] if shared == "the module" else ["0", "2"])
    assert list(compressed_layers(model)) == ["1"]


def test_tuning_scales_and_zeros_end_to_end_leaves_codes_and_places_alone():
    model = llama()
    compress(model, Form(0.5, 8))
    before = {n: (m.weight.clone(), m.index.clone(), m.scale.clone()) for n, m in compressed_layers(model).items()}
    adapter = undula.attach(model, undula.LoRA(r=1), "*q_proj", full=["*.scale", "*.zero"])
    trained = list(adapter.full.values())
    assert len(trained) == 28
    optimizer, losses = torch.optim.Adam(trained, lr=1e-3), []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for n, m in compressed_layers(model).items():
        assert torch.equal(m.weight, before[n][0])
        assert torch.equal(m.index, before[n][1])
        assert not torch.equal(m.scale, before[n][2])


@pytest.mark.parametrize("method", [undula.LoRA(r=2), undula.DoRA(undula.LoRA(r=2)), undula.LoRAN(r=2)], ids=repr)
def test_adapters_train_on_it_and_are_not_merged_into_it(method):
    model = llama()
    compress(model, Form(0.5, 8))
    with torch.no_grad():
        y = model(input_ids=IDS).logits
    adapter = undula.attach(model, method)
    assert len(adapter.methods) >= 14
    torch.testing.assert_close(model(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-4)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=1e-2), []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(TypeError, match="nothing is merged into a base of 4-bit groups"):
        undula.merge(model)


def test_it_is_small_on_disk_and_opens_again_bit_for_bit(tmp_path, monkeypatch):
    """Where nobody has told transformers of the format it is refused, and dequantised it is an ordinary model of the
    same numbers."""
    model = llama()
    dense = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "_proj" not in n)
    made = compress(model, Form(0.5, 16))
    marked(model, Form(0.5, 16)).save_pretrained(tmp_path)
    assert made.bits == 0.5 * (4 + 40 / 16)
    header = 20_000
    assert (tmp_path / "model.safetensors").stat().st_size <= dense * made.bits / 8 + rest * 4 + header
    state = model.state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for n, m in compressed_layers(again).items():
        for leaf in ("weight", "index", "scale", "zero"):
            assert torch.equal(getattr(m, leaf), state[f"{n}.{leaf}"])
        assert m.scale.dtype == torch.float32
    with torch.no_grad():
        y = model(input_ids=IDS).logits
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(opened(input_ids=IDS).logits, y)
        plain = opened.dequantize()
        assert not compressed_layers(plain)
        torch.testing.assert_close(plain(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-4)
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, METHOD)
    with pytest.raises(Exception, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
