"""The probe against autograd's own gradients and against activations that are recorded by hand."""

import copy
import gc
import math
import subprocess
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import undula
from tests.support.bases import BASES
from undula import Centred, LoRA, Probe
from undula.host import quantised
from undula.host.views import site
from undula.host.where import choose
from undula.observe.probe import weight_gradient
from undula.starts import EVA, LoRAGA, Start

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Every kind of layer; one is used twice, one is changed in place afterwards, one is called by keyword."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8, padding_idx=0)
        self.twice = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.transposed = Conv1D(12, 8)
        self.named = nn.Linear(12, 8, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.conv = nn.Conv2d(6, 4, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.table(ids)  # (B, 4, 8)
        x = torch.tanh(self.twice(x))
        x = self.drop(self.twice(x))
        y = self.transposed(x)
        y.relu_()
        x = self.named(input=y) + x
        image = torch.tanh(self.conv(torch.relu_(self.grouped(x[:, :, :, None].expand(-1, -1, -1, 4)))))
        x = self.norm(image).mean((2, 3))
        return self.head(torch.cat([x, x], -1))


EVERY = ["table", "twice", "transposed", "named", "grouped", "conv", "head"]


def loss(model, batch):
    ids, target = batch
    return F.cross_entropy(model(ids), target)


def data(n=3):
    return [(torch.randint(0, 9, (5, 4)), torch.randint(0, 3, (5,))) for _ in range(n)]


def net():
    model = Net()
    model.norm.running_mean.normal_()
    return model


def bound(model, batches, where=EVERY, hold=1 << 28, loss=loss):
    layers = choose(model, where)
    return Probe(batches, loss, hold).on(model, layers), layers


def wanted(model, batches):
    """dL/dW in each layer's own orientation, by autograd on the weights, in evaluation mode."""
    other = copy.deepcopy(model).eval().requires_grad_(True)
    torch.stack([loss(other, b) for b in batches]).mean().backward()
    layers = choose(other, EVERY)
    for name, layer in layers.items():
        layer.module.weight.data = layer.module.weight.grad  # its view then shows the gradient as (O, I)
        assert layer.weight.abs().max() > 0, name
    return {name: layer.weight.clone() for name, layer in layers.items()}


@pytest.mark.parametrize("hold", [0, 1000, 1 << 28])
def test_gradients_are_autograds(hold):
    model, batches = net(), data()
    want = wanted(model, batches)
    probe, layers = bound(model, batches, hold=hold)
    for name in layers:
        torch.testing.assert_close(probe.gradient(name), want[name])


def test_several_dimensions_and_a_single_vector():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3)
    probe, _ = bound(model, [x], ["0", "1"], loss=lambda m, b: m(b).square().sum())
    model(x).square().sum().backward()
    torch.testing.assert_close(probe.gradient("1"), model[1].weight.grad)
    torch.testing.assert_close(probe.gradient("0"), model[0].weight.grad)
    torch.testing.assert_close(probe.moments("0")[0], torch.outer(x, x))


def state(model):
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._backward_hooks)) for n, m in model.named_modules()},
        "numbers": {n: t.clone() for n, t in model.state_dict().items()},
    }


def same_state(a, b):
    for key in ("modes", "trains", "hooks"):
        assert a[key] == b[key], key
    for key in ("grads", "numbers"):
        for n, t in a[key].items():
            assert t is b[key][n] or torch.equal(t, b[key][n]), (key, n)


def mixed():
    """Some modules train, some parameters do not, one has a gradient already."""
    model = net()
    model.twice.eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def test_the_model_is_left_as_it_was():
    model = mixed()
    before, generator = state(model), torch.random.get_rng_state()
    probe, layers = bound(model, data(), hold=0)
    generator = torch.random.get_rng_state()
    for name in layers:
        probe.gradient(name)
    probe.moments("twice")
    same_state(before, state(model))
    assert torch.equal(generator, torch.random.get_rng_state())


@pytest.mark.parametrize("when", ["forward", "backward", "moments"])
def test_an_exception_restores_everything(when):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if when != "backward":
                raise ArithmeticError("broken")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("broken")

    model = mixed()
    before = state(model)
    probe, _ = bound(model, data(), loss=lambda m, b: Broken.apply(loss(m, b)))
    with pytest.raises(ArithmeticError, match="broken"):
        probe.moments("twice") if when == "moments" else probe.gradient("table")
    same_state(before, state(model))


def test_other_parameters_of_the_loss_get_no_gradient():
    """A head outside the model, whose own training is none of the probe's business."""
    model, head = net(), nn.Linear(3, 3)
    probe, _ = bound(model, data(), loss=lambda m, b: head(m(b[0])).square().sum())
    assert probe.gradient("twice").norm() > 0
    assert head.weight.grad is None


