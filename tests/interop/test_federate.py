"""`undula federate`: a file, its rounds, what is left of them."""

import html
import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.federated import rounds
from undula.federated.client import Client

FED = """
model = "{home}/base"
data = "{home}/server.jsonl"
task = "classification"
method = {{ is = "lora", r = 2 }}
where = ["query", "value"]
lr = 3e-2
head_lr = 3e-2
max_steps = 4
batch = 4
rounds = 3
how = "fedsvd"

[[clients]]
name = "north"
data = "{home}/north.jsonl"

[[clients]]
name = "south"
data = "{home}/south.jsonl"
"""


@pytest.fixture
def home(tmp_path):
    """A model, and three files of rows: the server's, and two clients' that have one class more than another."""
    tiny.bert(tmp_path / "base")
    rows = [{"text": f"the {w} was {x}", "label": c} for w in ("film", "food", "day") for x in tiny.GOOD + tiny.BAD
            for c in ["good" if x in tiny.GOOD else "bad"]]  # fmt: skip
    tiny.jsonl(tmp_path / "server.jsonl", rows[:10])
    tiny.jsonl(tmp_path / "north.jsonl", rows[10:20] + [r for r in rows[20:] if r["label"] == "good"])
    tiny.jsonl(tmp_path / "south.jsonl", [r for r in rows[20:] if r["label"] == "bad"])
    (tmp_path / "fed.toml").write_text(FED.format(home=tmp_path.as_posix()))
    return tmp_path


def ask(*words):
    return CliRunner().invoke(app, ["federate", *map(str, words)])


def test_a_file_becomes_an_adapter_and_a_report(home):
    out = home / "out"
    done = ask(home / "fed.toml", "--out", out, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "north" in done.output
    assert not out.exists()
    done = ask(home / "fed.toml", "--out", out)
    assert done.exit_code == 0, done.output
    assert "round 3 of 3" in done.output
    report = json.loads((out / "report.json").read_text())
    assert [r["round"] for r in report["rounds"]] == [0, 1, 2, 3]
    assert report["after"]["loss"] < report["rounds"][0]["server"]["loss"]
    assert set(report["rounds"][3]["spread"]) == {"north", "south"}
    assert report["bytes"]["up"] < report["bytes"]["down"]  # of FedSVD's clients B and the head alone
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "film" not in page  # no word of any row
    assert undula.load(out).predict("the film was awful")["label"] in ("good", "bad")
    (home / "again.toml").write_text((out / "federation.toml").read_text())
    done = ask(home / "again.toml", "--out", home / "again")
    assert done.exit_code == 0, done.output
    same, other = (undula.Adapter.load(place) for place in (out, home / "again"))
    assert all(torch.equal(t, other.factors[site][name]) for site, name, t in same.tensors())
    done = ask(home / "fed.toml", "--out", out)
    assert done.exit_code == 2
    assert "holds a federation already" in done.output


def test_a_client_that_fails_is_told_and_ctrl_c_says_how_to_go_on(home, monkeypatch):
    train, out = Client.train, home / "out"

    def odd(self, round, arrays):
        if self.name == "south":
            raise OSError("the disk is full")
        if round == 2 and not (home / "again").exists():
            raise KeyboardInterrupt
        return train(self, round, arrays)

    monkeypatch.setattr(Client, "train", odd)
    done = ask(home / "fed.toml", "--out", out)
    assert done.exit_code == 130
    assert "south (error): OSError: the disk is full" in done.output
    assert f"--out {out} --resume" in done.output
    (home / "again").touch()
    done = ask(home / "fed.toml", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert "round 1 of 3" not in done.output
    assert "the disk is full" in (out / "report.html").read_text()


def test_what_is_wrong_with_a_file_is_said_before_anything_is_opened(home, monkeypatch):
    monkeypatch.setattr(rounds, "Server", None)
    (home / "fed.toml").write_text(
        FED.format(home=home).replace("max_steps", "steps").replace('"lora", r = 2', '"loran"')
    )
    done = ask(home / "fed.toml", "--out", home / "out")
    assert done.exit_code == 2
    assert "line 9: a run has no 'steps'" in done.output
    (home / "fed.toml").write_text('optimiser = "gorp"\n' + FED.format(home=home))
    done = ask(home / "fed.toml", "--out", home / "out")
    assert done.exit_code == 2
    assert "rounds leave nothing of that" in " ".join(done.output.split())
    done = ask(home / "none.toml", "--out", home / "out")
    assert done.exit_code == 2
    assert "fed.toml" in done.output


def test_a_real_model_learns_from_clients(tmp_path):
    """MiniLM on definitions, divided by Dirichlet(10): better than before after two rounds of six steps."""
    (tmp_path / "fed.toml").write_text("""
model = "bundled:minilm"
data = "bundled:wordnet"
task = { is = "classification", max_length = 16 }
method = { is = "lora", r = 4 }
where = ["query", "value"]
lr = 3e-3
head_lr = 3e-3
max_steps = 6
batch = 8
train_rows = 200
eval_rows = 60
rounds = 2
how = "fedit"
split = { is = "dirichlet", alpha = 10, clients = 2 }
""")
    done = ask(tmp_path / "fed.toml", "--out", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["after"]["loss"] < report["rounds"][0]["server"]["loss"]
    n = undula.Adapter.load(tmp_path / "out").num_parameters()
    assert [c["bytes"] for r in report["rounds"][1:] for c in r["clients"].values()] == [4 * n] * 4


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="it would begin")
@pytest.mark.parametrize(("runtime", "extra"), [("flower", "flower"), ("ray", "simulation")])
def test_a_runtime_that_is_not_installed_says_what_is(home, runtime, extra):
    done = ask(home / "fed.toml", "--out", home / "out", "--runtime", runtime)
    assert done.exit_code == 2
    assert f"this needs the package flwr, which is not installed: pip install 'undula[{extra}]'" in done.output
    assert not (home / "out").exists()


def test_what_is_cut_is_told_at_the_end_and_on_the_page(home):
    text = (home / "fed.toml").read_text()
    (home / "fed.toml").write_text(text.replace('"classification"', '{ is = "classification", max_length = 4 }'))
    done = ask(home / "fed.toml", "--out", home / "out", "--dry-run")
    for who in ("the server: 10 of 10 rows", "13 of 13 north rows", "2 of 2 north validation rows"):
        assert f"{who}: the text is cut at its end" in " ".join(done.output.split())
    done = ask(home / "fed.toml", "--out", home / "out")
    assert done.exit_code == 0, done.output
    notes = json.loads((home / "out/report.json").read_text())["notes"]
    page = html.unescape((home / "out/report.html").read_text())
    assert [note for note in notes if "is cut" in note] == [
        "the server: 10 of 10 rows: the text is cut at its end (the longest has 6 tokens, 4 are kept)"
    ]
    for note in notes:
        assert note in page
        assert " ".join(done.output.split()).count(note) == 1
