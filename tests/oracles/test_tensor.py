"""Methods whose factors the sites of a shape share (LoRTA, TensLoRA, S2-LoRA), and Block-LoRA, whose blocks share A."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import undula
from undula import BlockLoRA, LoRA, LoRTA, S2LoRA, TensLoRA
from undula.methods import tenslora as tl
from undula.methods._stacks import place
from undula.methods.lora import Classic
from undula.methods.lorta import HeadsInInputs, HeadsInOutputs
from undula.penalties import Gates, GroupLasso
from undula.study import sizes

pytestmark = pytest.mark.usefixtures("float64")

D, HEADS, LAYERS, KINDS = 16, 4, 3, 4
STACKINGS = [m() for m in tl.Stacking.registry.values()]
RANKS = tl.Tucker(r_outputs=5, r_heads=2, r_kinds=2, r_depth=3)
SHARED = [
    LoRTA(r=3, heads=HEADS),
    S2LoRA(r=3),
    *(TensLoRA(r=4, heads=HEADS, stacking=s, factorisation=f) for s in STACKINGS for f in (RANKS, tl.CP())),
]
TIED = [m for m in SHARED if getattr(m, "stacking", None) != tl.Att()]  # Att has a tensor for every matrix


class Block(nn.Module):
    """Four square matrices, and two of other shapes where the model has them."""

    def __init__(self, d, mlp):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        if mlp:
            self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        for square in (self.q, self.k, self.v, self.o):
            x = x + torch.tanh(square(x))
        return x + self.down(torch.tanh(self.up(x))) if hasattr(self, "up") else x


class Model(nn.Module):
    def __init__(self, layers=LAYERS, d=D, mlp=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(d, mlp) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def made(m, shake=0.3, **model):
    """(model, adapter), the factors away from their start."""
    model = Model(**model)
    adapter = undula.attach(model, m, where="*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(shake * torch.randn_like(p))
    return model, adapter


def rows(adapter, name):
    """{place: row} of the factor K or L, numpy."""
    return {place(s): f[name].detach().numpy() for s, f in adapter.factors.items() if name in f}


def each(methods):
    return pytest.mark.parametrize("m", methods, ids=[repr(m) for m in methods])


# Where a site stands


def test_places():
    assert place("model.layers.3.self_attn.q_proj") == (3, "model.layers.*.self_attn.q_proj")
    assert place("layer1.0.conv2") == (0, "layer1.*.conv2")
    assert place("lm_head") == (0, "lm_head")
    assert place("") == (0, "")
    names = [f"stages.{s}.blocks.{b}.fc" for s, b in itertools.product(range(3), range(3))]
    names += [f"layers.{i}.experts.{e}.w" for i, e in itertools.product(range(3), range(3))]
    assert len({place(n) for n in names}) == len(names)  # no two sites are one slice
    assert len({place(n).kind for n in names}) == 6


# LoRTA


def test_lorta_is_a_slice_of_the_papers_tensor():
    """T_ijqml by one einsum over the whole model, sliced; and the official code's concatenation of head blocks."""
    m = LoRTA(r=3, alpha=6.0, heads=HEADS)
    _, adapter = made(m)
    f = {k: t.detach().numpy() for k, t in adapter.factors["layers.0.q"].items()}
    kinds = [f"layers.*.{k}" for k in "qkvo"]
    C_m = np.stack([rows(adapter, "K")[0, kind] for kind in kinds])
    C_l = np.stack([rows(adapter, "L")[i, kinds[0]] for i in range(LAYERS)])
    T = np.einsum("ir,jr,qr,mr,lr->ijqml", f["A"], f["B"], f["H"], C_m, C_l)
    for (k, kind), i in itertools.product(enumerate(kinds), range(LAYERS)):
        got = adapter.delta(kind.replace("*", str(i)))
        blocks = [f["A"] @ np.diag(f["H"][q] * C_m[k] * C_l[i]) @ f["B"].T for q in range(HEADS)]
        np.testing.assert_allclose(got, 2.0 * np.concatenate(blocks, 1))
        np.testing.assert_allclose(got, 2.0 * T[..., k, i].transpose(0, 2, 1).reshape(D, D))


