"""Verbs that write folders, killed and on a full disk: what was asked for is whole or not there, its place is named."""

import os
import signal

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.io import whole

resource = pytest.importorskip("resource", reason="limits of files are Unix's")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, rows, and two adapters."""
    from transformers import AutoModelForCausalLM

    home = tmp_path_factory.mktemp("home")
    tiny.llama(home / "base")
    tiny.jsonl(home / "rows.jsonl", [{"text": "the film was good and the food is bad"}] * 30)
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(home / "base")
        adapter = undula.attach(model, undula.LoRA(r=16), "all-linear")
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.1)
        adapter.save(home / name, base=str(home / "base"), task="CAUSAL_LM")
    return home


def words(verb, home, out):
    rows = ["--data", home / "rows.jsonl"]
    given = {
        "merge": [home / "a"],
        "squeeze": [home / "a", "--rank", 4],
        "combine": [home / "a", home / "b"],
        "gqsa": [home / "base", *rows, "--rows", 4, "--steps", 1, "--group", 8],
        "prune-base": ["--model", home / "base", *rows, "--task", "causal-lm", "--sparsity", 0.5, "--every", 1,
                       "--max-steps", 2, "--lr", 0.01, "--batch", 2],
    }  # fmt: skip
    return [verb, *map(str, given[verb]), "--out", str(out)]


def forked(work):
    """The status with which a fork of this process ends that does `work`, and what this wrote into the pipe."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reads)
            work(writes)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads, encoding="utf-8") as file:
        said = file.read()
    return os.waitpid(child, 0)[1], said


@pytest.mark.parametrize("verb", ["merge", "squeeze", "combine", "gqsa", "prune-base"])
def test_a_verb_that_is_killed_when_all_is_written_has_left_nothing_under_the_name(verb, home, tmp_path):
    """Nor has it at any moment before; the next verb takes what is left over away."""
    out, flush, rename = tmp_path / "o", whole.sync, os.replace

    def work(pipe):
        def look(path):
            os.write(pipe, b"there " if out.exists() else f"{path.name} ".encode())
            flush(path)

        def kill(source, target):
            if str(target) == str(out.resolve()):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        whole.sync, os.replace = look, kill
        CliRunner().invoke(app, words(verb, home, out))

    status, said = forked(work)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [name for name in said.split() if name.endswith(".safetensors")]
    assert "there" not in said
    assert not out.exists()
    assert len(left := list(tmp_path.glob(f"{whole.UNFINISHED}o-*"))) == 1
    if verb == "squeeze":
        done = CliRunner().invoke(app, words(verb, home, out))
        assert done.exit_code == 0, done.output
        assert undula.Adapter.load(out).method.r == 4
        assert not left[0].exists()


@pytest.mark.parametrize("verb", ["merge", "combine"])
def test_a_full_disk_is_told_with_the_place_and_what_to_do(verb, home, tmp_path):
    """Whoever writes: of `merge` it is transformers, by a library whose error names neither."""

    def work(pipe):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
        done = CliRunner().invoke(app, words(verb, home, tmp_path / "o"))
        os.write(pipe, f"{done.exit_code} {' '.join(done.output.split())}".encode())

    _, said = forked(work)
    assert said.startswith("2 ")
    assert f"File too large (make room there, or write elsewhere): '{tmp_path / 'o'}'" in said
    assert not list(tmp_path.iterdir())
