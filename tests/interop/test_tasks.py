"""Every task beyond classification and language models: trained really, from the command line, in a study and in
Python; measured, resumed to the bit, merged into a model that transformers opens."""

import dataclasses
import json
import random

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.train import Interrupted, MultiLabel, Run, evaluate, restored
from undula.train.data.faults import Faults
from undula.train.data.load import load_data


def labelled(n, seed=0):
    """What something is and whether it is good, of four words, with a label for each."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        thing, telling = draw.choice(tiny.WORDS[12:15]), draw.choice([*tiny.GOOD, *tiny.BAD])
        labels = [*(["film"] if thing == "film" else []), *(["good"] if telling in tiny.GOOD else [])]
        rows.append({"text": f"the {thing} was {telling}", "label": labels})
    return rows


@dataclasses.dataclass(frozen=True)
class Kind:
    """A task with a tiny model and rows from which it can be learned."""

    name: str  # as the command line has it
    base: object  # writes the model into a folder
    rows: object  # n, seed -> rows
    opener: str  # the class of transformers for the merged model
    chance: float  # the headline metric that no answer without skill reaches
    options: tuple = ()
    lr: float = 1e-2
    steps: int = 40
    task: str = ""  # where the kind is one of several of a task
    number: int = 160  # rows
    metric: str = ""  # where the headline takes longer to learn


def named(n, seed=0):
    """Words of which the good ones are entities, with a "very" before them where there is one."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        very, telling = draw.random() < 0.5, draw.choice([*tiny.GOOD, *tiny.BAD])
        tokens = ["the", draw.choice(tiny.WORDS[12:15]), "was", *(["very"] if very else []), telling]
        kind = "GOOD" if telling in tiny.GOOD else "BAD"
        tags = ["O", "O", "O", *([f"B-{kind}", f"I-{kind}"] if very else [f"B-{kind}"])]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def questions(n, seed=0):
    """What something is, asked and answered in one word."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        label = draw.choice(["good", "bad"])
        telling = draw.choice(tiny.GOOD if label == "good" else tiny.BAD)
        rows.append({"source": f"the {draw.choice(tiny.WORDS[12:15])} was {telling}", "target": label})
    return rows


def rated(n, seed=0):
    """Two sentences, and 5 where both are good or both bad, else 0."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        first, second = (draw.choice([tiny.GOOD, tiny.BAD]) for _ in range(2))
        texts = [f"the {draw.choice(tiny.WORDS[12:15])} was {draw.choice(words)}" for words in (first, second)]
        rows.append({"sentence1": texts[0], "sentence2": texts[1], "score": 5 * (first is second)})
    return rows


