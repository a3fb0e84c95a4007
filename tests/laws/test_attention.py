"""The attention of rows behind each other in one, and what is between a decoder's products, against torch's own."""

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from undula.kernels import attention, between
from undula.kernels.attention import BLOCK, attended, pieces
from undula.kernels.holes import holes
from undula.train.tasks import between as inside

FLAT = pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="needs a C compiler")
LENGTHS = ((5, 3, 1, 7), (BLOCK, 1), (2 * BLOCK + 5, 3, BLOCK + 1, 40, 90), (1,))


def drawn(lengths, dtype, heads=6, groups=2, d=8, e=8):
    torch.manual_seed(0)
    sizes = ((heads, d), (groups, d), (groups, e))
    q, k, v = (torch.randn(1, sum(lengths), n, w, dtype=torch.float64).transpose(1, 2).to(dtype) for n, w in sizes)
    return [t.requires_grad_() for t in (q, k, v)], torch.randn(1, sum(lengths), heads, e, dtype=torch.float64).to(
        dtype
    )


def one_by_one(q, k, v, lengths, scale, causal):
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    each = [F.scaled_dot_product_attention(*p, is_causal=causal, scale=scale, enable_gqa=True) for p in parts]
    return torch.cat(each, 2).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows_at_once_are_rows_one_by_one(lengths, causal):
    given, g = drawn(lengths, torch.float64)
    found, wanted = attended(*given, lengths, 0.3, causal), one_by_one(*given, lengths, 0.3, causal)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, given, g), torch.autograd.grad(wanted, given, g), strict=True):
        torch.testing.assert_close(a, b)


@FLAT
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["C", "torch"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", between.SUFFIX, ids=str)
def test_in_narrow_types_it_differs_from_double_by_a_few_roundings(dtype, causal, least, monkeypatch):
    monkeypatch.setattr(attention, "LEAST", least)
    lengths = (200, 60, 9, 1)
    given, g = drawn(lengths, dtype)
    double = [t.detach().double().requires_grad_() for t in given]
    wanted = one_by_one(*double, lengths, 0.3, causal)
    wanted = [wanted.detach(), *torch.autograd.grad(wanted, double, g.double())]
    found = attended(*given, lengths, 0.3, causal)
    found = [found, *torch.autograd.grad(found, given, g)]
    off = [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    assert max(off) < 8 * torch.finfo(dtype).eps


def test_dropout_is_of_the_probabilities_and_the_same_in_both_directions():
    lengths, p = (150, 20, 6), 0.1
    given, g = drawn(lengths, torch.float64, groups=6)
    torch.manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(3)
    found = attended(*given, lengths, 0.3, False, p)
    wanted = torch.empty_like(found)
    parts = []
    for i, at in enumerate(pieces(lengths, False)):
        q, k, v = (t[0] for t in given)
        scores = 0.3 * q[:, at.first : at.last] @ k[:, at.begin : at.end].transpose(1, 2)
        P = scores.masked_fill(at.hides, -torch.inf).softmax(-1) if at.hides is not None else scores.softmax(-1)
        mask = torch.ones_like(P).view(-1).index_fill(0, holes(seed + i, P.numel(), p), 0).view_as(P)
        assert abs(float(mask.mean()) - (1 - p)) < 0.02
        parts.append((P * mask / (1 - p)) @ v[:, at.begin : at.end])
    wanted = torch.cat(parts, 1).transpose(0, 1)[None]
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, given, g), torch.autograd.grad(wanted, given, g), strict=True):
        torch.testing.assert_close(a, b)


def test_pieces_are_of_whole_rows_and_no_larger_than_they_need():
    for lengths in LENGTHS:
        for causal in (True, False):
            found = pieces(lengths, causal)
            assert [(p.first, p.last) for p in found] == list(
                zip([0, *(p.last for p in found)][:-1], [p.last for p in found], strict=True)
            )
            assert found[-1].last == sum(lengths)
            assert all(p.last - p.first <= BLOCK for p in found)


def eager(name, *x):
    if name == "norm":
        return x[1] * (x[0].float() * torch.rsqrt(x[0].float().square().mean(-1, True) + 1e-5)).to(x[0].dtype)
    if name == "gated":
        return F.silu(x[0]) * x[1]
    half = x[0].shape[-1] // 2
    turned = torch.cat([-x[0][..., half:], x[0][..., :half]], -1)
    return x[0] * x[1][:, None] + turned * x[2][:, None]


def passed(name, *x):
    return between.norm(*x, 1e-5) if name == "norm" else getattr(between, name)(*x)


