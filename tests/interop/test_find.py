"""`undula find`: adapters of a folder by a description, by rows, and by their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import undula
from tests.support.numbers import shake
from undula import retrieve
from undula.cli.main import app
from undula.io.diffusers import WEIGHTS
from undula.retrieve import texts

TASKS = {
    "films": "whether a film critic liked the film or not",
    "animals": "tell animals from plants in dictionary glosses",
    "law": "the kind of a legal contract, by one of its clauses",
    "french": "translate a short English sentence into French",
    "spam": "unwanted commercial messages in electronic mail",
    "python": "write the documentation of a Python function",
    "health": "symptoms of patients, and the illness that they point to",
    "weather": "tomorrow's weather in a few words",
    "chess": "the best move in a game of chess",
}


def find(*words):
    done = CliRunner().invoke(app, ["find", *map(str, words)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of these tasks, with updates that belong to none."""
    root = tmp_path_factory.mktemp("adapters")
    for i, (name, words) in enumerate(TASKS.items()):
        torch.manual_seed(i)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        shake(undula.attach(model, undula.LoRA(r=2), "*"), 0.4).save(root / name, base="a-base")
        (root / name / "README.md").write_text(f"---\nlicence: mit\n---\n# {words}\n\n```python\nimport x\n```\n")
    return root


def test_a_description_finds_what_it_describes(folder):
    code, said = find("sort reviews of movies by mood", "--in", folder, "--top", 3)
    assert code == 0, said
    assert "9 adapters" in said
    shown = [line for line in said.splitlines() if any(f" {name} " in line for name in TASKS)]
    assert len(shown) == 3
    assert " films " in shown[0]
    assert "whether a film critic liked" in shown[0]


def test_rows_find_it_too_and_json_says_all(folder, tmp_path):
    rows = [("a small dog", "animal"), ("a tall tree with leaves", "plant"), ("a bird that sings", "animal")] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
    code, said = find("--rows", tmp_path / "rows.jsonl", "--in", folder, "--json", "-")
    assert code == 0, said
    told = json.loads(said)
    assert told["found"][0]["name"] == "animals"
    assert told["found"][0]["description"] == TASKS["animals"]
    assert (told["adapters"], told["skipped"]) == (9, {})


def test_an_encoder_of_weights_is_trained_and_asked(folder, tmp_path):
    """The updates are chance: of adapters that it was trained on it knows which is which."""
    code, said = find("--in", folder, "--learn", tmp_path / "encoder.safetensors")
    assert code == 0, said
    for name, words in TASKS.items():
        code, said = find(words, "--in", folder, "--by", "weights", "--encoder", tmp_path / "encoder.safetensors",
                          "--json", "-")  # fmt: skip
        assert code == 0, said
        assert json.loads(said)["found"][0]["name"] == name


def test_what_cannot_be_read_is_named_and_the_exit_code_says_so(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    (tmp_path / "good").symlink_to(folder / "law")
    code, said = find("contracts", "--in", tmp_path, "--json", tmp_path / "told.json")
    assert code == 1
    assert "bad is left out: " in said
    assert "1 of 2 could not be read" in said
    told = json.loads((tmp_path / "told.json").read_text())
    assert [f["name"] for f in told["found"]] == ["good"]
    assert list(told["skipped"]) == ["bad"]


def test_a_question_in_another_encoding_is_asked_and_other_bases_are_named(folder):
    code, said = find("films\udce9", "--in", folder, "--model", "other/base")
    assert code == 0, said
    assert "--model other/base asks for one base, and these are for: a-base" in " ".join(said.split())


def test_what_is_missing_is_said(folder, tmp_path):
    for words, told in {
        ("--in", folder): "say what the task is",
        (" ", "--in", folder): "the description of the task is empty",
        ("x", "--in", tmp_path / "none"): "is no folder",
        ("x", "--in", folder, "--by", "weights"): "takes an encoder",
        ("x", "--in", folder, "--by", "name"): "by is both, text, weights",
        ("x", "--in", folder, "--encoder", folder / "law" / "adapter_model.safetensors"): "is no encoder of weights",
        ("--in", folder / "law", "--learn", tmp_path / "e"): "takes 8 adapters",
        ("--in", folder, "--learn", folder / "law" / "adapter_model.safetensors"): "is not written over",
    }.items():
        code, said = find(*words)
        assert (code, told in said) == (2, True), said


def test_a_file_of_diffusers_is_found_by_all_its_parts(tmp_path):
    """One that is for two parts of a pipeline, its names as they are; and the same adapter with one part alone."""
    model = nn.ModuleDict({"down": nn.Sequential(nn.Linear(8, 8))})
    adapter = shake(undula.attach(model, undula.LoRA(r=2), "*"), 0.4).copy()
    for part in ("unet", "text_encoder"):
        undula.io.export_diffusers(adapter, tmp_path / part, part)
    both = {k: t for part in ("unet", "text_encoder") for k, t in load_file(tmp_path / part / WEIGHTS).items()}
    save_file(both, tmp_path / "both.safetensors")
    made = retrieve.update(tmp_path)
    assert {e.name: (e.wrong, e.layers) for e in made.entries} == {
        "both.safetensors": ("", 2), "text_encoder": ("", 1), "unet": ("", 1)
    }  # fmt: skip
    near = retrieve.likeness(made.weights, made.weights[0])
    assert near[0] == pytest.approx(1)
    assert near[1:].min() > 0.5
    assert abs(float(retrieve.likeness(made.weights, made.weights[1])[2])) < 0.2  # the parts are different layers


def test_rows_that_are_sorted_by_class_tell_of_every_class(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(texts, "embedded", lambda some, model: heard.extend(some) or torch.ones(len(some), 2))
    lines = [f"a {i},{c}" for c in ("animal", "plant") for i in range(texts.ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines, ""]))
    texts.of_rows(str(tmp_path / "rows.csv"))
    assert len(heard) == texts.ROWS
    assert {line.split()[-1] for line in heard} == {"animal", "plant"}
