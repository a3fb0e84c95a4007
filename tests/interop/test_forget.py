"""Forgetting classes, one request after another: what goes, what stays, what comes back."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.forgetting import _classes
from undula.cli.main import app
from undula.penalties import GroupLasso
from undula.train import Classification, ImageClassification, Regression, Run, forget
from undula.train import forgetting as verb
from undula.train.concluding import Diverged
from undula.train.forgetting import merged
from undula.train.forgetting_page import blocks, selected
from undula.train.forgetting_rows import check_rows, quoted
from undula.train.forgetting_runs import feed_forward, planned
from undula.train.tasks.forgetting import ForgetImages, ForgetTexts, forgetting, h_mean
from undula.train.tasks.forgetting_trainer import balanced, chosen
from undula.train.tasks.task import Examples

CLASSES = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that was trained to tell four classes, whole, and its rows."""
    home = tmp_path_factory.mktemp("home")
    words = {"red": "good", "green": "bad", "blue": "film", "grey": "day"}
    rows = [{"text": f"the {words[c]} was {words[c]} {i}", "label": c} for i in range(16) for c in CLASSES]
    data = home / "data"
    data.mkdir()
    for split, part in (("train", rows[:40]), ("validation", rows[40:52]), ("test", rows[52:])):
        tiny.jsonl(data / f"{split}.jsonl", part)
    run = Run(model=tiny.bert(home / "base"), data=data, task=Classification(), method=undula.LoRA(r=4), lr=2e-2,
              max_steps=40, batch=8, out=home / "known", eval_every=0)  # fmt: skip
    undula.train(run)
    done = CliRunner().invoke(app, ["merge", str(home / "known"), "--out", str(home / "whole")])
    assert done.exit_code == 0, done.output
    return home


def asked(home, out, **changes):
    return Run(**{"model": str(home / "whole"), "data": home / "data", "task": Classification(), "lr": 2e-2,
                  "method": undula.LoRA(r=2), "max_steps": 24, "batch": 8, "eval_every": 8, "save_every": 4, "out": out,
                  "penalty": GroupLasso(1e-3)} | changes)  # fmt: skip


REQUESTS = [["red"], ["blue"]]


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("forgotten") / "out"
    return out, forget(asked(home, out), REQUESTS, beta=1.0)


def logits(model, text="the good was good"):
    tokens = AutoTokenizer.from_pretrained(model.config._name_or_path)(text, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).logits


def test_what_is_asked_for_goes_and_the_rest_stays(done):
    """On rows by which nothing was chosen; of each request, and of those before it."""
    _, report = done
    assert report["split"] == "test"
    for request in report["requests"]:
        assert request["forgotten_before"] >= 0.9
        assert request["forgotten"] <= 0.4
        assert request["kept"] >= 0.9
        assert request["h_mean"] == pytest.approx(
            h_mean(request["forgotten_before"], request["forgotten"], request["kept"])
        )
    assert report["requests"][1]["earlier"] <= 0.4
    assert report["kept"]["classes"] == ["green", "grey"]


def test_the_sum_is_an_adapter_of_the_model_as_it_was(done, home):
    """It opens by itself, names its classes, and answers as the last request's model does."""
    out, _ = done
    opened, last = undula.load(out), undula.load(out / "requests" / "02")
    assert opened.labels == last.labels
    for text in ("the good was good", "film", "the bad was bad"):
        a, b = (each.predict(text)["probabilities"] for each in (opened, last))
        assert a == pytest.approx(b, abs=1e-4)
    assert (out / "report.html").read_text().count("<svg") >= 1


def test_it_is_told_which_blocks_changed(done):
    """In the record and on the page; and where the penalty closed none, or all."""
    out, report = done
    groups = report["requests"][0]["groups"]
    assert groups[0]["in_use"] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    page = (out / "report.html").read_text()
    assert "2 of 2" in page
    assert "red: the penalty has closed no group: a larger weight, or more steps" in page
    few = [{"groups": 3, "zero": 1, "in_use": ["layer.0", "layer.2"]}]
    assert blocks(few) == "2 of 3: layer.0, layer.2"
    assert list(selected(few)) == []
    assert [next(selected([{"groups": 3, "zero": zero}])).split(":")[0] for zero in (0, 3)] == [
        "the penalty has closed no group",
        "the penalty has closed all groups, so nothing was forgotten",
    ]
    assert blocks([]) == ""


