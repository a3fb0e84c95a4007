"""Rows with faults: all of them are told in one message, and they may be left out, never without a word."""

import json
import sys

import datasets
import pytest

import undula
from tests.support import tiny
from undula.study.drive import warnings
from undula.study.read import parse
from undula.train import (
    CausalLM,
    Classification,
    ImageClassification,
    Regression,
    Run,
    evaluate,
)
from undula.train.data.faults import Faults
from undula.train.data.load import load_data, read_file
from undula.train.rows import rows_of

TEXT = [f'{{"text": "row {i}", "label": "{"ab"[i % 2]}"}}' for i in range(20)]
PAIR = [f'{{"prompt": "row {i}", "completion": "so {i}"}}' for i in range(20)]
TALK = [f'{{"messages": [{{"role": "user", "content": "row {i}"}}, {{"role": "assistant", "content": "so"}}]}}'
        for i in range(20)]  # fmt: skip
CELLS = [f"row {i},{i % 2}" for i in range(20)]

# file: (task, first lines, good rows, two rows with faults, what is told of them, which stand in lines 4 and 9)
CASES = {
    "label.csv": (Classification(), ["text,label"], CELLS, ["a,", "b,  "], "'label' is empty.*: line 4, line 9"),
    "blank.csv": (Classification(), ["text,label"], CELLS, [" ,1", ",0"], "'text' is empty.*: line 4, line 9"),
    "width.csv": (Classification(), ["text,label"], CELLS, ["a", "b,1,2"],
                  "as the header has .*: line 4 has 1, line 9 has 3"),
    "quote.csv": (Classification(), ["text,label"], CELLS, ['"a" b,1', '"c"d,0'], "quoted field .*: line 4, line 9"),
    "width.tsv": (Classification(), ["text\tlabel"], [c.replace(",", "\t") for c in CELLS], ["a", "b\t1\t2"],
                  "as the header has .*: line 4 has 1, line 9 has 3"),
    "number.csv": (Regression(), ["text,label"], CELLS, ["a,much", "b,"],
                   "no number.*line 4 has 'much'.*empty.*line 9"),
    "class.csv": (Classification(names=("0", "1")), ["text,label"], CELLS, ["a,2", "b,x"],
                  "not known.*: line 4 has '2', line 9 has 'x'"),
    "broken.jsonl": (Classification(), [], TEXT, ['{"text": "a"', "so it goes"], "not JSON.*: line 4 .*line 9 "),
    "no object.jsonl": (Classification(), [], TEXT, ["[1]", "null"],
                        "is an object: line 4 has a list, line 9 has null"),
    "kinds.jsonl": (Classification(), [], TEXT, ['{"text": 5, "label": "a"}', '{"text": ["b"], "label": "a"}'],
                    "several kinds; line 1 has a text as most have, but: line 4 has a number, line 9 has a list"),
    "lacking.jsonl": (Classification(), [], TEXT, ['{"text": "a"}', '{"text": "b", "label": null}'],
                      "'label' is empty: line 4, line 9"),
    "pair.jsonl": (Classification(), [], [t[:-1] + ', "sentence2": "so"}' for t in TEXT], TEXT[:2],
                   "'sentence2' is empty.*: line 4, line 9"),
    "half.jsonl": (Classification(), [], TEXT, ['{"text": "\\ud83d", "label": "a"}', '{"text": ["\\ud83d"]}'],
                   "half of a surrogate pair.*: line 4, line 9"),
    "twice.jsonl": (Classification(), [], TEXT, ['{"text": "a", "text": "b"}'] * 2, "'text' stands twice"),
    "array.json": (Classification(), ["["], TEXT, ['{"text": "a", "text": "b"}', '{"text": "\\ud83d"}'],
                   "line 4 .*'text' stands twice.*half of a surrogate pair.*: line 9"),
    "items.json": (Classification(), ["["], TEXT, ["5", '{"text": " ", "label": "a"}'],
                   "is an object: line 4 has a number.*'text' is empty: line 9"),
    "completion.jsonl": (CausalLM(), [], PAIR, ['{"prompt": "a"}', '{"prompt": "b", "completion": " "}'],
                         "'completion' is empty: line 4, line 9"),
    "talk.jsonl": (CausalLM(), [], TALK, ['{"messages": []}', '{"messages": [{"role": "user", "content": "a"}]}'],
                   "no conversation: line 4 .*line 9 .*nothing to learn"),
}  # fmt: skip


