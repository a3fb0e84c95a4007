"""Allocators and starts from data in the whole of a training: Trainer, checkpoints, studies, the command line."""

import dataclasses
import functools
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

import undula
from undula import ranks, starts
from undula.cli import app
from undula.ranks import diffora, sora
from undula.study import Faults, parse
from undula.study.plan import Plan
from undula.study.trial import perform
from undula.study.watch import Watch
from undula.train import CausalLM, Classification, Interrupted, Run, evaluate

from . import tiny

STEPS = 12
GATED = undula.GatedLoRA(r=3)
COURSES = {
    "AdaLoRA": (undula.AdaLoRA(r=3), ranks.AdaLoRA(target=1, every=2)),
    "SoRA": (undula.SoRA(r=3), ranks.SoRA(lr=5.0, levels=sora.Linear(0.0, 0.1, 3))),
    "ALoRA": (undula.GatedLoRA(r=2, open=1), ranks.ALoRA(rounds=2, count=1, first=0.3, between=0.3)),
    "DyLoRA": (undula.Dropout(undula.DyLoRA(r=3), 0.1), ranks.DyLoRA()),
    "DiffoRA": (GATED, ranks.DiffoRA(rho=0.5, search=0.5)),
    "DiffoRA, shared": (GATED, ranks.DiffoRA(rho=0.3, search=0.5, rest=diffora.Shared())),
    "Budget": (GATED, ranks.Budget(total=17)),
    "ReLoRA": (undula.LoRA(r=2), ranks.ReLoRA(cycles=3)),
    "LoRASC": (undula.LoRA(r=2), ranks.LoRASC(cycles=3, merge=0.5, noise=0.05)),
    "XGBLoRA": (undula.LoRA(r=1), ranks.XGBLoRA(boosters=3, layers=1)),
    "SRLoRA": (undula.LoRA(r=2), ranks.SRLoRA(target=4)),
}
each = pytest.mark.parametrize("name", COURSES)


def test_every_allocator_is_here():
    assert {type(how) for _, how in COURSES.values()} == set(ranks.Allocator.registry.values())


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", tiny.reviews(60))


@pytest.fixture(scope="module")
def usual(bert, reviews):
    return Run(model=bert, data=reviews, task=Classification(), method=None, out="unused", where=("query", "output.dense"),
               lr=1e-2, max_steps=STEPS, batch=4, save_every=3, seed=3)  # fmt: skip


class Until(TrainerCallback):
    """Stops after k steps, with a checkpoint or without one of its own."""

    def __init__(self, k, save):
        self.k, self.save = k, save

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.k:
            control.should_training_stop, control.should_save = True, control.should_save or self.save


class Counted(TrainerCallback):
    """How often the Trainer tells of its moments."""

    def __init__(self):
        self.calls = {"on_step_begin": 0, "on_optimizer_step": 0, "on_substep_end": 0}

    def __getattribute__(self, name):
        calls = object.__getattribute__(self, "calls") if name.startswith("on_") else {}
        if name in calls:
            calls[name] += 1
        return object.__getattribute__(self, name)


def every(path):
    return load_file(path / "adapter_model.safetensors")


def assert_same(a, b):
    found, wanted = every(a), every(b)
    assert found.keys() == wanted.keys()
    assert [k for k in found if not torch.equal(found[k], wanted[k])] == []
    assert undula.Adapter.load(a).methods == undula.Adapter.load(b).methods


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory):
    """The directory and the report of the run of that name, which nothing interrupted."""

    @functools.cache
    def trained(name):
        method, how = COURSES[name]
        out = tmp_path_factory.mktemp("whole") / "out"
        return out, undula.train(dataclasses.replace(usual, method=method, allocator=how, out=out))

    return trained


@each
def test_interruptions_change_nothing(name, usual, whole, tmp_path):
    """Stopped after 5 steps, on from the checkpoint of step 3; stopped after 9, on from there.  Each time through files
    and in a model that is opened anew."""
    method, how = COURSES[name]
    with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
        undula.train(dataclasses.replace(usual, method=method, allocator=how, out=tmp_path), callbacks=(Until(5, False),))
    with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
        undula.train(Run.load(tmp_path), resume=True, callbacks=(Until(9, True),))
    again = undula.train(Run.load(tmp_path), resume=True)
    assert again["resumed_from_step"] == 9
    out, report = whole(name)
    assert_same(tmp_path, out)
    same = ("before", "after", "ranks", "trainable_parameters")
    assert {key: again[key] for key in same} == {key: report[key] for key in same}