def test_a_request_that_is_taken_back_comes_back_exactly(done, home, tmp_path):
    """Without any request the adapter is none, to the bit; without one the other stands."""
    out, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    base = AutoModelForSequenceClassification.from_pretrained(home / "whole")
    wanted = logits(base)
    verb.undo(copy, ["red"])
    undula.attach(base, undula.Adapter.load(copy))
    assert not torch.equal(logits(base), wanted)
    undula.detach(base)
    undula.attach(base, verb.undo(copy, ["blue"]))
    assert torch.equal(logits(base), wanted)
    assert json.loads((copy / "report.json").read_text())["undone"] == REQUESTS
    with pytest.raises(LookupError, match="was no request"):
        verb.undo(copy, ["grey"])


class Falls(TrainerCallback):
    """Falls over in the second request."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6 and "requests/02" in args.output_dir.replace(os.sep, "/"):
            raise MemoryError("fallen over")


def test_an_interruption_changes_nothing(done, home, tmp_path):
    """A kill in the second request: the first stands, the second goes on from its checkpoint."""
    out, report = done
    with pytest.raises(MemoryError):
        forget(asked(home, tmp_path / "out"), REQUESTS, beta=1.0, callbacks=(Falls(),))
    with pytest.raises(FileExistsError, match="holds requests already"):
        forget(asked(home, tmp_path / "out"), REQUESTS)
    again = verb.go_on(tmp_path / "out")
    assert again["requests"] == report["requests"]
    for name in ("requests/01", "requests/02"):
        a, b = (load_file(p / name / "adapter_model.safetensors") for p in (out, tmp_path / "out"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_cannot_be_is_refused_first(home, tmp_path):
    """Before anything is written."""
    out = tmp_path / "out"
    usual = asked(home, out)
    cases = (
        (TypeError, "rung Reweight", {"method": undula.DoRA(undula.LoRA())}, REQUESTS),
        (LookupError, "knows no class 'pink'", {}, [["pink"]]),
        (ValueError, "'red' is to be forgotten twice", {}, [["red"], ["red"]]),
        (ValueError, "'red' is to be forgotten twice", {}, [["red", "red"]]),
        (ValueError, "full=.*classifier.* is no part of a request", {"full": ("classifier",)}, REQUESTS),
        (ValueError, "begin_from=.* is no part of a request", {"begin_from": str(home / "known")}, REQUESTS),
        (ValueError, "all classes are to be forgotten", {}, [["red", "green"], ["blue", "grey"]]),
        (ValueError, "has no head with named classes", {"model": str(home / "base")}, REQUESTS),
        (TypeError, "classes are forgotten of", {"task": Regression()}, REQUESTS),
        (ValueError, "takes requests", {}, []),
    )
    for kind, words, changes, requests in cases:
        with pytest.raises(kind, match=words):
            forget(dataclasses.replace(usual, **changes), requests)
    assert not out.exists()


def test_classes_without_rows_are_refused_before_anything_is_trained(home, tmp_path, caplog):
    """Of a second request too, and by the split; a class among others that cannot be measured is told."""

    def without(split, name):
        there = tmp_path / split
        shutil.copytree(home / "data", there)
        lines = (there / f"{split}.jsonl").read_text().splitlines()
        (there / f"{split}.jsonl").write_text("\n".join(line for line in lines if name not in line))
        return dataclasses.replace(asked(home, tmp_path / "out"), data=there)

    cases = {"train": [["red", "blue"]], "validation": [["red"], ["blue"]], "test": [["red"], ["blue"]]}
    for split, requests in cases.items():
        lacking = without(split, '"blue"')
        with pytest.raises(ValueError, match=f"{split} has no row of blue among its .*, which is to be forgotten"):
            forget(lacking, requests)
        assert not (tmp_path / "out").exists()
    check_rows(list(planned(lacking, [["red", "blue"]], {})))
    assert [r.message for r in caplog.records if "is not seen there" in r.message] == [
        "test has no row of blue: what becomes of it is not seen there"
    ]


def test_a_request_that_has_diverged_is_not_gone_on_from(home, tmp_path):
    """At the step at which it falls a checkpoint is due: of such numbers there is none."""
    run = asked(home, tmp_path / "out", lr=1e30, max_steps=3)
    for again in (lambda: forget(run, REQUESTS), lambda: verb.go_on(run.out)):
        with pytest.raises(Diverged, match=r"diverged"):
            again()
    with pytest.raises(Diverged, match=r"request red has diverged at lr=1e\+30: begin in another directory"):
        verb.go_on(run.out)


def test_a_name_with_a_comma_stands_in_quotes():
    assert _classes('shirt, "coat, long" ,bag') == ["shirt", "coat, long", "bag"]
    assert [quoted(name) for name in ("bag", "coat, long")] == ["bag", '"coat, long"']


def test_the_default_layers_are_those_of_feed_forward_networks(home):
    names = feed_forward(str(home / "whole"))
    assert names
    assert all(("intermediate" in n or "output" in n) and "attention" not in n for n in names)


def test_the_forgetting_term_ends_at_its_bound(home):
    """No gradient once the loss is there, one before; kept rows alone are the plain loss."""

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self):
            return self

    task = forgetting(Classification(names=CLASSES), forget=("red",), beta=2.0)
    for value, moves in ((-1.0, False), (3.0, True)):
        logits = torch.tensor([[value, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], requires_grad=True)
        loss = task.lost(Fixed(logits), {"labels": torch.tensor([0, 1])})
        loss.backward()
        kept = torch.nn.functional.cross_entropy(logits[1:], torch.tensor([1])).item()
        gone = torch.nn.functional.cross_entropy(logits[:1], torch.tensor([0])).item()
        assert loss.item() == pytest.approx(kept + 2 * max(0.0, math.log(4) - gone))
        assert bool(logits.grad[0].any()) is moves
    only = task.lost(Fixed(logits), {"labels": torch.tensor([1, 1])})
    assert only.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 1])).item(), abs=1e-6
    )


def test_a_class_of_images_is_forgotten_and_comes_back(tmp_path):
    """A network of convolutions, with prototype terms; its normalisation's statistics are those that it had."""
    data = tiny.classes(tmp_path / "rows", {"train": tiny.pictures(64), "test": tiny.pictures(40, seed=1)})
    run = Run(model=tiny.efficientnet(tmp_path / "base"), data=data, task=ImageClassification(), lr=1e-2, batch=8,
              method=undula.LoRA(r=2), where=("stem", "expand", "project", "top"), max_steps=30, eval_every=0,
              out=tmp_path / "known")  # fmt: skip
    undula.train(run)
    merged(run.out, tmp_path / "whole")
    asks = dataclasses.replace(run, model=str(tmp_path / "whole"), max_steps=16, out=tmp_path / "gone")
    report = forget(asks, [["red"]], beta=1.0, near=0.01, apart=0.01)
    (request,) = report["requests"]
    assert report["split"] == "test"
    assert request["forgotten_before"] >= 0.6
    assert request["forgotten"] <= 0.3
    assert request["kept"] >= 0.8
    opened = undula.load(tmp_path / "gone")
    assert isinstance(Run.load(tmp_path / "gone").task, ForgetImages)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    live = opened.model.state_dict()
    assert all(torch.equal(live[k], t) for k, t in whole.items() if "running" in k)
    taken_back = verb.undo(tmp_path / "gone", ["red"])
    assert not any(bool(m.delta(taken_back.factors[site]).any()) for site, m in taken_back.methods.items())


