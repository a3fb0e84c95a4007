"""`undula.load(DIRECTORY)`: what a training, an export or a merge left, opened and asked."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

import undula
from tests.support import tiny
from tests.support import trained as small
from tests.support.trained import trained
from undula.train import (
    CausalLM,
    Classification,
    ImageClassification,
    MultiLabel,
    Regression,
    Seq2Seq,
    TokenClassification,
)
from undula.train.asking import question
from undula.train.base import open_model

TEXTS = ["the film was good", "the food was awful", "nice"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return small.texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return small.pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return small.words(tmp_path_factory.mktemp("words"))


def test_two_lines_are_enough_and_say_what_the_model_says(texts):
    opened = undula.load(texts)
    found = opened.predict(TEXTS)
    assert opened.labels == ("bad", "good")
    assert [set(f) for f in found] == [{"label", "probability", "probabilities"}] * 3
    with torch.no_grad():
        want = opened.model(**opened.processor(TEXTS[2], return_tensors="pt")).logits[0].softmax(0)
    assert opened.predict(TEXTS[2])["probabilities"] == pytest.approx(
        dict(zip(opened.labels, want.tolist(), strict=True))
    )
    assert len(opened.adapter.methods) > 0
    assert not opened.model.training


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        [{"text": text} for text in TEXTS],
        [{"sentence": text, "stars": i} for i, text in enumerate(TEXTS)],
        {"text": TEXTS},
        Dataset.from_dict({"text": TEXTS, "label": ["?"] * 3}),
        "FRAME",
        *("csv", "jsonl", "tsv", "parquet", "txt"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_rows_may_be_given_as_people_have_them(texts, tmp_path, given):
    """Whatever holds the texts, the answers are the same; a label is not needed, and one that is there not read."""
    opened = undula.load(texts)
    table, path = Dataset.from_dict({"text": TEXTS}), tmp_path / f"rows.{given}"
    if given == "FRAME":
        given = table.to_pandas()
    elif given == "parquet":
        table.to_parquet(given := path)
    elif given == "txt":
        path.write_text("\n".join(["", *TEXTS, ""]))
        given = path
    elif given == "jsonl":
        given = str(tiny.jsonl(path, list(table)))  # a text that names a file is that file
    elif isinstance(given, str):
        given = tiny.table(path, list(table), "," if given == "csv" else "\t")
        given = path
    found = opened.predict(given)
    assert [f["probability"] for f in found] == pytest.approx([f["probability"] for f in opened.predict(TEXTS)])


def test_columns_are_named_for_rows_that_call_them_otherwise(texts):
    opened = undula.load(texts)
    with pytest.raises(LookupError, match=r"no column for text .*their columns are: review"):
        opened.predict([{"review": "good"}])
    assert opened.predict([{"review": "nice"}], columns={"text": "review"}) == [opened.predict("nice")]
    with pytest.raises(LookupError, match="Classification has no column txt; it has: text, pair, label"):
        opened.predict("nice", columns={"txt": "review"})


def test_what_was_trained_on_pairs_is_asked_pairs_and_what_was_not_is_not(texts, pairs):
    """A column that might be the other half of a pair changes nothing where the training had none; and where it had
    one, a text alone is not answered as if."""
    alone, both = undula.load(texts), undula.load(pairs)
    assert alone.predict([{"text": "nice", "sentence2": "bad"}]) == [alone.predict("nice")]
    found = both.predict([(text, "nice") for text in TEXTS])
    assert found == both.predict([{"premise": text, "hypothesis": "nice"} for text in TEXTS])
    assert found != both.predict([(text, "bad bad") for text in TEXTS])
    with pytest.raises(LookupError, match="trained on rows with a pair, and there is none here"):
        both.predict(TEXTS)


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        (["good", ""], ValueError, "is empty: row 2"),
        ([], ValueError, "no rows"),
        (["good", 3], TypeError, "item 2 is 3"),
        (7, TypeError, "predict takes a text, a list of these"),
        ([("a", "b", "c")], TypeError, "item 1"),
        ("absent.csv", FileNotFoundError, "absent.csv does not exist"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_place(texts, given, error, what):
    with pytest.raises(error, match=what):
        undula.load(texts).predict(given)


def test_what_a_model_cannot_do_is_said(texts, words):
    with pytest.raises(TypeError, match="generate is for language models; this is Classification"):
        undula.load(texts).generate("good")
    with pytest.raises(AttributeError, match="CausalLM has no labels"):
        _ = undula.load(words).labels


def test_a_language_model_writes_as_it_was_trained(words):
    """The prompt goes through the training's own format; `raw` does not; messages and streams come to the same."""
    opened = undula.load(words)
    text = opened.generate("the film was", max_new_tokens=6)
    assert text.strip()
    assert text == opened.predict("the film was")["text"][: len(text)] or text.strip() == text
    same = [{"role": "user", "content": "very the film was"}]
    assert opened.generate(same, max_new_tokens=6) == text
    assert "".join(opened.generate("the film was", max_new_tokens=6, stream=True)) == text
    assert opened.generate(["the film was", "a day"], max_new_tokens=6)[0] == text
    ids = opened.processor(
        "[CLS] very the film was [SEP]", add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
    )
    made = opened.model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert opened.processor.decode(made, skip_special_tokens=True) == text
    bare = opened.processor(
        "[CLS] the film was", add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
    )
    made = opened.model.generate(**bare, max_new_tokens=6, do_sample=False)[0, bare["input_ids"].shape[1] :]
    untouched = opened.generate("[CLS] the film was", max_new_tokens=6, raw=True)
    assert opened.processor.decode(made, skip_special_tokens=True) == untouched
    draws = [opened.generate("the film", max_new_tokens=8, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    wrong = {"raw=True puts one text": {"raw": True, "system": "be brief"}, "top_p": {"top_p": 0.0}}
    for what, options in (wrong | {"max_new_tokens": {"max_new_tokens": -1}}).items():
        with pytest.raises(ValueError, match=what):
            opened.generate("a", **options)


def test_what_was_trained_on_texts_goes_on_with_a_text(tmp_path):
    """No format stands between: the prompt is the beginning of a text."""
    run = trained(
        tmp_path, "run", tiny.llama(tmp_path / "base"), [{"text": r["text"]} for r in tiny.reviews(24)], CausalLM()
    )
    opened = undula.load(run)
    assert opened.roles == ("text",)
    assert opened.generate("the film", max_new_tokens=4) == opened.generate("the film", max_new_tokens=4, raw=True)
    assert opened.predict("the film")["text"].startswith(
        opened.generate("the film", max_new_tokens=4, raw=True).strip()[:3]
    )


def test_images_are_asked_by_path_bytes_pil_or_folder(tmp_path):
    from PIL import Image

    run = small.images(tmp_path)
    opened, file = undula.load(run), sorted((tmp_path / "data/train/red").iterdir())[0]
    want = opened.predict(file)
    assert want["label"] in opened.labels == ("green", "red")
    with Image.open(file) as image:
        assert opened.predict(image) == want
        assert opened.predict([image, str(file), file.read_bytes(), {"image": file}], batch=1) == [want] * 4
    assert opened.predict(tmp_path / "data/train/red", batch=1)[0] == want
    with pytest.raises(FileNotFoundError, match="no file"):
        opened.predict(["absent.png"])
    with pytest.raises(TypeError, match="none of the images"):
        opened.predict([3])


def test_a_number_is_answered_as_a_value(tmp_path):
    rows = [{"text": r["text"], "label": float(i)} for i, r in enumerate(tiny.reviews(24))]
    run = trained(tmp_path, "run", tiny.bert(tmp_path / "base"), rows, Regression())
    assert [set(f) for f in undula.load(run).predict(TEXTS)] == [{"value"}] * 3


def test_exports_and_merges_answer_as_the_run_does(texts, words, pairs, tmp_path):
    """The task, its format and its roles go with them: a merged chat model is asked as it was trained."""
    from typer.testing import CliRunner

    from undula.cli.main import app

    for name, run in (("texts", texts), ("words", words), ("pairs", pairs)):
        for verb in ("export", "merge"):
            out = tmp_path / f"{name}-{verb}"
            done = CliRunner().invoke(app, [verb, str(run), "--out", str(out)])
            assert done.exit_code == 0, done.output
            one, other = undula.load(run), undula.load(out)
            assert other.run.task == one.run.task
            assert other.roles == one.roles
            given = [(text, "nice") for text in TEXTS] if name == "pairs" else TEXTS
            if name == "words":
                assert other.generate(TEXTS, max_new_tokens=6) == one.generate(TEXTS, max_new_tokens=6)
            else:
                for a, b in zip(one.predict(given), other.predict(given), strict=True):
                    assert a["label"] == b["label"]
                    assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)


def test_what_holds_no_model_is_refused_with_what_is_there(texts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("nothing")
    for path, what in (
        (tmp_path / "empty", "neither an adapter .* it has: nothing"),
        (tmp_path / "other", "it has: notes.txt"),
        (tmp_path / "othr", "no directory .*Did you mean '.*other'"),
        (tmp_path / "other/notes.txt", "is a file: name the directory"),
        ("nobody/nothing", "the hub gave nothing of that name"),
    ):
        with pytest.raises(FileNotFoundError, match=what):
            undula.load(path)
    page = shutil.copytree(texts, tmp_path / "page")
    (page / "adapter_model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        undula.load(page)
    with pytest.raises(FileNotFoundError, match="is no folder here"):
        undula.load(texts, model=str(tmp_path / "no-base"))
    whole = tmp_path / "whole"
    undula.load(texts).model.base_model.save_pretrained(whole)
    with pytest.raises(ValueError, match="no task"):
        undula.load(tiny.bert(tmp_path / "bare"))
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ValueError, match="needs no base"):
        undula.load(whole, model="x")
    with pytest.raises(ValueError, match="lack classifier"):
        undula.load(whole)


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (Classification(names=("no", "yes")), "single_label_classification"),
        (MultiLabel(names=("no", "yes")), "multi_label_classification"),
        (Regression(), "regression"),
        (ImageClassification(names=("no", "yes")), "single_label_classification"),
        (CausalLM(), None),
        (Seq2Seq(), None),
        (TokenClassification(names=("O", "B-X")), None),
    ],
    ids=lambda value: type(value).__name__ if value is not None else "",
)
def test_a_whole_model_of_anybodys_is_known_by_its_configuration(tmp_path, task, problem):
    """What transformers saved, without a word of undula's."""
    make = {ImageClassification: tiny.vit, CausalLM: tiny.llama, Seq2Seq: tiny.t5}.get(type(task), tiny.bert)
    model, processor = open_model(make(tmp_path / "base"), task, torch.float32, 0)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    assert getattr(model.config, "problem_type", None) == problem
    assert undula.load(tmp_path / "whole").run.task == task


