"""What a training says and to whom: nobody waits in silence, who wants quiet has it, services hear all figures."""

import io
import json
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli import shell
from undula.cli.main import VERBS, app
from undula.cli.stages import Stages
from undula.core.extras import Missing
from undula.train import Classification, Run
from undula.train.stages import advanced, stage, told_to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voice")
    tiny.bert(folder / "bert")
    tiny.jsonl(folder / "reviews.jsonl", tiny.reviews(40))
    return folder


def run(folder, out, *words):
    usual = ["train", "--model", folder / "bert", "--data", folder / "reviews.jsonl", "--task", "classification",
             "--max-steps", "4", "--batch", "4", "--set", "r=1", "--out", out]  # fmt: skip
    return CliRunner().invoke(app, [str(word) for word in (*usual, *words)])


def test_every_stage_is_said_where_there_is_no_terminal(folder, tmp_path):
    done = run(folder, tmp_path / "o", "--eval-every", "2")
    assert done.exit_code == 0, done.output
    said, at = done.stderr, 0
    for line in (f"reading {folder}", f"opening {folder}", "looking at the rows: 40 rows", "attaching the adapter",
                 "measuring before: 4 rows", "preparing the trainer", "training: 4 steps",
                 "step 2 of 4, on the validation rows: loss ", "measuring after: 4 rows"):  # fmt: skip
        at = said.index(line, at)
    assert "accuracy" in done.stdout


def test_quiet_is_the_result_alone_and_verbose_all(folder, tmp_path):
    quiet = run(folder, tmp_path / "q", "--quiet")
    assert quiet.stderr == ""
    assert "Saved in" in quiet.stdout
    verbose = run(folder, tmp_path / "v", "--verbose")
    for step in range(1, 5):
        assert f"step {step} of 4: loss " in verbose.stderr
    assert "learning_rate" in verbose.stderr
    assert "grad_norm" in verbose.stderr
    both = run(folder, tmp_path / "b", "--verbose", "--quiet")
    assert both.exit_code == 2
    assert "leave one of them out" in both.stderr
    wrong = run(folder, tmp_path / "w", "--quiet", "--where", "nowhere")
    assert wrong.exit_code == 2
    assert "nowhere" in wrong.stderr
    assert shell.voice == shell.Voice()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_both(verb):
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "--quiet" in shown
    assert "--verbose" in shown


def test_quiet_may_be_said_where_a_training_goes_on(folder, tmp_path):
    made = undula.train(Run(str(folder / "bert"), str(folder / "reviews.jsonl"), Classification(), undula.LoRA(r=1),
                            tmp_path / "o", max_steps=4, batch=4, save_every=2))  # fmt: skip
    (tmp_path / "o/report.json").unlink()
    done = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "o"), "--quiet", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["losses"] == made["losses"]
    assert done.stderr == ""


def test_a_terminal_shows_how_far_a_stage_is():
    console = Console(file=(out := io.StringIO()), force_terminal=True, width=80)
    with told_to(Stages(console)), stage("measuring [before]", 9):
        advanced(4)
        advanced(5)
    assert "measuring [before]: 9 of 9 rows" in out.getvalue()
    advanced(1)  # nobody listens


def test_tensorboard_has_every_loss_and_evaluation(folder, tmp_path):
    """Read back from its own file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(folder, tmp_path / "o", "--report-to", "tensorboard", "--eval-every", "2")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "o/report.json").read_text())
    events = EventAccumulator(str(tmp_path / "o/logs"))
    events.Reload()
    losses = [[e.step, e.value] for e in events.Scalars("train/loss")]
    assert losses == [[step, pytest.approx(loss)] for step, loss in report["losses"]]
    found = [[e.step, e.value] for e in events.Scalars("eval/accuracy")]
    assert found == [[p["step"], pytest.approx(p["accuracy"])] for p in report["evaluations"]]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_whose_package_is_missing_is_told_before_anything_is_read(name, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    usual = Run("nowhere", "nothing", Classification(), undula.LoRA(r=1), tmp_path / "o")
    with pytest.raises(Missing, match=f"reporting to {name} needs the package {name}.* pip install {name}"):
        undula.train(usual, report_to=name)
    with pytest.raises(LookupError, match=r"nothing is called 'tensorbord' .*; there are: .*tensorboard"):
        undula.train(usual, report_to=["tensorbord"])
    assert not (tmp_path / "o").exists()
