"""Laws of penalties: their proximal steps minimise what they say, zero strength is no penalty, zeros are exact."""

import copy
import dataclasses
import tempfile

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import undula
from undula import penalties
from undula.cli.forgetting import PENALTY
from undula.penalties import (
    L1,
    NLG,
    NLU,
    WGSEF,
    Adapters,
    BALoRA,
    Blocks,
    Entries,
    Filters,
    GroupLasso,
    HeadRanks,
    Heads,
    KLToBase,
    Matrices,
    Orthogonal,
    OrthogonalToEarlier,
    Ranks,
    SparseGroups,
)
from undula.penalties.answers import base_answers, kl, scored
from undula.penalties.group_lasso import shrunk
from undula.penalties.groups import block_of, pairs
from undula.penalties.wgsef import conjugate, envelope, factors, levels
from undula.ranks import Together

GROUPS = [Blocks(), Adapters(), Matrices(), Ranks(), Filters(), Heads(4), HeadRanks(4), Entries()]
PIECES = SparseGroups(0.02, groups=HeadRanks(4))
EVERY = [GroupLasso(0.02), WGSEF(0.05), PIECES, L1(0.01), Orthogonal(0.1), KLToBase(0.5), BALoRA(10.0, after=0.0)]


def net(p=0.2):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 4))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randint(4, (16,), generator=g)


def fill(adapter, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


def before(place, r=2, where="*", model=None):
    """The directory of an adapter of a task before."""
    adapter = undula.attach(model or net(), undula.LoRA(r=r), where=where)
    fill(adapter, seed=r)
    adapter.save(place)
    return str(place)


HOME = tempfile.TemporaryDirectory()
EVERY.append(OrthogonalToEarlier(0.1, earlier=(before(HOME.name),)))


def trained(how, steps=6, optimizer=torch.optim.AdamW, lr=0.05, parts=1, clip=None, method=None, where="*", p=0.2):
    """The model after so many updates of `parts` batches each."""
    model = net(p)
    adapter = undula.attach(model, method or undula.LoRA(r=3), where=where)
    fill(adapter)
    made = optimizer(adapter.parameters(), lr=lr)
    course = None if how is None else how.start(model, made, steps)
    torch.manual_seed(7)
    for step in range(steps):
        if course:
            course.before_forward()
        x, y = batch(step)
        for rows, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            out = model(rows)
            loss = nn.functional.cross_entropy(out, labels) / parts
            (loss + (course.term(rows, out) / parts if course else 0.0)).backward()
        if course:
            course.before_update()
        if clip:
            nn.utils.clip_grad_norm_(adapter.parameters(), clip)
        made.step()
        if course:
            course.after_update()
        made.zero_grad()
    if course:
        course.finish()
    return model, course


def test_every_penalty_of_the_library_stands_in_these_laws():
    """A new one must not pass them by."""
    assert {type(p) for p in EVERY} == set(penalties.Penalty.members())


@pytest.mark.parametrize("how", EVERY, ids=lambda p: type(p).__name__)
def test_a_weight_of_zero_changes_no_bit(how):
    """Also where what it would look at costs a forward pass, or draws."""
    plain, none = trained(None)[0], trained(dataclasses.replace(how, weight=0.0))[0]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), none.parameters(), strict=True))


@pytest.mark.parametrize("how", EVERY, ids=lambda p: type(p).__name__)
def test_a_penalty_changes_what_is_trained_and_a_stronger_one_lowers_it_more(how):
    """Else it would be there and do nothing."""
    plain, once = trained(None)[0], trained(how)[0]
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), once.parameters(), strict=True))


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: type(g).__name__)
def test_the_sizes_of_groups_are_what_their_entries_say(groups):
    """Of every grouping, told entry by entry."""
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=3), where=["0", "2"])
    fill(adapter)
    grouped = groups.of(model, adapter)
    found = torch.zeros(grouped.count, dtype=torch.float64)
    counted = torch.zeros(grouped.count, dtype=torch.float64)
    for part in grouped.parts:
        index = part.index.expand(part.tensor.shape)
        for g, x in zip(index.flatten().tolist(), part.tensor.flatten().tolist(), strict=True):
            found[g] += x * x
            counted[g] += 1
    torch.testing.assert_close(grouped.squares().double(), found, rtol=1e-5, atol=0)
    torch.testing.assert_close(grouped.sizes.double(), counted)
    assert (counted > 0).all()


