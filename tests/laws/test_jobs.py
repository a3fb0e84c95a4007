"""Many jobs at once: each one's weights are those that it would have alone."""

import dataclasses
import json

import pytest
import torch

import undula
from tests.support import tiny
from undula import DoRA, LoRA
from undula.jobs.engine import Engine
from undula.jobs.planner import apart, together
from undula.methods.dropout import Dropout
from undula.train import CausalLM, Run

METHODS = [LoRA(r=2), LoRA(r=2), DoRA(LoRA(r=3)), undula.LoRAN(r=2), undula.AuroRA(r=2), undula.VeRA(r=4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    pairs = [{"prompt": f"the {' '.join(['film'] * (i % 5))} is", "completion": f"very {w} and {w}"}
             for i, w in enumerate((tiny.GOOD + tiny.BAD) * 2)]  # fmt: skip
    return tiny.llama(folder / "llama"), tiny.jsonl(folder / "pairs.jsonl", pairs)


def run_of(base, out, method=METHODS[0], **more):
    model, data = base
    usual = {"lr": 1e-2, "max_steps": 3, "batch": 2, "eval_every": 0, "dtype": torch.float64, "warmup": 0.0}
    task = CausalLM(generate=0)
    return Run(model=model, data=data, task=task, method=method, out=out, **usual | more)


def several(base, folder, **more):
    """Runs that differ in whatever may differ."""
    return {
        str(i): run_of(
            base, folder / str(i), method, seed=i, batch=1 + i % 3, accumulate=1 + i % 2, max_steps=2 + i % 3,
            lr=1e-2 / (1 + i), b_ratio=4.0 if i == 1 else None, max_grad_norm=0.1 if i == 2 else 0.0, **more,
        )
        for i, method in enumerate(METHODS)
    }  # fmt: skip


def weights(out):
    saved = undula.Adapter.load(out)
    return {(site, name): t for site, name, t in saved.tensors()} | {("", n): t for n, t in saved.full.items()}


def same(one, other, **how):
    one, other = weights(one), weights(other)
    assert set(one) == set(other)
    for key, t in one.items():
        torch.testing.assert_close(t, other[key], **how)


def alone(run, out):
    """The engine with this job alone."""
    Engine({"one": dataclasses.replace(run, out=out)}).run()
    return out


def test_among_others_each_job_has_the_weights_that_it_has_alone(llama, tmp_path):
    runs = several(llama, tmp_path / "many")
    reports = Engine(runs, planner=lambda pieces: together(pieces, 40)).run()
    for name, run in runs.items():
        assert reports[name]["state"] == "done"
        same(run.out, alone(run, tmp_path / "alone" / name))


def test_alone_in_the_engine_a_job_has_the_weights_of_train(llama, tmp_path):
    for name, run in several(llama, tmp_path / "many").items():
        undula.train(dataclasses.replace(run, out=tmp_path / "train" / name))
        same(tmp_path / "train" / name, alone(run, tmp_path / "alone" / name), rtol=1e-4, atol=1e-5)
