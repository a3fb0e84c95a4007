"""What a training leaves to look at: one page that holds all that it shows, and the same numbers in report.json."""

import dataclasses
import json
import logging
import re
import sys

import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix

import undula
from tests.support import tiny
from undula.observe.page import html
from undula.train import (
    CausalLM,
    Classification,
    ImageClassification,
    Regression,
    Run,
    concluding,
    page,
)
from undula.train.concluding import Diverged
from undula.train.curves import smooth
from undula.train.details import diagnosis, of_classes

pytestmark = pytest.mark.usefixtures("pages")
ODD = '<b>"odd" & so</b>'


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = tiny.reviews(90)
    for i, row in enumerate(rows):
        row["label"] = ODD if i % 6 == 0 else row["label"]
        row["text"] += f" <script>alert({i})</script>"
    return Run(
        model=tiny.bert(folder / "bert"), data=tiny.jsonl(folder / "reviews.jsonl", rows), task=Classification(),
        method=undula.LoRA(r=2), out=folder / "out", lr=5e-3, max_steps=8, batch=8, eval_every=2,
    )  # fmt: skip


def headings(text):
    return re.findall("<h2>(.*?)</h2>", text)


def check_alone(text):
    """Nothing is fetched, nothing runs, whatever stands in the data."""
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:image/png;base64,)', text)
    assert not re.findall(r"url\((?!#)", text)
    assert html.POLICY in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_of_a_classifier(usual, tmp_path):
    run = dataclasses.replace(usual, out=tmp_path / "out")
    report = undula.train(run)
    text = (run.out / "report.html").read_text(encoding="utf-8")
    check_alone(text)
    assert headings(text) == [
        "In short", "Before and after", "Course", "Classes", "The rows that are most wrong", "The adapter",
        "Of the rows", "How to repeat it",
    ]  # fmt: skip
    assert ODD not in text
    assert "&lt;b&gt;&quot;odd&quot; &amp; so&lt;/b&gt;" in text
    assert "&lt;script&gt;alert(" in text
    assert (run.out / "run.toml").read_text().splitlines()[-1] in text.replace("&quot;", '"')
    assert text.count("<svg ") == 3
    assert (run.out / "loss.svg").read_text().startswith("<?xml")
    assert report == json.loads((run.out / "report.json").read_text())
    assert sum(c["rows"] for c in report["per_class"]) == report["eval_rows"] == sum(map(sum, report["confusion"]))
    assert len(report["evaluations"]) == 4
    losses = [w["loss"] for w in report["worst"]]
    assert losses == sorted(losses, reverse=True)
    assert report["after"]["macro_f1"] == pytest.approx(sum(c["f1"] for c in report["per_class"]) / 3)
    assert "best of 4 evaluations on the same rows" in report["optimism"]
    assert "--data FILE" in report["optimism"]


def test_figures_of_classes_are_those_of_scikit_learn():
    torch.manual_seed(1)
    logits, names = torch.randn(50, 4), ("a", "b", "c", "d")
    labels = torch.randint(0, 3, (50,)).tolist()  # of d there is none
    found, said = of_classes(logits, labels, names), logits.argmax(1).tolist()
    wanted = classification_report(labels, said, labels=range(4), target_names=names, output_dict=True, zero_division=0)
    for c in found["per_class"]:
        own = wanted[c["class"]]
        assert (c["precision"], c["recall"], c["f1"]) == (own["precision"], own["recall"], own["f1-score"])
        assert c["rows"] == own["support"]
        assert c["answers"] == said.count(names.index(c["class"]))
    assert found["confusion"] == confusion_matrix(labels, said, labels=range(4)).tolist()
    assert sum(c["rows"] for c in found["confused"]) == sum(a != b for a, b in zip(labels, said, strict=True))
    first = found["worst"][0]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    assert first["row"] == int(losses.argmax())
    assert first["loss"] == pytest.approx(float(losses.max()))
    assert first["class"] == names[labels[first["row"]]]


def test_of_very_many_classes_the_frequent_confusions_are_kept():
    names = tuple(str(i) for i in range(150))
    found = of_classes(torch.randn(300, 150), [i % 150 for i in range(300)], names)
    assert "confusion" not in found
    assert len(found["confused"]) == 50
    assert len(found["per_class"]) == 150


def test_images_are_shown_small(tmp_path):
    tiny.classes(tmp_path / "pets", {"train": tiny.pictures(30), "test": tiny.pictures(4, seed=1)})
    run = Run(
        model=tiny.vit(tmp_path / "vit"), data=str(tmp_path / "pets"), task=ImageClassification(),
        method=undula.LoRA(r=1), out=tmp_path / "out", max_steps=4, batch=4, eval_every=2,
    )  # fmt: skip
    report = undula.train(run)
    text = (run.out / "report.html").read_text()
    check_alone(text)
    assert text.count("<img ") == len(report["worst"])
    assert f"--split {'test'}" in report["optimism"]
    assert "text" not in report["worst"][0]