@pytest.mark.parametrize(
    ("named", "given", "column"),
    [
        (Classification(text="review"), ["fine", "bad"], "review"),
        (Classification(text="review", pair="other"), [("fine", "bad")], "review"),
        (CausalLM(prompt="ask"), ["fine"], "ask"),
    ],
)
def test_texts_alone_are_asked_of_what_was_trained_on_columns_of_other_names(named, given, column):
    """The training named its columns; a text, a line and a pair have none."""
    trained = ("text", "pair") if isinstance(given[0], tuple) else ("text",)
    asked = question(named, given, trained if isinstance(named, Classification) else ())
    assert column in asked.rows.column_names
    assert len(asked.asked) == len(given)


def test_a_pair_is_refused_where_the_training_had_none():
    """Its second text was left unread, and the answer was that to the first."""
    with pytest.raises(TypeError, match="trained on single ones"):
        question(Classification(), [("fine", "bad")], ("text",))
    assert len(question(Classification(), [("fine", "bad")], ("text", "pair")).asked) == 1


def test_tags_of_texts_and_of_tokens_are_answered_though_the_training_had_tokens(tmp_path):
    """What was trained on lists of tokens is asked texts, lists of tokens, or a file of either."""
    rows = [{"tokens": r["text"].split(), "tags": ["O", "B-X", "O", "O"]} for r in tiny.reviews(24)]
    run = trained(tmp_path, "run", tiny.bert(tmp_path / "base"), rows, TokenClassification())
    opened = undula.load(run)
    found = opened.predict("the film was good")
    assert set(found) == {"entities"}
    assert opened.predict(["the film was good", "nice"], batch=1)[0] == found
    assert opened.predict([["the", "film", "was", "good"]]) == [found]
    assert opened.predict([{"tokens": ["the", "film", "was", "good"]}, {"tokens": ["nice"]}], batch=1)[0] == found


def test_sources_are_answered_by_texts(tmp_path):
    rows = [{"source": r["text"], "target": r["label"]} for r in tiny.reviews(24)]
    task = Seq2Seq(generate=0, max_target=4)
    run = trained(tmp_path, "run", tiny.t5(tmp_path / "base"), rows, task)
    assert [set(f) for f in undula.load(run).predict(TEXTS)] == [{"text"}] * 3
    assert undula.load(run).predict([{"text": TEXTS[0]}], batch=1) == [undula.load(run).predict(TEXTS[0])]
