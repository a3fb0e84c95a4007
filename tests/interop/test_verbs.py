"""What the verbs write and whether it is what was asked: adapters from here and from elsewhere, merged, cut, exported.

No training: the adapters have random numbers, as after it.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.train import restored
from undula.train.base import open_model
from undula.train.run import Run
from undula.train.tasks.classification import Classification

NAMES = ("sad", "so so", "glad")
IDS = torch.tensor([[2, 4, 5, 6, 3], [2, 9, 10, 7, 3]])


def call(*words, code=0):
    """(output, errors) of `undula words...`, white space made one."""
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return " ".join(done.stdout.split()), " ".join(done.stderr.split())


def config_of(path, name="adapter_config.json"):
    return json.loads((path / name).read_text())


def filled(parameters):
    for p in parameters:
        torch.nn.init.normal_(p, std=0.2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": f"the film was {w}", "label": name} for w, name in zip(tiny.WORDS * 2, NAMES * 13, strict=False)]
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", rows)


def left(path, bert, data, method, where=("query", "value")):
    """What `undula train` leaves: an adapter, a head and run.json."""
    run = Run(model=bert, data=data, task=Classification(names=NAMES), method=method, out=path, where=tuple(where))
    model, _ = open_model(run.model, run.task, run.dtype, run.seed)
    adapter = undula.attach(model, method, where, full=run.task.head(model))
    filled(adapter.parameters())
    adapter.save(path, base=bert, task="SEQ_CLS")
    run.save(None)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def gated(bert, data, tmp_path_factory):
    """A directory of an adapter that every verb takes."""
    path = tmp_path_factory.mktemp("gated") / "run"
    left(path, bert, data, undula.SoRA(r=2))
    return path


def foreign(path, base, cls, task, targets, **options):
    """A LoRA as PEFT leaves it, and its logits."""
    import peft

    given = {"r": 4, "target_modules": targets, "task_type": task, "init_lora_weights": False} | options
    model = peft.get_peft_model(cls.from_pretrained(base), peft.LoraConfig(**given)).eval()
    filled(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(path)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {})
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def lora(bert, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "lora"
    return path, left(path, bert, data, undula.LoRA(r=4))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def elsewhere(llama, tmp_path_factory):
    """A PEFT LoRA without run.json and without data."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("elsewhere") / "lora"
    return path, foreign(path, llama, LlamaForCausalLM, "CAUSAL_LM", ["q_proj", "v_proj"])


# --how, --set, --rows, --data: done, or refused


@pytest.mark.parametrize("verb", ["export", "collapse"])
@pytest.mark.parametrize("given", [("--how", "truncate", "--set", "r=2"), ("--set", "r=2")])
def test_a_low_rank_adapter_is_truncated_where_that_is_asked(verb, given, elsewhere, tmp_path):
    """A LoRA needs no collapse, so `export` once wrote it as it was whatever --how and --set said; and truncating
    B A needs neither data nor the base."""
    shown, _ = call(verb, elsewhere[0], *given, "--out", tmp_path / "o")
    made, wanted = undula.Adapter.load(tmp_path / "o"), undula.Adapter.load(elsewhere[0])
    assert {m.r for m in made.methods.values()} == {2}
    assert "relative error of the update, on the Frobenius norm of dW" in shown
    best = undula.collapse(wanted, undula.Truncate(2)).adapter
    for site in wanted.factors:
        torch.testing.assert_close(made.delta(site), best.delta(site))
    assert config_of(tmp_path / "o")["task_type"] == "CAUSAL_LM"


def test_a_collapsed_adapter_leaves_for_peft_by_a_second_export(elsewhere, tmp_path):
    shown, _ = call("collapse", elsewhere[0], "--set", "r=2", "--out", tmp_path / "c")
    assert "undula export" in shown
    call("export", tmp_path / "c", "--out", tmp_path / "e")
    assert (config_of(tmp_path / "e")["peft_type"], config_of(tmp_path / "e")["r"]) == ("LORA", 2)