def test_a_language_model_shows_what_it_wrote_before_and_after(tmp_path):
    """Before too, where the training was resumed."""
    rows = [{"prompt": f"the {w}", "completion": f"{w} {w}"} for w in tiny.WORDS * 3]
    run = Run(
        model=tiny.llama(tmp_path / "m"), data=tiny.jsonl(tmp_path / "d.jsonl", rows), task=CausalLM(generate=7),
        method=undula.LoRA(r=2), out=tmp_path / "o", lr=1e-2, max_steps=6, batch=8, eval_every=3,
    )  # fmt: skip
    report = undula.train(run)
    assert [set(w) for w in report["written"]] == [{"asked", "wanted", "written"}] * 5
    assert [w["asked"] for w in report["written"]] == [w["asked"] for w in report["written_before"]]
    text = (run.out / "report.html").read_text()
    check_alone(text)
    assert "Written before and after" in headings(text)
    assert "Classes" not in headings(text)
    assert text.count("<svg ") == 1  # the headline is the loss
    (run.out / "report.json").unlink()
    assert undula.train(run, resume=True)["written_before"] == report["written_before"]
    none = undula.train(dataclasses.replace(run, task=CausalLM(generate=0), out=tmp_path / "none"))
    assert "written" not in none
    assert "Written before and after" not in headings((tmp_path / "none/report.html").read_text())


def test_other_tasks_have_the_page_without_classes(usual, tmp_path):
    rows = [{"text": f"the {w}", "label": float(i)} for i, w in enumerate(tiny.WORDS * 2)]
    run = dataclasses.replace(usual, task=Regression(), data=tiny.jsonl(tmp_path / "d.jsonl", rows), out=tmp_path / "o")
    undula.train(run)
    assert headings((run.out / "report.html").read_text())[:4] == [
        "In short",
        "Before and after",
        "Course",
        "The adapter",
    ]


def test_without_matplotlib_there_is_a_page_without_pictures(usual, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "undula.train"):
        report = undula.train(dataclasses.replace(usual, out=tmp_path / "out"))
    assert report["state"] == "done"
    assert "pip install 'undula[plot]'" in caplog.text
    text = (tmp_path / "out/report.html").read_text()
    assert "<svg" not in text
    assert "per class" not in text
    assert not (tmp_path / "out/loss.svg").exists()


def test_a_page_that_cannot_be_made_ends_no_training(usual, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise OSError("no room")

    monkeypatch.setattr(page.html, "page", broken)
    with caplog.at_level(logging.WARNING, "undula.train"):
        assert undula.train(dataclasses.replace(usual, out=tmp_path / "out"))["state"] == "done"
    assert "report.html could not be made: OSError: no room" in caplog.text
    assert undula.Adapter.load(tmp_path / "out")


def test_a_report_that_diverged_has_its_page(usual, tmp_path):
    with pytest.raises(Diverged):
        undula.train(dataclasses.replace(usual, lr=1e30, max_grad_norm=0, eval_every=0, out=tmp_path / "out"))
    assert "diverged" in (tmp_path / "out/report.html").read_text()


def test_names_of_any_script_are_drawn(usual, tmp_path, recwarn):
    rows = [
        {"text": f"the {w}", "label": ["좋아", "悪い $x$ %", "good\nnews"][i % 3]} for i, w in enumerate(tiny.WORDS * 2)
    ]
    run = dataclasses.replace(usual, data=tiny.jsonl(tmp_path / "d.jsonl", rows), out=tmp_path / "o", max_steps=2)
    undula.train(run)
    text = (run.out / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg ") == 3
    assert "悪い $x$ %" in text
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_running_means_keep_the_mean_and_the_steps():
    line = [(float(i), float(i % 2)) for i in range(100)]
    assert [x for x, _ in smooth(line)] == [x for x, _ in line]
    assert all(0.3 < y < 0.7 for _, y in smooth(line)[2:-2])
    assert smooth([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_spectra_that_take_long_are_left_out():
    big = undula.Adapter(
        {"a": undula.LoRAN(r=1)}, {"a": {"B": torch.zeros(1), "A": torch.zeros(1)}}, {"a": (10000, 10000)}
    )
    assert diagnosis(big) == []


@pytest.mark.parametrize("at", ["page.write", "put", "_save"])
def test_a_run_is_finished_when_all_is_written(at, usual, tmp_path, monkeypatch):
    """Killed between its last files, a training can be resumed, and then everything is there."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    run = dataclasses.replace(usual, out=tmp_path / "out", max_steps=2)
    calls = []

    def second(*given):
        calls.append(given)
        return kill() if len(calls) == 2 else save(*given)

    save = concluding._save
    with monkeypatch.context() as cut:
        where, name = (concluding.page, "write") if at == "page.write" else (concluding, at)
        cut.setattr(where, name, second if at == "_save" else kill)
        with pytest.raises(Killed):
            undula.train(run)
    assert not (run.out / "report.json").exists()
    undula.train(Run.load(run.out), resume=True)
    assert {"report.json", "report.html", "README.md"} <= {file.name for file in run.out.iterdir()}
    assert undula.Adapter.load(run.out).about["training"]["steps"] == 2
