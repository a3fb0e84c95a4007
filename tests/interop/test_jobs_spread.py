"""Jobs on two local workers of Ray's: each job's weights are those that it has here."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import undula
from tests.support import tiny
from undula.jobs.checkpoint import rounds
from undula.jobs.spread import TRIES, shared, train_spread
from undula.jobs.view import Silent
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


def below(pid):
    """The processes that this one has started, and those that they have."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = [p for p, parent in parents.items() if parent == pid]
    return [*found, *(q for p in found for q in below(p))]


def at_work(word):
    """The processes below this one whose command says so."""
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_text():
                yield pid


class Saying(Silent):
    def __init__(self):
        self.words = []

    def said(self, text):
        self.words.append(text)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kills", [1, TRIES])
def test_jobs_of_a_worker_that_dies_go_on_in_another_and_those_of_one_that_dies_again_have_failed(tmp_path, kills):
    pytest.importorskip("ray")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(16)]
    common = {"data": tiny.jsonl(tmp_path / "d.jsonl", rows), "task": CausalLM(generate=0), "batch": 2, "eval_every": 0}
    base = tiny.llama(tmp_path / "base", chat=True)
    lengths = {"long": 60, "short": 2}
    jobs = {name: Recipe(base, **common, method=undula.LoRA(r=2), max_steps=n, save_every=1)
            for name, n in lengths.items()}  # fmt: skip
    view, out = Saying(), tmp_path / "there"

    def kill():
        at = 0
        for _ in range(kills):
            last = at + 2
            while (at := max(rounds(out / "long"), default=0)) < last:
                time.sleep(0.02)
            (pid,) = [p for p in at_work("ray::_train") if f"{out / 'workers' / '0'}" in locked(p)]
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = train_spread(jobs, out, workers=2, view=view)
    assert done["short"].state == "done"
    assert len([words for words in view.words if "the worker of long has died" in words]) == 1
    if kills == 1:
        assert (done["long"].state, done["long"].step) == ("done", 60)
        assert done["long"].report["resumed_from_step"] > 0
        return
    assert done["long"].state == "failed"
    assert "its worker ended: WorkerCrashedError" in done["long"].error
    assert json.loads((out / "jobs.json").read_text())["jobs"]["long"]["state"] == "failed"
    again = undula.train_many(jobs, out, resume=True)
    assert {name: job.state for name, job in again.items()} == dict.fromkeys(jobs, "done")


def locked(pid):
    """The folders that a process holds open."""
    with contextlib.suppress(OSError):
        return [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.exists()]
    return []