def test_layers_that_share_a_parameter_have_their_own_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    probe, _ = bound(model, [x], ["0", "2"], loss=lambda m, b: m(b).square().sum())
    first, second = probe.gradient("0"), probe.gradient("2")
    model(x).square().sum().backward()
    torch.testing.assert_close(first + second, model[0].weight.grad)
    assert not torch.allclose(first, second)


class Alive:
    """Counts the gradients that live at a time, and the passes."""

    def __init__(self, monkeypatch):
        self.most, self.passes, self._refs = 0, 0, []
        monkeypatch.setattr("undula.observe.probe.weight_gradient", self.weight_gradient)

    def weight_gradient(self, layer, x, g):
        G = weight_gradient(layer, x, g)
        self._refs.append(weakref.ref(G))
        gc.collect()
        self.most = max(self.most, sum(r() is not None for r in self._refs))
        return G

    def loss(self, model, batch):
        self.passes += 1
        return loss(model, batch)


@pytest.mark.parametrize(("hold", "most", "passes"), [(0, 1, 6), (8 * 200, 2, 4), (1 << 28, 6, 1)])
def test_hold_bounds_the_gradients_that_live(monkeypatch, hold, most, passes):
    """Layers of 72, 96, 96, 108, 96 and 24 numbers: one by one, in groups of at most 200 numbers, or all at once."""
    alive = Alive(monkeypatch)
    model, batches = net(), data(1)
    model.twice.forward = lambda x: x  # not one of those that are asked
    where = ["table", "transposed", "named", "grouped", "conv", "head"]
    probe, layers = bound(model, batches, where, hold, alive.loss)
    for name in layers:
        assert probe.gradient(name).norm() >= 0
    assert alive.passes == passes
    assert alive.most == most


def test_two_starts_at_a_layer_ask_once(monkeypatch):
    alive = Alive(monkeypatch)
    probe, layers = bound(net(), data(1), hold=0, loss=alive.loss)
    for name in layers:
        assert torch.equal(probe.gradient(name), probe.gradient(name))
    assert alive.passes == len(layers)


def test_a_gradient_is_freed_when_the_next_is_asked_for():
    probe, layers = bound(net(), data(1))
    first, second = list(layers)[:2]
    gradient = weakref.ref(probe.gradient(first))
    assert gradient() is not None
    probe.gradient(second)
    gc.collect()
    assert gradient() is None


def test_batches_may_come_from_a_generator():
    model, batches = net(), data()
    want = wanted(model, batches)
    probe, layers = bound(model, (b for b in batches), hold=0)
    for name in layers:
        torch.testing.assert_close(probe.gradient(name), want[name])