COUNTS = {
    "Blocks": 2,
    "Adapters": 2,
    "Matrices": 4,
    "Ranks": 6,
    "Filters": 16,
    "Heads": 4,
    "HeadRanks": 12,
    "Entries": 90,
}


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: type(g).__name__)
def test_there_are_as_many_groups_as_their_name_says(groups):
    model = net()
    grouped = groups.of(model, undula.attach(model, undula.LoRA(r=3), where=["0", "2"]))
    assert grouped.count == COUNTS[type(groups).__name__]


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("encoder.layer.3.attention.query", "encoder.layer.3"),
        ("model.layers.11.mlp.experts.5.up", "model.layers.11"),
        ("blocks.2.1.conv_pw", "blocks.2.1"),
        ("classifier", "classifier"),
        ("0", "0"),
    ],
)
def test_a_block_is_told_by_the_first_numbers_of_a_name(site, block):
    assert block_of(site) == block


def brute(objective, start):
    """The minimum of a function of numpy arrays, from several starts."""
    runs = [minimize(objective, s, method="BFGS", options={"gtol": 1e-9}) for s in (start, start * 0.5, start * 0.1)]
    return min(runs, key=lambda r: r.fun)


def test_the_proximal_step_of_group_lasso_minimises_its_objective():
    """|z - v|^2 / 2 + l |z| over single groups, found by a general minimiser."""
    rng = np.random.default_rng(0)
    for l in (0.1, 0.5, 1.0):
        v = rng.normal(size=4)
        found = v * float(shrunk(torch.tensor([np.linalg.norm(v)]), torch.tensor([l], dtype=torch.float64)))

        def objective(z, v=v, l=l):
            return ((z - v) ** 2).sum() / 2 + l * np.sqrt((z**2).sum() + 1e-16)

        assert objective(found) <= brute(objective, v).fun + 1e-7


def test_the_proximal_step_of_group_lasso_is_zero_within_its_length_and_safe_at_zero():
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    assert shrunk(norms, torch.ones_like(norms)).tolist() == [0.0, 0.0, 0.0, 0.5]


def cases():
    rng = np.random.default_rng(1)
    for _ in range(20):
        G = int(rng.integers(2, 7))
        k = int(rng.integers(1, G + 1))
        yield rng.normal(size=G), rng.uniform(0.3, 3, size=G), k, float(10 ** rng.uniform(-2, 1))


def test_the_envelope_is_the_biconjugate():
    """f** is the largest of <x, y> - f*(y): no y gives more, one gives as much; and it is f on points of k groups."""
    rng = np.random.default_rng(3)
    for x, d, k, _ in cases():
        norms, weights = torch.tensor(abs(x)), torch.tensor(d)
        value = float(envelope(norms, weights, k))
        u = levels(weights.sqrt() * norms, torch.zeros_like(norms), k)
        best = weights * norms / u
        assert float(best @ norms - conjugate(best, weights, k)) == pytest.approx(value, rel=1e-9)
        for scale in (0.1, 1.0, 10.0):
            y = best * torch.tensor(1 + scale * rng.normal(size=len(x)))
            assert float(y @ norms - conjugate(y.abs(), weights, k)) <= value + 1e-9
        kept = torch.zeros_like(norms)
        kept[norms.topk(k).indices] = norms[norms.topk(k).indices]
        torch.testing.assert_close(envelope(kept, weights, k), (weights * kept.square()).sum() / 2)


