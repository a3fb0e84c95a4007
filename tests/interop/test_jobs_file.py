"""A file of many jobs: what is shared, what is one job's, grids, and all faults at once with their lines."""

import pytest

import undula
from tests.support import tiny
from undula.io.toml import Faults
from undula.jobs.file import read
from undula.jobs.job import Job
from undula.jobs.many import summary
from undula.train import Classification, Recipe, Run

TOP = """
model = "{base}"
data = "{data}"
task = "classification"
method = {{ is = "lora", r = 4 }}
max_steps = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("jobs")
    rows = tiny.reviews(24)
    return {
        "base": tiny.bert(tmp / "base"), "data": tiny.jsonl(tmp / "data.jsonl", rows),
        "one": tiny.jsonl(tmp / "one.jsonl", rows[:1]), "alike": tiny.jsonl(tmp / "alike.jsonl", rows[:1] * 3),
    }  # fmt: skip


def written(tmp_path, text, place, top=TOP):
    path = tmp_path / "jobs.toml"
    path.write_text((top + text).format(**place), encoding="utf-8")
    return path


def faults(path, out, **more):
    with pytest.raises(Faults) as told:
        read(path, out, **more)
    return told.value.found


def test_a_job_has_what_all_share_and_its_own(tmp_path, place):
    """Options of the shared method too, where a job names no other."""
    text = """
    lr = 1e-2
    [[jobs]]
    name = "small"
    [jobs.method]
    r = 2
    [[jobs]]
    name = "dora"
    method = {{ is = "dora", inner = "lora" }}
    lr = 1e-3
    batch = 4
    """
    runs = read(written(tmp_path, text, place), tmp_path / "out")
    common = {"model": place["base"], "data": place["data"], "task": Classification(), "max_steps": 2}
    assert runs == {
        "small": Run(**common, method=undula.LoRA(r=2), lr=1e-2, out=tmp_path / "out" / "small"),
        "dora": Run(**common, method=undula.DoRA(undula.LoRA()), lr=1e-3, batch=4, out=tmp_path / "out" / "dora"),
    }


def test_lists_make_a_job_for_each_combination(tmp_path, place):
    """Of numbers and of choices; a list where a field is one, such as `where`, is a value."""
    text = """
    seed = [0, 1]
    [[jobs]]
    name = "a"
    lr = [1e-3, 0.01]
    where = ["query", "value"]
    [[jobs]]
    name = "b"
    seed = 5
    method = ["lora", "loran"]
    """
    runs = read(written(tmp_path, text, place), tmp_path / "out")
    grid = {(f"a-seed{s}-lr{lr:g}", s, lr) for s in (0, 1) for lr in (1e-3, 1e-2)}
    assert {(n, r.seed, r.lr) for n, r in runs.items() if n[0] == "a"} == grid
    assert all(run.where == ("query", "value") for name, run in runs.items() if name[0] == "a")
    assert [type(runs[f"b-{name}"].method) for name in ("lora", "loran")] == [undula.LoRA, undula.LoRAN]
    assert [run.seed for name, run in runs.items() if name[0] == "b"] == [5, 5]


WRONG = """
[[jobs]]
name = "one"
lrr = 1e-3
[[jobs]]
name = "in/side"
lr = -1.0
[[jobs]]
name = "ONE"
seed = [1, 1]
[[jobs]]
seed = "many"
[[jobs]]
name = "other"
data = "nowhere.jsonl"
method = "lorra"
out = "elsewhere"
"""
LINES = [
    (10, "'lrr'"), (12, "letters"), (13, "lr"), (16, "different ones"), (17, "has a name"), (18, "seed"), (22, "lorra"),
    (23, "OUT/NAME"),
]  # fmt: skip


def test_all_faults_are_told_at_once_with_their_lines(tmp_path, place):
    found = faults(written(tmp_path, WRONG, place), tmp_path / "out")
    assert [line for line, _ in found] == [line for line, _ in LINES]
    assert all(word in text for (_, text), (_, word) in zip(found, LINES, strict=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [("a/b", "letters"), ("..", "letters"), ("a b", "letters"), ("", "letters"), ("A", "case"), ("a", "two jobs"),
     ("jobs.json", "of that name"), ("Jobs.JSON", "of that name"), ("workers", "of that name"), ("x" * 200, "letters"),
     ("漢" * 90, "letters")],
)  # fmt: skip
def test_a_name_that_is_no_directory_of_its_own_is_refused(tmp_path, place, name, why):
    text = f'[[jobs]]\nname = "a"\n[[jobs]]\nname = "{name}"\n'
    ((line, told),) = faults(written(tmp_path, text, place), tmp_path / "out")
    assert line == 10
    assert why in told


@pytest.mark.parametrize("own", ['model = "bundled:minilm"', 'dtype = "bfloat16"', "bits = 8"])
def test_jobs_of_two_models_are_refused(tmp_path, place, own):
    text = f'[[jobs]]\nname = "a"\n[[jobs]]\nname = "b"\n{own}\n'
    ((line, told),) = faults(written(tmp_path, text, place), tmp_path / "out")
    assert line == 11
    assert "share it" in told


def test_what_is_wrong_with_data_and_with_layers_is_told_of_all_jobs(tmp_path, place):
    """Before the model is read: a job that could not begin would be missed after hours."""
    text = """
    [[jobs]]
    name = "a"
    where = "nowhere"
    [[jobs]]
    name = "b"
    data = "{one}"
    exclude = "nobody"
    seed = [0, 1]
    """
    found = faults(written(tmp_path, text, place), tmp_path / "out")
    assert [line for line, _ in found] == [10, 13, 14]
    recipe = {"model": place["base"], "data": place["data"], "task": Classification(), "method": undula.LoRA(r=2)}
    with pytest.raises(ValueError, match=r"(?s)a: .*nowhere.*b: .*nobody"):
        undula.train_many(
            {"a": Recipe(**recipe, where="nowhere"), "b": Recipe(**recipe, exclude="nobody")}, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('[[jobs]]\nname = "a"\ndata = "nowhere.jsonl"', 9, "does not exist"),
        ('[[jobs]]\nname = "a"\ntask = "preference"', 9, "cannot be trained among"),
        ('[[jobs]]\nname = "a"\ntask = {{ is = "classification", text = "words" }}', 9, "words"),
        ('[[jobs]]\nname = "a"\ndata = "{one}"\ntask = "causal-lm"', 9, "1 row(s) cannot be split"),
        ('[[jobs]]\nname = "a"\ndata = "{alike}"', 9, "two classes"),
        ('[[jobs]]\nname = "a"\nwhere = ["query", "nowhere"]', 9, "nowhere"),
        ('[[jobs]]\nname = "a"\nexclude = "nowhere"', 9, "nowhere"),
        ('[[jobs]]\nname = "a"\nfull = "nowhere"', 9, "nowhere"),
        ('[[jobs]]\nname = "a"\nwhere = "query"\noverrides = {{ nowhere = "loran" }}', 10, "nowhere"),
        ('[[jobs]]\nname = "a"\nbegin_from = "nowhere"', 9, "no adapter directory"),
        ("", None, "no job"),
        ("jobs = 3", 7, "tables"),
    ],
)
def test_what_could_not_begin_is_told_before_anything_does(tmp_path, place, text, line, why):
    found = faults(written(tmp_path, text, place), tmp_path / "out")
    assert found[0][0] == line
    assert why in found[0][1]


def test_a_directory_that_holds_a_run_is_refused_and_resume_takes_the_same_one(tmp_path, place):
    path, out = written(tmp_path, '[[jobs]]\nname = "a"\n[[jobs]]\nname = "b"\n', place), tmp_path / "out"
    runs = read(path, out)
    runs["a"].save({"accuracy": 0.5})
    summary(out, {name: Job(name, run) for name, run in runs.items()}, 0.0, {})
    ((line, told),) = faults(path, out)
    assert line == 7
    assert "holds a run already: go on with the jobs there (--resume), or name another --out" in told
    assert read(path, out, resume=True) == runs
    summary(out, {"b": Job("b", runs["b"])}, 0.0, {})  # what another file's jobs leave of these
    changed = written(tmp_path, '[[jobs]]\nname = "a"\nlr = 0.5\n', place)
    ((_, told),) = faults(changed, out, resume=True)
    assert "lr was 0.001 and is 0.5" in told


def test_a_place_that_is_a_file_is_refused(tmp_path, place):
    out = tmp_path / "out"
    out.write_text("")
    ((line, told),) = faults(written(tmp_path, '[[jobs]]\nname = "a"\n', place), out)
    assert line == 7
    assert "is a file" in told


@pytest.mark.parametrize("text", ["{broken", "[]", '{"version": 1, "jobs": {"a": 3}}', '{"version": 1, "jobs": []}'])
def test_a_summary_that_is_broken_is_told_with_the_way_on(tmp_path, place, text):
    out = tmp_path / "out"
    runs = read(written(tmp_path, '[[jobs]]\nname = "a"\n', place), out)
    runs["a"].save({"accuracy": 0.5})
    (out / "jobs.json").write_text(text)
    ((_, told),) = faults(tmp_path / "jobs.toml", out, resume=True)
    assert f"delete {out / 'jobs.json'}, and they go on" in told
    with pytest.raises(ValueError, match="delete"):
        summary(out, {"a": Job("a", runs["a"])}, 0.0, {})
    (out / "jobs.json").unlink()
    assert read(tmp_path / "jobs.toml", out, resume=True) == runs


def test_a_folder_is_no_file_of_jobs(tmp_path):
    with pytest.raises(IsADirectoryError, match="a TOML file of jobs"):
        read(tmp_path, tmp_path / "out")


def test_a_model_that_cannot_be_opened_is_told_once(tmp_path, place):
    path = written(tmp_path, '[[jobs]]\nname = "a"\n[[jobs]]\nname = "b"\nwhere = "query"\n', place | {"base": "/no"})
    ((line, told),) = faults(path, tmp_path / "out")
    assert line == 2
    assert "no folder here" in told
