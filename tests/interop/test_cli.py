"""The command line: every verb on tiny models, one clear line for every mistake, and a method from another package."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli import shell
from undula.cli.main import app
from undula.core.options import build
from undula.methods.lora import LoRA
from undula.train import Classification, Task, restored
from undula.train.worries import worries

THIRD_PARTY = Path(__file__).parents[1] / "fixtures" / "third_party"


def call(*words, code=0):
    """Runs `undula words...` in this process; its output, with white space made one, and its errors."""
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return " ".join(done.stdout.split()), " ".join(done.stderr.split())


def fails(*words, code=2):
    """The one line that a mistake ends in."""
    said = call(*words, code=code)[1]
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    rows = [{"review": r["text"], "stars": r["label"]} for r in tiny.reviews(60)]
    return tiny.table(tmp_path_factory.mktemp("data") / "reviews.csv", rows)


@pytest.fixture(scope="module")
def usual(bert, reviews):
    columns = ("--column", "text=review", "--column", "label=stars")
    return ("--model", bert, "--data", reviews, "--task", "classification", *columns, "--max-steps", 3, "--batch", 4)


@pytest.fixture(scope="module")
def trained(usual, tmp_path_factory):
    """{method: directory} of adapters trained by the command line."""
    out = tmp_path_factory.mktemp("trained")
    options = {"loran": ("--set", "r=2", "--set", "activation.a=1e-3"), "aurora": (), "lora": ("--set", "r=2")}
    for method, given in options.items():
        call("train", *usual, "--method", method, *given, "--lr", "1e-2", "--out", out / method)
    return {method: out / method for method in options}


# Help and lists


def test_help_is_light():
    """--help needs none of the heavy packages."""
    heavy = ("transformers", "peft", "datasets", "accelerate", "sklearn", "matplotlib", "trl", "scipy", "pyarrow")
    script = f"""
import sys
import warnings
from undula.cli import app
try:
    app(["--help"])
except SystemExit as done:
    assert done.code == 0
