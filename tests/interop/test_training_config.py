"""A run in a file: what people write, what every run leaves, what both are together with a command line."""

import dataclasses
import json
import tomllib

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula import penalties, ranks
from undula.cli.main import app
from undula.io import toml
from undula.methods.activations import Sinter
from undula.optim.optimisers import SGD, AdamW
from undula.optim.schedules import Cosine
from undula.ranks.relora import Jagged
from undula.starts import PiSSA
from undula.train import (
    CausalLM,
    Chat,
    Classification,
    ImageClassification,
    Plain,
    Recipe,
    Run,
    config,
)

USUAL = Recipe("a/model", "data.csv", Classification(), undula.LoRA(r=2))
SEVERAL = (
    {},
    {"method": None},
    {"method": undula.LoRAN(r=3, activation=Sinter(a=1e-3))},
    {"method": undula.Dropout(undula.Centred(undula.LoRA(r=4), start=PiSSA()), p=0.25)},
    {"overrides": {"*.q_proj": undula.AuroRA(r=2), 'odd "name" = [x]': undula.DoRA(undula.LoRA(r=1))}},
    {"task": CausalLM(prompt="none", format=Plain(instruction='Say:\n\t"x" é\x7f\\', between="\n"), max_length=9)},
    {"task": CausalLM(format=Chat(), generate=0)},
    {"task": Classification(text="the text", names=("a, b", "none", "ü", ""))},
    {"task": ImageClassification(size=8, names=("0", "1"))},
    {"where": ("a", "b.*"), "exclude": ("c",), "full": ("d",)},
    {"where": "query"},
    {"eval_rows": None, "train_rows": 7, "max_steps": 3, "max_grad_norm": None},
    {"method": undula.AdaLoRA(r=4), "allocator": ranks.AdaLoRA(target=2), "schedule": Cosine()},
    {"allocator": ranks.Together((ranks.L2SP(), ranks.ReLoRA(cycles=2))), "schedule": Jagged(2)},
    {"allocator": ranks.ReLoRA(cycles=2)},
    {"penalty": penalties.GroupLasso(0.1, groups=penalties.Heads(8)) + penalties.KLToBase()},
    {"optimiser": SGD(momentum=0.5, nesterov=True), "b_ratio": 1e-3, "lr": 1e-300, "weight_decay": 1e22},
    {"optimiser": AdamW(beta2=0.95), "dtype": torch.bfloat16, "bits": 4, "skip_faulty": 0.1, "by_chance": True},
    {"eval_every": 0.25, "keep_best": False, "patience": 2, "gradient_checkpointing": True},
    {"model": 'C:\\a "b"\nc', "data": "é \U0001f600", "seed": 2**32 - 1},
)


@pytest.mark.parametrize("changes", SEVERAL, ids=repr)
def test_what_a_run_leaves_in_toml_is_the_same_run(changes, tmp_path):
    """Whatever a recipe holds: what is read again is encoded as it was, which is what run.json holds."""
    recipe = dataclasses.replace(USUAL, **changes)
    path = tmp_path / "run.toml"
    path.write_text(config.written(recipe), encoding="utf-8")
    assert Recipe.load(path).encode() == recipe.encode()
    Run.of(recipe, tmp_path / "out").save(None)
    assert Recipe.load(tmp_path / "out/run.json") == Recipe.load(tmp_path / "out/run.toml") == Recipe.load(path)


def test_runs_of_older_versions_are_taken_as_they_were(tmp_path):
    data = {"version": 1, "run": USUAL.encode(), "before": None}
    (tmp_path / "run.json").write_text(json.dumps(data))
    older = {"by_chance": True, "eval_every": 0, "gradient_checkpointing": False, "plain": True}
    assert Recipe.load(tmp_path / "run.json") == dataclasses.replace(USUAL, **older)
    assert Run.load(tmp_path) == Run.of(Recipe.load(tmp_path / "run.json"), tmp_path)