def written(path, name, first, rows):
    """The rows in the form of that file."""
    lines = [*first, *([row + "," for row in rows[:-1]] + [rows[-1], "]"] if name.endswith(".json") else rows)]
    path.mkdir()
    (path / name).write_text("\n".join(lines) + "\n")
    return str(path / name)


def read(source, task, skip=None, parts=("train",)):
    faults = Faults(skip)
    return (*task.read(load_data(source, faults), *parts, faults=faults), list(faults.told()))


@pytest.mark.parametrize("name", CASES)
def test_rows_with_faults_are_refused_or_left_out_and_told(name, tmp_path):
    """Whatever is wrong with a row in whatever form of file: what stays is what a file without these rows gives."""
    task, first, good, bad, told = CASES[name]
    rows = good.copy()
    for line, row in zip((4, 9), bad, strict=True):
        rows.insert(line - 1 - len(first), row)
    source = written(tmp_path / "bad", name, first, rows)
    with pytest.raises(ValueError, match=rf"(?s){told}.*2 of 22 in .*can be left out: --skip-faulty SHARE"):
        read(source, task)
    with pytest.raises(ValueError, match=rf"(?s){told}.*2 of 22 rows of .*more than skip_faulty=0.05 lets go"):
        read(source, task, 0.05)
    fitted, parts, (said,) = read(source, task, 0.1)
    want, clean, nothing = read(written(tmp_path / "good", name, first, good), task)
    assert (fitted, parts["train"].to_list(), nothing) == (want, clean["train"].to_list(), [])
    assert said.startswith(f"{source}: 2 of 22 rows are left out for their faults: ")
    assert "line 4" in said
    assert "line 9" in said


WHOLE = {
    "column.csv": ("words,label\n" + "a,1\nb,0\n" * 20 + "c,\n", "no column for text"),
    "encoding.csv": ("text,label\n" + "a,1\nb,0\n" * 20 + "caf\u00e9,1\n", "is not UTF-8: line 42"),
    "swallowed.csv": ("text,label\n" + "a,1\nb,0\n" * 20 + '"c,1\nd,0\n', "may hold other rows: line 42 to line 43"),
    "swallowing.csv": ("text,label\n" + "a,1\nb,0\n" * 20 + '"c,1\nd",0,0\n', "other rows: line 42 to line 43 has 3"),
    "cut.json": ("[" + ", ".join(TEXT) + ',\n{"text": ', "not JSON: the item that begins in line 2"),
    "alike.csv": ("text,label\n" + "a,x\nb,y\n" * 20 + "c,X\n", "differ by case"),
    "header.csv": ("text,label,text\n" + "a,1,\nb,0,\n" * 20 + "c,1\n", "column 'text' stands 2 times"),
    "one class.csv": (
        "text,label\n" + "a,1\n" * 20 + ",0\n",
        "two classes or more.*without the rows that are left out",
    ),
    "none left.csv": ("text,label\n" + "a,\n" * 20, "20 of 20 rows of .* have faults"),
    "none read.jsonl": ("{\n" * 5, "5 of 5 rows of .* have faults"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_wrong_with_a_file_as_a_whole_stays_refused(name, tmp_path):
    """Leaving rows out does not mend it, or would leave out more than anyone can see."""
    content, told = WHOLE[name]
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, LookupError), match=rf"(?s){told}"):
        read(str(tmp_path / name), Classification(), 0.9)


def test_of_a_line_with_many_rows_the_faulty_ones_go(tmp_path):
    """An array may stand in one line: the line does not tell its rows apart."""
    (tmp_path / "a.json").write_text("[" + ", ".join([*TEXT[:7], '{"text": ""}', "5", *TEXT[7:]]) + "]")
    _, parts, (said,) = read(str(tmp_path / "a.json"), Classification(), 0.1)
    assert parts["train"]["text"][:] == [f"row {i}" for i in range(20)]
    assert "2 of 22 rows" in said