@pytest.mark.parametrize("verb", ["export", "collapse"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--set", "rank=2"), "Truncate has no option rank; it has: r"),
        (("--how", "truncate", "--set", "ridge=1"), "Truncate has no option ridge"),
        (("--how", "substitute", "--set", "r=2"), "Substitute has no option r"),
        (("--how", "magic"), "no recipe is called 'magic'"),
        (("--how", "least-squares"), "say on which data"),
    ],
)
def test_what_cannot_be_done_is_refused(verb, given, message, elsewhere, tmp_path):
    assert message in call(verb, elsewhere[0], *given, "--out", tmp_path / "o", code=2)[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [("--rows", 4), ("--data", "x.jsonl")])
def test_an_exact_export_takes_no_data(given, lora, tmp_path):
    assert "leave out --rows and --data" in call("export", lora[0], *given, "--out", tmp_path / "o", code=2)[1]


def test_data_that_are_named_are_measured_on(lora, data, tmp_path):
    shown, _ = call("export", lora[0], "--set", "r=2", "--data", data, "--rows", 4, "--out", tmp_path / "o")
    assert "on held-out data" in shown
    assert (
        "no.jsonl does not exist"
        in call("export", lora[0], "--set", "r=2", "--data", "./no.jsonl", "--out", tmp_path / "p", code=2)[1]
    )


def test_dora_is_truncated_with_its_base_alone(llama, tmp_path):
    """W' - W of a reweighting method needs the base, but no data."""
    from transformers import LlamaForCausalLM

    foreign(tmp_path / "d", llama, LlamaForCausalLM, "CAUSAL_LM", ["q_proj"], use_dora=True)
    call("export", tmp_path / "d", "--set", "r=3", "--out", tmp_path / "o")
    assert config_of(tmp_path / "o")["r"] == 3


# Adapters from elsewhere


def bases(kind, path):
    """A tiny base of another kind and what PEFT adapts there."""
    import transformers as t

    torch.manual_seed(0)
    tiny.tokenizer(path)
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    words = len(tiny.WORDS) + 4
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"vocab_size": words, "max_position_embeddings": 40, "pad_token_id": 0}
    distil = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "vocab_size": words, "pad_token_id": 0}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": words}
    multi = {"problem_type": "multi_label_classification"}
    made = {
        # DistilBERT has a matrix before the output, which comes later in the alphabet
        "distilbert": lambda: (t.DistilBertForSequenceClassification, t.DistilBertConfig(**distil, **named), "q_lin"),
        "roberta": lambda: (t.RobertaForSequenceClassification, t.RobertaConfig(**small, **named), "query"),
        "bert": lambda: (t.BertForSequenceClassification, t.BertConfig(**small, **named), "query"),
        "llama": lambda: (t.LlamaForSequenceClassification, t.LlamaConfig(**small, **named), "q_proj"),
        "multi-label": lambda: (t.BertForSequenceClassification, t.BertConfig(**small, **named, **multi), "query"),
        "regression": lambda: (t.BertForSequenceClassification, t.BertConfig(**small, num_labels=1), "query"),
        "tokens": lambda: (t.BertForTokenClassification, t.BertConfig(**small, **named), "query"),
        "questions": lambda: (t.BertForQuestionAnswering, t.BertConfig(**small), "query"),
        "features": lambda: (t.BertModel, t.BertConfig(**small), "query"),
        "masked": lambda: (t.BertForMaskedLM, t.BertConfig(**small), "query"),  # PEFT has no name for it
        "t5": lambda: (t.T5ForConditionalGeneration, t.T5Config(**t5), "q"),
    }
    cls, config, target = made[kind]()
    return cls, config, TYPES.get(kind, "SEQ_CLS"), [target]