def test_attach_gives_each_start_its_own_layer():
    seen = {}

    class Spy(Start):
        def __call__(self, site, r, s=1.0):
            if site.device.type != "meta":
                seen[site.name] = site.gradient()
            return site.zeros(site.shape[0], r), site.uniform(r, site.shape[1], bound=1)

    model, batches = net(), data()
    want = wanted(model, batches)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    where = [n for n in EVERY if n != "grouped"]
    undula.attach(model, Centred(LoRA(r=2), Spy()), where, probe=Probe(batches, loss, hold=0))
    for name in where:
        torch.testing.assert_close(seen[name], want[name])
    undula.detach(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


# Language models: losses of the model's own, padding, quantised bases


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval()


def texts(labels=True):
    batches = []
    for length in (6, 9):
        ids, mask = torch.randint(3, 40, (3, length)), torch.ones(3, length, dtype=torch.long)
        mask[0, 4:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        batches.append({**batch, "labels": ids.masked_fill(mask == 0, -100)} if labels else batch)
    return batches


def test_the_loss_of_a_language_model():
    model, batches = tiny(), texts()
    layers = choose(model, "all-linear")
    probe = Probe(batches).on(model, layers)
    found = {n: probe.gradient(n) for n in layers}
    sum(model(**b).loss for b in batches).div(2).backward()
    for n, G in found.items():
        torch.testing.assert_close(G, layers[n].module.weight.grad)


class Whole(nn.Module):
    """A model of no parts that would be given the mask."""

    def __init__(self, conv=False):
        super().__init__()
        self.table, self.first, self.conv = nn.Embedding(40, 8), nn.Linear(8, 6), nn.Conv1d(8, 6, 3, padding=1)
        self.through_conv = conv

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids)
        return self.conv(h.mT).mT if self.through_conv else self.first(h)


def test_the_mask_of_a_batch_counts_where_the_model_alone_is_given_it():
    model, batches = Whole(), texts(labels=False)
    layers = choose(model, ["first"])
    xx, _, count = Probe(batches, hold=0).on(model, layers).moments("first")
    x = torch.cat([model.table(b["input_ids"])[b["attention_mask"].bool()] for b in batches]).double()
    assert count == len(x)
    torch.testing.assert_close(xx, x.T @ x)


def test_padding_within_the_windows_of_a_convolution_is_told():
    model, batches = Whole(conv=True), texts(labels=False)
    with pytest.warns(UserWarning, match="padding counts at conv: a convolution along a sequence"):
        Probe(batches, hold=0).on(model, choose(model, ["conv"])).moments("conv")


def test_moments_leave_padding_out_and_need_no_labels():
    model, batches = tiny(), texts(labels=False)
    layers = choose(model, "all-linear")
    probe = Probe(batches, hold=0).on(model, layers)
    rows = {n: [] for n in layers}
    now = {}

    def record(name):
        def hook(module, arguments, y):
            rows[name].append(arguments[0][now["mask"].bool()])

        return hook

    handles = [layer.module.register_forward_hook(record(n)) for n, layer in layers.items()]
    with torch.no_grad():
        for b in batches:
            now["mask"] = b["attention_mask"]
            model(**b)
    for h in handles:
        h.remove()
    for n in layers:
        x = torch.cat(rows[n])
        xx, sums, count = probe.moments(n)
        assert count == len(x) == sum(int(b["attention_mask"].sum()) for b in batches)
        torch.testing.assert_close(xx, x.T @ x)
        torch.testing.assert_close(sums, x.sum(0))


def test_moments_of_a_convolution_are_those_of_its_patches():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    x = torch.randn(4, 3, 8, 7)
    xx, sums, count = Probe([x]).on(model, choose(model, ["0"])).moments("0")
    patches = F.unfold(x, 3, stride=2, padding=1).movedim(1, -1).reshape(-1, 27)
    assert count == len(patches)
    torch.testing.assert_close(xx, patches.T @ patches)
    torch.testing.assert_close(sums, patches.sum(0))


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8"])
def test_over_a_quantised_base(base):
    """The gradient is that of the matrix which the base stands for.  A 4-bit or int8 product rounds by itself."""
    torch.set_default_dtype(torch.float32)
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)).eval()
    model = BASES[base](copy.deepcopy(plain)).eval().requires_grad_(False)
    with torch.no_grad():
        for layer, dense in zip(model, plain, strict=True):
            if isinstance(dense, nn.Linear):
                dense.weight.copy_(quantised.dense(layer))
    x, target = torch.randn(16, 64), torch.randn(16, 32)
    probe, layers = bound(model, [x], ["0", "2"], 0, lambda m, b: F.mse_loss(m(b), target))
    found = {n: probe.gradient(n) for n in layers}
    F.mse_loss(plain(x), target).backward()
    for n, G in found.items():
        want = plain[int(n)].weight.grad
        assert G.dtype == torch.float32
        if base == "torchao int8":
            torch.testing.assert_close(G, want)
        else:
            assert (G - want).norm() / want.norm() < {"bitsandbytes nf4": 1e-5, "bitsandbytes int8": 0.05}[base]


def test_half_precision_is_summed_in_single():
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16)
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    probe, _ = bound(model, [x], ["0"], loss=lambda m, b: m(b).float().square().sum())
    G = probe.gradient("0")
    assert G.dtype == torch.float32
    g = (2 * model(x).float()).to(torch.bfloat16)
    torch.testing.assert_close(G, g.float().T @ x.float())
    assert not torch.equal(G, G.to(torch.bfloat16).float())


# What the errors say


def test_no_loss():
    model = tiny()
    probe = Probe(texts(labels=False)).on(model, choose(model, "all-linear"))
    with pytest.raises(TypeError, match=r"without a loss: batches are mappings with `labels`, or give Probe a loss"):
        probe.gradient("model.layers.0.self_attn.q_proj")


def test_a_loss_that_is_no_number():
    probe, _ = bound(net(), data(), loss=lambda m, b: m(b[0]))
    with pytest.raises(TypeError, match=r"returns one number as a tensor; found \(5, 3\)"):
        probe.gradient("twice")
    probe, _ = bound(net(), data(), loss=lambda m, b: 1.0)
    with pytest.raises(TypeError, match="found float"):
        probe.gradient("twice")


def test_no_batches():
    with pytest.raises(ValueError, match=r"no batches \(an iterator gives them once"):
        bound(net(), [])[0].gradient("twice")


def test_batches_are_made_when_they_are_asked_for():
    """Once, and not at all for a method that asks for nothing."""
    made = []

    def batches():
        made.append("begun")
        yield from data()

    model = net()
    undula.attach(model, undula.LoRA(r=1), probe=undula.Probe(batches(), loss=lambda m, b: m(b[0]).square().mean()))
    assert made == []
    undula.detach(model)
    probe, _ = bound(model, batches(), loss=lambda m, b: m(b[0]).square().mean())
    assert made == []
    assert torch.equal(probe.gradient("twice"), probe.gradient("twice"))
    probe.moments("twice")
    assert made == ["begun"]


