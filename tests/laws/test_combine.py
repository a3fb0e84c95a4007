"""The algebra of several adapters as one, over random adapters of every method that has an update."""

import random
import warnings
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

import undula
from tests.support.layers import net
from tests.support.numbers import shake
from tests.support.zoo import ADDITIVE
from undula import LoRA, LoRAN, combine
from undula.combine import (
    DARE,
    DELLA,
    LEGO,
    Aligned,
    Average,
    Breadcrumbs,
    Elect,
    Magnitude,
    Merge,
    Principal,
    RegMean,
    Slerp,
    Sum,
    update,
)
from undula.combine.merge import align
from undula.io.sites import Opened, Writer
from undula.kernels.magnitude import kth_largest

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _evidence(made_up_evidence):
    """Methods that start from data meet made-up data."""


def drawn(seed, methods=ADDITIVE, where=("0", "2")):
    """An adapter of random methods at some layers, away from its start."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    chosen = [site for site in where if rng.random() < 0.8] or [where[0]]
    model = net().double()
    first, *others = [rng.choice(methods) for _ in chosen]
    rules = dict(zip(chosen[1:], others, strict=True))
    return shake(undula.attach(model, first, chosen, overrides=rules), 0.3).copy()


def low(seed, r=2, where=("0", "2"), **options):
    torch.manual_seed(seed)
    return shake(undula.attach(net().double(), LoRA(r=r, **options), list(where)), 0.5).copy()


def delta(adapter, site):
    zero = torch.zeros({"0": (16, 12), "2": (8, 16)}[site], dtype=torch.float64)
    return adapter.delta(site).double() if site in adapter.methods else zero


def same(found, wanted, rtol=1e-7, atol=1e-9):
    """The same updates: `wanted` is an adapter or {site: dW}."""
    for site in ("0", "2"):
        close(
            delta(found, site), wanted[site] if isinstance(wanted, dict) else delta(wanted, site), rtol=rtol, atol=atol
        )


def quietly(combiner, adapters, weights=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", combine.Missing)
        return combiner(adapters, weights)


ALL = Magnitude(1.0)  # entry by entry, and nothing is left out
DETERMINISTIC = {
    "average": Merge(),
    "ties, all": Merge(ALL, Elect()),
    "slerp": Slerp(),
    "lego": LEGO(),
    "knots, all": Merge(ALL, Elect(), Aligned()),
}
TRIMMED = {
    "ties": Merge(Magnitude(0.3), Elect()),
    "magnitude": Merge(Magnitude(0.5), Sum()),
    "breadcrumbs": Merge(Breadcrumbs(0.6, 0.1), Elect(Sum())),
    "knots": Merge(Magnitude(0.3), Elect(), Aligned()),
    "stack": Merge(consensus=Sum()),
}


@pytest.mark.parametrize("seed", range(8))
def test_of_equal_adapters_it_is_that_adapter_and_one_alone_is_itself(seed):
    """Every method with an update: the average of equals is itself; so is an adapter alone, whatever the way."""
    a = drawn(seed)
    for combiner in DETERMINISTIC.values():
        for number in (1, 3):
            same(quietly(combiner, [a.copy() for _ in range(number)]), a)


@pytest.mark.parametrize("seed", range(4))
def test_no_order_counts(seed):
    """Of adapters with their weights, for whatever draws nothing."""
    adapters, weights = [drawn(10 * seed + i) for i in range(3)], [0.5, 0.3, 0.2]
    for combiner in (DETERMINISTIC | TRIMMED).values():
        found = quietly(combiner, adapters, weights)
        same(quietly(combiner, adapters[::-1], weights[::-1]), {s: delta(found, s) for s in ("0", "2")})


@pytest.mark.parametrize("seed", range(6))
def test_stacking_is_the_sum_and_taking_away_gives_the_base(seed):
    adapters, weights = [drawn(10 * seed + i) for i in range(3)], [0.5, -2.0, 1.5]
    found = quietly(Merge(consensus=Sum()), adapters, weights)
    same(found, {s: sum(w * delta(a, s) for w, a in zip(weights, adapters, strict=True)) for s in ("0", "2")})
    left = found - sum(w * a for w, a in zip(weights, adapters, strict=True))
    same(left, {"0": torch.zeros(16, 12).double(), "2": torch.zeros(8, 16).double()})
    gone = quietly(Merge(consensus=Sum()), [found, *adapters], [1.0, -0.5, 2.0, -1.5])
    same(gone, {"0": torch.zeros(16, 12).double(), "2": torch.zeros(8, 16).double()})


def test_ranks_and_scales_are_kept_account_of():
    """Different ranks, alphas and rules of scale: the result is one plain LoRA of scale 1, and the sum to the bit of
    what each computes."""
    adapters = [low(1, 2, alpha=7.0), low(2, 3, scaling=undula.RankStabilised()), low(3, 1, alpha=0.5)]
    found = combine.named("stack")(adapters)
    assert found.methods == {"0": LoRA(r=6, alpha=6.0), "2": LoRA(r=6, alpha=6.0)}
    assert found.methods["0"].plain()[0] == 1.0
    same(found, sum(adapters))
    many = combine.named("stack")([low(i, 4) for i in range(4)])  # 16 ranks at a layer that has 12 or 8
    assert [m.r for m in many.methods.values()] == [12, 8]
    same(many, sum(low(i, 4) for i in range(4)))
    assert all(t.requires_grad for _, _, t in found.tensors())


@pytest.mark.parametrize("space", ["factors", "update"])
def test_what_a_rank_keeps_is_the_nearest_and_keeping_it_again_changes_nothing(space):
    """Eckart and Young: the miss is that of the first singular triples, as `steps` reports; of low-rank parts from the
    factors, else of the update itself."""
    others = [low(1, 3), low(2, 3)] if space == "factors" else [low(1, 3), drawn(3, [LoRAN(r=2)])]
    combiner = Merge(consensus=Sum(), rank=2)
    whole = quietly(Merge(consensus=Sum()), others)
    found = quietly(combiner, others)
    for site, made in zip(found.methods, combiner.steps(others), strict=True):
        s = torch.linalg.svdvals(delta(whole, site))
        assert found.methods[site] == LoRA(r=2, alpha=2.0)
        close(torch.linalg.matrix_norm(delta(whole, site) - delta(found, site)).square(), s[2:].square().sum())
        close(torch.tensor([made.missed, made.whole]).double(), torch.stack([s[2:].square().sum(), s.square().sum()]))
    same(combiner([found]), found)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_updates_by_other_factors_give_the_same(seed):
    """B G and G^-1 A are B and A; LEGO's units are an adapter's own ranks, so G turns none, but in its principal
    gauge."""
    torch.manual_seed(seed)
    adapters = [low(seed, 3), low(seed + 1, 2)]
    for general in (True, False):
        turned = []
        for a in adapters:
            r = a.methods["0"].r
            G = torch.randn(r, r).double() if general else torch.diag(torch.randn(r).double())[torch.randperm(r)]
            turned.append(a.map(lambda f, G=G: {"B": f["B"] @ G, "A": torch.linalg.solve(G, f["A"])}))
        own = {"lego, principal": LEGO(3, Principal())} if general else {"lego": LEGO(3)}
        for combiner in (DETERMINISTIC | TRIMMED | own).values():
            if combiner != LEGO():
                same(combiner(turned), combiner(adapters), rtol=1e-6, atol=1e-8)


def brute(deltas, density, weights, elect=True):
    """TIES as its paper writes it."""
    terms = []
    for dW in deltas:
        k = int(density * dW.numel())
        kept = torch.zeros(dW.numel(), dtype=dW.dtype)
        top = dW.flatten().abs().topk(k).indices
        kept[top] = dW.flatten()[top]
        terms.append(kept.view_as(dW))
    sign = sum(w * t for w, t in zip(weights, terms, strict=True)).sign()
    agree = [(t.sign() == sign) & (sign != 0) for t in terms]
    total = sum(w * t * a for w, t, a in zip(weights, terms, agree, strict=True))
    count = sum(w * a for w, a in zip(weights, agree, strict=True))
    return total / torch.where(count > 0, count, torch.ones_like(total))


@pytest.mark.parametrize("block", [1 << 22, 40])
def test_ties_is_its_papers_whatever_the_blocks(block, monkeypatch):
    """Also where a block holds a row or two, and of methods without factors."""
    monkeypatch.setattr(update, "BLOCK", block)
    adapters = [low(1), low(2, 3), drawn(5, [LoRAN(r=2)], ["0"])]
    found = quietly(Merge(Magnitude(0.3), Elect(), rank=100), adapters, [0.5, 1.0, 2.0])
    same(found, {s: brute([delta(a, s) for a in adapters], 0.3, [0.5, 1.0, 2.0]) for s in ("0", "2")})
    taken = quietly(Merge(Magnitude(0.3), Elect(), rank=100), adapters, [0.5, -1.0, 2.0])
    signed = [adapters[0], -adapters[1], adapters[2]]
    same(taken, quietly(Merge(Magnitude(0.3), Elect(), rank=100), signed, [0.5, 1.0, 2.0]))


def test_what_is_kept_in_memory_is_what_is_computed_anew(monkeypatch):
    """A large combination is computed again for each product of its decomposition, with the same draws."""
    monkeypatch.setattr(update, "BLOCK", 1000)
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(90, 80).double())
        adapters.append(shake(undula.attach(model, LoRA(r=2), ["0"]), 0.5).copy())
    how, found = Merge(DELLA(0.5), Elect(), rank=2), []
    for held in (0, 1 << 24):
        monkeypatch.setattr(update, "HELD", held)
        found.append(how(adapters, [1.0, 1.0]).delta("0"))
    close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest_is_found_block_by_block(dtype):
    torch.manual_seed(0)
    for numbers in (torch.randn(997), torch.randn(997) * 10.0 ** torch.randint(-30, 30, (997,)), torch.zeros(40),
                    torch.tensor([0.0, -1.0, 1.0, 1.0, 5.0, -5.0])):  # fmt: skip
        numbers = numbers.to(dtype)
        ordered = numbers.abs().sort(descending=True).values
        for k in {1, 2, 3, len(numbers) // 2, len(numbers)}:
            assert kth_largest(lambda n=numbers: n.split(100), k, dtype) == float(ordered[k - 1]), (k, dtype)


def test_what_is_drawn_is_divided_by_its_chance():
    """DARE and DELLA: an entry is gone or divided by its probability, which is the density, or rises with its rank in
    its row; so the mean over draws is the update.  The same seed draws the same."""
    torch.manual_seed(0)
    M = torch.randn(50, 200).double()
    generator = torch.Generator().manual_seed(0)
    dare = DARE(0.4)(M, None, generator)
    assert set((dare / M).unique().tolist()) <= {0.0, 1 / 0.4, *(dare / M)[dare != 0].unique().tolist()}
    close(dare[dare != 0], (M / 0.4)[dare != 0])
    assert abs(float((dare != 0).double().mean()) - 0.4) < 0.03
    share = M.abs().argsort(1).argsort(1) / 199
    chance = 0.5 + 0.4 * (share - 0.5)
    della = DELLA(0.5, 0.4)(M, None, generator)
    close(della[della != 0], (M / chance)[della != 0])
    kept = (della != 0).double()
    assert abs(float(kept[share < 0.2].mean()) - 0.34) < 0.04
    assert abs(float(kept[share > 0.8].mean()) - 0.66) < 0.04
    adapters, combiner = [low(1), low(2)], Merge(DARE(0.5), Sum(), seed=3)
    same(combiner(adapters), combiner(adapters))
    assert not torch.equal(combiner(adapters).delta("0"), Merge(DARE(0.5), Sum(), seed=4)(adapters).delta("0"))
    with pytest.raises(ValueError, match="lie in \\(0, 1\\]"):
        DELLA(0.95, 0.2)


def test_breadcrumbs_leave_out_both_ends():
    M = torch.arange(1.0, 101.0).view(10, 10).double()
    found = Breadcrumbs(0.6, 0.1)
    kept = found.measured(lambda: [M], 100, torch.float64)
    assert found(M, kept, None).count_nonzero() == 60
    close(found(M, kept, None)[found(M, kept, None) != 0], torch.arange(31.0, 91.0).double())


def test_the_aligned_space_is_that_of_the_updates():
    """KnOTS: U S V_i' are the updates, the mean there is the mean, and no direction is there twice."""
    adapters = [low(1, 2), low(2, 3), low(1, 2)]
    pairs = [a.methods["0"].pair(a.factors["0"]) for a in adapters]
    U, parts = align(pairs)
    assert U.shape == (16, 5)
    for part, a in zip(parts, adapters, strict=True):
        close(U @ part, a.delta("0"))
    same(Merge(ALL, Average(), Aligned())(adapters), Merge()(adapters))


