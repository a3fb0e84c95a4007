"""`undula predict`, `generate` and `chat`: what a person does with what a training left."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

import undula
from tests.support import tiny
from tests.support import trained as small
from undula.cli.main import app

TEXTS = ["the film was good", "the food was awful", "nice, and very good", "bad"]


def call(*words, code=0, typed=None):
    """(what `undula words...` writes, what it says beside)."""
    done = CliRunner().invoke(app, [str(w) for w in words], input=typed, catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return done.stdout, " ".join(done.stderr.split())


def table(text, delimiter=","):
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return small.texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return small.words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return small.images(tmp_path_factory.mktemp("images"))


@pytest.mark.every(2)
@pytest.mark.parametrize("given", ["csv", "tsv", "jsonl", "parquet", "txt", "texts", "input"])
@pytest.mark.parametrize("out", [None, "csv", "jsonl"])
def test_rows_come_back_with_their_answers_in_their_order(texts, tmp_path, given, out):
    """Every column that was there stays; the label is not needed."""
    rows = [{"id": str(i), "review": text} for i, text in enumerate(TEXTS)]
    file, told = tmp_path / f"new.{given}", ("--column", "text=review")
    words, typed = (file, *told), None
    if given in ("csv", "tsv"):
        tiny.table(file, rows, "," if given == "csv" else "\t")
    elif given == "jsonl":
        tiny.jsonl(file, rows)
    elif given == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
    elif given == "txt":
        file.write_text("\n\n".join(TEXTS) + "\n")
    else:
        words, typed = (TEXTS, None) if given == "texts" else ((), "\n".join(TEXTS))
    plain = given in ("txt", "texts", "input")
    words = words if not plain or given != "txt" else (file,)
    to = () if out is None else ("--out", tmp_path / f"answers.{out}")
    said, _ = call("predict", texts, *words, *to, "--probabilities", "--batch", 3, typed=typed)
    text = said if out is None else (tmp_path / f"answers.{out}").read_text()
    found = [json.loads(line) for line in text.splitlines()] if out == "jsonl" else table(text)
    want = undula.load(texts).predict(TEXTS)
    assert [row["text" if plain else "review"] for row in found] == TEXTS
    assert plain or [row["id"] for row in found] == list("0123")
    for row, answer in zip(found, want, strict=True):
        assert row["label"] == answer["label"]
        assert float(row["probability"]) == pytest.approx(answer["probability"], abs=1e-5)
        for name, p in answer["probabilities"].items():
            told = row["probabilities"][name] if out == "jsonl" else row[f"probability of {name}"]
            assert float(told) == pytest.approx(p, abs=1e-5)


def test_a_column_of_the_rows_is_not_written_over(texts, tmp_path):
    """Of rows that have a label the answer's is called otherwise, and that is said."""
    data = tiny.table(tmp_path / "new.csv", [{"text": t, "label": "x", "predicted_label": "y"} for t in TEXTS])
    said, beside = call("predict", texts, data)
    assert list(table(said)[0]) == ["text", "label", "predicted_label", "predicted_predicted_label", "probability"]
    assert "the answers' is called 'predicted_predicted_label'" in beside
    assert {row["label"] for row in table(said)} == {"x"}


def test_faulty_rows_are_named_and_left_out_where_that_is_asked(texts, tmp_path):
    data = tiny.table(tmp_path / "new.csv", [{"text": t, "n": i} for i, t in enumerate(["good", " ", "bad", "nice"])])
    out = tmp_path / "answers.csv"
    said = call("predict", texts, data, "--out", out, code=2)[1]
    assert "column 'text' is empty: line 3" in said
    assert "--skip-faulty" in said
    assert not out.exists()
    said, beside = call("predict", texts, data, "--out", out, "--skip-faulty", 0.3)
    assert "1 of 4 rows are left out" in beside
    assert "3 rows answered" in said
    assert [row["n"] for row in table(out.read_text())] == ["0", "2", "3"]


def test_what_was_there_stays_where_answering_fails(texts, tmp_path, monkeypatch):
    """The file has all answers, or is as it was."""
    out = tmp_path / "answers.csv"
    out.write_text("before")
    from undula.train.tasks.classification import Classification

    given = Classification.said

    def fails(self, logits):
        yield next(iter(given(self, logits)))
        raise OSError("no more")

    monkeypatch.setattr(Classification, "said", fails)
    done = CliRunner().invoke(app, ["predict", str(texts), *TEXTS, "--out", str(out)])
    assert done.exit_code != 0
    assert out.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["answers.csv"]


def test_images_are_answered_by_file_and_folder(images):
    folder = images.parent / "data"
    said, _ = call("predict", images, folder)
    rows = table(said)
    assert len(rows) == 24
    assert list(rows[0]) == ["file", "label", "probability"]
    assert (folder / rows[0]["file"]).is_file()
    one, _ = call("predict", images, folder / rows[5]["file"])
    assert table(one)[0]["label"] == rows[5]["label"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (("good", "--out", "answers.xlsx"), "answers are written as .csv, .tsv, .jsonl"),
        (("good", "--out", "answers.csv", "--as", "jsonl"), "--as says jsonl"),
        (("absent.csv",), "absent.csv does not exist"),
        (("good", "--column", "texts=review"), "Classification has no column texts"),
        (("good", "--skip-faulty", "3"), "a share from 0"),
        ((), "no rows to answer"),
    ],
)
def test_a_mistake_ends_in_one_line(texts, given, what):
    said = call("predict", texts, *given, code=2)[1]
    assert what in said
    assert "Traceback" not in said