PEOPLE = {
    'method = "lora"': {"method": undula.LoRA()},
    '[method]\nis = "lora"\nr = 3': {"method": undula.LoRA(r=3)},
    '[method]\nname = "lo-ra"\nr = 3': {"method": undula.LoRA(r=3)},
    'method = "none"': {"method": None},
    'method = {is = "loran", activation = {a = 1e-3}}': {
        "method": undula.LoRAN(activation=dataclasses.replace(undula.LoRAN().activation, a=1e-3))
    },
    'method = {is="centred", inner={is="lora", r=2}, start="pissa"}': {
        "method": undula.Centred(undula.LoRA(r=2), start=PiSSA())
    },
    "optimiser = { beta2 = 0.5 }": {"optimiser": AdamW(beta2=0.5)},
    'schedule = "cosine"': {"schedule": Cosine()},
    'overrides = { "*.v" = "aurora" }': {"overrides": {"*.v": undula.AuroRA()}},
    'eval_rows = "none"': {"eval_rows": None},
    'dtype = "bfloat16"': {"dtype": torch.bfloat16},
    'exclude = "a"': {"exclude": ("a",)},
    "epochs = 1": {"epochs": 1.0},
}


@pytest.mark.parametrize("text", PEOPLE)
def test_what_people_write(text, tmp_path):
    own = "" if "method" in text else 'method = "lora"\n'
    (tmp_path / "c.toml").write_text(
        f'\ufeffmodel = "m"\r\ndata = "d"\ntask = "classification"\n{own}{text}\n', "utf-8"
    )
    wanted = Recipe("m", "d", Classification(), **{"method": undula.LoRA()} | PEOPLE[text])
    assert Recipe.load(tmp_path / "c.toml") == wanted
    data = tomllib.loads((tmp_path / "c.toml").read_text("utf-8-sig"))
    (tmp_path / "c.json").write_text(json.dumps(data))
    assert Recipe.load(tmp_path / "c.json") == wanted


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("learing_rate = 1", r"line 3: a run has no 'learing_rate'"),
        ("epoch = 1", r"line 3: a run has no 'epoch'; did you mean epochs\?"),
        ("learning_rate = 1", r"line 3: a run has no 'learning_rate'; it is called lr"),
        ("set = {r = 2}", r"line 3: a run has no 'set'; options of the method stand in its table"),
        ('column = {text = "a"}', r"line 3: a run has no 'column'; columns are options of the task: task = "),
        ('task_set = {text = "a"}', r"line 3: a run has no 'task_set'; options of the task stand in its table"),
        ("override = {}", r"line 3: a run has no 'override'; it is called overrides"),
        ("lr = -1", r"line 3: lr is greater than 0, found -1"),
        ('lr = "1e-3"', r"line 3: lr is a finite number"),
        ("batch = 1.5", r"line 3: batch is an integer"),
        ('keep_best = "yes"', "line 3: keep_best is bool"),
        ('method = "lorra"', "line 3: no method is called 'lorra'"),
        ('[method]\nis = "lora"\nrank = 2', r"line 3: LoRA has no option rank; .* called r"),
        ("[method]\nr = 2", r"line 3: method does not say which method: write method = \{ is"),
        ("[task]\nis = 3", r"line 3: task.is is the name of a task, found 3"),
        ('dtype = "int8"', "line 3: no dtype is called 'int8'"),
        ("eval_every = -1", "line 3: eval_every is at least 0"),
        ("lr = ", "not TOML"),
    ],
)
def test_everything_that_is_wrong_with_a_file_is_told_with_its_line(line, told, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'model = "m"\ndata = "d"\n{line}\n')
    with pytest.raises(toml.Faults, match=told):
        Recipe.load(path)
    if "not TOML" not in told:
        path.write_text(f'model = 3\ndata = "d"\n{line}\n')
        with pytest.raises(toml.Faults, match=r"c\.toml cannot be run; 2 fault"):
            Recipe.load(path)


def test_what_is_not_there_is_told(tmp_path):
    (tmp_path / "c.toml").write_text('model = "m"\n')
    with pytest.raises(LookupError, match=r"c\.toml does not say data, task, method"):
        Recipe.load(tmp_path / "c.toml")
    with pytest.raises(LookupError, match=r"does not say data, task, method, out, which a run needs"):
        Run.load(tmp_path / "c.toml")
    (tmp_path / "e.toml").write_text("out = 3\n")
    with pytest.raises(toml.Faults, match="line 1: out is a text or a path"):
        Run.load(tmp_path / "e.toml")
    (tmp_path / "e.toml").unlink()
    with pytest.raises(FileNotFoundError, match=r"such files there: c\.toml"):
        Recipe.load(tmp_path / "d.toml")
    (tmp_path / "c.json").write_text("[1")
    with pytest.raises(ValueError, match=r"c\.json"):
        Recipe.load(tmp_path / "c.json")