print("heavy:", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert all(
        verb in done.stdout
        for verb in (
            "methods",
            "train",
            "eval",
            "show",
            "compare",
            "merge",
            "collapse",
            "prune",
            "cut",
            "export",
            "assets",
        )
    )


def test_methods_come_from_the_registry(tmp_path):
    shown, _ = call("methods", "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    rows = {row["name"]: row for row in found if row["kind"] == "method"}
    assert set(rows) == {m.__name__ for m in undula.Method.registry.values()} == set(undula.methods())
    for kind, family in (("allocator", undula.ranks.Allocator), ("start", undula.starts.Start)):
        names = {row["name"] for row in found if row["kind"] == kind}
        assert names == {m.__name__ for m in family.registry.values()}
        assert all(name in shown for name in names)
    assert rows["LoRAN"]["rung"] == "Additive"
    assert rows["Dropout"]["rung"] == "as inner"
    assert rows["AuroRA"]["grade"] == "interpretation"
    assert all(name in shown for name in rows)
    assert "W' = W + s B A" in shown


def test_methods_is_a_function_and_a_package():
    assert undula.methods()["LoRA"] is LoRA is undula.LoRA


def test_assets_show_licences():
    shown = json.loads(call_raw("assets", "--json", "-"))
    assert {"minilm", "wordnet"} <= {row["name"] for row in shown}
    assert all(row["licence"] for row in shown)
    assert "no bundled asset is called 'gpt9'" in fails("assets", "--fetch", "gpt9")


def call_raw(*words):
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False).stdout


# Training


def test_train_writes_what_it_says(usual, tmp_path):
    shown, said = call("train", *usual, "--out", tmp_path / "o", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads((tmp_path / "o" / "report.json").read_text())
    assert {"method", "trainable_parameters", "before", "after", "seconds", "peak_memory_bytes"} <= set(report)
    assert f"LoRA: {report['trainable_parameters']:,} parameters, 3 steps" in shown
    assert f"{report['after']['accuracy']:.4g}" in shown
    assert "step 3 of 3, loss" in said
    assert json.loads(call_raw("eval", tmp_path / "o", "--json", "-")) == report["after"]


def test_options_reach_the_method(trained, usual, tmp_path):
    (method,) = set(undula.Adapter.load(trained["loran"]).methods.values())
    assert (method.r, method.activation.a, method.activation.w) == (2, 1e-3, 1e4)
    wrapped = ("--method", "dora", "--set", "inner=loran", "--set", "inner.r=3", "--override", "*.query=lora,r=1")
    call("train", *usual, *wrapped, "--where", "query", "--where", "*.value", "--out", tmp_path, "--max-steps", 1)
    adapter = undula.Adapter.load(tmp_path)
    by_leaf = {site.rpartition(".")[2]: m for site, m in adapter.methods.items()}
    assert by_leaf == {"query": undula.LoRA(r=1), "value": undula.DoRA(undula.LoRAN(r=3))}


def test_numbers_reach_the_run(usual, tmp_path):
    given = {"lr": 0.02, "epochs": 1.0, "accumulate": 2, "warmup": 0.2, "weight-decay": 0.1, "seed": 5}
    given |= {"train-rows": 8, "eval-rows": 3, "save-every": 1, "max-steps": 1, "batch": 2, "probe-batches": 3}
    flat = [w for k, v in given.items() for w in (f"--{k}", v)]
    call("train", *usual, *flat, "--full", "LayerNorm", "--task-set", "max_length=7", "--out", tmp_path)
    run = undula.Run.load(tmp_path)
    assert {k: getattr(run, k.replace("-", "_")) for k in given} == given
    assert run.task.max_length == 7
    assert any("LayerNorm" in name for name in undula.Adapter.load(tmp_path).full)


def test_head_alone(usual, tmp_path):
    shown, _ = call("train", *usual, "--method", "none", "--out", tmp_path, "--max-steps", 1)
    assert "head only: 66 parameters" in shown
    assert "0 layers merged" in call("merge", tmp_path, "--out", tmp_path / "merged")[0]


MISTAKES = {
    "method": (("--method", "lorra"), "no method is called 'lorra'; there are: AdaLoRA, AuroRA"),
    "option": (("--set", "depth=3"), "LoRA has no option depth; it has: r, alpha, scaling"),
    "value": (("--set", "r=two"), "LoRA.r is an integer at least 1 and at most 1,048,576, found 'two'"),
    "no value": (("--set", "r"), "an option is written NAME=VALUE, found 'r'"),
    "nothing nested": (("--set", "r.x=1"), "LoRA.r is one value and has no option x"),
    "bare wrapper": (("--method", "dropout"), "Dropout needs inner"),
    "undefined inner": (("--method", "dropout", "--set", "inner.r=2"), "say what it is first (inner=NAME)"),
    "wrong inner": (("--method", "dora", "--set", "inner=aurora"), "DoRA wraps a method with an update dW"),
    "task": (("--task", "translation"), "no task is called 'translation'; there are: causal-lm, classification"),
    "task option": (("--task-set", "generate=3"), "Classification has no option generate"),
    "role": (("--column", "prompt=review"), "Classification has no column prompt=review; it has: text, pair, label"),
    "column": (("--task-set", "pair=title"), "no column 'title'; their columns are: review, stars"),
    "where": (("--where", "*.q_proj"), "where='*.q_proj' matches none of the"),
    "override": (("--override", "*.q_proj=lora"), "the override '*.q_proj' matches none"),
    "override twice": (
        ("--override", "*.query=lora,r=1", "--override", "*.query=lora,r=2"),
        "--override *.query is given twice",
    ),
    "dtype": (("--dtype", "int3"), "no dtype is called 'int3'; there are: float32"),
    "data": (("--data", "./no.jsonl"), "data=no.jsonl does not exist"),
    "model": (("--model", "nowhere"), "model='nowhere' is no folder here"),
    "rate": (("--lr", "-1"), "Run.lr is greater than 0, found -1.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, usual, tmp_path):
    given, message = MISTAKES[name]
    assert message in fails("train", *usual, "--out", tmp_path / "o", *given)
    assert not (tmp_path / "o" / "report.json").exists()


def test_mistakes_around_a_run(trained, tmp_path):
    assert "train needs --data, --task, --out" in fails("train", "--model", "x")
    assert "leave out --set, --lr" in fails("train", "--resume", trained["lora"], "--lr", 1, "--set", "r=2")
    assert "is finished" in fails("train", "--resume", trained["lora"])
    assert "run.json is missing" in fails("train", "--resume", tmp_path)
    assert "is not empty" in fails("merge", trained["lora"], "--out", trained["aurora"])
    assert "no split 'exam'" in fails("eval", trained["lora"], "--split", "exam")
    assert "is no adapter directory" in fails("eval", tmp_path)
    with pytest.raises(FileNotFoundError, match="is no adapter directory"):
        call("--debug", "eval", tmp_path)


def test_errors_of_others_say_so(trained, monkeypatch):
    monkeypatch.setattr("undula.cli.training.restored", lambda *_: json.loads("{"))
    assert "JSONDecodeError" in fails("eval", trained["lora"], code=1)


# What becomes of an adapter


def outputs(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = AutoTokenizer.from_pretrained(folder)(["the film was good", "a sad day"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits, batch


def test_merge_writes_an_ordinary_model(trained, tmp_path):
    shown, _ = call("merge", trained["loran"], "--out", tmp_path / "merged")
    assert re.search(r"13 layers merged; storing them costs \d\.\de-0[5-7] of the change at most", shown)
    logits, batch = outputs(tmp_path / "merged")
    opened = restored(trained["loran"])
    opened.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, opened.model(**batch).logits)
    assert opened.model.config.id2label == {0: "bad", 1: "good"}
    assert "AuroRA" in fails("merge", trained["aurora"], "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_quantised_base(tmp_path):
    """Training on a 4-bit base works, and --dense merges without rounding (transformers cannot write 4 bits again)."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, rows = (
        tiny.llama(tmp_path / "base"),
        [{"text": f"the {x} was", "summary": w} for w in tiny.GOOD for x in tiny.WORDS[10:14]],
    )
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    quantised.save_pretrained(tmp_path / "small")
    tiny.tokenizer(tmp_path / "small")
    data = ("--data", tiny.jsonl(tmp_path / "d.jsonl", rows), "--task", "causal-lm", "--task-set", "generate=0")
    run = ("--model", tmp_path / "small", *data, "--max-steps", 5, "--lr", "1e-2", "--out", tmp_path / "adapter")
    call("train", *run, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"] - 0.1
    assert "merge with --dense" in fails("merge", tmp_path / "adapter", "--out", tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()
    merged = call("merge", tmp_path / "adapter", "--dense", "--out", tmp_path / "dense")[0]
    assert re.search(r"costs \d\.\de-0[5-7] of", merged)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    opened = restored(tmp_path / "adapter")
    found = opened.run.task.score(merged, opened.examples(), 4)
    assert found["loss"] == pytest.approx(report["after"]["loss"], rel=1e-4)


def test_show_tells_and_draws(trained, tmp_path):
    shown, _ = call("show", trained["loran"], "--plot", tmp_path / "p.png", "--json", tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["site"] for row in rows][-1] == "all"
    assert f"{rows[0]['nonlinearity']:.4g}" in shown
    assert "outside" not in shown
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    shown, _ = call("show", trained["aurora"], "--rows", 20)
    assert "outside" in shown


def test_collapse_prints_its_error(trained, tmp_path):
    given = ("--set", "r=6", "--set", "ridge=1e-4", "--rows", 40)
    shown, _ = call("collapse", trained["aurora"], "--out", tmp_path / "flat", *given, "--json", tmp_path / "e.json")
    report = json.loads((tmp_path / "e.json").read_text())
    assert f"relative error of the model's change, on held-out data: {report['error']:.3g}" in shown
    assert len(report["errors"]) == 13
    assert undula.Adapter.load(tmp_path / "flat").rung is undula.LowRank
    assert json.loads(call_raw("eval", tmp_path / "flat", "--json", "-")).keys() >= {"accuracy", "loss"}
    shown, _ = call("collapse", trained["loran"], "--out", tmp_path / "cut", "--how", "truncate", "--set", "r=1")
    assert "relative error" in shown
    known = "no recipe is called 'magic'; there are: LeastSquares, Substitute, Truncate"
    assert known in fails("collapse", trained["loran"], "--out", tmp_path / "x", "--how", "magic")


def test_export_is_read_by_peft_alone(trained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    shown, _ = call("export", trained["lora"], "--format", "peft", "--out", tmp_path / "plain")
    assert "exported exactly" in shown
    opened = restored(trained["lora"])
    batch = opened.processor(["the film was good"], return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(opened.folder, num_labels=2)
    peft = PeftModel.from_pretrained(base, tmp_path / "plain").eval()
    opened.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(**batch).logits, opened.model(**batch).logits)
    shown, _ = call("export", trained["aurora"], "--out", tmp_path / "bent", "--rows", 30)
    assert "on the rung Method there is no exact LoRA: collapsed first relative error" in shown
    assert json.loads((tmp_path / "bent" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_adapters_from_elsewhere(trained, bert, reviews, tmp_path):
    """A plain PEFT directory without run.json: the config and --model say what it is for."""
    call("export", trained["lora"], "--out", tmp_path / "plain")
    call("merge", tmp_path / "plain", "--out", tmp_path / "merged", "--model", bert)
    opened = restored(trained["lora"])
    opened.model.eval()
    logits, batch = outputs(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(logits, opened.model(**batch).logits)
    assert "was not made by `undula train`" in fails("eval", tmp_path / "plain")


# Interruption


def test_ctrl_c_in_a_terminal(usual, tmp_path, python):
    """SIGINT to the real program: exit code 130, a checkpoint, and a command that finishes the run."""
    words = [*usual, "--max-steps", 120, "--save-every", 40, "--out", tmp_path / "o"]
    program = [python, "-m", "undula", "train", *map(str, words)]
    child = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = ""
    for line in child.stderr:
        said += line
        if line.startswith("step "):
            child.send_signal(signal.SIGINT)
    assert child.wait() == 130, said
    stopped = re.search(r"stopped at step (\d+) of 120; go on with: undula (train --resume \S+)", said)
    assert stopped, said
    assert (tmp_path / "o" / "checkpoints" / f"checkpoint-{stopped[1]}" / "optimizer.pt").is_file()
    call(*stopped[2].split())
    assert json.loads((tmp_path / "o" / "report.json").read_text())["resumed_from_step"] == int(stopped[1])


# A method that another package brings


@pytest.fixture
def installed(tmp_path):
    """The fixture package as pip would install it: a module and its metadata in a folder of their own."""
    place = tmp_path / "site"
    metadata = place / "undula_tilt-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (place / "undula_tilt.py").write_text((THIRD_PARTY / "undula_tilt.py").read_text())
    points = re.search(r'\[project.entry-points."undula.methods"\]\n(.*)', (THIRD_PARTY / "pyproject.toml").read_text())
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: undula-tilt\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[undula.methods]\n" + points[1].replace('"', "") + "\n")
    return {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}


STORY = """
import sys
import warnings
from undula.cli import app
*words, out = sys.argv[1:]
def call(*words):
    try:
        app([str(w) for w in words])
    except SystemExit as done:
        assert not done.code, words
call("methods", "--json", out + "/methods.json")
call("train", *words, "--method", "tilt", "--set", "r=3", "--lr", "1e-2", "--out", out + "/adapter")
call("eval", out + "/adapter", "--json", out + "/eval.json")
call("merge", out + "/adapter", "--out", out + "/merged")
call("export", out + "/adapter", "--out", out + "/peft")
"""


def test_a_method_of_another_package(installed, usual, tmp_path, python):
    """It is listed, trains, is saved and loaded, merges and leaves as a LoRA, and undula never heard of it."""
    words = [python, "-c", STORY, *map(str, usual), str(tmp_path)]
    done = subprocess.run(words, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "methods.json").read_text())}
    assert rows["Tilt"]["rung"] == "LowRank"
    assert rows["Tilt"]["parameters"] == "r*(O + I) + r"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["undula"]["methods"] == [{"is": "Tilt", "r": 3, "s": 2.0}]
    assert any("undula_factors.g" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    report = json.loads((tmp_path / "adapter" / "report.json").read_text())
    assert json.loads((tmp_path / "eval.json").read_text()) == report["after"]
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 3
    logits, batch = outputs(tmp_path / "merged")
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(usual[1], num_labels=2)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "peft").eval()(**batch).logits, logits)


def test_a_broken_package_does_not_break_undula(installed, tmp_path):
    place = Path(installed["PYTHONPATH"])
    (place / "undula_tilt.py").write_text("raise OSError('half installed')")
    script = "import undula; print(sorted(undula.methods())[:2])"
    done = subprocess.run([sys.executable, "-c", script], env=installed, capture_output=True, text=True, check=True)
    assert done.stdout == "['AdaLoRA', 'AuroRA']\n"
    assert (
        "the method Tilt = undula_tilt:Tilt of another package did not load: OSError('half installed')" in done.stderr
    )


def test_options_from_text():
    loran = build(undula.Method, "lo-ran", ["activation=sine", "activation.w=5", "learn=w", "scaling=rank-stabilised"])
    assert loran == undula.LoRAN(activation=undula.activations.Sine(5.0), learn=("w",), scaling=undula.RankStabilised())
    assert build(undula.Method, "centred", ["inner=lora", "start.std=0.5"]).start.std == 0.5
    for text in (" ", "\n\n ", " a = b "):  # of a text, blanks are part
        assert build(Task, "causal-lm", ["format=plain", f"format.between={text}"]).format.between == text
    assert build(Task, "classification", ["label= Label", "max_length = 8"]) == Classification(
        label=" Label", max_length=8
    )
    assert build(undula.Method, "loran", ["activation = sine", "r = 4"]).activation == undula.activations.Sine()
    with pytest.raises(ValueError, match="the option r is given twice: '1' and '2'"):
        build(undula.Method, "lora", ["r=1", "r=2"])


def test_a_directory_without_an_adapter_says_what_it_is(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert "has not ended: `undula train --resume" in fails("show", tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "config.json")
    assert "is the folder of a model" in fails("show", tmp_path)


def test_warnings_are_notes_of_one_style_once_each(capsys):
    """Ours with the advice of the command line, another package's by its name in one line; its advice to programmers is
    left out, unless --debug asks for it."""
    torch_like = "/x/site-packages/torch/nn/modules.py"
    for debug in (False, True):
        with shell.notes(debug):
            for _ in range(2):
                warnings.warn_explicit("look at undula.merge again", UserWarning, shell.OURS + "/a.py", 1)
                logging.getLogger("undula.train").warning("24 texts are cut")
                warnings.warn_explicit("strange numbers\n  at a line", UserWarning, torch_like, 7)
                warnings.warn_explicit("gone in 3.0", FutureWarning, torch_like, 8)
        said = capsys.readouterr().err.splitlines()
        wanted = ["Note: look at `undula merge` again", "Note: 24 texts are cut", "Note: (torch) strange numbers"]
        assert said == wanted + ["Note: (torch) gone in 3.0"] * debug


def test_a_training_that_diverged_says_so_once():
    """The loss that rose is what the divergence is told by."""
    rose = ["the training loss rose from 1 to 9: lower the rate", "every validation row is said to be of one class"]
    report = {"warnings": rose, "before": {"loss": 1.0}, "after": {"loss": 9.0}, "losses": []}
    assert worries(report) == [rose[1], "the training diverged: the loss went from 1 to 9; lower the learning rate"]
    assert worries({"warnings": rose * 2}) == rose
