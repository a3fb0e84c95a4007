"""What others open: a colleague who has PEFT, or transformers, and not undula; the README beside it."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support import trained as small
from undula.cli.main import app
from undula.train.card import MARK

TEXTS = ["the film was good", "the food was awful", "nice"]
KINDS = {"texts": small.texts, "pairs": small.pairs, "words": small.words, "images": small.images}


def call(*words):
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    return request.param, KINDS[request.param](tmp_path_factory.mktemp(request.param))


def blocks(folder):
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)


def front(folder):
    """The metadata of a card, as the hub reads them."""
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


ALONE = """
import importlib.abc, json, sys
class No(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "undula":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
import torch
exec(open("card.py").read())
torch.save(model.eval()(**torch.load("inputs.pt")).logits.detach(), "logits.pt")
print(json.dumps([config.id2label, type(model).__name__]))
"""


def test_a_colleague_with_peft_alone_gets_the_same_numbers(run, tmp_path, python):
    """In another process, where undula cannot be imported, the card's lines as they stand."""
    kind, path = run
    call("export", path, "--out", tmp_path / "plain")
    opened = undula.load(path)
    if kind == "images":
        inputs = opened.processor(tiny_picture(), return_tensors="pt")
    else:
        inputs = opened.processor(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=kind != "words")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    (tmp_path / "card.py").write_text(blocks(tmp_path / "plain")[0])
    done = subprocess.run([python, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    names, cls = json.loads(done.stdout.splitlines()[-1])
    assert cls.startswith("Peft")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / "logits.pt"), opened.model(**inputs).logits, rtol=1e-4, atol=1e-4
        )
    if kind != "words":
        assert tuple(names.values()) == opened.labels


def tiny_picture():
    import io

    from PIL import Image

    return Image.open(io.BytesIO(tiny.pictures(1)[0]["image"])).convert("RGB")


def test_cards_say_what_it_is_and_their_lines_run(run, tmp_path, monkeypatch):
    """Of a run, an export and a merge: metadata the hub reads, the base, the law, the figures, lines that work."""
    kind, path = run
    call("export", path, "--out", tmp_path / "plain")
    call("merge", path, "--out", tmp_path / "whole")
    report = json.loads((path / "report.json").read_text())
    tag = {"words": "text-generation", "images": "image-classification"}.get(kind, "text-classification")
    libraries = {path: "undula", tmp_path / "plain": "peft", tmp_path / "whole": "transformers"}
    for folder, library in libraries.items():
        text, told = (folder / "README.md").read_text(), front(folder)
        assert (told["library_name"], told["pipeline_tag"]) == (library, tag)
        assert "undula" in told["tags"]
        assert "license" not in told
        assert "base_model" not in told  # a folder of this machine is nothing to the hub
        assert "W' = W + s B A" in text
        assert "Hu et al. 2021" in text
        for name, value in report["after"].items():
            assert f"| {name} | {report['before'][name]:.4g} | {value:.4g} |" in text
        monkeypatch.chdir(folder.parent)
        for lines in blocks(folder):
            exec(compile(prepared(lines, kind, tmp_path), "card", "exec"), {})


def prepared(lines, kind, tmp):
    """A card's lines, with an image in the place of the one that they name."""
    if kind == "images":
        tiny_picture().save(tmp / "photo.png")
        return lines.replace("photo.jpg", str(tmp / "photo.png"))
    return lines


@pytest.mark.parametrize("run", ["texts"], indirect=True)
def test_a_base_of_the_hub_is_named_in_the_metadata(run, tmp_path):
    path = run[1]
    told = json.loads((path / "run.json").read_text())
    told["run"]["model"] = "somebody/some-model"
    from undula.train import Run
    from undula.train.card import of_run

    made = of_run(Run.decode(told["run"], path), undula.Adapter.load(path)).text()
    (tmp_path / "README.md").write_text(made)
    assert front(tmp_path)["base_model"] == "somebody/some-model"


def test_what_a_collapse_costs_stands_in_the_card(tmp_path):
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(24)]
    from undula.train import CausalLM

    task = CausalLM(generate=0)
    path = small.trained(tmp_path, "run", tiny.llama(tmp_path / "base"), rows, task, method=undula.LoRAN(r=2))
    call("export", path, "--how", "truncate", "--set", "r=2", "--out", tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert re.search(r"Collapsed into a plain LoRA \(rank 2 at most\).*relative error of the .*: [\d.e-]+\.", text)
    assert "sin" in text  # the law that was trained


@pytest.mark.parametrize("run", ["texts"], indirect=True)
def test_a_readme_of_ones_own_stays(run, tmp_path):
    """A training writes its card over its own alone."""
    from undula.train.card import of_run, put
    from undula.train.run import Run

    card = of_run(Run.load(run[1]), undula.Adapter.load(run[1]))
    put(card, tmp_path)
    assert MARK in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    put(card, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert Path(run[1], "README.md").read_text().startswith("---\n")


def test_every_task_says_what_the_hub_calls_it_and_what_opens_its_model():
    import transformers

    from undula.train import Task
    from undula.train.card import opener

    ours = [kind for kind in Task.registry.values() if kind.__module__.startswith("undula.")]
    for kind in ours:
        assert kind.pipeline, kind
        assert hasattr(transformers, opener(kind())), kind


ODD = "<script>x</script> [here](http://x.example) `a` *b* | c\\"


def test_names_of_classes_and_folders_are_text_in_a_card(tmp_path):
    """Whatever a data set calls its classes, and a person a folder: no HTML, no links, no other code."""
    import dataclasses
    import html

    from undula.train import Classification
    from undula.train.card import Card

    markdown = pytest.importorskip("markdown").markdown  # which comes with mkdocs

    empty = undula.Adapter({}, {}, {}, {})
    card = Card("undula", 'my "best"; $(run)', Classification(), "base <i>", "base <i>", empty, (ODD, "plain_name"))
    shown = markdown(card.text().partition("-->")[2], extensions=["tables"])
    assert not re.findall("<(?:script|i|em|a)\\b", shown)
    assert f"{ODD}, plain_name" in html.unescape(shown)
    for form in ("undula", "peft", "whole"):
        made = dataclasses.replace(card, form=form).text()
        assert 'undula.load("my \\"best\\"; $(run)")' in made
    assert "undula export 'my \"best\"; $(run)' --out plain" in card.text()