def test_the_proximal_step_of_the_envelope_minimises_its_objective():
    """No other point is better, and the step meets Fenchel's equality."""
    rng = np.random.default_rng(2)
    for v, d, k, l in cases():
        norms, weights = torch.tensor(abs(v)), torch.tensor(d)
        x = norms * factors(norms, weights, k, torch.full_like(norms, l))

        def objective(z, norms=norms, weights=weights, k=k, l=l):
            return float(((z - norms) ** 2).sum() / 2 + l * envelope(z.abs(), weights, k))

        least = objective(x)
        for scale in (1e-3, 1e-2, 1e-1, 1.0):
            for _ in range(10):
                assert objective(x + scale * torch.tensor(rng.normal(size=len(v)))) >= least - 1e-9
        y = (norms - x) / l
        fenchel = float(envelope(x, weights, k) + conjugate(y.abs(), weights, k))
        assert fenchel == pytest.approx(float(x @ y), rel=1e-7, abs=1e-9)


def test_a_long_step_of_the_envelope_keeps_the_k_largest_groups():
    norms = torch.tensor([0.1, 3.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    found = factors(norms, torch.ones_like(norms), 2, torch.full_like(norms, 1e6))
    assert found.nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(
    "groups",
    [GroupLasso(0.05), GroupLasso(0.01, by_size=True), L1(0.05), WGSEF(0.2, sparsity=0.5, settle=1.0)],
    ids=repr,
)
def test_under_plain_descent_it_is_the_proximal_gradient_method(groups):
    """One step is prox(x - eta g), told from parts: the gradient of the loss alone, then the operator."""
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=3), where=["0", "2"])
    fill(adapter)
    other = copy.deepcopy(model)
    sgd = torch.optim.SGD(adapter.parameters(), lr=0.3)
    course = groups.start(model, sgd, 10)
    x, y = batch(0)
    for m in (model, other):
        torch.manual_seed(0)
        nn.functional.cross_entropy(m(x), y).backward()
    course.before_update()
    sgd.step()
    course.after_update()
    theirs = undula.selected(other)
    with torch.no_grad():
        for p in theirs.parameters():
            p.sub_(p.grad, alpha=0.3)
        grouped = groups.grouping.of(other, theirs)
        grouped.scale(groups.factors(grouped, grouped.norms(), torch.full_like(grouped.sizes, 0.3 * groups.weight)))
    for a, b in zip(adapter.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", [p for p in EVERY if not isinstance(p, BALoRA)], ids=lambda p: type(p).__name__)
def test_batches_that_are_accumulated_are_as_one(how):
    """Its strength does not follow the number of backward passes; BA-LoRA is of a batch as it comes."""
    one, several = (trained(how, parts=n, clip=0.5, p=0.0)[0] for n in (1, 4))
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sparsity_is_reached_and_kept_to_the_end():
    """Exactly so many groups are zero from where it settles on, AdamW's momentum notwithstanding."""
    for sparsity in (0.0, 0.34, 0.8):
        how = WGSEF(1e-4, sparsity=sparsity, settle=0.5)
        model = trained(how, steps=8)[0]
        grouped = how.groups.of(model, undula.selected(model))
        assert int((grouped.norms() == 0).sum()) == round(sparsity * grouped.count)
        assert how.figures(model)["zero"] == round(sparsity * grouped.count)


def test_a_group_at_zero_is_the_base_there():
    """What GS-LoRA promises: a block that is not needed changes nothing."""
    model, _ = trained(GroupLasso(1e4))
    model.eval()
    x, _ = batch(0)
    assert torch.equal(model(x), net().eval()(x))


def test_after_the_settling_what_stays_trains_on():
    """The groups that were chosen move, the others do not come back."""
    how = WGSEF(1e-3, sparsity=0.5, settle=0.5)
    half, whole = (trained(dataclasses.replace(how, settle=s), steps=8)[0] for s in (1.0, 0.5))
    zero = [(how.groups.of(m, undula.selected(m)).norms() == 0) for m in (half, whole)]
    assert int(zero[0].sum()) == int(zero[1].sum())
    assert any(not torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("how", [WGSEF(1e-3, settle=0.4), GroupLasso(0.02), KLToBase(0.5), BALoRA(after=0.0)], ids=repr)
def test_a_course_goes_on_from_its_state(how):
    """What is settled, and where the schedule is, comes back with a checkpoint."""
    model, course = trained(how, steps=4)
    tensors, values = course.state()
    other = how.start(model, torch.optim.SGD(undula.selected(model).parameters(), lr=0.1), 4)
    other.restore(tensors, values)
    again, told = other.state()
    assert told == values
    assert {k: t.tolist() for k, t in again.items()} == {k: t.tolist() for k, t in tensors.items()}


@pytest.mark.parametrize("how", [GroupLasso(0.1), L1(0.1), WGSEF(0.1)], ids=repr)
def test_half_precision_is_drawn_to_exact_zeros_too(how):
    """Sizes of groups are summed in float32, and zero is zero in any type.  That small steps are lost is told."""
    model = net().to(torch.bfloat16)
    adapter = undula.attach(model, undula.LoRA(r=3), where=["0", "2"], dtype=torch.bfloat16)
    fill(adapter)
    with pytest.warns(UserWarning, match="bfloat16 loses those below 0.004 of a number: keep the factors in float32"):
        course = dataclasses.replace(how, weight=1e4).start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), 1)
    course.before_forward()
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    course.before_update()
    course.after_update()
    course.finish()
    grouped = how.grouping.of(model, adapter)
    assert grouped.squares().dtype == torch.float32
    assert float(grouped.norms().min()) == 0.0


