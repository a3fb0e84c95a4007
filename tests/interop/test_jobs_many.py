"""Many jobs from a file: what each leaves, what waits, what a stop leaves, and the verb."""

import errno
import json
import os
import signal

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.host.host import detach
from undula.io.whole import alone_in
from undula.jobs import checkpoint
from undula.jobs.many import job_bytes, one_by_one
from undula.jobs.view import Silent
from undula.train import Interrupted
from undula.train.prepared import prepare

JOBS = """
model = "{base}"
data = "{data}"
task = {{ is = "causal-lm", generate = 0 }}
method = {{ is = "lora", r = 4 }}
dtype = "float64"
where = ["q_proj", "up_proj"]
max_steps = 4
batch = 2
eval_every = 0
[[jobs]]
name = "a"
lr = 1e-2
[[jobs]]
name = "b"
method = "loran"
accumulate = 2
"""
LOST = """
[[jobs]]
name = "lost"
lr = 1e38
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("many")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(24)]
    made = {"base": tiny.llama(tmp / "base", chat=True), "data": tiny.jsonl(tmp / "data.jsonl", rows)}
    (tmp / "jobs.toml").write_text(JOBS.format(**made))
    (tmp / "lost.toml").write_text((JOBS + LOST).format(**made))
    return tmp


@pytest.fixture(scope="module")
def alone(place):
    """{job: its weights} of one job after the other."""
    one_by_one(place / "jobs.toml", place / "alone")
    return {name: weights(place / "alone" / name) for name in ("a", "b")}


def weights(out):
    return load_file(out / "adapter_model.safetensors")


def assert_as_alone(out, alone):
    """In the type that trains, whatever rows stood beside."""
    for name, theirs in alone.items():
        assert_close(weights(out / name), theirs, rtol=1e-4, atol=1e-5)


def test_jobs_have_the_weights_and_directories_of_single_runs_and_one_that_is_lost_touches_none(place, alone):
    """By the verb; its exit code says that one failed, the summary which and why."""
    rows = place / "rows.json"
    told = CliRunner().invoke(
        app, ["train-many", str(place / "lost.toml"), "--out", str(place / "out"), "--json", str(rows)]
    )
    assert told.exit_code == 1, told.output
    assert [row["loss"] is None for row in json.loads(rows.read_text(), parse_constant=pytest.fail)] == [
        False,
        False,
        True,
    ]
    assert_as_alone(place / "out", alone)
    assert undula.Run.load(place / "out" / "b").accumulate == 2
    assert json.loads((place / "out" / "a" / "report.json").read_text())["steps"] == 4
    summary = json.loads((place / "out" / "jobs.json").read_text())
    assert {n: j["state"] for n, j in summary["jobs"].items()} == {"a": "done", "b": "done", "lost": "diverged"}
    assert "step" in summary["jobs"]["lost"]["error"]
    assert "2 of 3 jobs are trained" in told.stdout


class Beside(Silent):
    """The most jobs that ran at once."""

    def __init__(self):
        self.running, self.most = set(), 0

    def begun(self, job):
        self.running.add(job.name)
        self.most = max(self.most, len(self.running))

    def ended(self, job):
        self.running.discard(job.name)


@pytest.mark.parametrize(("budget", "beside"), [(1, 1), (10**9, 2)])
def test_jobs_wait_for_memory_and_lose_nothing_by_it(place, alone, tmp_path, budget, beside):
    """One at least trains, whatever the budget."""
    seen = Beside()
    jobs = undula.train_many(place / "jobs.toml", tmp_path, budget=budget, view=seen)
    assert [(job.state, job.error) for job in jobs.values()] == [("done", None)] * 2
    assert seen.most == beside
    assert_as_alone(tmp_path, alone)


class Stopping(Silent):
    def stepped(self, job):
        if (job.name, job.step) == ("a", 2):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(place, alone, tmp_path, monkeypatch):
    """By the plans that it had: what was tried is kept."""
    monkeypatch.setattr("undula.jobs.packing.LONG", 1)
    with pytest.raises(Interrupted):
        undula.train_many(place / "jobs.toml", tmp_path, view=Stopping())
    before = json.loads((tmp_path / "jobs.json").read_text())
    assert before["jobs"]["a"]["step"] == 2
    assert [at for _, at, _ in before["tried"][0]["taken"]] == [0, 1]
    jobs = undula.train_many(place / "jobs.toml", tmp_path, resume=True)
    assert [(job.step, job.error) for job in jobs.values()] == [(4, None)] * 2
    assert_as_alone(tmp_path, alone)
    after = json.loads((tmp_path / "jobs.json").read_text())
    assert after["tokens"] == before["tokens"]
    assert after["tried"][0]["taken"][0] == before["tried"][0]["taken"][0]
    assert [job.state for job in undula.train_many(place / "jobs.toml", tmp_path, resume=True).values()] == ["done"] * 2


def test_a_full_disk_ends_all_and_says_how_to_go_on(place, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    told = CliRunner().invoke(app, ["train-many", str(place / "jobs.toml"), "--out", str(tmp_path)])
    assert told.exit_code == 2
    assert "make room, and resume them (--resume)" in " ".join(told.output.split())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--plain", "--budget", "1GB"], "would do nothing"),
        (["--budget", "much"], "a number of bytes"),
        (["--workers", "2"], "without --executor ray"),
        (["--plain", "--executor", "ray"], "leave out --executor ray"),
    ],
)
def test_options_that_mean_nothing_are_refused(place, tmp_path, options, why):
    told = CliRunner().invoke(app, ["train-many", str(place / "jobs.toml"), "--out", str(tmp_path), *options])
    assert told.exit_code == 2
    assert why in " ".join(told.output.split())


def test_one_directory_has_one_process_at_a_time(place, tmp_path):
    """Two would mix their checkpoints."""
    with alone_in(tmp_path):
        for verb in (undula.train_many, one_by_one):
            with pytest.raises(BlockingIOError, match="another process is at work in"):
                verb(place / "jobs.toml", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_job_begins_from_an_adapter_and_memory_counts_what_that_holds(place, alone, tmp_path):
    """Its methods and layers are the adapter's: none is asked for."""
    text = (place / "jobs.toml").read_text().split("[[jobs]]")[0].replace('where = ["q_proj", "up_proj"]\n', "")
    path, before = tmp_path / "jobs.toml", place / "alone" / "a"
    path.write_text(f'{text}[[jobs]]\nname = "on"\nbegin_from = "{before}"\nlr = 1e-9\n')
    done = undula.train_many(path, tmp_path / "out", budget=10**9)
    assert (done["on"].state, done["on"].error) == ("done", None)
    assert_as_alone(tmp_path / "out", {"on": alone["a"]})
    ready = prepare(done["on"].run)
    detach(ready.model)
    trained = sum(t.numel() for t in alone["a"].values())
    held = trained * next(iter(alone["a"].values())).element_size()
    assert job_bytes(ready.model, done["on"].run) == held + 4 * 3 * trained