def test_all_faults_of_all_files_are_told_in_one_message(tmp_path):
    """Of reading, of columns, of labels, of both splits: one run tells all that there is to mend."""
    written(tmp_path / "d", "train.jsonl", [], [*TEXT, "{", '{"text": 5}', '{"text": " ", "label": "a"}', "[1]"])
    (tmp_path / "d" / "validation.csv").write_bytes(b"text,label\nna\xefve,a\nb\nc,never\n,a\n")
    with pytest.raises(ValueError, match=r"faults of 8 kinds") as error:
        read(str(tmp_path / "d"), Classification(), None, ("train", "validation"))
    message = str(error.value)
    for told in ("train.jsonl: not JSON: line 21", "train.jsonl: every line or item is an object: line 24",
                 "line 22 has a number", "train.jsonl, column 'text' is empty: line 23",
                 "validation.csv is not UTF-8: line 2",
                 "validation.csv: not as many fields as the header has (2: text, label): line 3 has 1",
                 "validation.csv, column 'text' is empty: line 5",
                 "validation.csv, column 'label' holds classes that are not known: line 4 has 'never'"):  # fmt: skip
        assert told in message


def test_a_missing_column_is_told_with_its_file(tmp_path):
    """A folder has several, and the columns of one say nothing of another."""
    written(tmp_path / "d", "train.jsonl", [], [*TEXT, "{"])
    (tmp_path / "d" / "validation.csv").write_text("words,label\na,a\n")
    with pytest.raises(
        LookupError, match=r"(?s)train.jsonl: not JSON: line 21.*validation.csv: the data have no column"
    ):
        read(str(tmp_path / "d"), Classification(), 0.1, ("train", "validation"))


def test_a_share_is_of_each_file(tmp_path):
    """Few rows of train and validation together may be many of validation."""
    written(tmp_path / "d", "train.jsonl", [], TEXT * 10)
    (tmp_path / "d" / "validation.jsonl").write_text("\n".join([*TEXT[:4], "{"]))
    with pytest.raises(ValueError, match=r"1 of 5 rows of .*validation.jsonl have faults: more than skip_faulty=0.1"):
        read(str(tmp_path / "d"), Classification(), 0.1, ("train", "validation"))
    assert len(read(str(tmp_path / "d"), Classification(), 0.2, ("train", "validation"))[1]["validation"]) == 4
    many = Faults(0.29)
    many.of("a", 100)
    for row in range(29):
        many.add("is empty", row=("a", row))
    many.check()


def test_rows_that_no_file_of_ours_holds(tmp_path):
    """Parquet, rows in memory, folders of images: they are numbered, each split for itself."""
    rows = [{"text": f"row {i}", "label": None if i == 7 else "ab"[i % 2]} for i in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    _, parts, (said,) = read(str(tmp_path / "a.parquet"), Classification(), 0.1)
    assert len(parts["train"]) == 19
    assert said.endswith("a.parquet: 1 of 20 rows are left out for their faults: column 'label' is empty: row 8")
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), validation=datasets.Dataset.from_list(rows[:7]))
    faults = Faults(0.1)
    _, parts = Classification().read(data, "train", "validation", faults=faults)
    assert {name: len(part) for name, part in parts.items()} == {"train": 19, "validation": 7}
    assert list(faults.told()) == [
        "split 'train': 1 of 20 rows are left out for their faults: column 'label' is empty: row 8"
    ]


@pytest.mark.parametrize("cut", [0, 20, -40])
def test_damaged_images_go_wherever_they_are_damaged(cut, tmp_path):
    """Also one whose pixels end early, which without the option is found when it is read."""
    tiny.classes(tmp_path / "d", {"train": tiny.pictures(30)})
    damaged = sorted((tmp_path / "d").rglob("*.png"))[7]
    damaged.write_bytes(damaged.read_bytes()[:cut])
    _, parts, (said,) = read(str(tmp_path / "d"), ImageClassification(), 0.1)
    assert len(parts["train"]) == 29
    assert damaged.name in said


