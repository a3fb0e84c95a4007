"""What the command line shows before anything is trained: help that 80 columns hold, and no other package's noise."""

import dataclasses
import logging
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from tests.support import tiny
from undula.cli import shell
from undula.cli.main import VERBS, app
from undula.train.fields import PANELS


def helped(*words):
    return CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_whole_in_80_columns(verb):
    """No name is cut, and what is said of an option has at least half of the width: one two-sided flag squeezed all."""
    shown = helped(*verb.split())
    assert "…" not in shown
    assert not re.search(r"<(bool|int|list|str)\b", shown.partition("─ Options")[2])
    for line in shown.splitlines():
        assert len(line) <= 80
        if re.match(r"│ --", line):
            name, *more = re.split(r" {2,}", line.strip("│ "))
            assert line.index(more[-1].strip("│ ")) <= 46, line
            assert re.fullmatch(r"--[a-z0-9-]+", name), line


def test_the_options_of_train_are_in_panels_in_the_order_of_the_work():
    shown = helped("train")
    at = [shown.index(f"─ {title} ─") for title in PANELS]
    assert at == sorted(at)
    assert "─ Options ─" not in shown
    assert shown.index("--lr ") < shown.index("--epochs ")
    assert shown.index(f"─ {PANELS[0]}") < shown.index("--column ") < shown.index("--train-rows ")
    assert "--no-keep-best" in shown


def test_the_list_of_verbs_has_a_sentence_each():
    for line in helped().splitlines():
        assert not re.match(r"│\s+rows\s{4,}", line), line  # the docstring's own line breaks
    assert CliRunner().invoke(app, []).output.count("─ Use ─") == 1


@pytest.mark.parametrize("logger", ["torchao", "torchao.kernel.intmm", "torch.utils._pytree"])
def test_what_packages_tell_their_builders_is_heard_with_verbose_alone(logger, caplog):
    """transformers imports torchao, which told at each start of each verb what it was not compiled for."""
    level = logging.getLogger(logger).level

    def verb():
        logging.getLogger(logger).warning("not compiled for this")
        logging.getLogger(logger).error("broken")

    shell.speaking(verb)()
    assert [record.getMessage() for record in caplog.records] == ["broken"]
    assert logging.getLogger(logger).level == level
    caplog.clear()
    shell.speaking(verb)(verbose=True)
    assert "not compiled for this" in caplog.text


def test_a_reader_who_has_read_enough_is_no_error(tmp_path):
    """`undula train --help | head -5` ended in "BrokenPipeError"."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "undula", "train", "--help"], check=False, stdout=closed, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr == b""


def test_a_broken_pipe_elsewhere_is_told():
    """What ends in silence is the output's reader alone: a lost worker is an error."""

    class Lost:
        def __init__(self):
            self.params, self.name = {}, "lost"

    def lose(*_):
        raise BrokenPipeError("a worker is gone")

    verbs = shell.Verbs(name="lost", commands={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.core.TyperGroup.invoke", lose)
        with pytest.raises(typer.Exit):
            verbs.invoke(Lost())


def test_a_look_needs_no_place(tmp_path, monkeypatch):
    """It writes nothing; a training needs one, and a place that is named is looked at all the same."""
    monkeypatch.chdir(tmp_path)
    tiny.bert(tmp_path / "bert")
    tiny.jsonl(tmp_path / "reviews.jsonl", tiny.reviews(30))
    words = ["train", "--model", "bert", "--data", "reviews.jsonl", "--task", "classification"]
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "majority" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "--out" in refused.stderr
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/run.json").write_text("{}")
    taken = CliRunner().invoke(app, [*words, "--dry-run", "--out", "taken"])
    assert taken.exit_code == 2
    assert "holds a run already" in taken.stderr


def test_what_a_notebook_shows_of_an_opened_run_is_short(tmp_path):
    """The last line of a cell is `undula.load(DIR)`: it showed every layer of the model."""
    import undula
    from undula.train import Classification, Run

    tiny.bert(tmp_path / "bert")
    tiny.jsonl(tmp_path / "reviews.jsonl", tiny.reviews(30))
    run = Run(str(tmp_path / "bert"), str(tmp_path / "reviews.jsonl"), Classification(), undula.LoRA(r=1),
              tmp_path / "o", max_steps=1, batch=4)  # fmt: skip
    undula.train(run)
    opened = undula.load(tmp_path / "o")
    shown = repr(opened)
    assert "\n" not in shown
    assert len(shown) < 800 + 2 * len(str(tmp_path))
    for told in ("Classification", "BertForSequenceClassification", "labels: ", "LoRA(r=1"):
        assert told in shown
    with pytest.raises(ValueError, match="is empty: row 2") as empty:
        opened.predict(["a film", ""])
    assert "skip" not in str(empty.value)
    with pytest.raises(FileNotFoundError, match=r"is an adapter, not a model.*undula merge"):
        undula.train(dataclasses.replace(run, model=str(tmp_path / "o"), out=tmp_path / "p"))
    with pytest.raises(FileExistsError, match=r"is a file, so .* can be no directory"):
        undula.train(dataclasses.replace(run, data="not yet read", out=tmp_path / "reviews.jsonl"))


def test_where_every_row_is_faulty_none_can_be_left_out(tmp_path):
    """A column with decimal commas: "30 of 30 rows can be left out" is no advice."""
    from undula.train.data.faults import Faults

    faults = Faults()
    faults.of("p.csv", 2)
    for line in (2, 3):
        faults.add("p.csv, column 'price' holds what is no number", f"line {line}", "Write it 3.5", ("p.csv", line))
    assert "left out" not in faults.message()
    faults.of("q.csv", 9)
    faults.add("q.csv, column 'price' is empty", "line 4", "", ("q.csv", 4))
    assert "(1 of 9 in q.csv) can be left out" in faults.message()