def test_the_h_mean_is_that_of_the_fall_and_what_is_kept():
    assert h_mean(1.0, 0.0, 1.0) == 1.0
    assert h_mean(0.5, 0.5, 0.9) == 0.0
    assert h_mean(0.9, 0.1, 0.8) == pytest.approx(0.8)
    assert h_mean(0.1, 0.9, 0.8) == 0.0


def test_few_rows_of_each_class_and_as_many_to_forget_as_to_keep():
    """Missing classes too; what was forgotten earlier is in no batch."""
    task = forgetting(Classification(names=CLASSES), forget=("red",), earlier=("grey",), shots=3)
    rows = Dataset.from_dict({"text": ["x"] * 30, "label": [0] * 2 + [1] * 20 + [3] * 8})
    few = chosen(Examples(task, rows, None), task, 0)
    assert sorted(few.rows["label"][:]) == [0, 0, 1, 1, 1]
    assert sorted(balanced(few, task).rows["label"][:]) == [0, 0, 0, 1, 1, 1]


def test_prototype_terms_and_the_command_line(home, tmp_path):
    """GS-LoRA++: embeddings of kept rows stay near those of the base, others leave."""
    words = ["forget", "--model", home / "whole", "--data", home / "data", "--task", "classification",
             "--forget", "red", "--max-steps", 2, "--batch", 8, "--near", 0.1, "--apart", 0.1, "--shots", 4,
             "--out", tmp_path / "a"]  # fmt: skip
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    task = Run.load(tmp_path / "a" / "requests" / "01").task
    assert isinstance(task, ForgetTexts)
    assert (task.near, task.apart, task.shots, task.forget) == (0.1, 0.1, 4, ("red",))
    done = CliRunner().invoke(app, ["forget", "--resume", str(tmp_path / "a"), "--undo", "red"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "a" / "report.json").read_text())["undone"] == [["red"]]
    assert "red (taken back)" in done.output.replace("\n", " ")
    assert "Taken back: red. All figures are of before" in (tmp_path / "a" / "report.html").read_text()