def test_regmean_is_the_minimum_on_all_inputs_together():
    """The gradient of sum_i w_i |X_i dW' - X_i dW_i'|^2 is zero there; of low-rank updates without an O x I matrix."""
    torch.manual_seed(0)
    inputs = [{s: torch.randn(40, I).double() for s, I in (("0", 12), ("2", 16))} for _ in range(2)]
    grams = [{s: X.T @ X for s, X in own.items()} for own in inputs]
    for adapters in ([low(1, 2), low(2, 3)], [low(1, 2), drawn(5, [LoRAN(r=2)], ["0"])]):
        found = quietly(RegMean(grams, shrink=1.0, rank=100), adapters, [1.0, 3.0])
        for site in ("0", "2"):
            gradient = sum(
                w * (delta(found, site) - delta(a, site)) @ G[site]
                for w, a, G in zip((1.0, 3.0), adapters, grams, strict=True)
            )
            close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
    same(RegMean([grams[0]] * 2)([low(1), low(1)]), low(1))
    apart = [{"0": grams[0]["0"]}, {"2": grams[1]["2"]}]
    lone = quietly(RegMean(apart), [low(1, where=("0",)), low(2, where=("2",))], [0.0, 1.0])
    same(lone, {"0": torch.zeros(16, 12).double(), "2": low(2, where=("2",)).delta("2")})
    with pytest.raises(ValueError, match="adapter 2 has an update at 0 and no Gram matrix"):
        RegMean([grams[0], {}])([low(1), low(2)])