TYPES = {"tokens": "TOKEN_CLS", "questions": "QUESTION_ANS", "features": "FEATURE_EXTRACTION", "masked": None}
TYPES |= {"t5": "SEQ_2_SEQ_LM"}
KINDS = ("distilbert", "roberta", "bert", "llama", "multi-label", "regression", "tokens", "questions", "features")
KINDS += ("masked", "t5")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_task_merge_and_keep_their_names(kind, tmp_path):
    """The head is the layer whose width follows the number of labels, the names are the base's; a merge needs no task
    that undula trains."""
    cls, config, task, targets = bases(kind, tmp_path / "base")
    cls(config).save_pretrained(tmp_path / "base")
    want = foreign(tmp_path / "lora", tmp_path / "base", cls, task, targets)
    call("merge", tmp_path / "lora", "--out", tmp_path / "merged")
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {})
    with torch.no_grad():
        torch.testing.assert_close(cls.from_pretrained(tmp_path / "merged").eval()(**inputs)[0], want)
    told = config_of(tmp_path / "merged", "config.json")
    assert (told.get("id2label"), told.get("problem_type")) == (
        config_of(tmp_path / "base", "config.json").get("id2label"),
        config.problem_type,
    )
    call("export", tmp_path / "lora", "--set", "r=2", "--out", tmp_path / "small")
    assert config_of(tmp_path / "small")["task_type"] == task


@pytest.mark.parametrize("kind", ["distilbert", "bert", "llama"])
def test_adapters_from_elsewhere_are_scored_by_the_names_of_their_classes(kind, data, tmp_path):
    cls, config, task, targets = bases(kind, tmp_path / "base")
    cls(config).save_pretrained(tmp_path / "base")
    foreign(tmp_path / "lora", tmp_path / "base", cls, task, targets)
    assert "accuracy" in call("eval", tmp_path / "lora", "--data", data)[0]


def test_a_head_of_another_size_than_the_bases_tells_how_many_classes_there_are(bert, data, tmp_path):
    """The base is a bare body, whose configuration speaks of two labels; the adapter's head has three."""
    from transformers import AutoModelForSequenceClassification as Auto

    class Three:
        @staticmethod
        def from_pretrained(path):
            return Auto.from_pretrained(path, num_labels=3)

    want = foreign(tmp_path / "lora", bert, Three, "SEQ_CLS", ["query"])
    call("merge", tmp_path / "lora", "--out", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(Auto.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS).logits, want)


def test_what_has_no_metric_here_says_so(data, tmp_path):
    cls, config, task, targets = bases("questions", tmp_path / "base")
    cls(config).save_pretrained(tmp_path / "base")
    foreign(tmp_path / "lora", tmp_path / "base", cls, task, targets)
    assert "QUESTION_ANS" in call("eval", tmp_path / "lora", "--data", data, code=2)[1]


# What a colleague needs


