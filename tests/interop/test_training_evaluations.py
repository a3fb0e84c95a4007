"""Evaluations while it trains: they change nothing of the training, the best is kept, none better ends it."""

import dataclasses
import json
import random
import shutil

import numpy
import pytest
import torch
from transformers import TrainerCallback

import undula
from tests.support import tiny
from tests.support.courses import COURSES
from undula.train import CausalLM, Classification, Run, evaluate, prepare
from undula.train.evaluating import number_of
from undula.train.resume import evaluated, last_checkpoint
from undula.train.tasks.task import Task

LORA = undula.LoRA(r=2)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    return Run(
        model=tiny.bert(folder / "bert"), data=tiny.jsonl(folder / "reviews.jsonl", tiny.reviews(80)),
        task=Classification(), method=LORA, out=folder / "out", lr=5e-3, max_steps=12, batch=8, save_every=4, seed=3,
        eval_every=2,
    )  # fmt: skip


def same(one, other):
    one, other = undula.Adapter.load(one), undula.Adapter.load(other)
    assert one.methods == other.methods
    assert all(torch.equal(t, other.factors[site][name]) for site, name, t in one.tensors())
    assert all(torch.equal(t, other.full[name]) for name, t in one.full.items())


def scripted(monkeypatch, values):
    """Accuracies that evaluations find, one after another; the generators are drawn from, as a task may."""
    score, given = Classification.score, iter(values)

    def found(self, model, examples, batch):
        torch.rand(3), random.random(), numpy.random.rand()
        real = score(self, model, examples, batch)
        return real | {"accuracy": next(given, real["accuracy"])}

    monkeypatch.setattr(Classification, "score", found)


@pytest.mark.parametrize("step", [8])
def test_what_is_kept_is_the_adapter_of_that_step_of_a_run_without_evaluations(step, usual, tmp_path, monkeypatch):
    """Evaluations leave no trace, with dropout, whatever they draw: the best of step 4 or 8 is the checkpoint of the
    plain run there, and the last one is the plain run's last."""
    plain = dataclasses.replace(usual, out=tmp_path / "plain", eval_every=0, save_every=2)
    keep = []

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **_):
            if state.global_step in (step, 12):
                shutil.copytree(
                    plain.out / f"checkpoints/checkpoint-{state.global_step}", tmp_path / f"at{state.global_step}"
                )
                keep.append(state.global_step)

    undula.train(plain, callbacks=[Keep()])
    assert keep == [step, 12]
    scripted(monkeypatch, [0.5, *(0.9 if s == step else 0.6 for s in range(2, 13, 2))])
    run = dataclasses.replace(usual, out=tmp_path / "kept")
    report = undula.train(run)
    same(run.out, tmp_path / f"at{step}")
    assert report["best"] == {"step": step, "metric": "accuracy", "value": 0.9, "of": 6, "kept": True}
    assert [(p["step"], p["accuracy"]) for p in report["evaluations"]][:2] == [
        (2, 0.9 if step == 2 else 0.6),
        (4, 0.9 if step == 4 else 0.6),
    ]
    same(run.out / "checkpoints/checkpoint-12", tmp_path / "at12")
    last = dataclasses.replace(run, out=tmp_path / "last", keep_best=False)
    undula.train(last)
    same(last.out, tmp_path / "at12")


def test_what_is_measured_of_the_best_is_what_is_measured_of_the_saved_adapter(usual, tmp_path):
    run = dataclasses.replace(usual, out=tmp_path / "out")
    report = undula.train(run)
    best = report["best"]
    assert evaluate(run.out) == report["after"]
    assert report["after"]["accuracy"] == best["value"] == max(p["accuracy"] for p in report["evaluations"])
    assert report["after"] == {
        k: v for p in report["evaluations"] if p["step"] == best["step"] for k, v in p.items() if k != "step"
    }
    assert json.loads((run.out / "report.json").read_text()) == report
    assert [p["step"] for p in report["evaluations"]] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("values", "patience", "last", "best"),
    [
        ([0.6, 0.7, 0.5, 0.4, 0.9], 2, 8, 4),
        ([0.6, 0.6, 0.6, 0.9, 0.9], 2, 6, 6),  # equal is no better: of equals the last is kept
        ([0.9, 0.8], 1, 4, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 12, 12),
        ([0.1, float("nan"), 0.3, 0.2, 0.1], 2, 10, 6),
    ],
)
def test_it_ends_where_none_is_better_any_more(values, patience, last, best, usual, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, *values])
    report = undula.train(dataclasses.replace(usual, out=tmp_path / "out", patience=patience))
    assert (report["steps"], report["best"]["step"]) == (last, best)
    assert report["state"] == ("done" if last == 12 else "stopped")
    if last < 12:
        assert f"ended at step {last}: {patience} evaluation" in report["ended_early"]
    else:
        assert report["ended_early"] is None


class Killed(Exception):
    """What is on the disk is what a kill would leave: nothing more is written."""