def test_regmean_of_a_rank_is_the_minimum_of_that_rank():
    """What it costs beyond the minimum itself is what Eckart and Young leave of dW L, L L' = sum_i w_i G_i; cutting dW
    costs more."""
    torch.manual_seed(0)
    stretched = {I: torch.logspace(0, 2, I).double() for I in (12, 16)}
    inputs = [{s: torch.randn(40, I).double() * stretched[I] for s, I in (("0", 12), ("2", 16))} for _ in range(2)]
    grams = [{s: X.T @ X for s, X in own.items()} for own in inputs]
    for adapters in ([low(1, 2), low(2, 3)], [low(1, 2), drawn(5, [LoRAN(r=2)], ["0"])]):
        best = quietly(RegMean(grams, shrink=1.0, rank=100), adapters, [1.0, 3.0])
        found = quietly(RegMean(grams, shrink=1.0, rank=2), adapters, [1.0, 3.0])
        site = "0"
        L = torch.linalg.cholesky(0.25 * grams[0][site] + 0.75 * grams[1][site])
        left = torch.linalg.svdvals(delta(best, site) @ L)[2:].square().sum()
        cost = ((delta(found, site) - delta(best, site)) @ L).square().sum()
        close(cost, left, rtol=1e-6, atol=0)
        U, s, Vh = torch.linalg.svd(delta(best, site))
        cut = (U[:, :2] * s[:2]) @ Vh[:2]
        assert float(((cut - delta(best, site)) @ L).square().sum()) > 1.5 * float(cost)