# The command line


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return {
        "model": tiny.bert(folder / "bert"),
        "data": tiny.jsonl(folder / "reviews.jsonl", tiny.reviews(40)),
        "folder": folder,
    }


def typed(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)])


@pytest.fixture(scope="module")
def first(usual):
    """A run from a file, and the file."""
    path = usual["folder"] / "c.toml"
    path.write_text(
        f'model = "{usual["model"]}"\ndata = "{usual["data"]}"\ntask = "classification"\nmax_steps = 3\nbatch = 4\n'
        'where = ["query"]\nseed = 5\n[method]\nis = "loran"\nr = 2\nactivation = { is = "sinter", a = 2e-3 }\n'
    )
    done = typed("--config", path, "--out", usual["folder"] / "first")
    assert done.exit_code == 0, done.output
    return path, usual["folder"] / "first"


def test_a_run_is_repeated_from_what_it_left(first, usual):
    """To the bit, and leaves the same file again."""
    _, out = first
    again = usual["folder"] / "again"
    done = typed("--config", out / "run.toml", "--out", again)
    assert done.exit_code == 0, done.output
    assert (again / "run.toml").read_text() == (out / "run.toml").read_text()
    one, two = undula.Adapter.load(out), undula.Adapter.load(again)
    assert all(torch.equal(t, two.factors[site][name]) for site, name, t in one.tensors())
    assert (out / "report.json").is_file()


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ((), {}),
        (("--lr", "0.5", "--where", "value"), {"lr": 0.5, "where": "value"}),
        (("--set", "r=3"), {"method": undula.LoRAN(r=3, activation=Sinter(a=2e-3))}),
        (("--set", "activation.w=2"), {"method": undula.LoRAN(r=2, activation=Sinter(a=2e-3, w=2.0))}),
        (("--method", "lora"), {"method": undula.LoRA()}),
        (("--method", "lora", "--set", "r=3"), {"method": undula.LoRA(r=3)}),
        (("--column", "text=text"), {"task": Classification(text="text")}),
        (("--task-set", "max_length=9"), {"task": Classification(max_length=9)}),
        (("--keep-best", "--eval-every", "0.5"), {"keep_best": True, "eval_every": 0.5}),
        (("--no-keep-best",), {"keep_best": False}),
    ],
)
def test_options_go_before_what_the_file_says(words, changes, first, tmp_path, monkeypatch):
    path, _ = first
    ran = []
    monkeypatch.setattr("undula.cli.training._fit", lambda run, *_: ran.append(run))
    done = typed("--config", path, "--out", tmp_path, *words)
    assert done.exit_code == 0, done.output
    assert ran == [dataclasses.replace(Run.of(Recipe.load(path), tmp_path), **changes)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--config", "CONFIG"), "train needs --out (in "),
        (("--config", "CONFIG", "--resume", "x"), "leave out --config"),
        (("--config", "nowhere.toml"), "nowhere.toml is no file of a run's settings"),
        (("--config", "CONFIG", "--out", "o", "--set", "rank=3"), "LoRAN has no option rank"),
        (("--config", "CONFIG", "--out", "o", "--column", "txt=a"), "has no column txt=a"),
        (("--config", "CONFIG", "--out", "o", "--method", "none", "--set", "r=2"), "leave out --set"),
        (("--config", "CONFIG", "--out", "o", "--allocate", "target=2"), "--allocate has"),
        ((), "or --resume DIRECTORY, or --config FILE"),
    ],
)
def test_what_a_file_and_options_cannot_mean(words, told, first):
    path, _ = first
    done = typed(*(path if word == "CONFIG" else word for word in words))
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


def test_a_file_of_someone_else_is_not_written_over(first, tmp_path):
    path, _ = first
    (tmp_path / "run.toml").write_text(path.read_text())
    done = typed("--config", tmp_path / "run.toml", "--out", tmp_path)
    assert done.exit_code == 2
    assert "holds run.toml of something else" in done.output
