"""Many jobs at once: each one's weights are those that it would have alone."""

import dataclasses

import pytest
import torch

import undula
from tests.support import tiny
from undula import DoRA, Dropout, LoRA
from undula.jobs.engine import Engine
from undula.jobs.planner import together
from undula.train import CausalLM, Run

METHODS = [Dropout(LoRA(r=2), p=0.3), LoRA(r=2), DoRA(LoRA(r=3)), undula.LoRAN(r=2), undula.VeRA(r=4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    pairs = [{"prompt": f"the {' '.join(['film'] * (i % 5))} is", "completion": f"very {w} and {w}"}
             for i, w in enumerate((tiny.GOOD + tiny.BAD) * 2)]  # fmt: skip
    return tiny.llama(folder / "llama"), tiny.jsonl(folder / "pairs.jsonl", pairs)


def run_of(base, out, method=METHODS[1], **more):
    model, data = base
    usual = {"lr": 1e-2, "max_steps": 3, "batch": 2, "eval_every": 0, "dtype": torch.float64, "warmup": 0.0}
    return Run(model=model, data=data, task=CausalLM(generate=0), method=method, out=out, **usual | more)


def several(base, folder):
    """Runs that differ in whatever may differ."""
    return {
        str(i): run_of(
            base, folder / str(i), method, seed=i, batch=1 + i % 3, accumulate=1 + i % 2, max_steps=2 + i % 3,
            lr=1e-2 / (1 + i), b_ratio=4.0 if i == 1 else None, max_grad_norm=0.1 if i == 2 else 0.0,
        )
        for i, method in enumerate(METHODS)
    }  # fmt: skip


def planned(pieces):
    """So small micro-batches that steps are spread over several."""
    return together(pieces, 40)


def weights(out):
    saved = undula.Adapter.load(out)
    return {(site, name): t for site, name, t in saved.tensors()} | {("", n): t for n, t in saved.full.items()}


def same(one, other, **how):
    one, other = weights(one), weights(other)
    assert set(one) == set(other)
    for key, t in one.items():
        torch.testing.assert_close(t, other[key], **how)


def alone(run, out):
    """The directory of the engine with this job alone."""
    Engine({"one": dataclasses.replace(run, out=out)}).run()
    return out


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """{name: (its run among others, its directory alone)}."""
    folder = tmp_path_factory.mktemp("trained")
    runs = several(llama, folder / "many")
    reports = Engine(runs, planner=planned).run()
    assert {name: report["state"] for name, report in reports.items()} == dict.fromkeys(runs, "done")
    return {name: (run, alone(run, folder / "alone" / name)) for name, run in runs.items()}


def test_among_others_each_job_has_the_weights_that_it_has_alone(trained):
    """With dropout too, whose numbers are a job's own."""
    for run, by_itself in trained.values():
        same(run.out, by_itself)


@pytest.mark.parametrize("name", ["1", "2"])
def test_alone_in_the_engine_a_job_has_the_weights_of_train(name, trained, tmp_path):
    """Without dropout, which has other numbers there.  transformers computes the loss in float32."""
    run, by_itself = trained[name]
    undula.train(dataclasses.replace(run, out=tmp_path))
    same(tmp_path, by_itself, rtol=1e-5, atol=1e-5)