def test_regmean_measures_the_inputs_of_the_adapted_layers():
    model = net().double()
    adapter = shake(undula.attach(model, LoRA(r=2)))
    batches = [torch.randn(5, 12).double() for _ in range(3)]
    found = combine.grams(model, batches)
    x = torch.cat(batches)
    close(found["0"], x.T @ x)
    y = torch.tanh(x @ (model[0].weight + adapter.delta("0")).T + model[0].bias)
    close(found["2"], y.T @ y)
    assert list(found) == ["0", "2"]


def test_slerp_of_two_is_the_formula_and_of_opposites_is_refused():
    a, b = low(1), low(2)
    found = Slerp()([a, b], [1.0, 3.0])
    for site in ("0", "2"):
        x, y = a.delta(site), b.delta(site)
        angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
        wanted = torch.sin(0.25 * angle) / angle.sin() * x + torch.sin(0.75 * angle) / angle.sin() * y
        close(found.delta(site), wanted)
    with pytest.raises(ValueError, match="opposite directions"):
        Slerp()([a, -a])
    with pytest.raises(ValueError, match="not negative"):
        Slerp()([a, b], [1.0, -1.0])


def test_lego_of_as_many_groups_as_ranks_is_the_sum():
    """And of two adapters whose ranks are permuted, and rescaled, it is the one: factors averaged would not be."""
    a, b = low(1, 3), low(2, 2)
    same(LEGO(5, rescale=0.0)([a, b]), a + b)
    close(LEGO(5)([a, b]).delta("0"), (2.5 / 5) ** 0.5 * (a + b).delta("0"))
    order, scale = torch.tensor([2, 0, 1]), torch.tensor([-3.0, 0.1, 5.0]).double()
    twin = a.map(lambda f: {"A": (f["A"] * scale[:, None])[order], "B": (f["B"] / scale)[:, order]})
    for k in (3, None):
        found = LEGO(k)([a, twin])
        same(found, a)
        assert found.methods["0"].r == 3
    mean = a.map(lambda f: {k: (f[k] + twin.factors["0"][k]) / 2 if f[k] is a.factors["0"][k] else f[k] for k in f})
    assert (mean.delta("0") - a.delta("0")).norm() > 0.3 * a.delta("0").norm()
    close(LEGO(1, restore=0.0)([a, b], [1.0, 0.0]).delta("0"), LEGO(1, restore=0.0)([a]).delta("0"))