def test_no_gradient():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    probe, _ = bound(model, [torch.randn(2, 4)], ["0", "1"], loss=lambda m, b: m[0](b).square().sum())
    assert probe.gradient("0").norm() > 0  # nobody asked for the other one
    with pytest.raises(RuntimeError, match="no gradient of the loss reaches 1: the loss does not depend on it"):
        probe.gradient("1")

    def frozen(m, b):
        with torch.no_grad():
            y = m(b)
        return (y * torch.ones((), requires_grad=True)).sum()

    probe, _ = bound(model, [torch.randn(2, 4)], ["0", "1"], loss=frozen)
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        probe.gradient("0")


def test_a_layer_that_never_computed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    probe, _ = bound(model, [torch.randn(2, 4)], ["0", "1"], loss=lambda m, b: m[0](b).sum())
    probe.moments("0")
    with pytest.raises(RuntimeError, match="1 did not compute"):
        probe.moments("1")


def test_a_gradient_that_is_not_finite():
    probe, _ = bound(net(), data(), loss=lambda m, b: loss(m, b) * math.nan)
    with pytest.raises(RuntimeError, match="gradient at head is not finite"):
        probe.gradient("head")


def test_an_input_that_was_changed_in_place():
    """Autograd would refuse as well, had the weight taken a gradient."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            x += 1
            return x * y

    model = Residual()
    probe, _ = bound(model, [torch.randn(2, 4)], ["first", "second"], loss=lambda m, b: m(b).sum())
    with pytest.raises(RuntimeError, match="changed the input of second in place"):
        probe.gradient("second")


def test_what_has_no_directions():
    """It is refused where it is asked for, and in nobody else's way."""
    model = net()
    probe, _ = bound(model, data())
    with pytest.raises(TypeError, match="indices, which have no directions"):
        probe.moments("table")
    with pytest.raises(ValueError, match="groups see different inputs"):
        bound(model, data(), ["grouped"])[0].moments("grouped")


def test_a_start_without_a_probe():
    for start in (LoRAGA(), EVA()):
        with pytest.raises(RuntimeError, match=r"probe=undula\.Probe\(batches\)"):
            undula.attach(nn.Sequential(nn.Linear(9, 9)), Centred(LoRA(r=2), start))
    assert site("l", choose(nn.Sequential(nn.Linear(3, 2)), ["0"])["0"]).outline().gradient().shape == (2, 3)


PEAK = """
import resource, sys, torch
from torch import nn
import undula
from undula.host.where import choose

def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) / 1024

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).requires_grad_(False)
x, layers = torch.randn(4, 1024), choose(model, "all-linear")
loss = lambda m, b: m(b).square().sum()
undula.Probe([x], loss).on(model, {"0": layers["0"]}).gradient("0").norm()  # what a first backward allocates for good
before = peak()
probe = undula.Probe([x], loss, hold=int(sys.argv[1])).on(model, layers)
norms = [float(probe.gradient(n).norm()) for n in layers]
print(peak() - before, *norms)
"""


def test_memory_is_what_hold_says():
    """Sixteen layers of 4 MB, above what probing one of them takes: nothing more one by one, the others all at once."""
    runs = {}
    for hold in (0, 1 << 28):
        done = subprocess.run([sys.executable, "-c", PEAK, str(hold)], capture_output=True, text=True, check=True)
        runs[hold] = [float(x) for x in done.stdout.split()]
    assert runs[0][0] < 8
    assert 56 < runs[1 << 28][0] < 72
    assert runs[0][1:] == runs[1 << 28][1:]


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


def test_what_learns_from_inputs_and_outputs_refuses_a_layer_that_is_no_product():
    """There u(x) = forward(x) - layer(x) is no dW x, and dL/dW no g x'."""
    model, data = nn.Sequential(OrderedDict(router=Normed(12, 12))), [torch.randn(3, 12)]
    probe = undula.Probe(data, loss=lambda model, batch: model(batch).square().sum())
    with pytest.raises(TypeError, match=r"router: Normed.forward is not W x \+ b, which is needed here"):
        undula.attach(model, undula.Centred(undula.LoRA(r=2), undula.starts.LoRAGA()), ["router"], probe=probe)
    undula.attach(model, undula.LoRA(r=2), ["router"])
    with pytest.raises(TypeError, match=r"router: Normed.forward is not W x \+ b, which is needed here"):
        undula.collapse(model, undula.LeastSquares(2, data))