def test_lorta_turned_round():
    """Heads in the outputs: the transposed matrices of the transposed model."""
    there, back = (LoRTA(r=3, heads=HEADS, orientation=o) for o in (HeadsInInputs(), HeadsInOutputs()))
    _, adapter = made(there, mlp=True)
    for f in adapter.factors.values():
        torch.testing.assert_close(back.delta(f), there.delta(f).T)
    _, other = made(back, mlp=True)
    assert {s: tuple(other.delta(s).shape) for s in other.factors} == dict(other.shapes)


def test_lorta_counts():
    _, adapter = made(LoRTA(r=5, heads=HEADS))
    assert adapter.num_parameters() == 5 * (D + D // HEADS + HEADS + KINDS + LAYERS) == 155
    _, adapter = made(LoRTA(r=5, heads=HEADS), mlp=True)
    up, down = (2 * D + D // HEADS + HEADS + 1 + LAYERS), (D + 2 * D // HEADS + HEADS + 1 + LAYERS)
    assert adapter.num_parameters() == 155 + 5 * (up + down)


def test_heads_that_do_not_divide():
    _, adapter = made(LoRTA(r=2, heads=7))
    assert adapter.factors["layers.0.q"]["H"].shape == (4, 2)  # 16 = 4 x 4: neither 7, 6 nor 5 divides it
    with pytest.raises(ValueError, match=r"LoRTA\.heads is at least 1, found 0"):
        LoRTA(heads=0)


def test_lorta_starts_as_the_code_does():
    m = LoRTA(r=6, heads=64)
    model = Model(layers=1, d=512)
    f = undula.attach(model, m, where="*.q").factors["layers.0.q"]
    assert not f["B"].any()
    for name, bound in {"A": 6**-0.5, "H": 1.0}.items():  # Kaiming-uniform over r columns: a = sqrt 5, and a = 0
        reference = torch.empty_like(f[name])
        nn.init.kaiming_uniform_(reference, a=5**0.5 if name == "A" else 0)
        assert 0.97 * bound < f[name].abs().max() <= bound
        assert 0.97 * bound < reference.abs().max() <= bound
    assert max(f[name].abs().max() for name in "KL") <= 1.0


def lbfgs(parameters, loss, steps=400):
    optimiser = torch.optim.LBFGS(parameters, max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def misfit(adapter, target):
    """The squared error of all updates, relative."""
    methods = adapter.methods
    error = sum((methods[s].delta(f) - target[s]).square().sum() for s, f in adapter.factors.items())
    return error / sum(t.square().sum() for t in target.values())


def test_a_planted_cp_tensor_is_recovered():
    torch.manual_seed(1)
    m = LoRTA(r=3, heads=2)
    _, planted = made(m, d=8)
    with torch.no_grad():
        for p in planted.parameters():  # components of like size: a tiny one is found very slowly
            p.copy_(torch.randn_like(p).sign() * (0.5 + torch.rand_like(p)))
    target = {s: planted.delta(s) for s in planted.factors}
    _, adapter = made(m, shake=0.0, d=8)
    lbfgs(adapter.parameters(), lambda: misfit(adapter, target))
    assert misfit(adapter, target).item() ** 0.5 < 1e-3


# TensLoRA


def einsum_of(m):
    """The whole tensor of the stacked modes as an einsum over (G,) A, B, H, K, L."""
    modes = m.stacking.modes(D, D, HEADS)
    if isinstance(m.factorisation, tl.CP):
        return ",".join(f"{big}r" for big in modes) + "->" + "".join(modes)
    core = "".join(modes).lower()
    return core + "," + ",".join(big + big.lower() for big in modes) + "->" + "".join(modes)


def whole_tensors(adapter, m):
    """{(layer, kind): dW (O, I)}: every tensor of the adapter made in full, (inputs, outputs, ...) as in the
    paper, then sliced, unfolded and transposed."""
    found, stacking = {}, m.stacking
    where = {place(s): f for s, f in adapter.factors.items()}
    kinds, layers = sorted({p.kind for p in where}), sorted({p.layer for p in where})
    for here, f in where.items():
        factors = [f["G"]] if "G" in f else []
        factors += [f[name] for name in ("A", "B", "H") if name in f]
        if stacking.kinds:
            factors.append(torch.stack([where[here.layer, k]["K"] for k in kinds]))
        if stacking.depth:
            factors.append(torch.stack([where[i, here.kind]["L"] for i in layers]))
        T = np.einsum(einsum_of(m), *(t.detach().numpy() for t in factors))
        if stacking.depth:
            T = T[..., layers.index(here.layer)]
        if stacking.kinds:
            T = T[..., kinds.index(here.kind)]
        if stacking.heads:
            T = T.transpose(0, 2, 1).reshape(D, D)  # (i, j, q) -> (i, (q, j))
        found[here] = m.scale * T.T
    return found


@each([TensLoRA(4, 1.5, HEADS, s, f) for s in STACKINGS for f in (RANKS, tl.CP())])
def test_slice_then_contract_is_contract_then_slice(m):
    _, adapter = made(m)
    whole = whole_tensors(adapter, m)
    for s in adapter.factors:
        np.testing.assert_allclose(adapter.delta(s), whole[place(s)], atol=1e-12)


def test_official_unfolding_interleaves_heads():
    """The official code unfolds (d, d/h, h) in C order, so that output n belongs to "head" n mod h.  An attention
    layer's head q has the outputs q d/h ... (q + 1) d/h - 1, and so have ours."""
    m = TensLoRA(4, 1.0, HEADS, tl.Att(), RANKS)
    _, adapter = made(m)
    f = {k: t.detach().numpy() for k, t in adapter.factors["layers.0.q"].items()}
    official = np.einsum("abh,Aa,Bb,Hh->ABH", f["G"], f["A"], f["B"], f["H"]).reshape(D, D).T
    ours = adapter.delta("layers.0.q").numpy()
    assert not np.allclose(ours, official)
    np.testing.assert_allclose(ours, official.reshape(D // HEADS, HEADS, D).swapaxes(0, 1).reshape(D, D))


def test_tenslora_counts():
    r, (r2, rh, rk, rl) = 4, (RANKS.r_outputs, RANKS.r_heads, RANKS.r_kinds, RANKS.r_depth)
    d, h, L, M = D, HEADS, LAYERS, KINDS  # the paper has three kinds
    papers = {
        tl.Att(): M * L * (r * d + r2 * d // h + rh * h + r * r2 * rh),
        tl.QKV(): L * (r * d + r2 * d + rk * M + r * r2 * rk),
        tl.Depth(): M * (r * d + r2 * d + rl * L + r * r2 * rl),
        tl.AttQKV(): L * (r * d + r2 * d // h + rh * h + rk * M + r * r2 * rh * rk),
        tl.AttDepth(): M * (r * d + r2 * d // h + rh * h + rl * L + r * r2 * rh * rl),
        tl.QKVDepth(): r * d + r2 * d + rk * M + rl * L + r * r2 * rk * rl,
        tl.AttQKVDepth(): r * d + r2 * d // h + rh * h + rk * M + rl * L + r * r2 * rh * rk * rl,
    }
    assert set(papers) == set(STACKINGS)
    for stacking, count in papers.items():
        m = TensLoRA(r=r, heads=h, stacking=stacking, factorisation=RANKS)
        _, adapter = made(m)
        assert adapter.num_parameters() == count, stacking
        assert sizes.count(m, adapter.shapes) == count, stacking
    _, adapter = made(TensLoRA(r=r, heads=h, stacking=tl.AttQKVDepth(), factorisation=tl.CP()))
    assert adapter.num_parameters() == r * (d + d // h + h + M + L)


@pytest.mark.parametrize("stacking", STACKINGS, ids=repr)
def test_full_ranks_reproduce_any_tensor(stacking):
    """At r_n = D_n the start's factors are orthogonal, those whose rows sites hold one by one too: the core that fits
    any updates is these updates, turned."""
    full = tl.Tucker(r_outputs=D // HEADS if stacking.heads else D, r_heads=HEADS, r_kinds=KINDS, r_depth=LAYERS)
    m = TensLoRA(r=D, heads=HEADS, stacking=stacking, factorisation=full)
    _, adapter = made(m, shake=0.0)
    target = {s: torch.randn(D, D) for s in adapter.factors}
    with torch.no_grad():
        for s, f in adapter.factors.items():
            T = target[s].T.reshape(D, HEADS, D // HEADS).swapaxes(1, 2) if stacking.heads else target[s].T
            for name in "ABH":
                if name in f:  # contracts the first mode and puts it last
                    T = torch.tensordot(T, f[name], dims=([0], [0]))
            for name in "KL":
                if name in f:
                    T = T[..., None] * f[name]
            f["G"].add_(T)  # summed over the sites that share it: over the kinds and layers that are stacked
    for s in adapter.factors:
        torch.testing.assert_close(adapter.delta(s), target[s])


def test_rows_are_those_of_one_orthogonal_factor():
    model = Model(layers=7, mlp=True)  # the two other shapes are none of this factor's business
    m = TensLoRA(r=4, factorisation=tl.Tucker(r_kinds=3, r_depth=4))
    adapter = undula.attach(model, m, where="*")
    L = np.stack([rows(adapter, "L")[i, "layers.*.q"] for i in range(7)])
    K = np.stack([rows(adapter, "K")[0, f"layers.*.{k}"] for k in "qkvo"])
    np.testing.assert_allclose(L.T @ L, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(K.T @ K, np.eye(3), atol=1e-12)
    f = adapter.factors["layers.0.q"]
    for name in "AB":
        torch.testing.assert_close(f[name].T @ f[name], torch.eye(4))


@pytest.mark.parametrize("stacking", STACKINGS, ids=repr)
def test_cp_is_tucker_with_the_identity_as_core(stacking):
    r = 3
    cp = TensLoRA(r, 1.0, HEADS, stacking, tl.CP())
    tucker = TensLoRA(r, 1.0, HEADS, stacking, tl.Tucker(r, r, r, r))
    _, adapter = made(cp)
    for f in adapter.factors.values():
        G = torch.zeros((r,) * len(f))
        G[(torch.arange(r),) * len(f)] = 1.0
        torch.testing.assert_close(tucker.delta({**f, "G": G}), cp.delta(f))


@pytest.mark.parametrize(
    ("stacking", "name", "alone", "other"),
    [(tl.QKV(), "K", "layers.1.q", "layers.0.k"), (tl.Depth(), "L", "layers.0.k", "layers.1.q")],
    ids=["kinds", "layers"],
)
def test_what_is_drawn_together_is_what_there_is(stacking, name, alone, other):
    """Of a layer without some kinds, its own kinds; of a kind without some layers, its own layers: the columns of these
    rows are orthonormal, and a lone row is a unit."""
    layers = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(D, D) for kind in kinds}) for kinds in ("qk", "q"))
    m = TensLoRA(r=2, stacking=stacking, factorisation=tl.Tucker(r_kinds=1, r_depth=1))
    f = undula.attach(nn.ModuleDict({"layers": layers}), m, where="*").factors
    row = {site: float(f[site][name].detach().square().sum()) for site in f}
    assert row[alone] == pytest.approx(1)
    assert row["layers.0.q"] + row[other] == pytest.approx(1)


def test_qkv_with_the_identity_is_independent_updates():
    """Three kinds, r_kinds = 3, K = 1: a Tucker-2 update of its own for each kind, in common bases."""
    m = TensLoRA(r=4, stacking=tl.QKV(), factorisation=tl.Tucker(r_outputs=5, r_kinds=3))
    adapter = undula.attach(Model(), m, where=["*.q", "*.k", "*.v"])
    cores = torch.randn(4, 5, 3)
    for i, kind in enumerate("qkv"):
        f = adapter.factors[f"layers.1.{kind}"]
        with torch.no_grad():
            f["K"].copy_(torch.eye(3)[i])
            f["G"].copy_(cores)
        torch.testing.assert_close(adapter.delta(f"layers.1.{kind}"), f["B"] @ cores[:, :, i].T @ f["A"].T)


# What the three have in common


@each(TIED)
def test_gradients_of_shared_factors_are_sums_over_sites(m):
    """Against the same adapter with the ties cut."""
    model, adapter = made(m, mlp=True)
    x, target = torch.randn(6, D), torch.randn(6, D)
    alone = copy.deepcopy(model)
    undula.detach(alone)
    cut = undula.attach(
        alone, adapter.copy().map(lambda f: {k: t.detach().clone().requires_grad_() for k, t in f.items()})
    )
    for net in (model, alone):
        nn.functional.mse_loss(net(x), target).backward()
    assert cut.num_parameters() > adapter.num_parameters()
    for p in adapter.parameters():
        uses = [cut.factors[s][k].grad for s, k, t in adapter.tensors() if t is p]
        torch.testing.assert_close(p.grad, sum(uses))


@each(TIED)
def test_ties_survive_files(m, tmp_path):
    _, adapter = made(m, mlp=True)
    adapter.save(tmp_path)
    again = undula.Adapter.load(tmp_path)

    def ties(a):
        return sorted([(s, k) for s, k, other in a.tensors() if other is t] for t in a.parameters())

    assert ties(again) == ties(adapter)
    assert max(map(len, ties(adapter))) > 1
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (it is no mapping)
    assert sum(t.numel() for t in stored) == adapter.num_parameters()
    model = Model(mlp=True)
    attached = undula.attach(model, again)
    assert ties(attached) == ties(adapter)
    for s in adapter.factors:
        torch.testing.assert_close(attached.delta(s), adapter.delta(s), rtol=1e-5, atol=1e-6)  # files hold float32


FIRST = {LoRTA: {"B"}, S2LoRA: {"e"}}


@each(SHARED)
def test_what_moves_first(m):
    model, adapter = made(m, shake=0.0)
    x = torch.randn(6, D)
    undula.detach(model)
    base = model(x)
    undula.attach(model, adapter)
    torch.testing.assert_close(model(x), base)
    model(x).square().sum().backward()
    moving = {k for _, k, t in adapter.tensors() if t.grad.abs().max() > 0}
    assert moving == FIRST.get(type(m), {"G"} if getattr(m, "factorisation", None) == RANKS else {"A"})


def test_methods_of_one_attach_share_nothing_with_each_other():
    model = Model()
    adapter = undula.attach(model, S2LoRA(r=2), where="*", overrides={"*.q": S2LoRA(r=3), "*.k": LoRTA(r=2)})
    assert adapter.num_parameters() == (
        2 * 2 * D + 2 * LAYERS * 2 + 3 * 2 * D + 3 * LAYERS + 2 * (D + 2 + 8 + 1 + LAYERS)
    )


@each([LoRTA(), TensLoRA(), S2LoRA(), BlockLoRA()])
def test_ranks_fit_a_budget(m):
    """The search for a rank asks for every rank from 1 on."""
    shapes = {f"layers.{i}.{k}": (64, 64) for i in range(12) for k in "qkv"}
    wanted = sizes.count(sizes.at_rank(m, 11), shapes)
    assert sizes.with_parameters(m, wanted, shapes).r == 11


# S2-LoRA


def test_s2_lora():
    m = S2LoRA(r=3)
    _, adapter = made(m, mlp=True)
    pairs = [(D, D), (2 * D, D), (D, 2 * D)]
    assert adapter.num_parameters() == sum(3 * (o + i) for o, i in pairs) + 3 * len(adapter.factors)
    for s, f in adapter.factors.items():
        outer = [float(f["e"][k].detach()) * torch.outer(f["B"][:, k], f["A"][k]) for k in range(3)]
        torch.testing.assert_close(adapter.delta(s), sum(outer).detach())
        one_hot = {**f, m.gate: torch.tensor([0.0, 1.0, 0.0])}
        assert torch.linalg.matrix_rank(m.delta(one_hot)) == 1


def test_planted_coefficients_are_recovered():
    """Sparse e over common bases: fitted without a penalty, the zeros of e come out (CP tensors are unique)."""
    torch.manual_seed(0)
    m = S2LoRA(r=3, std=0.3)
    _, planted = made(m, shake=0.5, d=8)
    support = {s: tuple((i >> k & 1) for k in range(3)) for i, s in enumerate(planted.factors, 1)}
    with torch.no_grad():
        for s, f in planted.factors.items():
            f["e"].copy_(torch.tensor(support[s]) * (1 + torch.rand(3)))
    target = {s: planted.delta(s) for s in planted.factors}
    _, adapter = made(m, shake=0.0, d=8)
    lbfgs(adapter.parameters(), lambda: misfit(adapter, target), 1000)
    assert misfit(adapter, target).item() ** 0.5 < 1e-4
    e = torch.stack([f["e"].detach().abs() for f in adapter.factors.values()])
    found = {tuple(column) for column in (e > 0.01 * e.max(0).values).T.tolist()}
    assert found == {tuple(bool(s[k]) for s in support.values()) for k in range(3)}


def penalised(adapter, model, weight, lr=0.05):
    """(optimiser, course) of a penalty on the gates alone."""
    optimiser = torch.optim.Adam(adapter.parameters(), lr=lr)
    return optimiser, GroupLasso(weight, groups=Gates()).start(model, optimiser, 200)


def test_a_penalty_on_the_gates_shrinks_them_alone():
    """One step without a gradient: e by rate * weight towards zero, the shared factors not at all."""
    model, adapter = made(S2LoRA(r=3), mlp=True)
    before = {(s, k): t.detach().clone() for s, k, t in adapter.tensors()}
    _, course = penalised(adapter, model, 2.0)
    course.before_forward()
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    course.before_update()
    course.after_update()
    for s, k, t in adapter.tensors():
        was = before[s, k]
        torch.testing.assert_close(t.detach(), nn.functional.softshrink(was, 0.05 * 2.0) if k == "e" else was)
    assert course.how.figures(model)["groups"] == 3 * len(adapter.factors)


def test_penalised_gates_close_where_nothing_is_to_be_learned():
    """Twelve matrices, of which three have an update to learn: the others end at exactly zero, and are the base."""
    torch.manual_seed(1)
    model = Model(d=8)
    needed = ["layers.0.q", "layers.1.k", "layers.2.o"]
    adapter = undula.attach(model, S2LoRA(r=3, std=0.3), where="*")
    want = {s: torch.outer(torch.randn(8), torch.randn(8)) / 4 * (s in needed) for s in adapter.factors}
    optimiser, course = penalised(adapter, model, 0.2)
    for _ in range(200):
        course.before_forward()
        misfit(adapter, want).backward()
        course.before_update()
        optimiser.step()
        course.after_update()
        optimiser.zero_grad()
    course.finish()
    assert {s for s, f in adapter.factors.items() if f["e"].any()} == set(needed)
    for s in needed:
        assert (adapter.delta(s) - want[s]).norm() < 0.2 * want[s].norm()


@pytest.mark.parametrize("m", [LoRA(r=2), undula.GatedLoRA(r=2)], ids=["none", "frozen"])
def test_gates_are_asked_of_methods_that_train_some(m):
    model = Model()
    adapter = undula.attach(model, m, where="*")
    with pytest.raises(TypeError, match=r"needs a gate that trains, and \w*LoRA\(.*\) at layers\.0\.q has none"):
        penalised(adapter, model, 1.0)


# Block-LoRA


def blocks_of(m, f):
    return f["B"].split(m.width, 1)


def test_block_form_is_summed_form():
    for m, widths in ((BlockLoRA(r=8, blocks=4, alpha=6.0), [2] * 4), (BlockLoRA(r=5, blocks=3), [2, 2, 1])):
        _, adapter = made(m)
        f = adapter.factors["layers.0.q"]
        blocks = blocks_of(m, f)
        assert [b.shape[1] for b in blocks] == widths
        A = torch.cat([f["A"][: b.shape[1]] for b in blocks])  # [A; A; ...]
        torch.testing.assert_close(adapter.delta("layers.0.q"), (m.alpha / m.r * f["B"] @ A).detach())
        assert torch.linalg.matrix_rank(adapter.delta("layers.0.q")) == widths[0]
    with pytest.raises(ValueError, match="blocks=1 is LoRA"):
        BlockLoRA(blocks=0)


def test_blocks_get_identical_gradients_wherever_they_are():
    m = BlockLoRA(r=8, blocks=4)
    model, adapter = made(m)
    model(torch.randn(5, D)).square().sum().backward()
    for f in adapter.factors.values():
        first, *others = f["B"].grad.split(2, 1)
        assert first.norm() > 0
        for other in others:
            torch.testing.assert_close(other, first)
        assert not torch.allclose(*blocks_of(m, f)[:2])  # the blocks themselves differ


def test_one_block_is_lora():
    m = BlockLoRA(r=3, blocks=1)
    _, adapter = made(m)
    for s, f in adapter.factors.items():
        torch.testing.assert_close(adapter.delta(s), LoRA(r=3, alpha=m.alpha).delta(f).detach())


@pytest.mark.parametrize(
    ("kind", "rate"),
    [(torch.optim.SGD, 0.05), (partial(torch.optim.AdamW, weight_decay=0.0), 0.005)],
    ids=["sgd", "adamw"],
)
def test_a_training_is_that_of_a_narrow_lora_with_a_faster_b(kind, rate):
    n = 4
    m = BlockLoRA(r=8, blocks=n, alpha=6.0)
    model, blocked = made(m, shake=0.0)
    twin = copy.deepcopy(model)
    undula.detach(twin)
    plain = undula.attach(twin, LoRA(r=2, alpha=1.5), where="*")
    with torch.no_grad():
        for s, f in plain.factors.items():
            f["A"].copy_(blocked.factors[s]["A"])
    down, up = ([f[k] for f in plain.factors.values()] for k in "AB")
    optimisers = [
        kind(blocked.parameters(), lr=rate),
        kind([{"params": down}, {"params": up, "lr": n * rate}], lr=rate),
    ]
    x, target = torch.randn(20, D), torch.randn(20, D)
    losses = []
    for _ in range(20):
        step = []
        for net, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            optimiser.step()
            step.append(loss.detach())
        torch.testing.assert_close(*step)
        losses.append(step[0].item())
    assert losses[-1] < 0.9 * losses[0]
    for s in plain.factors:
        torch.testing.assert_close(blocked.delta(s), plain.delta(s))


@pytest.mark.parametrize("scaling", [Classic(), undula.RankStabilised()], ids=repr)
def test_merged_up_is_the_same_update(scaling):
    m = BlockLoRA(r=8, blocks=4, alpha=6.0, scaling=scaling)
    _, adapter = made(m)
    for s, f in adapter.factors.items():
        plain, factors = m.merged_up(f)
        assert plain.r == 2
        torch.testing.assert_close(plain.delta(factors).detach(), adapter.delta(s))
        torch.testing.assert_close(factors["B"], sum(blocks_of(m, f)))