def test_many_kinds_of_values_in_large_files(tmp_path):
    """Where a value of another kind comes in a piece of a file with thousands of others, it was a crash."""
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(10_050)]
    rows[3]["text"] = 4
    tiny.jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"column 'text': values of several kinds.*line 4 has a number"):
        read_file(tmp_path / "a.jsonl")
    faults = Faults(0.1)
    assert len(read_file(tmp_path / "a.jsonl", faults)) == 10_049
    assert faults.left_out() == {str(tmp_path / "a.jsonl"): 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def holed(bert, tmp_path):
    """A run over data with a row that has no label, in line 5."""
    rows = tiny.reviews(30)
    rows.insert(4, {"text": "the film"})
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    method = undula.LoRA(r=1)
    return Run(bert, str(data), Classification(), method, tmp_path / "o", max_steps=1, batch=4, skip_faulty=0.1)


def test_a_run_says_what_it_left_out_and_does_so_again(holed, caplog):
    """In its notes and its report; its evaluation reads the same rows."""
    report = undula.train(holed)
    assert report["data"]["left_out"] == {holed.data: 1}
    told = f"{holed.data}: 1 of 31 rows are left out for their faults: column 'label' is empty: line 5"
    assert told in report["data"]["notes"]
    assert Run.load(holed.out).skip_faulty == 0.1
    assert evaluate(holed.out) == report["after"]
    with pytest.raises(ValueError, match=r"'label' is empty: line 5"):
        evaluate(holed.out, skip_faulty=0)
    other = tiny.jsonl(holed.out.parent / "e.jsonl", [*tiny.reviews(20), {"text": "the", "label": "never"}])
    with pytest.raises(ValueError, match="not known: line 21 has 'never'"):  # leave was given for the training's data
        evaluate(holed.out, data=str(other))
    with caplog.at_level("WARNING"):
        assert evaluate(holed.out, data=str(other), skip_faulty=0.1)
    assert "1 of 21 rows are left out" in caplog.text
    assert json.loads((holed.out / "run.json").read_text())["run"]["skip_faulty"] == 0.1


def test_a_run_without_the_option_is_written_as_ever(holed):
    """Runs and records of studies keep their names."""
    for none in (None, 0, 0.0):
        assert "skip_faulty" not in Run(**{**vars(holed), "skip_faulty": none}).encode()
    for wrong in (1, -0.1, True, "some"):
        with pytest.raises(ValueError, match=r"Run.skip_faulty"):
            Run(**{**vars(holed), "skip_faulty": wrong})


STUDY = """
[[models]]
source = {model}
[[data]]
source = {data}
task = "classification"
{option}
[[methods]]
method = "lora"
"""


def test_a_study_leaves_rows_out_where_its_file_says_so(holed):
    """And names them among what is doubtful."""
    given = {"model": json.dumps(holed.model), "data": json.dumps(holed.data)}
    with pytest.raises(
        ValueError, match=r"(?s)line 5: .*'label' is empty: line 5.*skip_faulty = SHARE under \[\[data\]\]"
    ):
        parse(STUDY.format(**given, option=""))
    study = parse(STUDY.format(**given, option="skip_faulty = 0.1"))
    assert study.data[0].skip_faulty == 0.1
    assert any(f"{holed.data}: 1 of 31 rows are left out" in text for text in warnings(study))
    with pytest.raises(ValueError, match=r"skip_faulty is .*below 1"):
        parse(STUDY.format(**given, option="skip_faulty = 2"))


def test_the_command_line_tells_faults_before_it_imports_the_trainer(holed, tmp_path, monkeypatch):
    """Faults of data came after ten seconds of imports; now nothing that only a training needs is there yet."""
    from typer.testing import CliRunner

    from undula.cli.main import app

    words = [
        "train",
        "--model",
        "nowhere",
        "--data",
        holed.data,
        "--task",
        "classification",
        "--out",
        str(tmp_path / "p"),
    ]
    for module in ("undula.train.bar", "undula.train.trainer"):
        monkeypatch.setitem(sys.modules, module, None)
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert "'label' is empty: line 5" in " ".join(found.output.split())
    assert "--skip-faulty" in found.output
    monkeypatch.undo()
    words[2] = holed.model
    found = CliRunner().invoke(app, [*words, "--skip-faulty", "0.1", "--max-steps", "1", "--batch", "4"])
    assert found.exit_code == 0, found.output
    assert "1 of 31 rows are left out" in " ".join(found.output.split())
    found = CliRunner().invoke(app, ["eval", str(tmp_path / "p"), "--skip-faulty", "0"])
    assert found.exit_code == 2


def test_rows_that_are_left_out_are_in_no_part(holed):
    """Neither learned from nor measured on."""
    read = rows_of(holed)
    assert len(read.train) + len(read.held) == 30
    assert "the film" not in read.train["text"][:] + read.held["text"][:]
