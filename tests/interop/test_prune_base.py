"""`undula prune-base`: from rows to a smaller model that plain transformers opens."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.support import tiny
from undula.cli.main import app
from undula.ranks.loraprune import LoRAPrune
from undula.train import CausalLM, Run, evaluate, look, restored, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of a run and of its smaller model, what the verb told)."""
    folder = tmp_path_factory.mktemp("prune")
    (folder / "base").mkdir()
    data = tiny.jsonl(folder / "rows.jsonl", [{"text": "the film was good and the food is bad"}] * 30)
    typed = ["prune-base", "--model", tiny.llama(folder / "base"), "--data", data, "--task", "causal-lm",
             "--sparsity", "0.5", "--every", "2", "--max-steps", "10", "--lr", "0.01", "--batch", "4",
             "--out", str(folder / "small"), "--json", str(folder / "told.json")]  # fmt: skip
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    return folder, json.loads((folder / "told.json").read_text()), done.output


def test_what_it_writes_opens_in_plain_transformers_and_computes_what_the_training_measured(made):
    folder, told, output = made
    small = AutoModelForCausalLM.from_pretrained(folder / "small").eval()
    opened = restored(folder / "small-run")
    asked = AutoTokenizer.from_pretrained(folder / "small")("the film was good", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            small(input_ids=asked).logits, opened.model(input_ids=asked).logits, rtol=1e-4, atol=1e-4
        )
    before, after = (told["parameters"][k] for k in ("before", "after"))
    assert sum(p.numel() for p in small.parameters()) == after < before
    assert small.config.num_attention_heads == told["structures"]["heads"]["after"] == 1
    assert "channels: " in output
    assert f"{after:,} of {before:,} parameters stay." in (folder / "small/README.md").read_text()
    report = json.loads((folder / "small-run/report.json").read_text())
    assert evaluate(folder / "small-run") == pytest.approx(report["after"])


def test_a_run_that_was_trained_so_is_read_again_and_gives_the_same_model(made, tmp_path):
    folder, *_ = made
    assert type(Run.load(folder / "small-run").allocator).__name__ == "LoRAPrune"
    done = CliRunner().invoke(app, ["prune-base", str(folder / "small-run"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    files = [(f / "model.safetensors").read_bytes() for f in (folder / "small", tmp_path / "again")]
    assert files[0] == files[1]


def test_what_would_do_nothing_or_overwrite_is_refused(made, tmp_path):
    folder, *_ = made
    run, out = str(folder / "small-run"), str(tmp_path / "x")
    for typed, told in (
        ([run, "--out", out, "--sparsity", "0.3"], "has been trained: leave out --sparsity"),
        ([run, "--out", str(folder / "small")], "is not empty"),
        (["--out", out], "prune-base needs --model, --data, --task"),
    ):
        done = CliRunner().invoke(app, ["prune-base", *typed])
        assert done.exit_code != 0
        assert told in " ".join(done.output.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"allocator": LoRAPrune(0.99)}, "would leave none of the"),
        ({"allocator": LoRAPrune(0.5), "where": "*q_proj"}, "no adapter is there"),
    ],
)
def test_what_a_course_has_against_a_run_is_said_before_anything_is_measured(made, tmp_path, monkeypatch, given, told):
    run = dataclasses.replace(Run.load(made[0] / "small-run"), out=tmp_path / "run", max_steps=2, **given)
    monkeypatch.setattr(CausalLM, "score", lambda *_: pytest.fail("measured"))
    for verb in train, look:
        with pytest.raises((ValueError, TypeError), match=told):
            verb(run)