def test_an_export_opens_with_peft_and_transformers_alone(lora, bert, tmp_path):
    """The classes, the tokenizer and a card are there: three lines that the card gives, run as they stand."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    path, want = lora
    out = tmp_path / "plain"
    call("export", path, "--out", out)
    card = (out / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0].replace('"plain"', repr(str(out)))
    room = {}
    exec(lines, room)
    with torch.no_grad():
        torch.testing.assert_close(room["model"].eval()(input_ids=IDS).logits, want)
    assert room["config"].id2label == dict(enumerate(NAMES))
    assert room["config"].label2id == {n: i for i, n in enumerate(NAMES)}
    assert len(AutoTokenizer.from_pretrained(out)) == len(tiny.WORDS) + 4
    from peft import AutoPeftModelForSequenceClassification

    (line,) = re.findall(r"`(AutoPeft[^`]*)`", card)  # over a base without a head for these classes
    model = eval(
        line.replace('"plain"', repr(str(out))),
        {"AutoPeftModelForSequenceClassification": AutoPeftModelForSequenceClassification},
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, want)
    assert all(name in card for name in NAMES)
    assert "a folder of the machine" in card
    assert bert in card
    config = AutoConfig.from_pretrained(out, subfolder="base")
    by_transformers = AutoModelForSequenceClassification.from_pretrained(out, config=config)
    with torch.no_grad():
        torch.testing.assert_close(by_transformers.eval()(input_ids=IDS).logits, want)


@pytest.mark.parametrize("pad", ["[UNK]", None])
def test_an_export_pads_as_the_training_did(pad, data, tmp_path):
    """A decoder's head reads the last token that is no padding: the base's configuration says another, or none."""
    from transformers import AutoTokenizer

    base, path, out = tiny.llama(tmp_path / "base"), tmp_path / "run", tmp_path / "plain"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(base)
    config = config_of(tmp_path / "base", "config.json") | ({} if pad else {"pad_token_id": None})
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    left(path, base, data, undula.LoRA(r=2), ("q_proj", "v_proj"))
    call("export", path, "--out", out)
    lines = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    room = {}
    exec(lines.replace('"plain"', repr(str(out))), room)
    texts = ["the film was very good", "bad"]
    batch = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    opened = restored(path)
    with torch.no_grad():
        got = room["model"].eval()(**batch).logits
        ids = [opened.processor(text, return_tensors="pt")["input_ids"] for text in texts]
        want = torch.cat([opened.model.eval()(input_ids=i).logits for i in ids])  # each alone: nothing is padded
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_export_keeps_the_tokenizer_that_came_with_the_adapter(elsewhere, tmp_path):
    """As `eval` and `merge` do: the adapter was trained with that one."""
    from transformers import AutoTokenizer

    path = shutil.copytree(elsewhere[0], tmp_path / "theirs")
    own = tiny.tokenizer(tmp_path / "own")
    own.add_tokens(["newly"])
    own.save_pretrained(path)
    call("export", path, "--out", tmp_path / "o")
    assert "newly" in AutoTokenizer.from_pretrained(tmp_path / "o").get_vocab()


def test_an_export_of_a_language_model_opens_by_one_line(elsewhere, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    call("export", elsewhere[0], "--out", tmp_path / "o")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with torch.no_grad():
            torch.testing.assert_close(auto.from_pretrained(tmp_path / "o").eval()(input_ids=IDS).logits, elsewhere[1])


def test_the_base_of_a_bundled_model_has_the_hubs_name(lora, bert, tmp_path, monkeypatch):
    """A folder of this machine's cache is nothing to a colleague; undula itself finds its own base again."""
    from undula.bundled import registry

    monkeypatch.setattr(registry, "fetch", lambda name, *_: bert)
    path = tmp_path / "run"
    call("export", lora[0], "--out", tmp_path / "before")
    run = config_of(lora[0], "run.json")
    run["run"]["model"] = "bundled:minilm"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes((lora[0] / "adapter_model.safetensors").read_bytes())
    folder = "/home/somebody/.cache/undula/minilm-b9a0018dff09-1"  # what earlier versions wrote
    told = config_of(lora[0]) | {"base_model_name_or_path": folder}
    (path / "adapter_config.json").write_text(json.dumps(told))
    (path / "run.json").write_text(json.dumps(run))
    call("export", path, "--out", tmp_path / "o")
    assert config_of(tmp_path / "o")["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    card = (tmp_path / "o" / "README.md").read_text()
    assert "bundled:minilm" in card
    assert bert not in card
    call("merge", tmp_path / "o", "--out", tmp_path / "merged")
    assert config_of(tmp_path / "merged", "config.json")["id2label"] == {str(i): n for i, n in enumerate(NAMES)}


@pytest.mark.parametrize("verb", ["merge", "eval", "collapse", "export", "prune", "show", "exported"])
@pytest.mark.parametrize("edited", ["adapter_config.json", "run.json"])
def test_two_files_that_name_two_bases_are_refused(verb, edited, gated, tmp_path, monkeypatch):
    """Nothing tells which of them was edited to what is meant.  A base that is named counts before both."""
    from undula.bundled import registry

    path = tmp_path / "run"
    shutil.copytree(gated, path)
    if verb == "exported":
        if edited == "run.json":
            pytest.skip("there is none")
        monkeypatch.setattr(registry, "fetch", lambda name, *_: config_of(gated, "run.json")["run"]["model"])
        told = config_of(path, "run.json")
        told["run"]["model"] = "bundled:minilm"
        (path / "run.json").write_text(json.dumps(told))
        (path / "adapter_config.json").write_text(
            json.dumps(config_of(path) | {"base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2"})
        )
        path = tmp_path / "lora"
        call("export", tmp_path / "run", "--out", path)
    told = config_of(path, edited)
    if edited == "run.json":
        told["run"]["model"] = "another/base"
    else:
        told["base_model_name_or_path"] = "another/base"
    (path / edited).write_text(json.dumps(told))
    verb = "merge" if verb == "exported" else verb
    words = {"eval": [], "show": ["--rows", 2]}.get(verb, ["--out", tmp_path / "out"])
    said = call(verb, path, *words, code=2)[1]
    other = "config.json" if path.name == "lora" else "run.json"
    assert f"{other} says that the base is" in said
    assert "adapter_config.json says" in said
    assert "another/base" in said
    assert not (tmp_path / "out").exists()
    if verb in ("merge", "eval", "export"):
        call(verb, path, "--model", config_of(gated, "run.json")["run"]["model"], *words)


def test_two_files_that_name_two_tasks_are_refused(gated, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(gated, path)
    (path / "adapter_config.json").write_text(json.dumps(config_of(path) | {"task_type": "CAUSAL_LM"}))
    said = call("merge", path, "--out", tmp_path / "out", code=2)[1]
    assert "run.json says Classification (task_type SEQ_CLS)" in said
    assert "adapter_config.json says task_type CAUSAL_LM" in said


def test_a_base_that_was_named_is_the_base_of_what_is_written(gated, bert, tmp_path):
    """Both files say so: the directory opens on it."""
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    call("collapse", gated, "--model", other, "--out", tmp_path / "out")
    assert config_of(tmp_path / "out", "run.json")["run"]["model"] == str(other)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(other)
    call("eval", tmp_path / "out")


def test_an_export_whose_base_is_not_here_says_what_is_missing(elsewhere, tmp_path):
    told = config_of(elsewhere[0]) | {"base_model_name_or_path": "some/model"}
    path = tmp_path / "lora"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes((elsewhere[0] / "adapter_model.safetensors").read_bytes())
    (path / "adapter_config.json").write_text(json.dumps(told))
    said = call("export", path, "--out", tmp_path / "o")[1]
    assert "only the adapter's own files were written" in said
    assert config_of(tmp_path / "o")["base_model_name_or_path"] == "some/model"


def test_show_says_whether_rows_were_run(gated, monkeypatch):
    """Rows tell something of AuroRA alone: for others none is run, and only the option that was given is named."""
    from undula.cli import adapters

    seen, real = [], adapters.diagnose
    monkeypatch.setattr(adapters, "diagnose", lambda model, rows=None: seen.append(rows) or real(model, rows))
    said = call("show", gated, "--rows", 2)[0]
    assert "--rows: no row was run, since rows tell something only of a method that bends" in said
    assert "--data" not in said
    assert seen == [None]
    assert "no row was run" not in call("show", gated)[0]


# Whole or not there

VERBS = {
    "merge": ("merge",),
    "export": ("export",),
    "truncating export": ("export", "--set", "r=2"),
    "collapse": ("collapse", "--set", "r=2", "--how", "truncate"),
    "cut": ("cut", "--rank", 1),
    "prune": ("prune",),
}
KILLED = """
import os, signal, sys
from pathlib import Path
from undula.io.whole import whole
with whole(Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def ranked(bert, data, tmp_path_factory):
    """An adapter for `cut` and one for `prune`."""
    room = tmp_path_factory.mktemp("ranked")
    left(room / "cut", bert, data, undula.DyLoRA(r=2))
    left(room / "prune", bert, data, undula.GatedLoRA(r=2))
    return room


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_in_the_middle_leaves_nothing(verb, lora, ranked, tmp_path, monkeypatch):
    """Whatever breaks while the last file is written: no folder that looks whole, and the name stays free."""
    from undula.io import whole

    path = ranked / verb if verb in ("cut", "prune") else lora[0]
    words = (*VERBS[verb][:1], path, *VERBS[verb][1:], "--out", tmp_path / "o")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "sync", full)
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code in (1, 2)
    assert "No space left on device" in done.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    call(*words)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_verb_cleans_up(elsewhere, tmp_path):
    out = tmp_path / "o"
    words = [sys.executable, "-c", KILLED, str(out)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert [p.name[:14] for p in tmp_path.iterdir()] == [".unfinished-o-"]
    call("merge", elsewhere[0], "--out", out)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_folders_of_living_processes_are_left_alone(tmp_path):
    from undula.io.whole import whole

    with whole(tmp_path / "a") as first:
        (first / "x").write_text("x")
        with whole(tmp_path / "b") as second:
            (second / "y").write_text("y")
        assert (first / "x").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(FileExistsError, match="is not empty"), whole(tmp_path / "a"):
        pass


def test_scratch_space_is_ones_own_and_what_a_kill_has_left_goes_with_the_next(tmp_path):
    from undula.io.whole import scratch

    (tmp_path / ".unfinished-ray-0").mkdir()
    with scratch(tmp_path, "ray") as first, scratch(tmp_path, "ray") as second:
        (first / "x").write_text("x")
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
        assert first.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_place_is_named(tmp_path):
    """As it was asked for, and not the hidden name; a full disk says none at all."""
    from undula.io.draft import Draft
    from undula.io.whole import whole

    (tmp_path / "file").touch()
    within, full = tmp_path / "file" / "a", tmp_path / "a"
    with pytest.raises(OSError, match=f"^{re.escape(str(within))} cannot be written: "), whole(within):
        pass
    told = rf"No space left on device \(make room there, or write elsewhere\): '{re.escape(str(full))}'"
    with pytest.raises(OSError, match=told), whole(full):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=told), whole(full) as folder, Draft(folder / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=told), Draft(full):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_umask_counts(tmp_path):
    from undula.io.whole import whole

    before = os.umask(0o077)
    try:
        with whole(tmp_path / "a") as folder:
            (folder / "x").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_names_of_classes_go_from_training_through_an_average_to_a_merge(bert, data, tmp_path):
    """The head of an average answers its parts' classes, by their names; of parts in another order there is none."""
    made = {}
    for seed, names in ((1, NAMES), (2, NAMES), (3, NAMES[::-1])):
        run = Run(model=bert, data=data, task=Classification(names=names), method=undula.LoRA(r=2),
                  out=tmp_path / str(seed), where=("query",), max_steps=2, batch=4, seed=seed)  # fmt: skip
        undula.train(run)
        made[seed] = undula.Adapter.load(run.out)
        assert made[seed].about["classes"] == list(names)
    (0.5 * made[1] + 0.5 * made[2]).save(tmp_path / "mean")
    with pytest.raises(ValueError, match="other classes, or the same in another order"):
        0.5 * made[1] + 0.5 * made[3]
    call("merge", tmp_path / "mean", "--model", bert, "--out", tmp_path / "merged")
    assert config_of(tmp_path / "merged", "config.json")["id2label"] == {str(i): n for i, n in enumerate(NAMES)}


def test_an_evaluation_on_data_whose_columns_are_called_otherwise(bert, data, tmp_path):
    left(tmp_path / "a", bert, data, undula.LoRA(r=2))
    rows = [{"review": f"the film was {w}", "verdict": name} for w, name in zip(tiny.WORDS, NAMES * 9, strict=False)]
    other = tiny.jsonl(tmp_path / "other.jsonl", rows)
    columns = ("--column", "text=review", "--column", "label=verdict")
    told = json.loads(
        CliRunner().invoke(app, ["eval", str(tmp_path / "a"), "--data", other, *columns, "--json", "-"]).stdout
    )
    found = undula.evaluate(tmp_path / "a", data=other, columns={"text": "review", "label": "verdict"})
    assert told["accuracy"] == found["accuracy"]
    _, errors = call("eval", tmp_path / "a", "--data", other, "--column", "prompt=review", code=2)
    assert "Classification has no column prompt; it has:" in errors
