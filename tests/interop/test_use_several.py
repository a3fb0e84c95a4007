"""Several adapters of one base, opened together: side by side, or as a weighted sum."""

import csv
import io
import json

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support.encoders import drawn
from undula.cli.main import app
from undula.train import CausalLM, Classification, Plain, TokenClassification

TEXTS = ["the film was good", "the food was awful", "nice"]


def call(*words, code=0, typed=None):
    """(what `undula words...` writes, what it says beside)."""
    done = CliRunner().invoke(app, [str(w) for w in words], input=typed, catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return done.stdout, " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """{name: directory}: classifiers of other sizes over one base, and one that is alike."""
    tmp = tmp_path_factory.mktemp("heads")
    base = tiny.bert(tmp / "base")
    tasks = {"a": ("x", "y"), "b": ("p", "q", "r"), "c": ("x", "y")}
    return {n: drawn(tmp / n, base, Classification(names=t), seed=i, dtype=torch.float32, where=["value"])
            for i, (n, t) in enumerate(tasks.items())}  # fmt: skip


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("writers")
    base = tiny.llama(tmp / "base")
    return {n: drawn(tmp / n, base, CausalLM(format=Plain(), generate=0), seed=i, dtype=torch.float32, where=["q_proj"])
            for i, n in enumerate("ab")}  # fmt: skip


def memory(opened):
    return {p.data_ptr() for p in opened.model.base_model.parameters() if p.numel()}


def test_they_share_the_base_and_say_what_each_says_alone(heads):
    """Also what they had in common before: nothing but the adapters and the heads is there twice."""
    several = undula.load([heads["a"], str(heads["b"])])
    for opened, name in zip(several, "ab", strict=True):
        assert opened.predict(TEXTS) == undula.load(heads[name]).predict(TEXTS)
    first, second = map(memory, several)
    own = {t.data_ptr() for _, _, t in several[1].adapter.tensors()}
    assert second - first <= own


def test_merging_one_leaves_the_other(heads):
    one, other = undula.load([heads["a"], heads["b"]])
    before = other.predict(TEXTS)
    undula.merge(one.model)
    assert other.predict(TEXTS) == before


def test_answers_stand_side_by_side(heads, tmp_path):
    """Under the adapters' names, whatever the rows come from."""
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    wanted = {n: undula.load(heads[n]).predict(TEXTS) for n in "ab"}
    out, _ = call("predict", heads["a"], heads["b"], tiny.table(tmp_path / "rows.csv", rows), "--probabilities")
    for row, given, a, b in zip(csv.DictReader(io.StringIO(out)), rows, wanted["a"], wanted["b"], strict=True):
        assert {k: row[k] for k in given} == given
        assert (row["a.label"], row["b.label"]) == (a["label"], b["label"])
        assert float(row["b.probability of r"]) == pytest.approx(b["probabilities"]["r"])
        assert "a.probability of r" not in row
    typed, _ = call("predict", heads["a"], heads["b"], "--as", "jsonl", typed="\n".join(TEXTS))
    for line, a, b in zip(typed.splitlines(), wanted["a"], wanted["b"], strict=True):
        assert json.loads(line)["a.label"] == a["label"]
        assert json.loads(line)["b.probability"] == pytest.approx(b["probability"])


def test_a_weighted_sum_answers_as_one(heads):
    """Heads are averaged where the weights sum to 1, and else no sum is made."""
    both = 0.25 * undula.Adapter.load(heads["a"]) + 0.75 * undula.Adapter.load(heads["c"])
    opened = undula.load(heads["a"])
    undula.detach(opened.model)
    undula.attach(opened.model, both)
    out, _ = call("predict", f"{heads['a']}:0.25", f"{heads['c']}:0.75", *TEXTS)
    for row, wanted in zip(csv.DictReader(io.StringIO(out)), opened.predict(TEXTS), strict=True):
        assert row["label"] == wanted["label"]
        assert float(row["probability"]) == pytest.approx(wanted["probability"], rel=1e-4)
    for words, said in {
        (f"{heads['a']}:1", f"{heads['c']}:1"): "weights that sum to 1",
        (f"{heads['a']}:0.5", f"{heads['b']}:0.5"): "answer other things",
        (f"{heads['a']}:half", heads["c"]): "is a weight",
    }.items():
        assert said in call("predict", *words, *TEXTS, code=2)[1]


def test_language_models_write_one_after_another_and_as_a_sum(writers, tmp_path):
    alone = {n: undula.load(writers[n]).generate("the film", max_new_tokens=5) for n in "ab"}
    out, _ = call("generate", writers["a"], writers["b"], "the film", "--max-new-tokens", 5)
    assert out.split("[a]\n")[1].split("[b]\n") == [f"{alone['a'].strip()}\n", f"{alone['b'].strip()}\n"]
    out, _ = call("generate", writers["a"], writers["b"], "the film", "a day", "--max-new-tokens", 5)
    first = json.loads(out.splitlines()[0])
    assert [first[f"{n}.text"] for n in "ab"] == [alone[n].strip() for n in "ab"]
    opened = undula.load(writers["a"])
    both = 0.5 * undula.Adapter.load(writers["a"]) + 2.0 * undula.Adapter.load(writers["b"])
    undula.detach(opened.model)
    undula.attach(opened.model, both)
    out, _ = call("generate", f"{writers['a']}:0.5", f"{writers['b']}:2", "the film", "--max-new-tokens", 5)
    assert out.strip() == opened.generate("the film", max_new_tokens=5).strip()


def test_adapters_of_several_bases_are_refused(heads, writers, tmp_path):
    with pytest.raises(ValueError, match="adapters of one base are opened together"):
        undula.load([heads["a"], writers["a"]])
    assert "adapters of one base" in call("predict", heads["a"], writers["a"], "nice", code=2)[1]
    with pytest.raises(ValueError, match="list is empty"):
        undula.load([])


def test_tasks_that_take_other_rows_are_refused_side_by_side(heads, tmp_path):
    base = str(heads["a"].parent / "base")
    tags = drawn(tmp_path / "tags", base, TokenClassification(names=("O", "B-A")), dtype=torch.float32, where=["value"])
    out, _ = call("predict", heads["a"], tags, TEXTS[0])  # both take texts
    assert "tags.entities" in out
    rows = tiny.jsonl(tmp_path / "rows.jsonl", [{"tokens": ["nice"]}])
    assert "no column for text" in call("predict", heads["a"], tags, rows, code=2)[1]


@pytest.mark.parametrize("verb", ["predict", "generate"])
@pytest.mark.parametrize("wrong", ["{folder}/abd", "{folder}/abd:0.5", "{folder}/abd.csv"])
def test_a_directory_that_is_not_there_is_no_text(heads, writers, verb, wrong):
    """A misspelled adapter would be answered as if it were a row, or gone on with as a prompt."""
    own = (heads if verb == "predict" else writers)["a"]
    said = call(verb, own, wrong.format(folder=own.parent), "good", code=2)[1]
    assert "abd" in said
    assert "directories" in said or "does not exist" in said


@pytest.mark.parametrize(
    "given", [("text", "{file}"), ("{file}", "{file}"), ("{file}", "text"), ("{folder}", "{file}")]
)
def test_files_are_no_texts_beside_others(heads, tmp_path, given):
    """Of a table beside a text the name was answered as a row."""
    table = tiny.table(tmp_path / "new.csv", [{"text": "good"}])
    said = call("predict", heads["a"], *(g.format(file=table, folder=tmp_path) for g in given), code=2)[1]
    assert "name one file or folder, several images, or texts alone" in said


def test_a_text_with_a_stroke_is_one(heads):
    """`and/or` names no place."""
    assert len(call("predict", heads["a"], "good/bad", "/good", "a/b c", "--as", "jsonl")[0].splitlines()) == 3
