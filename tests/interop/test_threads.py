"""How many threads a verb takes: the physical cores that it may use, once, and what somebody said stands."""

import os

import pytest
import torch
from typer.testing import CliRunner

from undula.cli import threads
from undula.cli.main import app


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Eight logical CPUs of four cores on two sockets, of which six may be used; no quotas, no settings."""
    for cpu in range(8):
        place = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{cpu // 4}\n")
        (place / "core_id").write_text(f"{cpu // 2 % 2}\n")
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(threads, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(threads, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in threads.SAID:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


def test_two_hyper_threads_of_a_core_are_one(machine):
    """Of cores 0 to 2 six logical CPUs may be used; cores of one number on two sockets are two."""
    assert threads.sensible() == 3


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/box/inner\n", {"sys/fs/cgroup/box/cpu.max": "200000 100000\n"}, 2),  # of a group around it
        ("0::/box\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 3),
        ("0::/box\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),  # in a container its own group is the root
        (
            "3:cpu,cpuacct:/a\n2:pids:/b\n",
            {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("3:cpu:/a\n", {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1"}, 3),
    ],
)  # fmt: skip
def test_a_quota_of_time_counts(machine, group, files, cores):
    (machine / "proc/cgroup").write_text(group)
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text)
    assert threads.sensible() == cores


def test_what_was_said_stands(machine, monkeypatch):
    """A program's own number, then the environment's; an option goes before both."""
    torch.set_num_threads(5)
    threads.settle()
    assert torch.get_num_threads() == 5
    torch.set_num_threads(6)  # what torch would take by itself
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    threads.settle()
    assert torch.get_num_threads() == 6
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.settle()
    assert torch.get_num_threads() == 3
    threads.settle(2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("verb", ["train", "eval", "study", "predict", "merge", "serve"])
def test_verbs_that_compute_have_the_option(verb):
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80"}).stdout
    assert shown.count("--threads") == 1


def test_a_verb_sets_them(machine, tmp_path):
    torch.set_num_threads(6)
    CliRunner().invoke(app, ["eval", str(tmp_path / "nothing")])
    assert torch.get_num_threads() == 3
    CliRunner().invoke(app, ["eval", str(tmp_path / "nothing"), "--threads", "2"])
    assert torch.get_num_threads() == 2
