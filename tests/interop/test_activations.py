"""Activations are computed again where those of a batch would not fit the memory that is free, and nowhere else."""

import dataclasses
import gc
import json
import weakref

import pytest
import torch
from torch import nn

import undula
from tests.support import tiny
from undula.train import CausalLM, Classification, Recipe, Run, activations, prepare


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("need")
    rows = [{"prompt": " ".join(["the"] * (n + 1)), "completion": w} for n, w in enumerate(tiny.WORDS * 2)]
    return Run(
        model=tiny.llama(folder / "m"), data=tiny.jsonl(folder / "d.jsonl", rows), task=CausalLM(generate=0),
        method=undula.LoRA(r=2), out=folder / "out", max_steps=1, batch=4, eval_every=0,
    )  # fmt: skip


def test_what_autograd_keeps_is_counted_by_storage():
    """tanh keeps its result; a product with a frozen weight keeps that alone; two views of one storage are one."""
    x = torch.randn(8, 16, requires_grad=True)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh()).requires_grad_(False)
    assert activations.saved_bytes(net, x, lambda net, x: net(x).sum()) == 8 * 32 * 4
    twice = activations.saved_bytes(net, x, lambda net, x: (net(x)[:4] * net(x)[4:]).sum())
    assert twice == 2 * 8 * 32 * 4


def test_counting_leaves_nothing_in_memory():
    """tanh keeps its own result: a graph that held it would never go, nor would the model."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
    weight = weakref.ref(net[0].weight)
    activations.saved_bytes(net, torch.randn(8, 16), lambda net, x: net(x).sum())
    del net
    gc.collect()
    assert weight() is None


def test_the_estimate_is_near_what_the_longest_rows_keep(usual):
    ready = prepare(usual)
    lengths = ready.train.seen["lengths"]
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:4]
    batch = usual.task.gatherer(ready.processor, ready.model)([ready.train[i] for i in longest])
    kept = activations.saved_bytes(ready.model, batch, usual.task.loss())
    for plain in (True, False):  # of a vocabulary of 24 the logits are little
        assert 0.8 * kept <= activations.of_largest_batch(ready.model, ready.train, 4, plain) <= 1.5 * kept


@pytest.mark.parametrize("task", [CausalLM, Classification])
@pytest.mark.parametrize(("bytes", "on"), [(10**15, False), (1000, True), (None, False)])
def test_need_decides_and_is_told(usual, bytes, on, task, monkeypatch, tmp_path):
    changes = {}
    if task is Classification:
        changes = {"model": tiny.bert(tmp_path / "m"), "task": Classification()}
        changes["data"] = tiny.jsonl(tmp_path / "r.jsonl", tiny.reviews(32))
    monkeypatch.setattr(activations, "free", lambda device: bytes)
    ready = prepare(dataclasses.replace(usual, **changes))
    assert ready.run.gradient_checkpointing is on
    assert any("activations are computed again" in note for note in ready.notes) is on
    for said in (True, False):
        kept = prepare(dataclasses.replace(usual, gradient_checkpointing=said, **changes))
        assert kept.run.gradient_checkpointing is said
        assert not any("computed again" in note for note in kept.notes)


def test_looking_leaves_no_trace(usual):
    """Weights, gradients, modes and random generators are what they are without."""
    states = []
    for said in (False, None):
        ready = prepare(dataclasses.replace(usual, gradient_checkpointing=said))
        states.append((torch.random.get_rng_state(), *ready.adapter.parameters()))
        assert all(p.grad is None for p in ready.model.parameters())
        assert not any(m.training for m in ready.model.modules())
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_run_says_what_was_chosen_and_goes_on_so(usual, monkeypatch, tmp_path):
    """run.json of a run holds the choice; an older file, which has none, never computed them again."""
    monkeypatch.setattr(activations, "free", lambda device: 1000)
    run = dataclasses.replace(usual, out=tmp_path / "out")
    report = undula.train(run)
    assert report["run"]["gradient_checkpointing"] is True
    assert any("computed again" in note for note in report["data"]["notes"])
    assert Run.load(run.out).gradient_checkpointing is True
    data = json.loads((run.out / "run.json").read_text())
    del data["run"]["gradient_checkpointing"]
    (run.out / "run.json").write_text(json.dumps(data))
    assert Run.load(run.out).gradient_checkpointing is False
    assert Recipe.load(run.out / "run.json").gradient_checkpointing is False


def test_a_model_that_cannot_is_left_alone(monkeypatch, tmp_path):
    from undula.train import ImageClassification

    monkeypatch.setattr(activations, "free", lambda device: 1000)
    tiny.classes(tmp_path / "pets", {"train": tiny.pictures(8)})
    run = Run(
        model=tiny.efficientnet(tmp_path / "net"), data=str(tmp_path / "pets"), task=ImageClassification(),
        method=undula.LoRA(r=1), out=tmp_path / "out", where=["expand"],
    )  # fmt: skip
    assert prepare(run).run.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "5000\n", "memory.current": "4000\n", "memory.stat": "anon 1\ninactive_file 500\n"}, 1500),
        ({"memory.max": "max\n", "memory.current": "4000\n", "memory.stat": "inactive_file 500\n"}, None),
        (
            {"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "1000", "memory/memory.stat": ""},
            2000,
        ),
    ],
)
def test_a_containers_limit_counts(files, left, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(activations, "GROUPS", tmp_path)
    monkeypatch.setattr(activations, "_available", lambda: 10**12)
    assert activations.free(torch.device("cpu")) == (10**12 if left is None else left)