def test_directories_give_what_values_give(tmp_path):
    """Layer by layer, without a base: every named way, the same adapter as in memory."""
    for i in range(3):
        drawn(i, [LoRA(r=2), LoRA(r=3, alpha=2.0), LoRAN(r=2)]).save(tmp_path / str(i))
    loaded = [undula.Adapter.load(tmp_path / str(i)) for i in range(3)]
    for name in combine.NAMED:
        combiner = combine.named(name, rank=3)
        with ExitStack() as stack, Writer(tmp_path / name) as writer, warnings.catch_warnings():
            warnings.simplefilter("ignore", combine.Missing)
            opened = [stack.enter_context(Opened(tmp_path / str(i))) for i in range(3)]
            for made in combiner.steps(opened, [0.5, 0.3, 0.2]):
                writer.add(made.part)
            writer.finish()
        same(undula.Adapter.load(tmp_path / name), quietly(combiner, loaded, [0.5, 0.3, 0.2]), rtol=1e-5, atol=1e-6)


def test_what_trained_trains_on_in_the_combination(tmp_path):
    """Where there is no plain LoRA too: the parts of a `Sum` train, those that a method freezes do not."""
    adapters = [
        low(1, where=("0",)),
        low(2, where=("0",)),
        drawn(3, [LoRAN(r=2)], ["0"]),
        drawn(4, [undula.VeRA()], ["0"]),
    ]
    for i, a in enumerate(adapters):
        a.save(tmp_path / str(i))
    for others in ([0, 1], [0, 2], [2, 3]):
        combine.combine_directories(Merge(), [tmp_path / str(i) for i in others], tmp_path / f"all {others}")
        for found in (Merge()([adapters[i] for i in others]), undula.Adapter.load(tmp_path / f"all {others}")):
            trains = {k: t.requires_grad for _, k, t in found.tensors()}
            if 2 in others:
                own = [(j, k, t) for j, i in enumerate(others) for _, k, t in adapters[i].tensors()]
                assert trains == {f"{j}_{k}": t.requires_grad for j, k, t in own}
            else:
                assert trains == {"A": True, "B": True}
            assert found.num_parameters() == sum(t.numel() for _, _, t in found.tensors() if t.requires_grad) > 0


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_what_is_in_full_is_averaged_and_rounded_once(dtypes, tmp_path):
    """In the widest type of all, in whatever order they come, from directories as from values."""
    heads = []
    for i in range(3):
        a = undula.attach(net(), LoRA(r=1), ["0"], full=["2"]).copy()
        torch.manual_seed(i)
        full = {n: torch.randn(t.shape).to(dtypes[i > 0]).requires_grad_() for n, t in a.full.items()}
        heads.append(replace(a, full=full))
        heads[i].save(tmp_path / str(i))
    weights = [0.5, 0.3, 0.2]
    wanted = sum(w * a.full["2.weight"].detach().double() for w, a in zip(weights, heads, strict=True))
    for turn in (1, -1):
        combine.combine_directories(
            Merge(), [tmp_path / str(i) for i in range(3)][::turn], tmp_path / f"to {turn}", weights[::turn]
        )
        for found in (Merge()(heads[::turn], weights[::turn]), undula.Adapter.load(tmp_path / f"to {turn}")):
            head = found.full["2.weight"]
            assert head.requires_grad
            assert head.dtype == torch.promote_types(*dtypes)
            close(head.double(), wanted, rtol=1.01 * 2.0**-8 if dtypes[1] == torch.bfloat16 else 1e-6, atol=1e-6)


