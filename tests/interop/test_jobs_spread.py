"""Jobs on two local workers of Ray's: each job's weights are those that it has here."""

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import undula
from tests.support import tiny
from undula.jobs.spread import shared, train_spread
from undula.train import CausalLM, Recipe


def test_shares_are_even_and_none_is_empty():
    assert shared(list("abcde"), 2) == [["a", "c", "e"], ["b", "d"]]
    assert shared(["a"], 4) == [["a"]]
    with pytest.raises(ValueError, match="1 worker or more"):
        shared(["a"], 0)


@pytest.mark.timeout(300)
def test_two_workers_train_what_one_process_does_and_one_lost_job_is_told(tmp_path):
    pytest.importorskip("ray")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(16)]
    common = {"data": tiny.jsonl(tmp_path / "d.jsonl", rows), "task": CausalLM(generate=0), "max_steps": 2, "batch": 2}
    base = tiny.llama(tmp_path / "base", chat=True)
    jobs = {
        name: Recipe(base, **common, method=undula.LoRA(r=r), where="q_proj", lr=lr)
        for name, r, lr in (("a", 2, 1e-2), ("b", 4, 1e-2), ("lost", 2, 1e38))
    }
    here = undula.train_many(jobs, tmp_path / "here")
    there = train_spread(jobs, tmp_path / "there", workers=2)
    assert {n: j.state for n, j in there.items()} == {n: j.state for n, j in here.items()}
    assert [job.state for job in there.values()] == ["done", "done", "diverged"]
    assert set(json.loads((tmp_path / "there" / "jobs.json").read_text())["jobs"]) == set(jobs)
    for name in ("a", "b"):
        mine, theirs = (load_file(tmp_path / p / name / "adapter_model.safetensors") for p in ("here", "there"))
        assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