@FLAT
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", between.SUFFIX, ids=str)
@pytest.mark.parametrize("name", ["norm", "gated", "turned"])
def test_a_pass_is_the_models_own_operations(name, dtype, threads):
    """Values and gradients, of odd sizes, strided heads and large arguments."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = {
        "norm": lambda: [3 * torch.randn(1, 13, 37), torch.randn(37)],
        "gated": lambda: [40 * torch.randn(1, 13, 37), torch.randn(1, 13, 37)],
        "turned": lambda: [torch.randn(1, 13, 3, 38).transpose(1, 2), torch.randn(1, 13, 38), torch.randn(1, 13, 38)],
    }[name]()
    x = [t.to(dtype) for t in x]
    learned = x[: 2 if name == "gated" else 1]
    for t in learned:
        t.requires_grad_()
    assert between.applies(*x)
    try:
        found, wanted = passed(name, *x), eager(name, *x)
        g = torch.randn_like(wanted)
        most = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, wanted, rtol=most, atol=most)
        pairs = zip(torch.autograd.grad(found, learned, g), torch.autograd.grad(wanted, learned, g), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=most, atol=most)
    finally:
        torch.set_num_threads(before)


SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip
MODELS = {  # how many parts: rotations and gates of two layers, norms
    "llama": (transformers.LlamaConfig, 2 + 2 + 5),
    "qwen3": (transformers.Qwen3Config, 2 + 2 + 9),
    "gemma": (transformers.GemmaConfig, 2),  # norms by 1 + w, and another gate
}


@FLAT
@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_parts_are_replaced_where_they_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(inside, "LEAST", 0)
    config, parts = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZE))
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    ids = torch.randint(2, 40, (1, 11))
    called, found = [], []
    real = between._run
    monkeypatch.setattr(between, "_run", lambda law, *rest: called.append(law) or real(law, *rest))
    with inside.one_pass(model):
        changed = [m for m in model.modules() if "forward" in m.__dict__]
        twin = copy.deepcopy(model)
        called.clear()
        loss = model(ids, labels=ids).loss
        loss.backward()
    found = [loss.detach(), model.get_input_embeddings().weight.grad.clone()]
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(m.forward.__self__ is m for m in twin.modules())
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    for a, b in zip(found, [loss.detach(), model.get_input_embeddings().weight.grad], strict=True):
        torch.testing.assert_close(a, b)
    kinds = {law.removesuffix("_back") for law in called}
    assert kinds == ({"turned"} if name == "gemma" else {"norm", "gated", "turned"})
    assert len(changed) == parts


@FLAT
def test_a_trained_norm_and_code_of_another_kind_stay_their_own(monkeypatch):
    monkeypatch.setattr(inside, "LEAST", 0)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-5

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.eps) + 1e-3

    class Norm(Shifted):
        def forward(self, x):
            return super().forward(x) - 1e-3

    model = nn.ModuleList([Shifted(), Norm()])
    with inside.one_pass(model):
        assert ["forward" in m.__dict__ for m in model] == [False, True]
        model[1](torch.randn(3, 8)).sum().backward()
    assert model[1].weight.grad is not None


class Odd(nn.Module):
    """A norm, or a gated layer, whose law is another one somewhere: in one mode, of large numbers, by what it holds."""

    def __init__(self, how, i, gate):
        super().__init__()
        self.how, self.eps, self.act_fn = how, 1e-5, F.gelu if how == "function" and i else F.silu
        if gate:
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        else:
            self.weight = nn.Parameter(torch.rand(2, 8) if how == "heads" else torch.rand(8))
        if how == "buffer":
            self.register_buffer("gain", torch.tensor(1.0 + i))
        if how == "hook":
            self.act_fn = nn.SiLU()
            self.act_fn.register_forward_hook(lambda module, given, y: 2 * y)

    def forward(self, x, more=None):
        if self.how == "cut":
            x = x.clamp(-9, 9)
        if hasattr(self, "gate_proj"):
            y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        else:
            y = self.weight * (x * torch.rsqrt(x.square().mean(-1, True) + self.eps))
        y = y if more is None else y + more
        return y * (2 if self.how == "mode" and self.training else getattr(self, "gain", 1))


@FLAT
@pytest.mark.parametrize("gate", [False, True], ids=["norm", "gate"])
@pytest.mark.parametrize("how", ["mode", "cut", "buffer", "function", "hook", "heads", "more", "named", "nothing"])
def test_a_law_that_is_another_one_somewhere_is_not_taken_for_one_that_is_known(how, gate, monkeypatch):
    """The training begins in evaluation mode, as models are opened."""
    monkeypatch.setattr(inside, "LEAST", 0)
    torch.manual_seed(0)
    model = nn.ModuleList([Odd(how, i, gate) for i in range(2)]).requires_grad_(False).eval()
    x = (20 * torch.randn(3, 2, 8)).requires_grad_()

    def found():
        more = {"more": x} if how == "more" else {}
        y = sum(m.train()(x=x) if how == "named" else m.train()(x, **more) for m in model)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    wanted, before = found(), torch.get_rng_state()
    with inside.one_pass(model.eval()):
        changed = ["forward" in m.__dict__ for m in model]
        for a, b in zip(found(), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(changed) or how != "nothing"
    assert not any("forward" in m.__dict__ for m in model)


def test_dropout_draws_what_falls_out_and_nothing_in_evaluation(monkeypatch):
    monkeypatch.setattr(inside, "LEAST", 0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1), nn.Dropout(0.5), nn.Dropout(0.0))
    drawn, real = [], inside.holes.dropped
    monkeypatch.setattr(inside.holes, "dropped", lambda x, p: drawn.append(p) or real(x, p))
    x = torch.ones(100, 100, requires_grad=True)
    with inside.one_pass(model):
        y = model[1](x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
        assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.9)}
        assert 0.08 < float((y == 0).float().mean()) < 0.12
        model[2](x), model[3](x), model.eval()[1](x)
    assert drawn == [0.1]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d], ids=lambda kind: kind.__name__)
def test_a_batch_norm_that_stands_still_is_the_same_function(kind):
    torch.manual_seed(0)
    norm = kind(5, eps=1e-3).double().eval().requires_grad_(False)
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var.sqrt_()):
        t.copy_(torch.rand(5) + 0.5)
    x = torch.randn((3, 5, 4, 2) if kind is nn.BatchNorm2d else (3, 5), dtype=torch.float64)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    wanted, g = norm(x), torch.randn(x.shape, dtype=torch.float64)
    with inside.one_pass(norm):
        found = norm(x)
        assert "AddcmulBackward" in str(found.grad_fn)
        assert found.stride() == wanted.stride()
        with torch.no_grad():
            assert torch.equal(norm(x), wanted)
        norm.weight.requires_grad_()
        assert "NormBackward" in str(norm(x).grad_fn)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(wanted, x, g))
