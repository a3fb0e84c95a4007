"""`undula gqsa`: a base in 4-bit groups from the command line, calibrated, tuned, opened by every verb."""

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.compress.gqsa import compressed_layers
from undula.train import CausalLM, Run


def ran(*typed):
    done = CliRunner().invoke(app, [str(each) for each in typed])
    return done, " ".join(done.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gqsa")
    (folder / "base").mkdir()
    data = tiny.jsonl(folder / "rows.jsonl", [{"text": "the film was good and the food is bad"}] * 30)
    base = tiny.llama(folder / "base")
    done, said = ran("gqsa", base, "--out", folder / "small", "--data", data, "--rows", 8, "--steps", 2, "--group", 8)
    assert done.exit_code == 0, said
    return folder, data, said


def test_scales_and_zeros_that_a_run_trained_are_written_into_the_base(made, tmp_path):
    folder, data, said = made
    assert "14 layers at" in said
    run = Run(model=str(folder / "small"), data=data, task=CausalLM(generate=0), method=None, out=tmp_path / "tuned",
              full=("*.scale", "*.zero"), lr=1e-2, max_steps=2, batch=4)  # fmt: skip
    report = undula.train(run)
    assert report["trainable_parameters"] == 2 * sum(
        m.scale.numel() for m in compressed_layers(undula.load(tmp_path / "tuned").model).values()
    )
    done, said = ran("gqsa", tmp_path / "tuned", "--out", tmp_path / "written")
    assert done.exit_code == 0, said
    ours, theirs = undula.load(tmp_path / "tuned").model, undula.load(tmp_path / "written").model
    asked = torch.arange(4, 10)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=asked).logits, theirs(input_ids=asked).logits, rtol=1e-2, atol=1e-2)
    before = compressed_layers(undula.load(folder / "small").model)
    for name, layer in compressed_layers(theirs).items():
        assert torch.equal(layer.weight, before[name].weight)
        assert torch.equal(layer.index, before[name].index)
        assert not torch.equal(layer.scale, before[name].scale)


def test_what_is_no_such_base_or_does_not_fit_is_refused(made, tmp_path):
    folder, *_ = made
    for typed, told in (
        ((folder / "base", "--group", 10), "no multiple of group=10"),
        ((folder / "base", "--sparsity", 1), "below 1"),
        ((folder / "small",), "no nn.Linear layers left to compress"),
    ):
        done, said = ran("gqsa", *typed, "--out", tmp_path / "x")
        assert done.exit_code != 0
        assert told in said
    assert not (tmp_path / "x").exists()