def test_parameters_in_full_without_an_average_are_refused_before_anything_is_computed(tmp_path):
    for i in range(2):
        undula.attach(net(), LoRA(r=1), ["0"], full=["2"]).save(tmp_path / str(i))
    for weights, why in (([1.0, -0.5], "weights that sum to 0.5"), ([1.0, 1.0], "cannot be added")):
        with pytest.raises(ValueError, match=why):
            combine.combine_directories(
                Merge(consensus=Sum()), [tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights, seen=pytest.fail
            )
        assert not (tmp_path / "out").exists()


def test_the_row_of_padding_is_no_part_of_an_update():
    """So the rank that is kept is spent on rows that count, and magnitudes are those of such rows."""
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        a = shake(
            undula.attach(nn.Sequential(nn.Embedding(12, 8, padding_idx=3)).double(), LoRA(r=2), ["0"]), 0.5
        ).copy()
        for f in a.factors.values():
            f["A"].detach()[:, 3] = 1e3  # no forward reads it
        adapters.append(a)
    total = sum(a.delta("0").index_fill(1, torch.tensor([3]), 0.0) for a in adapters)
    for combiner in (Merge(consensus=Sum(), rank=3), Merge(ALL, Sum(), rank=3), Merge(ALL, Sum(), Aligned(), rank=3)):
        (made,) = combiner.steps(adapters)
        U, s, V = torch.linalg.svd(total, full_matrices=False)
        close(made.part.delta("0").detach(), U[:, :3] * s[:3] @ V[:3])
        close(torch.tensor([made.missed, made.whole]).double(), torch.stack([s[3:].square().sum(), s.square().sum()]))


def test_what_does_not_belong_together_is_refused():
    a, b = low(1), low(2, where=("0",))
    with pytest.warns(combine.Missing, match=r"adapter 2 has nothing at 1 of 2 layers: its update is zero there \(2\)"):
        found = Merge()([a, b])
    close(found.delta("2"), a.delta("2") / 2)
    for text, adapters, weights in (
        ("at least one", [], None),
        ("2 adapters take 2 weights, found 1", [a, a], [1.0]),
        ("finite", [a, a], [1.0, float("nan")]),
        ("weights with a sum", [a, a], [1.0, -1.0]),
        ("nothing is left of the adapters", [a, a], [0.0, 0.0]),
    ):
        with pytest.raises(ValueError, match=text):
            Merge()(adapters, weights)
    named = [replace(a, about={"base_model_name_or_path": base}) for base in ("one/model", "other/model")]
    with pytest.raises(ValueError, match="adapter 1 is for one/model and adapter 2 for other/model"):
        Merge()(named)
    with pytest.raises(TypeError, match="rung Method"):
        Merge()([undula.attach(net().double(), undula.AuroRA()).copy()])
    with pytest.raises(LookupError, match="no way to combine is called 'tise'; there are: average"):
        combine.named("tise")
    with pytest.raises(ValueError, match="has no density"):
        combine.named("stack", density=0.5)
    with pytest.raises(ValueError, match="say which"):
        combine.named("svd")
    heads = undula.attach(net().double(), LoRA(r=1), ["0"], full=["2"]).copy()
    with pytest.raises(ValueError, match="train parameters in full cannot be added"):
        combine.named("stack")([heads, heads])
    wider = replace(heads, full={n: torch.cat([t, t]) for n, t in heads.full.items()})
    with pytest.raises(ValueError, match=r"2.weight is \(8, 16\) and \(16, 16\) in the adapters"):
        combine.named("average")([heads, wider])
    vast = a.map(lambda f: {"A": f["A"] * 1e100, "B": f["B"] * 1e100})
    for wrong, combiner in ((1e13, Merge()), (1.0, Merge(Magnitude(0.5), Sum(), rank=2))):
        with pytest.raises(
            ValueError, match=r"at most 1e\+12 in size|at 0 the combination is beyond what torch.float64"
        ):
            combiner([vast, a], [wrong, 1.0])
    for weights in ([1.0], [0.5, float("nan")]):
        with pytest.raises(ValueError, match=r"2 adapters take 2 weights|finite"):
            combine.fused([a, a], weights)
    with pytest.raises(ValueError, match="weights are for what adapters train in full"):
        combine.fused([a, a], [0.5, 0.5])
    halves = combine.named("average")([heads, heads])
    close(halves.full["2.weight"], heads.full["2.weight"])
    model = nn.Sequential(nn.Linear(12, 5))
    with pytest.raises(ValueError, match="different models: 0 is"):
        Merge()([a, undula.attach(model.double(), LoRA(r=1)).copy()])
