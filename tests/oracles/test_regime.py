"""The norms of adapted attention, against products that are taken by hand."""

import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support.models import gpt2, llama, tokens
from tests.support.numbers import shake
from undula.cli.main import app
from undula.observe.regime import norms
from undula.train import Classification

UNIT = math.sqrt(math.log(7))  # of 7 tokens


def inputs_of(model, name, batch):
    """What the module `name` is called with."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args, named: seen.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    model(batch)
    handle.remove()
    return seen[0].detach()


def by_heads(y, heads):
    return y.unflatten(-1, (heads, -1)).abs().amax((0, 1, 3)) / UNIT


@torch.no_grad()
def test_llama_with_fewer_heads_of_keys(float64):
    """4 heads of queries, 2 of keys; v is not adapted."""
    model = llama().double()
    adapter = undula.attach(model, undula.LoRA(r=2), ["q_proj", "k_proj"])
    shake(adapter.parameters())
    ids = tokens()
    rows = norms(model, [{"input_ids": ids}])
    assert [(r["layer"], r["head"]) for r in rows[:5]] == [
        *(("model.layers.0.self_attn", h) for h in range(4)), ("model.layers.1.self_attn", 0)
    ]  # fmt: skip
    x = inputs_of(model, "model.layers.1.self_attn.q_proj", ids)
    for part, heads in (("q", 4), ("k", 2), ("v", 2)):
        name = f"model.layers.1.self_attn.{part}_proj"
        W = model.get_submodule(name).weight
        f = adapter.factors.get(name)
        dW = torch.zeros_like(W) if f is None else adapter.methods[name].delta(f)
        for end, matrix in (("", W + dW), ("_base", W), ("_change", dW)):
            wanted = by_heads(x @ matrix.T, heads).repeat_interleave(4 // heads)
            torch.testing.assert_close(torch.tensor([r[part + end] for r in rows[4:8]]), wanted)
    raised = [r["q"] * r["k"] / (r["q_base"] * r["k_base"]) - 1 for r in rows[:-1]]
    assert [r["raised"] for r in rows[:-1]] == pytest.approx(raised)
    assert rows[-1]["q"] == max(r["q"] for r in rows[:-1])


@torch.no_grad()
def test_gpt2_has_all_three_in_one_layer(float64):
    model = gpt2().double()
    adapter = undula.attach(model, undula.LoRA(r=2), ["c_attn"])
    shake(adapter.parameters())
    ids = tokens()
    rows = norms(model, [{"input_ids": ids}])
    name = "transformer.h.1.attn.c_attn"
    x, own = inputs_of(model, name, ids), model.get_submodule(name)
    y = x @ own.weight + own.bias  # stored (I, O)
    change = x @ adapter.methods[name].delta(adapter.factors[name]).T
    for i, part in enumerate("qkv"):
        for end, values in (("", y + change), ("_base", y), ("_change", change)):
            wanted = by_heads(values.chunk(3, -1)[i], 4)
            torch.testing.assert_close(torch.tensor([r[part + end] for r in rows[4:8]]), wanted)


@torch.no_grad()
def test_at_zero_nothing_is_raised_and_twice_the_factor_is_twice_the_change(float64):
    model = llama().double()
    adapter = undula.attach(model, undula.LoRA(r=2), ["q_proj", "v_proj"])
    ids = {"input_ids": tokens()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert {r["raised"] for r in norms(model, [ids])} == {0.0}
    shake(adapter.parameters())
    one = norms(model, [ids])[:4]  # of the first layer, whose inputs no adapter changes
    for f in adapter.factors.values():
        f["B"].mul_(2)
    two = norms(model, [ids])[:4]
    for name in ("q_change", "v_change"):
        assert [r[name] for r in two] == pytest.approx([2 * r[name] for r in one])
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@torch.no_grad()
def test_padding_does_not_count(float64):
    model = llama().double()
    shake(undula.attach(model, undula.LoRA(r=2), ["q_proj", "k_proj", "v_proj"]).parameters())
    ids = tokens(rows=1)
    padded = torch.cat([ids, torch.full((1, 3), 5)], 1)
    mask = (torch.arange(10) < 7).long()[None]
    alone, among = norms(model, [{"input_ids": ids}]), norms(model, [{"input_ids": padded, "attention_mask": mask}])
    assert [r["tokens"] for r in among] == [7] * 9
    for a, b in zip(alone, among, strict=True):
        assert {k: v for k, v in b.items() if k != "layer"} == pytest.approx(
            {k: v for k, v in a.items() if k != "layer"}
        )


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "dense": nn.Linear(4, 4)})

    def forward(self, x):
        return self.attention["dense"](self.attention["query_key_value"](x)[..., :4])


def test_other_packings_and_other_models_are_refused_by_name():
    packed, plain = Packed(), nn.Sequential(nn.Linear(4, 4))
    undula.attach(packed, undula.LoRA(r=1), ["dense"])
    with pytest.raises(ValueError, match=r"attention\.query_key_value: q, k and v are packed"):
        norms(packed, [torch.zeros(2, 3, 4)])
    undula.attach(plain, undula.LoRA(r=1), ["0"])
    with pytest.raises(ValueError, match="Sequential has no layers called q_proj"):
        norms(plain, [torch.zeros(2, 3, 4)])


def test_show_norms(tmp_path):
    """A head each in the JSON, a line a layer in the table."""
    data = tiny.jsonl(tmp_path / "rows.jsonl", tiny.reviews(40))
    run = undula.Run(
        tiny.bert(tmp_path / "bert"), data, Classification(), undula.LoRA(r=2),
        tmp_path / "out", where=("query", "value"), max_steps=3, batch=4, eval_every=0,
    )  # fmt: skip
    undula.train(run)
    to = tmp_path / "norms.json"
    done = CliRunner().invoke(app, ["show", str(run.out), "--norms", "--rows", "6", "--json", str(to)])
    assert done.exit_code == 0, done.output
    rows = json.loads(to.read_text())
    assert [r["head"] for r in rows] == [0, 1, 0, 1, None]
    assert rows[0]["q_change"] > 0
    assert rows[0]["k_change"] == 0
    assert "layer.1.attention.self" in done.output