def test_rows_are_not_written_over_by_their_answers(texts, tmp_path):
    data = tiny.table(tmp_path / "new.csv", [{"text": "good"}])
    assert "is the file that the rows are in" in call("predict", texts, data, "--out", data, code=2)[1]


def test_a_prompt_is_gone_on_with_as_python_does(words, tmp_path):
    """From an argument, a text file or the input; the same text each time, and a seed makes a draw again."""
    want = undula.load(words).generate(TEXTS[0], max_new_tokens=6)
    assert want.strip()
    (tmp_path / "prompt.txt").write_text(TEXTS[0] + "\n")
    for given, typed in ((TEXTS[0], None), (tmp_path / "prompt.txt", None), ("-", TEXTS[0] + "\n")):
        said, _ = call("generate", words, given, "--max-new-tokens", 6, typed=typed)
        assert said.strip() == want.strip()
    drawn = [call("generate", words, TEXTS[0], "--temperature", 2, "--seed", s)[0] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    _, beside = call("generate", words, TEXTS[0], "--max-new-tokens", 1)
    assert "does not end by itself: cut at 1 tokens" in beside


def test_prompts_of_a_file_come_back_as_json_lines(words, tmp_path):
    data = tiny.jsonl(tmp_path / "prompts.jsonl", [{"id": i, "prompt": t} for i, t in enumerate(TEXTS)])
    out = tmp_path / "out.jsonl"
    call("generate", words, data, "--out", out, "--max-new-tokens", 5, "--batch", 3)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    want = undula.load(words).generate(TEXTS, max_new_tokens=5)
    assert [(r["id"], r["prompt"], r["text"]) for r in rows] == [
        (i, t, w.strip()) for i, (t, w) in enumerate(zip(TEXTS, want, strict=True))
    ]
    told = [{"messages": [{"role": "user", "content": t}]} for t in TEXTS]
    said, _ = call(
        "generate", words, tiny.jsonl(tmp_path / "chats.jsonl", told), "--system", "very", "--max-new-tokens", 5
    )
    first = [{"role": "system", "content": "very"}, {"role": "user", "content": TEXTS[0]}]
    assert json.loads(said.splitlines()[0])["text"] == undula.load(words).generate(first, max_new_tokens=5).strip()


def test_a_talk_goes_on_from_what_was_said(words):
    """The second answer follows the whole talk; after /reset it does not; /system goes before."""
    opened, how = undula.load(words), {"max_new_tokens": 5}

    def answer(*turns):
        return opened.generate(list(turns), **how)

    def user(text):
        return {"role": "user", "content": f"very {text}"}

    first = answer(user("good"))
    assert first.strip()
    second = answer(user("good"), {"role": "assistant", "content": first.lstrip()}, user("bad"))
    anew = answer({"role": "system", "content": "a day"}, user("bad"))
    typed = "good\nbad\n/reset\n/system a day\nbad\n/nothing\n/quit\nnever\n"
    said, beside = call("chat", words, "--max-new-tokens", 5, typed=typed)
    assert [line.strip() for line in said.splitlines()] == [t.strip() for t in (first, second, anew)]
    assert "no command is called /nothing" in beside


def test_ctrl_c_stops_an_answer_and_not_the_talk(words, monkeypatch):
    """What was said until then is kept."""
    from undula.train.tasks import generation

    calls = []

    def stopped(model, ids, tokenizer, sampling, hear, number=0):
        calls.append(list(ids))
        hear("good")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(generation, "speak", stopped)
    said, beside = call("chat", words, typed="a\nthe\n/quit\n")
    assert said.split() == ["good", "good"]
    assert "(stopped)" in beside
    assert len(calls) == 2
    assert calls[1][: len(calls[0])] == calls[0]


def test_what_a_model_does_not_do_is_said(texts, words, tmp_path):
    assert "generate is for language models" in call("generate", texts, "good", code=2)[1]
    assert "generate is for language models" in call("chat", texts, code=2)[1]
    rows = [{"text": r["text"]} for r in tiny.reviews(8)]
    from undula.train import CausalLM

    run = small.trained(tmp_path, "run", tiny.llama(tmp_path / "base"), rows, CausalLM())
    assert "it knows no turns" in call("chat", run, code=2)[1]
    assert "needs a chat template" in call("generate", run, "good", "--system", "very", code=2)[1]
    assert "neither an adapter" in call("predict", tmp_path, "good", code=2)[1]


def test_what_is_wrong_with_rows_is_said_before_a_model_is_opened(texts, tmp_path, monkeypatch):
    """Opening takes its time, and a wrong column is seen without."""

    def opened(*_):
        raise AssertionError("opened")

    monkeypatch.setattr("undula.cli.several.Several.opened", opened)
    data = tiny.table(tmp_path / "new.csv", [{"review": "good"}])
    assert "no column for text" in call("predict", texts, data, code=2)[1]
    with pytest.raises(AssertionError, match="opened"):
        call("predict", texts, data, "--column", "text=review")


def test_of_a_folder_of_splits_one_is_named(texts, tmp_path):
    for split, text in (("train", "good"), ("test", "bad")):
        tiny.table(tmp_path / f"{split}.csv", [{"text": text}])
    assert "say which (--split" in call("predict", texts, tmp_path, code=2)[1]
    assert [row["text"] for row in table(call("predict", texts, tmp_path, "--split", "test")[0])] == ["bad"]