# What goes with what


FITS = [undula.LoRA(r=2), undula.VeRA(r=4), undula.SHiRA(r=1), undula.AuroRA(r=2), undula.SineLoRA(r=2)]


@pytest.mark.parametrize("method", FITS, ids=repr)
def test_zero_is_the_base_for_methods_of_every_kind(method):
    """GroupLasso serves whatever is the base at zero, nonlinear methods too."""
    model, _ = trained(GroupLasso(1e4, groups=Adapters()), method=method, where=["0", "2"])
    x, _ = batch(0)
    torch.testing.assert_close(model.eval()(x), net().eval()(x))


@pytest.mark.parametrize(
    ("method", "how", "words"),
    [
        (undula.DoRA(undula.LoRA(r=2)), GroupLasso(), "Reweight"),
        (undula.Centred(undula.LoRA(r=2), undula.starts.PiSSA()), GroupLasso(), "not the base there"),
        (undula.SHiRA(r=1), GroupLasso(groups=Ranks()), "Additive"),
        (undula.AuroRA(r=2), Orthogonal(), "rung Method"),
        (undula.DoRA(undula.LoRA(r=2)), Orthogonal(), "rung Reweight"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_a_method_cannot_do_is_refused_with_its_rung(method, how, words):
    model = net()
    adapter = undula.attach(model, method, where=["0", "2"])
    with pytest.raises(TypeError, match=words):
        how.start(model, torch.optim.AdamW(adapter.parameters()), 10)


def test_what_steps_at_two_rates_is_no_group():
    """LoRA+ steps B faster than A: there is no one length of a proximal step for both.  Groups within B have one."""
    model = net()
    undula.attach(model, undula.LoRA(r=2), where=["0", "2"])
    made = torch.optim.AdamW(undula.loraplus_groups(model, lr=0.01, ratio=4))
    with pytest.raises(ValueError, match="different rates"):
        GroupLasso().start(model, made, 10)
    GroupLasso(groups=Filters()).start(model, made, 10)


def test_factors_that_sites_share_are_one_group_or_refused():
    """Blocks hold both sites; groups of each site would draw a shared factor twice."""
    model = net()
    adapter = undula.attach(model, undula.LoRTA(r=2), where=["2"])
    made = torch.optim.AdamW(adapter.parameters())
    GroupLasso(groups=Blocks()).start(model, made, 3)
    twin = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = undula.attach(twin, undula.LoRTA(r=2))
    with pytest.raises(ValueError, match="shares a factor"):
        GroupLasso(groups=Adapters()).start(twin, torch.optim.AdamW(adapter.parameters()), 3)


def test_outputs_that_are_no_multiple_of_a_head_are_refused():
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=2), where=["0"])
    for groups, words in ((Heads(3), "multiple|has 8"), (Heads(), "how large its heads are")):
        with pytest.raises(ValueError, match=words):
            GroupLasso(groups=groups).start(model, torch.optim.AdamW(adapter.parameters()), 3)


def test_by_size_a_step_takes_weight_times_rate_from_the_root_mean_square_of_each_group():
    """Whatever the size of the group."""
    model = net().double()
    adapter = undula.attach(model, undula.LoRA(r=3), where="*", dtype=torch.float64)
    fill(adapter)
    how = GroupLasso(0.4, by_size=True, groups=Matrices())
    before = how.grouping.of(model, adapter)
    was = before.norms() / before.sizes.sqrt()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    course = how.start(model, optimizer, 1)
    course.before_forward()
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    course.before_update()
    optimizer.step()
    course.after_update()
    assert len(set(before.sizes.tolist())) > 1
    torch.testing.assert_close(before.norms() / before.sizes.sqrt(), was - 0.4 * 0.05)


class Paths(nn.Module):
    """Four blocks beside each other, each with inputs and outputs of its own."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return torch.cat([block(part) for block, part in zip(self.block, x.chunk(4, -1), strict=True)], -1)


@pytest.mark.parametrize("width", [8, 32])
def test_the_default_of_forgetting_closes_blocks_that_are_not_needed_and_no_others(width):
    """Two of four blocks have something to learn; answers are noisy.  One weight serves both widths."""
    torch.manual_seed(2)
    model, target = Paths(width), Paths(width)
    target.load_state_dict(model.state_dict())
    for i in (1, 3):
        with torch.no_grad():
            target.block[i].weight.add_(torch.outer(torch.randn(width), torch.randn(width)) / width)
    adapter = undula.attach(model, undula.LoRA(r=2), where="*")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    course = PENALTY.start(model, optimizer, 150)
    for _ in range(150):
        course.before_forward()
        x = torch.randn(32, 4 * width)
        nn.functional.mse_loss(model(x), target(x).detach() + 0.05 * torch.randn(32, 4 * width)).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
    course.finish()
    assert PENALTY.figures(model)["in_use"] == ["block.1", "block.3"]
    with torch.no_grad():
        x = torch.randn(512, 4 * width)
        assert float((model(x) - target(x)).square().mean()) < 0.01


def test_what_is_settled_stays_and_trains_on_without_the_penalty():
    """A group that is zero at `settle` cannot come back, the others move by the optimiser alone; a state that is taken
    up again has settled the same; an end before it settles too."""
    how = GroupLasso(3.0, groups=Filters(), settle=0.5)
    model, course = trained(how, steps=6)
    norms = how.grouping.of(model, undula.selected(model)).norms()
    assert course.stays.tolist() == [1.0 if norm else 0.0 for norm in norms.tolist()]
    assert 0 < int(course.stays.sum()) < len(norms)
    _, other = trained(dataclasses.replace(how, weight=1e-9), steps=6)
    assert other.stays.tolist() == [1.0] * len(norms)
    short = how.start(model, torch.optim.AdamW(undula.selected(model).parameters()), 100)
    short.finish()
    assert short.stays.tolist() == course.stays.tolist()
    assert how.counts_from(10) == 5
    assert how.fixed
    assert not GroupLasso().fixed
    assert GroupLasso().counts_from(10) == 0
    with pytest.raises(ValueError, match=r"settles at 0\.2"):
        GroupLasso(after=0.5, settle=0.2)


def test_tasks_in_sequence_keep_apart(tmp_path):
    """R and its step are what the formula says, over all earlier tasks where they have the layer; A does not vanish."""
    how = OrthogonalToEarlier(1.0, earlier=(before(tmp_path / "a"), before(tmp_path / "b", 3, ["0"])))
    model = net().double()
    adapter = undula.attach(model, undula.LoRA(r=2), where=["0", "2"])
    fill(adapter)
    rows = {site: torch.cat([A.detach() for place in how.earlier for at, _, A in pairs(undula.Adapter.load(place), how)
                             if at == site]).double() for site in ("0", "2")}  # fmt: skip
    assert [len(those) for those in rows.values()] == [5, 2]
    A = {site: A for site, _, A in pairs(adapter, how)}
    was = {site: a.detach().clone() for site, a in A.items()}
    wanted = sum((rows[site] @ a.T.double()).square().sum().item() for site, a in was.items())
    assert how.figures(model)["value"] == pytest.approx(wanted)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.02)
    course = how.start(model, optimizer, 300)
    for step in range(300):
        course.before_forward()
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        course.before_update()
        optimizer.step()
        course.after_update()
        for site, a in A.items() if step == 0 else ():
            expected = was[site].double() - 0.02 * 2 * was[site].double() @ rows[site].T @ rows[site]
            torch.testing.assert_close(a.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert how.figures(model)["value"] < 0.1 * wanted
    assert all(a.norm() > 0.1 for a in A.values())


def test_tasks_before_that_say_nothing_are_refused(tmp_path):
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=2), where=["2"])
    optimizer = torch.optim.AdamW(adapter.parameters())
    other, wide = before(tmp_path / "a", where=["0"]), nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    for earlier, words in (
        ((), "needs the directories of adapters of tasks before"),
        ((other,), "has no layer of this one's"),
        ((before(tmp_path / "b", model=wide),), "2 takes 8 inputs, and 5 in the adapter in"),
        ((str(tmp_path / "none"),), "none"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            OrthogonalToEarlier(earlier=earlier).start(model, optimizer, 3)
    OrthogonalToEarlier(0.0).start(model, optimizer, 3)


def test_layers_that_a_task_before_has_not_are_told_and_a_frozen_A_is_refused(tmp_path):
    """There nothing would keep the tasks apart."""
    model = net()
    adapter = undula.attach(model, undula.LoRA(r=2), where=["0", "2", "4"])
    how = OrthogonalToEarlier(earlier=(before(tmp_path / "a"), before(tmp_path / "b", where=["0"])))
    with pytest.warns(UserWarning, match="b has nothing at 2, 4, 2 of these 3 layers") as told:
        how.start(model, torch.optim.AdamW(adapter.parameters()), 3)
    assert len(told) == 1
    adapter.factors["2"]["A"].requires_grad_(False)
    with pytest.raises(ValueError, match="that of 2 does not train"):
        dataclasses.replace(how, earlier=how.earlier[:1]).start(model, torch.optim.AdamW(adapter.parameters()), 3)


def test_where_no_group_is_left_that_is_told():
    with pytest.warns(UserWarning, match="none of 3 groups stays: the adapter is zero"):
        trained(GroupLasso(1e6, groups=Adapters(), by_size=True, settle=0.5))


def test_penalties_add_up_and_multiply():
    """A sum of sums is one list, and a number multiplies each."""
    both = 2 * (GroupLasso(0.1) + L1(0.2)) + KLToBase(1.0) * 0.5
    assert both == Together((GroupLasso(0.2), L1(0.4), KLToBase(0.5)))
    assert penalties.penalty.listed([both, L1(0.1)]) == (GroupLasso(0.2), L1(0.4), KLToBase(0.5), L1(0.1))
    with pytest.raises(TypeError, match="no weight"):
        2 * (GroupLasso() + undula.ranks.ReLoRA())


def test_two_penalties_together_are_each_of_them():
    """The sum of a smooth one, one of the answers and one with a kink does all three."""
    model, _ = trained(Orthogonal(0.1) + KLToBase(0.1) + GroupLasso(1e4))
    assert all(not p.any() for p in undula.selected(model).parameters())


# The teacher


def test_the_teacher_is_the_base_whatever_the_start():
    """PiSSA puts the largest part of W into the factors; the base answers as it did, with no dropout, and the modes
    of the model's parts are what they were."""
    for method in (undula.LoRA(r=2), undula.Centred(undula.LoRA(r=2), undula.starts.PiSSA())):
        model, x = net(), batch(0)[0]
        wanted = net().eval()(x)
        adapter = undula.attach(model, method, where="*", full=["4"] if method == undula.LoRA(r=2) else ())
        fill(adapter)
        model.train()
        model[1].eval()
        answers = model(x)
        found = base_answers(model, x)
        torch.testing.assert_close(found, wanted)
        assert [m.training for m in (model, model[3], model[1])] == [True, True, False]
        answers.sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())


