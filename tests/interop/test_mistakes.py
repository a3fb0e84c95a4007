"""First mistakes, on the command line and in Python: one message that says what to do, never a traceback."""

import dataclasses
import json
import math
import re
import typing
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli import shell
from undula.cli.main import VERBS, app
from undula.core.choice import Choice
from undula.train import worries
from undula.train.base import open_model
from undula.train.run import Run
from undula.train.tasks.classification import Classification
from undula.train.tasks.task import Task


def run(*words):
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The directory of a run, made without training."""
    room = tmp_path_factory.mktemp("run")
    bert, data = tiny.bert(room / "bert"), tiny.jsonl(room / "d.jsonl", tiny.reviews(12))
    task = Classification(names=("bad", "good"))
    made = Run(model=bert, data=data, task=task, method=undula.LoRA(r=2), out=room / "a", where="query")
    model, _ = open_model(bert, task, made.dtype, 0)
    found = undula.attach(model, made.method, made.where, full=task.head(model))
    for p in found.parameters():
        nn.init.normal_(p, std=0.2)
    found.save(room / "a", base=bert, task="SEQ_CLS")
    made.save(None)
    return room / "a"


# A verb and a bad file

DIRECTORY = {
    "eval": (),
    "show": (),
    "merge": ("--out",),
    "collapse": ("--out",),
    "prune": ("--out",),
    "cut": ("--rank", "1", "--out"),
    "export": ("--out",),
}


def written(name, content):
    return lambda path: (path / name).write_bytes(content)


def edited(change):
    def edit(path):
        told = json.loads((path / "run.json").read_text())
        change(told["run"])
        (path / "run.json").write_text(json.dumps(told))

    return edit


def _ia3(path):
    save_file({"base_model.model.x.ia3_l": torch.ones(2)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


FILES = {
    "config is no JSON": (written("adapter_config.json", b"{"), "adapter_config.json"),
    "config is a list": (written("adapter_config.json", b"[]"), "adapter_config.json"),
    "config is of another kind": (_ia3, "IA3"),
    "tensors are cut": (lambda p: _cut(p / "adapter_model.safetensors"), "adapter_model.safetensors"),
    "tensors are noise": (written("adapter_model.safetensors", bytes(range(256)) * 4), "adapter_model.safetensors"),
    "tensors are gone": (lambda p: (p / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
}
OPENED = {  # what only verbs that open the model see
    "run is no JSON": (written("run.json", b"{"), "run.json"),
    "run is a list": (written("run.json", b"[]"), "run.json"),
    "task is unknown": (edited(lambda r: r.update(task={"is": "dance"})), "dance"),
    "field is unknown": (edited(lambda r: r.update(depth=3)), "depth"),
    "base is gone": (edited(lambda r: r.update(model="./nowhere")), "nowhere"),
}


def copied(source, path):
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


@pytest.mark.parametrize("verb", DIRECTORY)
def test_no_verb_shows_a_traceback_for_a_bad_directory(verb, adapter, tmp_path):
    out = (tmp_path / "o",) if "--out" in DIRECTORY[verb] else ()
    cases = FILES | (OPENED if verb in ("eval", "merge") else {})
    for i, (what, (spoil, named)) in enumerate(cases.items()):
        path = copied(adapter, tmp_path / f"bad{i}")
        spoil(path)
        code, _, said = run(verb, path, *DIRECTORY[verb], *out)
        assert (code, "Traceback" in said) == (2, False), (what, said)
        assert named in said, (what, said)
        assert not (tmp_path / "o").exists()
    code, _, said = run(verb, tmp_path / "absent", *DIRECTORY[verb], *out)
    assert code == 2
    assert "is no adapter directory" in said


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_options_and_verbs_are_typers_own(verb):
    code, _, said = run(verb, "--no-such-option")
    assert code == 2
    assert "--no-such-option" in said


@pytest.mark.parametrize("error", [AttributeError("x"), RecursionError("deep"), OverflowError("big"), KeyError("k")])
def test_whatever_is_raised_is_one_line(error, adapter, monkeypatch):
    """Kinds of errors that nobody foresaw end in a line too; --debug shows where."""

    def broken(*_):
        raise error

    monkeypatch.setattr("undula.cli.adapters.diagnose", broken)
    code, _, said = run("show", adapter)
    assert code == 1
    assert type(error).__name__ in said
    assert "--debug" in said
    with pytest.raises(type(error)):
        run("--debug", "show", adapter)


def test_four_bits_without_bitsandbytes_say_what_to_install(adapter, monkeypatch, tmp_path):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    path = copied(adapter, tmp_path / "a")
    edited(lambda r: r.update(bits=4))(path)
    code, _, said = run("eval", path)
    assert code == 2
    assert "pip install 'undula[bits]'" in said


@pytest.mark.parametrize("spoil", ["cut", "pickle", "noise"])
def test_a_damaged_base_is_said_to_be_one(spoil, adapter, tmp_path):
    bert = tiny.bert(tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    match spoil:
        case "cut":
            _cut(weights)
        case "noise":
            weights.write_bytes(b"\xff" * 64)
        case "pickle":
            weights.unlink()
            (tmp_path / "bert" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    code, _, said = run("merge", adapter, "--model", bert, "--out", tmp_path / "o")
    assert code == 2
    assert "no model could be opened in it" in said


# Options that would do nothing


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("study", "s.toml", "--no-pilot"), "--pilot/--no-pilot"),
        (("study", "s.toml", "--dry-run", "--retry-failed"), "--retry-failed"),
        (("study", "s.toml", "--executor", "ray"), "those with one --out share its runs"),
        (("study", "s.toml", "--workers", 3), "those with one --out share its runs"),
        (("study", "s.toml", "--dry-run", "--report"), "--report"),
        (("train", "--method", "none", "--set", "r=2"), "--set"),
        (("train", "--method", "none", "--override", "*.query=lora", "--where", "query"), "--override, --where"),
        (("train", "--allocate", "target=4"), "--allocator"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, named, tmp_path):
    more = ("--model", "m", "--data", "d", "--task", "classification", "--out", tmp_path) if words[0] == "train" else ()
    code, _, said = run(*words, *more)
    assert code == 2
    assert named in said


def test_show_takes_a_model(adapter):
    """--model alone once did nothing."""
    _, plain, _ = run("show", adapter, "--json", "-")
    _, full, _ = run(
        "show", adapter, "--json", "-", "--model", json.loads((adapter / "run.json").read_text())["run"]["model"]
    )
    assert '"relative_norm": null' in plain
    assert json.loads(full)[0]["relative_norm"] > 0


def test_dense_over_a_dense_base_says_that_it_changes_nothing(adapter, tmp_path):
    _, shown, _ = run("merge", adapter, "--dense", "--out", tmp_path / "o")
    assert "--dense changes nothing" in shown


# Advice in the words of the place


def test_advice_is_in_options_on_the_command_line():
    texts = {
        "Name it: Classification(text=...), or --column text=...": "Name it: --column text=...",
        "say on which data (data=..., or --data)": "say on which data (--data)",
        "collapse(Truncate(4)) makes the best": "`undula collapse --how truncate --set r=4` makes the best",
        "undula.collapse fits a LowRank adapter": "`undula collapse` fits a LowRank adapter",
        "fits one: collapse(model, LeastSquares(r, calibration))": "fits one: `undula collapse --how least-squares`",
        "use Plain(), or --task-set format=plain": "use --task-set format=plain",
    }
    assert {text: shell.spoken(text) for text in texts} == texts


def test_tasks_are_named_as_in_help(tmp_path):
    _, _, said = run("train", "--model", "m", "--data", "d", "--task", "ner", "--out", tmp_path)
    assert "no task is called 'ner'; there are: causal-lm, classification, described-classification, " in said
    assert "multi-label" in said


def test_what_no_task_does_is_done_by_five_lines_of_python(tmp_path):
    """The message shows them, and they run."""
    import transformers

    words = ["train", "--model", "m", "--data", "d", "--task", "ner", "--out", str(tmp_path)]
    said = CliRunner().invoke(app, words).stderr
    lines = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    code = "\n".join(lines).replace("AutoModelFor...from_pretrained", "AutoModelForMaskedLM.from_pretrained")
    tiny.bert(tmp_path / "base")
    names = {"transformers": transformers, "undula": undula, "MODEL": tmp_path / "base", "OUT": tmp_path / "out"}
    exec(code, names)
    assert undula.Adapter.load(tmp_path / "out").factors
    with pytest.raises(LookupError, match=r"undula\.attach"):
        Task.named("ner")


# A merge that loses, a training that failed


def test_a_merge_that_loses_the_update_warns_and_names_the_way_out(adapter, tmp_path):
    """A 16-bit base rounds a small update away."""
    path = copied(adapter, tmp_path / "a")
    edited(lambda r: r.update(dtype="bfloat16"))(path)
    made = undula.Adapter.load(path)
    with torch.no_grad():
        for _, name, t in made.tensors():
            t.mul_(1e-3 if name == "B" else 1.0)
    made.save(path)
    _, _, said = run("merge", path, "--out", tmp_path / "o")
    assert "Note: rounding takes" in said
    assert "Merge with --dense" in said
    _, shown, said = run("merge", path, "--dense", "--out", tmp_path / "dense")
    assert "rounding takes" not in said
    assert re.search(r"costs \d\.\de-0[4-7] of", shown)


REPORT = {
    "before": {"loss": 1.7},
    "after": {"loss": 1.5, "mcc": 0.4},
    "losses": [[1, 1.8], [9, 1.4]],
    "best": None,
    "run": {"lr": 0.1},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"after": {"loss": 7195.0, "mcc": 0.1}}, "1.7 to 7195; lower the learning rate (it was 0.1)"),
        ({"after": {"loss": math.nan}}, "loss is nan"),
        ({"losses": [[1, 1.8], [9, math.inf]]}, "the loss was inf"),
        ({"losses": [[1, 1.8], [9, 60.0]]}, "1.8 to 60"),
        ({"after": {"loss": 1.2, "mcc": 0.0}}, "no better than with one class"),
    ],
)
def test_a_training_that_failed_is_told_by_its_report(change, named, adapter, tmp_path):
    assert worries.worries(REPORT) == []
    (told,) = worries.worries(REPORT | change)
    assert named in told
    path = copied(adapter, tmp_path / "a")
    (path / "report.json").write_text(json.dumps(REPORT | change))
    assert named in run("show", path)[2]


def test_a_training_that_diverged_ends_in_a_failure(adapter, tmp_path, monkeypatch):
    report = REPORT | {"after": {"loss": 7195.0}, "peak_memory_bytes": 1, "ranks": None, "method": "LoRA", "out": "o"}
    report |= {"trainable_parameters": 1, "steps": 1, "seconds": 1.0, "processes": 1, "rows_in_a_step": 8}
    monkeypatch.setattr("undula.cli.training.fit", lambda *_, **__: report)
    words = ("--model", "m", "--data", "d", "--task", "classification", "--out", tmp_path / "o")
    code, _, said = run("train", *words)
    assert code == 1
    assert "the training diverged" in said


# Python


def members():
    """Every choice of every family, with values for the fields that have no default."""
    for family in Choice.__subclasses__():
        for member in dict.fromkeys(family.registry.values()):
            hints = typing.get_type_hints(member)
            values = {}
            for f in dataclasses.fields(member):
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                    hint = hints[f.name]
                    of_type = {int: 1, float: 0.5, undula.Method: undula.LoRA(r=2)}
                    values[f.name] = of_type.get(hint, (undula.LoRA(),) if "Method" in str(hint) else (1.0,))
            yield pytest.param(member, hints, values, id=f"{family.__name__}-{member.__name__}")


@pytest.mark.parametrize(("member", "hints", "values"), list(members()))
def test_every_field_of_every_choice_refuses_what_is_no_value_of_it(member, hints, values):
    """NaN, infinity, texts for numbers, fractions for whole numbers, classes for members: each is told by its field's
    name when the choice is made, and not by a number that is wrong later."""
    for f in dataclasses.fields(member):
        hint = hints[f.name]
        bad = []
        if float in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple:
            bad = [math.nan, math.inf, "4", True]
        elif int in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple:
            bad = [2.5, "4", True]
        elif isinstance(hint, type) and issubclass(hint, Choice):
            bad = ["text", undula.LoRA, 3]
        elif typing.get_origin(hint) is tuple:
            bad = ["text", 3]
        for wrong in bad:
            with pytest.raises(ValueError, match=f"{f.name}"):
                member(**values | {f.name: wrong})


def test_numbers_of_numpy_and_lists_are_taken():
    np = pytest.importorskip("numpy")
    assert undula.LoRA(r=np.int64(4), alpha=np.float32(2)) == undula.LoRA(r=4, alpha=2.0)
    assert undula.LoRAN(learn=["w"]) == undula.LoRAN(learn=("w",))


@pytest.mark.parametrize(
    ("make", "kind", "named"),
    [
        (lambda m: undula.attach(m, "lora"), TypeError, r"write undula\.LoRA\(\)"),
        (lambda m: undula.attach(m, "lorra"), TypeError, "NAME one of AdaLoRA"),
        (lambda m: undula.attach(m, undula.LoRA), TypeError, r"make a method of it, LoRA\(\)"),
        (lambda m: undula.attach(m, undula.LoRA(), overrides={"0": "lora"}), TypeError, r"write undula\.LoRA\(\)"),
        (lambda m: undula.LoRA(dropout=0.1), TypeError, r"Dropout\(LoRA\(\.\.\.\), p=0\.1\)"),
        (lambda m: undula.LoRA(rank=3), TypeError, "called r"),
        (lambda m: undula.LoRA(start=1), TypeError, r"Centred\(LoRA\(\.\.\.\), start=\.\.\.\)"),
        (lambda m: undula.LoRA(1, 2.0, undula.RankStabilised(), 4), TypeError, "has 3 options"),
        (lambda m: undula.LoRA(alpha=-1), ValueError, "greater than 0"),
        (lambda m: undula.LoRA(alpha=0), ValueError, "greater than 0"),
        (lambda m: undula.VeRA(seed=-1), ValueError, "at least 0"),
        (lambda m: undula.Method.build("lora", {"start": "pissa"}), LookupError, "an option of Centred"),
        (lambda m: [undula.attach(m, undula.LoRA()) for _ in "12"], ValueError, r"undula\.detach\(model\).*name="),
    ],
)
def test_first_mistakes_in_python_say_what_to_write(make, kind, named):
    with pytest.raises(kind, match=named):
        make(nn.Sequential(nn.Linear(4, 4)))


def test_one_name_for_full_is_one_name():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert set(undula.attach(model, undula.LoRA(), ["body"], full="head").full) == {"head.weight", "head.bias"}


def test_adapters_are_shown_in_a_few_lines():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    found = undula.attach(model, undula.LoRA(r=16))
    assert len(repr(found)) < 400
    assert "LoRA(r=16" in repr(found)
    assert "40 layers" in repr(found)
    assert "81,920 train" in found._repr_html_()
    assert "LoRA(r=16, alpha=16.0, scaling=Classic()): A (16, 64), B (64, 16)" in repr(model)
    rows = undula.diagnose(model)
    assert len(repr(rows).splitlines()) == 40 + 3
    assert rows._repr_html_().startswith("<table>")
    assert json.loads(json.dumps(rows)) == rows


# A library saves the model, adapter and all


@pytest.mark.parametrize("outer", [True, False])
def test_save_pretrained_of_a_live_adapter_warns(outer, adapter, tmp_path):
    """What from_pretrained reads back is the bare base.  Also where the adapter is on a module around the model, or on
    a part of it."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(json.loads((adapter / "run.json").read_text())["run"]["model"])
    holder = nn.ModuleDict({"model": model})
    undula.attach(holder if outer else model, undula.LoRA(r=2), ["*query"])
    for each in (model, __import__("copy").deepcopy(model)):
        with pytest.warns(UserWarning, match="what is loaded is the bare base"):
            each.save_pretrained(tmp_path / "live")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        undula.select(holder if outer else model, None)
        model.save_pretrained(tmp_path / "base")
        undula.select(holder if outer else model, "default")
        undula.merge(holder if outer else model)
        model.save_pretrained(tmp_path / "merged")
        undula.unmerge(holder if outer else model)
        undula.detach(holder if outer else model)
    assert "save_pretrained" not in model.__dict__
    assert "save_pretrained" not in holder.__dict__