def paired(n, seed=0):
    """A sentence, another that says the like of the same thing, and one that does not."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        thing, words = draw.choice(tiny.WORDS[12:15]), draw.sample([tiny.GOOD, tiny.BAD], 2)
        rows.append({
            "anchor": f"the {thing} was {draw.choice(words[0])}",
            "positive": f"a very {words[0][0]} {thing}",
            "negative": f"a very {words[1][0]} {thing}",
        })  # fmt: skip
    return rows


EVERY = (
    Kind("multi-label", tiny.bert, labelled, "AutoModelForSequenceClassification", 0.65, lr=6e-3, steps=80),
    Kind("token-classification", tiny.bert, named, "AutoModelForTokenClassification", 0.5, lr=6e-3, steps=80),
    Kind("seq2seq", tiny.t5, questions, "AutoModelForSeq2SeqLM", 0.6, lr=1e-2, steps=60),
    Kind("similarity", tiny.bert, rated, "AutoModel", 0.5, lr=6e-3, steps=80),
    Kind("pairs", tiny.bert, paired, "AutoModel", 0.6, lr=6e-3, steps=60, task="similarity",
         options=("kind=pairs",)),
    Kind("whisper", tiny.whisper, tiny.tones, "AutoModelForSpeechSeq2Seq", 0.5, lr=1e-2, task="speech-recognition",
         number=32, options=("max_text=6",)),
    Kind("wav2vec2", tiny.wav2vec2, tiny.tones, "AutoModelForCTC", 5.0, task="speech-recognition", number=32,
         metric="loss"),
)  # fmt: skip
KINDS = {kind.name: kind for kind in EVERY}


def verb(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(the kind, its base, its data, the directory of a run from the command line)."""
    kind, path = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    (path / "base").mkdir()
    (path / "data").mkdir()
    base, data = kind.base(path / "base"), path / "data"
    for split, n, seed in (("train", kind.number, 0), ("validation", kind.number // 4, 1)):
        rows = tiny.tones(data / "wav", n, seed) if kind.rows is tiny.tones else kind.rows(n, seed)
        tiny.jsonl(data / f"{split}.jsonl", rows)
    options = [word for option in kind.options for word in ("--task-set", option)]
    verb("train", "--model", base, "--data", data, "--task", kind.task or kind.name, *options, "--set", "r=4",
         "--lr", kind.lr, "--max-steps", kind.steps, "--batch", 8, "--save-every", 10, "--out", path / "out",
    )  # fmt: skip
    return kind, base, data, path / "out"


def test_it_learns(trained):
    kind, _, _, out = trained
    report = json.loads((out / "report.json").read_text())
    metric, losses = kind.metric or report["metric"], [loss for _, loss in report["losses"]]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    after, before, chance = report["after"][metric], report["before"][metric], kind.chance
    assert after > max(chance, before) if Run.load(out).task.more_is_better else after < min(chance, before)


def test_it_is_measured_again(trained):
    _, _, _, out = trained
    after = json.loads((out / "report.json").read_text())["after"]
    assert json.loads(verb("eval", out, "--json", "-")) == after == evaluate(out)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_it_resumes_to_the_bit(trained, tmp_path):
    *_, out = trained
    run = dataclasses.replace(Run.load(out), out=tmp_path, max_steps=10, save_every=4, eval_rows=8)
    undula.train(dataclasses.replace(run, out=tmp_path / "whole"))
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        undula.train(run, callbacks=(Stop(),))
    assert undula.train(run, resume=True)["resumed_from_step"] == 4
    a, b = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_is_looked_at_first(trained, tmp_path):
    kind, base, data, _ = trained
    options = [word for option in kind.options for word in ("--task-set", option)]
    words = ("--model", base, "--data", data, "--task", kind.task or kind.name, *options, "--out", tmp_path / "o")
    assert str(kind.number) in verb("train", *words, "--dry-run")
    assert not (tmp_path / "o").exists()


def batch_of(opened, number=4):
    made = [opened.examples()[i] for i in range(number)]
    return {k: v for k, v in opened.run.task.collator(opened.processor)(made).items() if k != "labels"}


def first(output):
    """The first tensor of a model's output."""
    return output["logits"] if "logits" in output else next(iter(output.values()))


def test_it_merges_into_a_model_that_transformers_opens(trained, tmp_path):
    import transformers

    kind, _, _, out = trained
    opened = restored(out)
    verb("merge", out, "--out", tmp_path / "merged")
    merged = getattr(transformers, kind.opener).from_pretrained(tmp_path / "merged").eval()
    batch = batch_of(opened)
    with torch.no_grad():
        torch.testing.assert_close(first(merged(**batch)), first(opened.model.eval()(**batch)), atol=1e-4, rtol=1e-4)


def test_what_peft_opens_is_measured_too(trained, tmp_path):
    """The exported LoRA, which has no run.json: its task type and configuration say which task it is for."""
    *_, data, out = trained
    if Run.load(out).task.peft is None:
        pytest.skip("PEFT has no type for this task")
    verb("export", out, "--out", tmp_path / "plain")
    options = ("--data", data, "--split", "train", "--rows", 40, "--json", "-")
    found, own = (json.loads(verb("eval", path, *options)) for path in (tmp_path / "plain", out))
    assert found == pytest.approx(own, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_rows_are_answered_from_the_command_line(form, trained, tmp_path):
    """As many answers as rows, in a file of either form, from a file that holds what was learned too."""
    *_, data, out = trained
    verb("predict", out, data / "validation.jsonl", "--out", tmp_path / f"answers.{form}")
    found = load_data(str(tmp_path / f"answers.{form}"))["train"]
    assert len(found) == len((data / "validation.jsonl").read_text().splitlines())
    said = {"labels", "entities", "text", "similarity", "embedding"}
    assert said & set(found.column_names)


STUDY = """
title = "x"
seeds = [1]
[train]
steps = 2
batch = 8
[sweep]
rates = [1e-2]
extend = 0
[[models]]
source = "{base}"
[[data]]
source = "{data}"
task = "{task}"
set = {{ {options} }}
[[methods]]
method = "LoRA"
"""


@pytest.mark.parametrize("name", ["token-classification", "pairs"])
def test_a_study_takes_the_task(name, tmp_path):
    """From its file to a measured run, by the metric that these rows have."""
    kind = KINDS[name]
    (tmp_path / "base").mkdir()
    (tmp_path / "data").mkdir()
    for split, n, seed in (("train", 32, 0), ("validation", 16, 1), ("test", 16, 2)):
        tiny.jsonl(tmp_path / "data" / f"{split}.jsonl", kind.rows(n, seed))
    options = ", ".join(f"{k} = '{v}'" for k, v in (o.split("=") for o in kind.options))
    places = {"base": kind.base(tmp_path / "base"), "data": tmp_path / "data", "task": kind.task or kind.name}
    (tmp_path / "study.toml").write_text(STUDY.format(options=options, **places))
    said = verb("study", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert "1 runs have ended, 0 of them failed" in said
    assert ("mrr" if name == "pairs" else "f1") in (tmp_path / "out" / "report" / "report.md").read_text()


def answers(opened, rows):
    task = opened.run.task
    asked = task.asked(datasets.Dataset.from_list(rows), faults := Faults())
    faults.check()
    return list(task.answers(opened.model, asked, opened.processor, 8))


def test_the_merged_model_says_what_it_is_for(trained, tmp_path):
    """A whole model is opened for the task that it was trained for, its classes named."""
    kind, *_, out = trained
    if kind.opener == "AutoModel":
        pytest.skip("a bare body says nothing of its task")
    verb("merge", out, "--out", tmp_path / "merged")
    opened, task = undula.load(tmp_path / "merged"), Run.load(out).task
    assert type(opened.run.task) is type(task)
    assert getattr(opened.run.task, "names", ()) == getattr(task, "names", ())


# Multi-label


def test_sets_of_labels_are_answered(trained):
    """Of rows without labels, in their order, and as good as the metric says."""
    kind, *_, out = trained
    if kind.name != "multi-label":
        pytest.skip("another task")
    rows = labelled(40, seed=5)
    found = answers(restored(out), [{"text": row["text"]} for row in rows])
    right = sum(set(a["labels"]) == set(row["label"]) for a, row in zip(found, rows, strict=True))
    assert right > 20  # who always says the same has 14
    assert all({n for n, p in a["probabilities"].items() if p >= 0.5} == set(a["labels"]) for a in found)


FORMS = {
    "lists.jsonl": [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["y"]}],
    "lists as text.csv": 'text,label\na,"[""x"", ""y""]"\nb,[]\nc,"[""y""]"\n',
    "semicolons.csv": "text,label\na,x; y;\nb,\nc,y\n",
    "commas.csv": 'text,label\na,"x,y"\nb,\nc,y\n',
    "bars.tsv": "text\tlabels\na\tx|y\nb\t\nc\ty\n",
    "columns.csv": "text,x,y,id\na,1,1,17\nb,0,0,18\nc,0,1,19\n",
    "columns.jsonl": [
        {"text": "a", "x": True, "y": True},
        {"text": "b", "x": False, "y": False},
        {"text": "c", "x": False, "y": True},
    ],
    "vectors.jsonl": [{"text": "a", "label": [1, 1]}, {"text": "b", "label": [0, 0]}, {"text": "c", "label": [0, 1]}],
    "fractions.jsonl": [
        {"text": "a", "label": [1.0, 1.0]},
        {"text": "b", "label": [0.0, 0.0]},
        {"text": "c", "label": [0.0, 1.0]},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_sets_of_labels_are_read_as_people_write_them(form, tmp_path):
    from undula.train.data.load import load_data

    content = FORMS[form]
    if isinstance(content, str):
        (tmp_path / form).write_text(content)
    else:
        tiny.jsonl(tmp_path / form, content)
    data = load_data(str(tmp_path / form))
    task, parts = MultiLabel().read(data, "train")
    assert task.names in (("x", "y"), ("0", "1"))
    assert parts["train"]["label"][:] == [[0, 1], [], [1]]
    assert "2 train rows have no label" not in " ".join(task.told(task.figures(parts)))
    assert "1 train rows have no label, and count as such" in task.told(task.figures(parts))
    again = dataclasses.replace(MultiLabel(), names=("b", "a"), vectors=task.vectors)
    if form.startswith(("vectors", "fractions")):
        assert again.read(data, "train")[1]["train"]["label"][:] == [[0, 1], [], [1]]


WRONG = {
    r"differ by case.*'X ' \(1 rows, first line 2\)": [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["X "]}],
    "column 'y' of a class holds .*line 2 has 7": [
        {"text": "a", "x": 1, "y": 0},
        {"text": "b", "x": 0, "y": 7},
        {"text": "c", "x": 0, "y": 1},
    ],
    "no column for label .* nor two columns or more that hold 0 and 1": [{"text": "a", "score": 0.3}],
    "column 'text' is empty: line 2": [{"text": "a", "label": ["x"]}, {"text": " ", "label": ["x"]}],
    "no set of labels: line 1": [{"text": "a", "label": [""]}, {"text": "b", "label": ["x"]}],
    "no set of labels: line 1 ": [{"text": "a", "label": [{"a": 1}]}, {"text": "b", "label": []}],
    "another separator between labels than other rows: line 2 has 'x|y'": [
        {"text": "a", "label": "x;y"},
        {"text": "b", "label": "x|y"},
    ],
    "has no label in any row": [{"text": "a", "label": []}],
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_no_set_of_labels_is_named(said, tmp_path):
    from undula.train.data.load import load_data

    data = load_data(tiny.jsonl(tmp_path / "d.jsonl", WRONG[said]))
    with pytest.raises((ValueError, LookupError), match=said.replace("x|y", r"x\|y")):
        MultiLabel().read(data, "train")


def test_a_class_may_hold_another_separator(tmp_path):
    """Where nothing beside says that it is two."""
    from undula.train.data.load import load_data

    rows = [{"text": "a", "label": "food, drink;x"}, {"text": "b", "label": "x"}]
    assert MultiLabel().read(load_data(tiny.jsonl(tmp_path / "d.jsonl", rows)), "train")[0].names == (
        "food, drink",
        "x",
    )


def test_an_unknown_label_of_the_validation_rows_is_named(tmp_path):
    from undula.train.data.load import load_data

    tiny.jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": ["x", "y"]}])
    tiny.jsonl(tmp_path / "validation.jsonl", [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "z"]}])
    with pytest.raises(ValueError, match=r"not known: line 2 has 'z'"):
        MultiLabel().read(load_data(str(tmp_path)), "train", "validation")