def test_there_is_nothing_to_say_at_the_start():
    """With the adapter at the base KL is zero, and so is its gradient."""
    model = net(p=0.0)
    adapter = undula.attach(model, undula.LoRA(r=2), where="*")
    course = KLToBase(1.0, temperature=2.0).start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), 3)
    x, _ = batch(0)
    term = course.term(x, model(x))
    term.backward()
    assert term.item() == pytest.approx(0.0, abs=1e-6)
    assert all(float(p.grad.abs().max()) < 1e-6 for p in adapter.parameters())


def test_kl_is_the_mean_over_rows_of_what_its_formula_says():
    base, rows = (torch.randn(5, 7, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    p, q = (base / 2).softmax(-1), (rows / 2).softmax(-1)
    torch.testing.assert_close(kl(base, rows, 2.0), 4 * (p * (p / q).log()).sum(-1).mean())


def test_of_tokens_those_with_a_label_count_and_a_language_model_answers_the_next():
    class TinyForCausalLM(nn.Module): ...

    logits = torch.arange(24.0).view(2, 4, 3)
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7]])
    found = scored(TinyForCausalLM(), logits, {"labels": labels})
    torch.testing.assert_close(found, torch.stack([logits[0, 0], logits[0, 1], logits[1, 2]]))
    found = scored(nn.Linear(1, 1), logits, {"labels": labels})
    torch.testing.assert_close(found, torch.stack([logits[0, 1], logits[0, 2], logits[1, 3]]))


