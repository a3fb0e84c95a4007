"""Structured pruning of the base: what masks close while an adapter trains, and what is left when it has gone."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import undula
from undula.compress.prune_base import prune_base
from undula.host.coupled import HEADS, coupled
from undula.ranks import Procedure, loraprune
from undula.ranks.loraprune import LoRAPrune, ghat, sparsity_at

SIZES = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
         "intermediate_size": 20, "initializer_range": 0.3}  # fmt: skip
STEPS = 10
BOTH, CHANNELS = ("heads", "channels"), ("channels",)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4, n_positions=20,
                                               bos_token_id=1, eos_token_id=2)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=20)),
}  # fmt: skip
KINDS = {"llama": BOTH, "qwen2": BOTH, "gpt2": CHANNELS, "bert": CHANNELS}
each = pytest.mark.parametrize("name", MODELS)
IDS = torch.arange(36).reshape(3, 12) * 7 % 30


def made(name):
    """A random model whose biases are not zero, and a LoRA on all its layers."""
    torch.manual_seed(3)
    model = MODELS[name]().double().eval()
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            nn.init.normal_(p, std=0.5)
    return model, undula.attach(model, undula.LoRA(r=2))


def masks(adapter):
    return {s: f["mask"].clone() for s, f in adapter.factors.items() if "mask" in f}


def trained(name, how, steps=STEPS, spoil=()):
    """(model, adapter, masks after each update) of a training; at the steps `spoil` a gradient is not finite."""
    model, adapter = made(name)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    course, seen = how.start(model, optimizer, steps), []
    for step in range(steps):
        course.before_forward()
        model(input_ids=IDS, labels=IDS).loss.backward()
        if step in spoil:
            adapter.parameters()[0].grad.fill_(torch.nan)
        course.before_update()
        if step not in spoil:
            optimizer.step()
        course.after_update()
        optimizer.zero_grad()
        seen.append(masks(adapter))
    course.finish()
    return model, adapter, seen, course


def test_ghat_is_the_change_of_the_product_under_a_step_of_rate_one():
    B, A, gB, gA = (torch.randn(s, dtype=torch.float64) for s in ((5, 2), (2, 7), (5, 2), (2, 7)))
    torch.testing.assert_close(ghat(B, A, gB, gA), B @ A - (B - gB) @ (A - gA))


@pytest.mark.parametrize("steps", [7, 10, 333])
def test_the_schedule_goes_from_nothing_to_all_and_never_back(steps):
    every = [sparsity_at(t, steps, 0.4) for t in range(steps + 1)]
    assert every == sorted(every)
    assert {every[t] for t in range(steps // 10 + 1)} == {0.0}
    assert every[-(-9 * steps // 10)] == every[-1] == 0.4
    middle = sparsity_at(50, 100, 1.0)
    assert middle == pytest.approx(1 - 0.5**3)


@each
def test_what_masks_close_can_be_taken_away_and_plain_transformers_opens_the_rest(name, tmp_path):
    """The function of the masked model is that of the smaller one, with its adapter, merged, and opened elsewhere."""
    model, adapter, _, course = trained(name, LoRAPrune(0.5, structures=KINDS[name], every=2))
    bare = undula.detach(copy.deepcopy(model)).num_parameters()
    with torch.no_grad():
        y = model(input_ids=IDS).logits
        pruned = prune_base(model)
        assert {k: b - a for k, (b, a) in pruned.structures.items()} == course.gone
        assert undula.selected(model).num_parameters() < bare
        torch.testing.assert_close(model(input_ids=IDS).logits, y)
        undula.merge(model, keep=False)
        model.save_pretrained(tmp_path)
        assert sum(p.numel() for p in model.parameters()) == pruned.after < pruned.before
        opened = (AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM).from_pretrained(tmp_path).eval()
        assert type(opened) is type(model)
        torch.testing.assert_close(opened(input_ids=IDS).logits, y)
    assert not isinstance(adapter.method, undula.Masked)


@pytest.mark.parametrize(("name", "leaf"), [("qwen2", "*.q_proj.bias"), ("gpt2", "*.c_fc.bias")])
def test_what_trains_in_full_of_a_matrix_that_is_cut_is_cut_too(name, leaf):
    torch.manual_seed(3)
    model = MODELS[name]().double().eval()
    adapter = undula.attach(model, undula.LoRA(r=2), full=[leaf])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    course = LoRAPrune(0.5, structures=KINDS[name], every=1).start(model, optimizer, 4)
    for _ in range(4):
        course.before_forward()
        model(input_ids=IDS, labels=IDS).loss.backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
    course.finish()
    with torch.no_grad():
        y = model(input_ids=IDS).logits
        prune_base(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, y)
        undula.merge(model, keep=False)
        torch.testing.assert_close(model(input_ids=IDS).logits, y)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_what_is_closed_stays_closed_and_all_layers_lose_as_much(name):
    *_, seen, course = trained(name, LoRAPrune(0.6, structures=KINDS[name], every=1), steps=12)
    for before, after in itertools.pairwise(seen):
        assert all((after[s] <= before[s]).all() for s in before)
    closed = [{s: int((m == 0).sum()) for s, m in each.items()} for each in seen]
    assert not any(closed[0].values())
    assert any(0 < sum(c.values()) < sum(closed[-1].values()) for c in closed)
    assert closed[-1] == {p.columns: course.gone[p.kind] * p.width for p in course.parts}


def test_the_share_of_entries_that_goes_is_the_one_that_was_asked():
    model, *_, course = trained("llama", LoRAPrune(0.4, every=2), steps=10)
    one = {part.kind: part for part in course.parts}
    whole = sum(p.weights(model) * p.count for p in one.values())
    gone = sum(p.weights(model) * course.gone[p.kind] for p in one.values())
    assert abs(gone / whole - 0.4) <= one["channels"].weights(model) / whole
    assert course.gone["heads"] == int(0.4 * 4)


def test_heads_go_in_whole_groups_of_the_keys_and_values_that_they_read():
    model, adapter, *_ = trained("llama", LoRAPrune(0.5, structures=("heads",), every=2), steps=5)
    part = coupled(model, (HEADS,))[0]
    assert (part.count, part.width, list(part.rows.values())) == (4, 8, [8, 4, 4])
    open_ = adapter.factors[part.columns]["mask"].view(4, 8)
    assert set(open_.sum(1).tolist()) == {0.0, 8.0}
    kept = open_[:, 0].nonzero()[:, 0]
    k_proj = next(n for n in part.rows if n.endswith("k_proj"))
    W = model.get_submodule(k_proj).weight.detach().clone()
    prune_base(model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    assert torch.equal(model.get_submodule(k_proj).weight, W.view(4, 4, 32)[kept].reshape(-1, 32))


def test_a_score_is_the_papers_over_the_matrices_that_go_together():
    """By hand, entry by entry, after one step with gradients in every factor."""
    model, adapter = made("llama")
    with torch.no_grad():
        for _, name, t in adapter.tensors():
            if name == "B":
                t.normal_()
    course = LoRAPrune(0.5).start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), STEPS)
    course.before_forward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    course.before_update()
    part = next(p for p in course.parts if p.kind == "channels")
    want = torch.zeros(part.count, dtype=torch.float64)
    for site in (*part.rows, part.columns):
        f, W = adapter.factors[site], model.get_submodule(site).weight
        B, A = f["B"], f["A"]
        change = B @ A - (B - B.grad) @ (A - A.grad)
        I = (change * (W + 8.0 * B @ A)).abs()
        v = I.sum(0) if site == part.columns else I.sum(1)
        want += v / v.norm()
    torch.testing.assert_close(course.scores[f"channels.{part.layer}"], 0.1 * want.detach())


def test_an_update_that_is_not_finite_tells_nothing():
    model, adapter = made("llama")
    course = LoRAPrune(0.5).start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), STEPS)
    course.before_forward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapter.parameters()[3].grad.fill_(torch.inf)
    course.before_update()
    assert course.scores == {}
    course.after_update()
    with pytest.raises(RuntimeError, match="no gradient has told anything of the heads of"):
        course.finish()
    *_, full = trained("llama", LoRAPrune(0.5, every=2), steps=10, spoil=(3, 7))
    assert {k: int((~full.mask(full.first[k])).sum()) for k in full.first} == full.gone


@pytest.mark.parametrize("scores", [loraprune.Magnitude(), loraprune.Random(5)], ids=repr)
def test_other_scores_follow_what_they_say(scores):
    model, _, _, course = trained("llama", LoRAPrune(0.5, structures=CHANNELS, scores=scores, every=2), steps=4)
    part = course.parts[0]
    found = course.mask(part)
    if isinstance(scores, loraprune.Random):
        again = trained("llama", LoRAPrune(0.5, structures=CHANNELS, scores=scores), steps=3)[3]
        other = trained("llama", LoRAPrune(0.5, structures=CHANNELS, scores=loraprune.Random(6)), steps=3)[3]
        assert torch.equal(again.mask(part), found)
        assert not torch.equal(other.mask(part), found)
    else:
        W = model.get_submodule(part.columns).weight.detach()
        assert W[:, found].abs().sum(0).mean() > W[:, ~found].abs().sum(0).mean()


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("gpt2", LoRAPrune(), r"GPT2LMHeadModel has no heads .*one matrix, .*\.c_attn.*\['channels'\]"),
        ("bert", LoRAPrune(), r"no BertForMaskedLM with 4 heads, .*query\.weight would be \(32, 32\), "),
        ("llama", LoRAPrune(0.001), "less than one of the structures"),
        ("llama", LoRAPrune(0.99, structures=CHANNELS), "none of the 20 channels"),
    ],
)  # fmt: skip
def test_what_plain_transformers_could_not_open_is_refused_before_anything_changes(name, how, told):
    model, adapter = made(name)
    with pytest.raises((TypeError, ValueError), match=told):
        how.start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), STEPS)
    assert not masks(adapter)


def test_adapters_that_it_cannot_read_or_that_are_not_where_it_masks_are_refused():
    model, _ = made("llama")
    undula.detach(model)
    for method, where, told in (
        (undula.LoRAN(r=2), "all-linear", "reads the two factors of a LoRA"),
        (undula.LoRA(r=2), "*q_proj", r"reads them \(4 such layers\).*all-linear"),
    ):
        adapter = undula.attach(model, method, where)
        with pytest.raises((TypeError, ValueError), match=told):
            LoRAPrune(0.5).start(model, torch.optim.SGD(adapter.parameters(), lr=0.1), STEPS)
        undula.detach(model)
    undula.attach(model, undula.LoRA(r=2))
    with pytest.raises(
        ValueError, match=r"no site of this adapter has a mask.*`undula.prune` is for adapters with gates"
    ):
        prune_base(model)
    with pytest.raises(ValueError, match="structures are heads and channels"):
        LoRAPrune(0.5, structures=("layers",))


def test_a_file_names_it():
    how = LoRAPrune(0.3, structures=CHANNELS, scores=loraprune.Random(2), every=3)
    assert Procedure.decode(how.encode()) == how


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(2, 5, 3)], ids=repr)
@pytest.mark.parametrize("inner", [undula.LoRA(r=2), undula.DoRA(undula.LoRA(r=2))], ids=repr)
def test_a_masked_layer_reads_zeros_where_it_is_closed_and_merges_so(layer, inner):
    model = nn.Sequential(copy.deepcopy(layer).double())
    adapter = undula.attach(model, undula.Masked(inner), "*")
    f = adapter.factors["0"]
    with torch.no_grad():
        f["B"].normal_()
        f["mask"][1::2] = 0
    x = torch.randn(3, 6).double() if isinstance(layer, nn.Linear) else torch.randn(1, 2, 4, 4).double()
    y = model(x)
    if isinstance(layer, nn.Linear):
        held = x.clone()
        held[:, 1::2] = 9.0
        torch.testing.assert_close(model(held), y)
    undula.merge(model)
    torch.testing.assert_close(model(x), y)