RANKS = {  # in all, at the least and at the most of six sites
    "AdaLoRA": (6, 0, 2),
    "ALoRA": (6, 0, 2),
    "DyLoRA": (18, 3, 3),
    "DiffoRA": (9, 0, 3),
    "DiffoRA, shared": (18, 3, 3),
    "Budget": (17, 2, 3),
    "ReLoRA": (36, 6, 6),
    "LoRASC": (48, 8, 8),
    "SRLoRA": (48, 8, 8),
}


@each
def test_what_is_saved_and_reported(name, whole):
    (method, how), (out, report) = COURSES[name], whole(name)
    assert report == json.loads((out / "report.json").read_text())
    assert ranks.Allocator.decode(report["allocator"]) == how
    assert (Run.load(out).method, Run.load(out).allocator) == (method, how)
    total, least, most = (report["ranks"][k] for k in ("total", "least", "most"))
    assert (total, least, most) == RANKS.get(name, (total, least, most))
    assert 0 <= least <= total / 6 <= most
    assert evaluate(out) == report["after"]
    assert report["after"]["loss"] != report["before"]["loss"]


def test_once_per_update_whatever_the_accumulation(usual, tmp_path):
    """Eight rows at once, or twice four: the course hears the same, and sees the same gradients."""
    config = AutoConfig.from_pretrained(usual.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModel.from_pretrained(usual.model, config=config).save_pretrained(tmp_path / "still")
    tiny.tokenizer(tmp_path / "still")
    method, how = COURSES["AdaLoRA"]
    run = dataclasses.replace(usual, model=str(tmp_path / "still"), method=method, allocator=how, train_rows=48)
    found = []
    for batch, accumulate in ((8, 1), (4, 2)):
        heard, out = Counted(), tmp_path / str(batch)
        undula.train(dataclasses.replace(run, out=out, batch=batch, accumulate=accumulate), callbacks=(heard,))
        state = json.loads((out / "checkpoints" / "checkpoint-12" / "allocator.json").read_text())
        assert state["step"] == heard.calls["on_step_begin"] == heard.calls["on_optimizer_step"] == STEPS
        assert heard.calls["on_substep_end"] == STEPS * (accumulate - 1)
        found.append(every(out))
    for key, t in found[0].items():
        torch.testing.assert_close(found[1][key], t, rtol=1e-3, atol=1e-4)


@each
def test_a_method_that_is_not_served_is_refused_first(name, usual):
    """Before anything is opened: neither the model nor the data exist."""
    _, how = COURSES[name]
    stranger = undula.AuroRA()
    nowhere = {"model": "nowhere", "data": "nothing", "method": stranger}
    served = "trained gate" if name == "SoRA" else how.works_on[0].__name__
    with pytest.raises(ValueError, match=rf"works on .*{served}.*not on AuroRA\("):
        dataclasses.replace(usual, **nowhere, allocator=how)
    with pytest.raises(ValueError, match="not on None"):
        dataclasses.replace(usual, allocator=how)


# The command line


def call(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return " ".join((done.stdout if code == 0 else done.stderr).split())


def test_on_the_command_line(bert, reviews, tmp_path):
    usual = ("train", "--model", bert, "--data", reviews, "--task", "classification", "--max-steps", 8, "--batch", 4)
    gated = (*usual, "--method", "adalora", "--set", "r=6")
    shown = call(*gated, "--allocator", "adalora", "--allocate", "target=4", "--out", tmp_path / "a")
    assert "52 ranks (" in shown  # 4 at each of 13 layers
    assert "at a site), 8 steps" in shown
    assert Run.load(tmp_path / "a").allocator == ranks.AdaLoRA(target=4)
    assert sum(ranks.live(undula.Adapter.load(tmp_path / "a")).values()) == 52
    bad = {
        ("--allocator", "adalora"): "works on AdaLoRA, not on LoRA(r=8",
        ("--allocator", "adolora"): "no allocator is called 'adolora'; there are: ALoRA, AdaLoRA, Budget",
        ("--allocate", "target=4"): "--allocate has the options of an allocator: name one with --allocator",
        ("--allocator", "relora", "--allocate", "cycle=2"): "ReLoRA has no option cycle; it has: cycles",
    }
    for words, message in bad.items():
        assert message in call(*usual, *words, "--out", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()


def test_prune_and_cut(bert, reviews, usual, tmp_path):
    pass