# BA-LoRA


def test_diversity_is_none_of_columns_that_have_nothing_in_common():
    """NLU's is the covariance beside the diagonal; of one row there is none."""
    Z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert float(NLU().diverse(Z)) == pytest.approx(0.0, abs=1e-12)
    alike = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = torch.cov(alike.T)
    torch.testing.assert_close(NLU().diverse(alike), (C.square().sum() - C.diag().square().sum()) / 3)
    assert float(NLU().diverse(Z[:1])) == 0.0


def test_the_spectrum_is_minus_one_where_the_rank_is_k_and_above_it_else():
    g = torch.Generator().manual_seed(0)
    low, full = torch.randn(9, 3, generator=g) @ torch.randn(3, 8, generator=g), torch.randn(9, 8, generator=g)
    assert float(NLU(k=3).spectral(low)) == pytest.approx(-1.0, abs=1e-5)
    assert float(NLU(k=3).spectral(full)) > -0.99


def test_the_entropy_of_equal_answers_is_the_largest():
    assert float(NLG(top=5).diverse(torch.ones(3, 9))) == pytest.approx(-np.log(5), abs=1e-6)
    assert float(NLG(top=5).diverse(torch.randn(3, 9))) > -np.log(5)


def test_a_random_range_has_the_largest_singular_values_and_their_gradient(monkeypatch):
    """As exact as the decomposition of the whole, where the spectrum falls off."""
    g = torch.Generator().manual_seed(0)
    Z = (torch.randn(40, 20, generator=g) * 0.3 ** torch.arange(20)) @ torch.randn(20, 200, generator=g)
    values, slopes = [], []
    for wide in (4096, 10):
        monkeypatch.setattr(penalties.ba_lora, "WIDE", wide)
        own = Z.clone().requires_grad_()
        values.append(NLG(k=3).spectral(own))
        values[-1].backward()
        slopes.append(own.grad)
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-2, atol=1e-5)


def test_of_one_number_there_are_no_probabilities():
    model = nn.Linear(6, 1)
    undula.attach(model, undula.LoRA(r=1), "*")
    course = KLToBase().start(model, torch.optim.SGD(undula.adapters(model)["default"].parameters(), lr=0.1), 2)
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="a softmax over one is 1 whatever it is"):
        course.term(x, model(x))


def test_l1_counts_the_numbers_that_it_draws():
    """Not those of a head that trains beside the factors."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    undula.attach(model, undula.LoRA(r=2), ["0"], full=["1"])
    assert L1().figures(model) == {"groups": 2 * (6 + 4), "zero": 2 * 4}


def test_ba_lora_weighs_as_its_schedule_says():
    """Consistency falls to a tenth; the others begin after a fifth of the updates."""
    how = BALoRA()
    assert how.weights(0.0) == (1.0, 0.0)
    assert how.weights(1.0) == (pytest.approx(0.1), 1.0)
    assert how.weights(0.225)[1] == pytest.approx(0.5)