@pytest.mark.parametrize(("best", "at"), [(4, 6), (6, 8)])
def test_the_best_survives_a_kill(best, at, usual, tmp_path, monkeypatch):
    """The best was found at the checkpoint that a killed run goes on from, or after it: what is kept, when it ends and
    what is told are those of an uninterrupted run."""
    whole = dataclasses.replace(usual, out=tmp_path / "whole", patience=3)
    step, score = [0], Classification.score

    class Tell(TrainerCallback):
        dies = 0

        def on_step_end(self, args, state, control, **_):
            step[0] = state.global_step

        def on_evaluate(self, args, state, control, **_):
            if state.global_step == self.dies:
                raise Killed

    def found(self, *given):
        return score(self, *given) | {"accuracy": 0.9 if step[0] == best else 0.8 - step[0] / 100}

    monkeypatch.setattr(Classification, "score", found)
    one = undula.train(whole, callbacks=[Tell()])
    cut, tell = dataclasses.replace(whole, out=tmp_path / "cut"), Tell()
    step[0], tell.dies = 0, at
    with pytest.raises(Killed):
        undula.train(cut, callbacks=[tell])
    step[0] = 0
    two = undula.train(Run.load(cut.out), resume=True, callbacks=[Tell()])
    assert two["resumed_from_step"] == 4
    assert one["best"]["step"] == best
    for name in ("best", "evaluations", "ended_early", "steps", "losses"):
        assert one[name] == two[name], name
    same(whole.out, cut.out)


def test_a_training_that_was_ended_and_not_measured_is_not_trained_further(usual, tmp_path, monkeypatch):
    """A kill between the end and the report, where the end is a checkpoint's step."""
    scripted(monkeypatch, [0.5, 0.9, 0.5, 0.4, 0.3])
    run = dataclasses.replace(usual, out=tmp_path / "out", patience=3)
    report = undula.train(run)
    assert report["steps"] == 8
    (run.out / "report.json").unlink()
    again = undula.train(run, resume=True)
    assert (again["resumed_from_step"], again["steps"]) == (8, 8)
    assert again["best"] == report["best"]
    assert again["ended_early"] == report["ended_early"]
    same(run.out, run.out / "checkpoints/best-2")


@pytest.mark.parametrize("name", ["AdaLoRA", "DiffoRA", "LoRASC, whole", "SoRA"])
def test_the_best_under_a_procedure_is_an_adapter_as_it_was_measured(name, usual, tmp_path):
    """Its ranks and methods are of its own; what does not count yet (the budget is not reached) is not kept."""
    method, how = COURSES[name]
    run = dataclasses.replace(usual, method=method, allocator=how, out=tmp_path / "out", max_steps=24, eval_every=4)
    report = undula.train(run)
    step, points = report["best"]["step"], {p.pop("step"): p for p in report["evaluations"]}
    assert step >= evaluated(last_checkpoint(run.out))["counts_from"] == how.counts_from(24, prepare(run).adapter)
    assert report["after"] == pytest.approx(points[step], rel=1e-4, abs=1e-6)
    assert evaluate(run.out) == pytest.approx(report["after"], rel=1e-4, abs=1e-6)
    assert sum(t.numel() for t in undula.Adapter.load(run.out).parameters()) == report["trainable_parameters"]


def test_how_often_where_a_run_does_not_say(usual):
    """Ten at most, within a tenth of the training's time; fewer than two are none; who asks for the best has ten."""
    run = dataclasses.replace(usual, eval_every=None)
    assert number_of(run, 1000, 16000, 100) == 10
    assert number_of(run, 1000, 16000, 1000) == 4
    assert number_of(run, 1000, 5000, 1000) == 0
    assert number_of(run, 3, 48, 1) == 3
    assert number_of(dataclasses.replace(run, keep_best=True), 1000, 10, 1000) == 10
    assert number_of(dataclasses.replace(run, patience=2), 4, 10, 1000) == 4


def test_a_language_model_is_chosen_by_its_loss_and_generates_nothing_meanwhile(tmp_path, monkeypatch):
    rows = [{"prompt": f"the {w}", "completion": f"{w} {w}"} for w in tiny.WORDS * 3]
    written = []
    monkeypatch.setattr(CausalLM, "written", lambda *_: written.append(1) or {})
    run = Run(
        model=tiny.llama(tmp_path / "m"), data=tiny.jsonl(tmp_path / "d.jsonl", rows), task=CausalLM(), method=LORA,
        out=tmp_path / "o", lr=1e-2, max_steps=6, batch=8, eval_every=0.5,
    )  # fmt: skip
    report = undula.train(run)
    assert [list(p) for p in report["evaluations"]] == [["step", "loss"]] * 2
    assert report["best"]["value"] == min(p["loss"] for p in report["evaluations"])
    assert len(written) == 2  # before and after


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval_every": 1.5}, "a number of steps, or a share of them below 1, found 1.5"),
        ({"eval_every": 0, "patience": 1}, "patience=1 goes by evaluations, and eval_every=0 makes none"),
        ({"eval_every": 0, "keep_best": True}, "keep_best goes by evaluations"),
        ({"eval_every": -1}, "eval_every is at least 0"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, told, usual):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(usual, **changes)


def test_a_task_of_ones_own_is_watched_by_what_it_chooses_by(usual):
    """Where `choose` is cheaper than `score`, it alone is asked."""

    class Cheap(Classification):
        def choose(self, model, examples, batch):
            return 0.25

    assert Cheap().watched(None, None, 1) == {"accuracy": 0.25}
    assert Classification.choose is Task.choose
