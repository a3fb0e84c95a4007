"""Training on the real transformers.Trainer: it learns, it is saved, it resumes to the bit, bad input is named."""

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import undula
from tests.support import tiny
from undula.train import (
    CausalLM,
    Chat,
    Classification,
    Examples,
    Interrupted,
    Plain,
    Regression,
    Run,
    evaluate,
    restored,
)
from undula.train.base import open_model
from undula.train.concluding import Diverged
from undula.train.data.load import load_data, with_validation
from undula.train.resume import last_checkpoint

LORA = undula.LoRA(r=2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", tiny.reviews(80))


def classify(model, data, out, **changes):
    usual = {"lr": 5e-3, "max_steps": 14, "batch": 8, "save_every": 4, "seed": 3}
    run = Run(model=model, data=data, task=Classification(), method=LORA, out=out, **usual)
    return dataclasses.replace(run, **changes)


def weights(path):
    return load_file(path / "adapter_model.safetensors")


def assert_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(bert, reviews, tmp_path_factory):
    """A run that nothing interrupted: its directory and report."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, undula.train(classify(bert, reviews, out))


def test_report_and_directory(whole):
    out, report = whole
    assert report == json.loads((out / "report.json").read_text())
    assert (report["method"], report["rung"], report["steps"], report["seed"]) == ("LoRA", "LowRank", 14, 3)
    assert report["train_rows"] + report["eval_rows"] == 80
    adapter = undula.Adapter.load(out)
    assert set(adapter.full) == {"classifier.weight", "classifier.bias"}
    assert report["trainable_parameters"] == adapter.num_parameters() == sum(t.numel() for t in weights(out).values())
    assert 10 << 20 < report["peak_memory_bytes"] < 100 << 30
    assert report["versions"]["torch"] == torch.__version__
    assert 0 < report["seconds"] < report["seconds_with_evaluation"]
    assert set(report["before"]) == set(report["after"]) == {"loss", "accuracy", "macro_f1", "mcc"}


def test_checkpoints_hold_the_adapter_alone(whole, bert):
    out, _ = whole
    (last,) = (out / "checkpoints").glob("checkpoint-14")
    names = {p.name for p in last.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}
    base = (Path(bert) / "model.safetensors").stat().st_size
    assert (last / "adapter_model.safetensors").stat().st_size < base / 2
    assert_same(last, out)


def test_a_saved_run_measures_the_same(whole):
    out, report = whole
    assert evaluate(out) == report["after"]
    told = undula.Adapter.load(out).about
    assert told["created_by"] == f"undula {undula.__version__}"
    assert told["training"]["after"] == report["after"]
    assert told["training"]["steps"] == report["steps"]
    assert evaluate(out, split="train", rows=20) != report["after"]
    with pytest.raises(LookupError, match=r"no split 'exam'; there are: train \(80 rows\)"):
        evaluate(out, split="exam")


def test_the_seed_decides(whole, bert, reviews, tmp_path):
    out, _ = whole
    undula.train(classify(bert, reviews, tmp_path / "again"))
    assert_same(out, tmp_path / "again")
    undula.train(classify(bert, reviews, tmp_path / "other", seed=4, max_steps=1))
    head = "base_model.model.classifier.weight"
    assert not torch.equal(weights(tmp_path / "other")[head], weights(out)[head])


def test_measuring_does_not_touch_training(whole, bert, reviews, tmp_path, monkeypatch):
    """The same weights, whatever a task draws from the random generators while it measures."""
    score = Classification.score

    def drawing(*given):
        torch.rand(5)
        return score(*given)

    monkeypatch.setattr(Classification, "score", drawing)
    undula.train(classify(bert, reviews, tmp_path))
    assert_same(tmp_path, whole[0])


CHILD = """
import sys, time, torch
from transformers import TrainerCallback
import undula
class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
        time.sleep(600 if state.global_step == 10 else 0)  # until it is killed
undula.train(undula.Run.load(sys.argv[1]), resume=True, callbacks=(Tell(),))
"""


def test_resumes_to_the_bit_after_a_kill(whole, bert, reviews, tmp_path, python):
    """SIGKILL in the middle of an epoch and of a checkpoint interval, with dropout; then on in another process."""
    out = tmp_path / "killed"
    classify(bert, reviews, out).save(None)
    child = subprocess.Popen([python, "-c", CHILD, out], stdout=subprocess.PIPE, text=True)
    try:
        for line in child.stdout:
            if line == "step 10\n":
                child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not (out / "adapter_model.safetensors").exists()
    assert last_checkpoint(out).name == "checkpoint-8"
    torn = out / "checkpoints" / "checkpoint-12"  # a kill while a checkpoint is written
    torn.mkdir()
    (torn / "adapter_config.json").write_text("{}")
    report = undula.train(undula.Run.load(out), resume=True)
    assert (report["resumed_from_step"], report["steps"]) == (8, 14)
    assert report["before"] == whole[1]["before"]
    assert report["after"] == whole[1]["after"]
    assert_same(out, whole[0])


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, bert, reviews, tmp_path):
    out = tmp_path / "with space"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped at step 6 of 14; go on with: undula train --resume '.*with space'"):
        undula.train(classify(bert, reviews, out), callbacks=(Interrupt(),))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (out / "report.json").exists()
    assert undula.train(undula.Run.load(out), resume=True)["resumed_from_step"] == 6
    assert_same(out, whole[0])
    with pytest.raises(FileExistsError, match="is finished"):
        undula.train(undula.Run.load(out), resume=True)


def test_a_directory_is_not_overwritten(whole, bert, reviews, tmp_path):
    out, _ = whole
    with pytest.raises(FileExistsError, match="holds a run already"):
        undula.train(classify(bert, reviews, out))
    classify(bert, reviews, tmp_path / "begun").save(None)
    with pytest.raises(FileExistsError, match="undula train --resume"):
        undula.train(classify(bert, reviews, tmp_path / "begun"))
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing"):
        undula.train(classify(bert, reviews, tmp_path / "nothing"), resume=True)


def test_a_checkpoint_of_another_method_is_refused(bert, reviews, tmp_path):
    undula.train(classify(bert, reviews, tmp_path, max_steps=4))
    (tmp_path / "report.json").unlink()
    changed = dataclasses.replace(Run.load(tmp_path), method=undula.AuroRA(), max_steps=8)
    with pytest.raises(ValueError, match=r"holds LoRA\(.*the run has AuroRA"):
        undula.train(changed, resume=True)


def test_it_learns(bert, tmp_path):
    """Good words against bad ones, to the last row, in every metric."""
    data = tiny.jsonl(tmp_path / "d.jsonl", tiny.reviews(300))
    method = undula.LoRA(r=4, alpha=8.0)
    report = undula.train(classify(bert, data, tmp_path / "lora", max_steps=120, batch=16, method=method))
    assert report["after"]["loss"] < 0.2 < report["before"]["loss"]
    assert report["after"]["accuracy"] == report["after"]["macro_f1"] == report["after"]["mcc"] == 1.0


def test_head_alone(bert, reviews, tmp_path):
    report = undula.train(classify(bert, reviews, tmp_path, method=None, max_steps=2))
    assert (report["method"], report["rung"], report["sites"]) == ("head only", None, 0)
    assert report["trainable_parameters"] == 32 * 2 + 2
    assert evaluate(tmp_path) == report["after"]
    more = classify(bert, reviews, tmp_path / "more", method=None, max_steps=1, full=("pooler",))
    assert undula.train(more)["trainable_parameters"] == 66 + 32 * 32 + 32


@pytest.mark.parametrize("method", [undula.LoRAN(r=2), undula.AuroRA(), undula.DoRA(), undula.Dropout(LORA, 0.1)])
def test_other_methods_train(method, bert, reviews, tmp_path):
    report = undula.train(classify(bert, reviews, tmp_path, method=method, max_steps=2, overrides={"*.query": LORA}))
    adapter = undula.Adapter.load(tmp_path)
    assert set(adapter.methods.values()) == {method, LORA}
    assert report["after"]["loss"] != report["before"]["loss"]
    assert Run.load(tmp_path).method == method


def test_divergence_is_an_error(bert, reviews, tmp_path):
    with pytest.raises(Diverged, match=r"the training diverged at step . of 4.*lr=1e\+30"):
        undula.train(classify(bert, reviews, tmp_path, lr=1e30, max_steps=4))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["state"], report["after"]) == ("diverged", {})
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_regression(bert, tmp_path):
    for split, n in (("train", 200), ("validation", 40)):
        drawn = tiny.reviews(n, seed=n)
        rows = [{"text": r["text"], "label": 1.5 if r["label"] == "good" else -0.5} for r in drawn]
        tiny.table(tmp_path / f"{split}.csv", rows)
    method = undula.LoRA(r=4, alpha=8.0)
    run = classify(bert, str(tmp_path), tmp_path / "o", task=Regression(), max_steps=120, method=method)
    report = undula.train(run)
    assert report["after"]["mse"] < report["before"]["mse"] / 2
    assert report["after"]["pearson"] > 0.9
    assert report["after"]["spearman"] > 0.8


def test_correlations_against_scipy():
    from scipy.stats import pearsonr, spearmanr

    from undula.train.tasks.classification import correlations

    a, b = torch.tensor([1.0, 2, 2, 5, -3]), torch.tensor([0.0, 1, 1, 1, 7])
    expected = {"pearson": pearsonr(a, b).statistic, "spearman": spearmanr(a, b).statistic}
    assert correlations(a, b) == pytest.approx(expected)
    assert correlations(a, torch.ones(5)) == correlations(torch.ones(5), a) == {"pearson": 0, "spearman": 0}


def test_pairs_of_texts(bert, tmp_path):
    rows = [{"premise": "good film", "hypothesis": f"{w} film", "label": int(w in tiny.GOOD)} for w in tiny.WORDS[:10]]
    task = Classification(text="premise", names=("no", "yes"))
    data = tiny.jsonl(tmp_path / "d.jsonl", [dict(r, label=["no", "yes"][r["label"]]) for r in rows])
    undula.train(classify(bert, data, tmp_path / "o", task=task, max_steps=1, batch=2))
    example = restored(tmp_path / "o").examples()[0]
    assert 1 in example["token_type_ids"]


SUMMARIES = [{"text": f"the {a} was {w} and {w}", "summary": f"{w} {a}"} for a in ("film", "food") for w in tiny.GOOD]


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "summaries.jsonl", SUMMARIES * 4)


def test_language_model(llama, summaries, tmp_path):
    """Loss on the completion falls, and what it writes gets closer to it."""
    run = Run(
        model=llama,
        data=summaries,
        task=CausalLM(format=Plain(between=" is "), max_completion=6, generate=4),
        method=undula.LoRAN(r=4),
        out=tmp_path,
        lr=1e-2,
        max_steps=60,
        batch=8,
    )
    report = undula.train(run)
    before, after = report["before"], report["after"]
    assert after["loss"] < before["loss"] / 2
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item())
    assert after["rougeL"] > max(before["rougeL"], 0.4)
    assert set(after) == {"loss", "perplexity", "rouge1", "rouge2", "rougeL", "exact_match"}
    assert evaluate(tmp_path) == after


def test_loss_is_on_the_completion(llama, tmp_path):
    """Against the loss written out: each completion token (its end included) under the model, given all before it."""
    task = CausalLM(format=Plain(between=" is "), generate=0)
    opened = open_model(llama, task, torch.float32, 0)
    rows = task.rows(datasets.Dataset.from_list([*SUMMARIES[:3], {"text": "a " * 12, "summary": "bad"}]))
    examples = Examples(task, rows, opened[1])
    total, count = 0.0, 0
    for row in rows:
        prompt = opened[1](row["prompt"] + " is ", add_special_tokens=False)["input_ids"]
        completion = [*opened[1](row["completion"], add_special_tokens=False)["input_ids"], 3]
        with torch.no_grad():
            logp = opened[0](torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        total -= sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))
        count += len(completion)
    assert task.score(opened[0], examples, 2)["loss"] == pytest.approx(total / count, rel=1e-5)
    assert task.score(opened[0], examples, 4)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_prompts_of_different_lengths_are_continued_alike(llama):
    """A batch is padded before the prompts: what is written does not depend on the neighbours."""
    task = CausalLM(format=Plain(), max_completion=8)
    model, tokenizer = open_model(llama, task, torch.float32, 0)
    prompts = ["good", "the very nice film was", "a sad day", "happy and angry and great"]
    alone = [task.write(model, [text], tokenizer, 1)[0] for text in prompts]
    assert len(set(alone)) > 1
    assert task.write(model, prompts, tokenizer, 3) == alone


def test_chat_template_and_long_prompts(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, chat=True)
    example = CausalLM().example({"prompt": "good film", "completion": "happy"}, tokenizer)
    shown = tokenizer.decode(example["input_ids"]).split()
    assert shown == ["[CLS]", "good", "film", "[SEP]", "happy", "[SEP]"]
    assert example["labels"][:4] == [-100] * 4
    assert example["labels"][4:] == example["input_ids"][4:]
    long = CausalLM(format=Chat(instruction="the "), max_length=6).prompt_ids("good " * 50, tokenizer)
    assert tokenizer.decode(long).split() == ["[CLS]", "the", "good", "good", "good", "[SEP]"]
    with pytest.raises(ValueError, match="leaves no room"):
        CausalLM(max_length=2).prompt_ids("good " * 50, tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        CausalLM(format=Chat()).prompt_ids("good", tiny.tokenizer(tmp_path / "plain"))


# Data


def test_every_kind_of_file_reads_the_same(tmp_path):
    rows = [{"text": 'a "quoted",\nbroken line', "label": 1}, {"text": "b", "label": 0}]
    table = datasets.Dataset.from_list(rows)
    tiny.jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    tiny.table(tmp_path / "c.csv", rows)
    tiny.table(tmp_path / "d.tsv", rows, "\t")
    table.to_parquet(tmp_path / "e.parquet")
    table.save_to_disk(tmp_path / "f")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "g")
    (tmp_path / "h").mkdir()
    tiny.jsonl(tmp_path / "h" / "train.jsonl", rows)
    written = [row | {"label": str(row["label"])} for row in rows]  # a cell is a text
    for path in tmp_path.iterdir():
        table = path.suffix in (".csv", ".tsv")
        assert load_data(str(path))["train"].to_list() == (written if table else rows), path


def test_a_folder_of_splits(tmp_path):
    tiny.jsonl(tmp_path / "train.jsonl", tiny.reviews(4))
    tiny.table(tmp_path / "validation.csv", tiny.reviews(3))
    data = with_validation(load_data(str(tmp_path)), 0)
    assert {k: len(v) for k, v in data.items()} == {"train": 4, "validation": 3}


def test_validation_is_made_from_train():
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": str(i)} for i in range(50)]))
    made = with_validation(data, 1)
    parts = [set(made[s]["text"]) for s in ("train", "validation")]
    assert [len(p) for p in parts] == [45, 5]
    assert not parts[0] & parts[1]
    assert made["validation"]["text"][:] == with_validation(data, 1)["validation"]["text"][:]
    assert made["validation"]["text"][:] != with_validation(data, 2)["validation"]["text"][:]
    with pytest.raises(ValueError, match="cannot be split"):
        with_validation(datasets.DatasetDict(train=data["train"].select([0])), 0)


BAD_ROWS = {
    "missing column": (
        [{"body": "a", "label": "x"}],
        LookupError,
        "no column for text .*their columns are: body, label",
    ),
    "no label": ([{"text": "a", "stars": 1}], LookupError, "no column for label .*columns are: text, stars"),
    "one class": ([{"text": "a", "label": "x"}] * 5, ValueError, r"two classes or more.*\['x'\]"),
    "empty text": (
        [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}] * 10,
        ValueError,
        r"d.jsonl, column 'text' is empty: line 2, line 4, .*line 20\. Fill or remove",
    ),
    "no text": (
        [{"text": 3, "label": "x"}, {"text": 4, "label": "y"}] * 5,
        ValueError,
        r"'text' holds what is no text: line 1 has 3 \(int\), line 2 has 4",
    ),
    "fractions": ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 5, ValueError, "--task regression"),
    "missing label": (
        [{"text": "a", "label": "x"}, {"text": "b", "label": None}] * 5,
        ValueError,
        "'label' is empty: line 2, line 4",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name, tmp_path):
    rows, kind, message = BAD_ROWS[name]
    rows = rows * 2 if name in ("missing column", "no label") else rows
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(kind, match=message):
        undula.train(classify("nowhere", data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_classes_that_training_never_saw(bert, tmp_path):
    tiny.jsonl(tmp_path / "train.jsonl", tiny.reviews(20))
    tiny.jsonl(tmp_path / "validation.jsonl", [{"text": "so so", "label": "middling"}])
    with pytest.raises(ValueError, match=r"not known: line 1 has 'middling'\. The classes are: bad, good"):
        undula.train(classify(bert, str(tmp_path), tmp_path / "out"))


BAD_FILES = {
    "missing file": ("reviews.csvv", None, FileNotFoundError, r"is no file or folder here"),
    "misspelt": ("./revews.jsonl", None, FileNotFoundError, r"has: reviews.jsonl.*Did you mean 'reviews.jsonl'"),
    "no folder": ("./there/x.csv", None, FileNotFoundError, "there is no folder there"),
    "kind": ("notes.txt", "hello", ValueError, r"data files are .jsonl, .json, .csv, .*; found '.txt'"),
    "not JSON": ("x.jsonl", '{"text": "a"}\n{"text": \n', ValueError, "not JSON: line 2"),
    "no object": ("x.jsonl", "[1]\n", ValueError, "every line or item is an object: line 1 has a list"),
    "empty": ("x.jsonl", "\n", ValueError, "has no rows"),
    "not CSV": ("x.csv", "a,b\n1,2,3\n", ValueError, r"as the header has \(2: a, b\): line 2 has 3"),
    "not Parquet": ("x.parquet", "hello", ValueError, "could not be read"),
    "folder": (".", None, FileNotFoundError, "neither a folder saved by `datasets`, nor one with a file train"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path, monkeypatch):
    path, text, kind, message = BAD_FILES[name]
    monkeypatch.chdir(tmp_path)
    tiny.jsonl(tmp_path / "reviews.jsonl", tiny.reviews(4))
    if text is not None:
        Path(path).write_text(text)
    with pytest.raises(kind, match=message):
        load_data(path)


def test_bad_models(reviews, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder here, and the hub gave no model of that name"):
        undula.train(classify("no-such-model", reviews, tmp_path / "a"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"is a folder, but no model.*it has: notes.txt"):
        undula.train(classify(str(tmp_path), reviews, tmp_path / "b"))
    with pytest.raises(RuntimeError, match="no bundled model is called 'gpt9'"):
        undula.train(classify("bundled:gpt9", reviews, tmp_path / "c"))


def test_bad_runs(bert, reviews, tmp_path):
    with pytest.raises(ValueError, match=r"Run\.lr is greater than 0, found -1"):
        classify(bert, reviews, tmp_path, lr=-1)
    with pytest.raises(LookupError, match=r"where='\*_proj' matches none"):
        undula.train(classify(bert, reviews, tmp_path / "a", where="*_proj"))
    with pytest.raises(ValueError, match="this task has none"):
        undula.train(classify(bert, reviews, tmp_path / "b", method=None, task=CausalLM("text", "label")))


def test_run_round_trip(tmp_path):
    run = Run(
        model="bundled:minilm",
        data="bundled:wordnet",
        task=CausalLM("a", "b", format=Plain("x", "y")),
        method=undula.DoRA(undula.LoRAN(r=3)),
        out=tmp_path,
        where=("*.q", "*.v"),
        overrides={"*.q": undula.AuroRA()},
        full=("norm",),
        dtype=torch.bfloat16,
        epochs=1.5,
    )
    run.save({"loss": 1.0})
    assert Run.load(tmp_path) == run
    encoded = run.encode()
    with pytest.raises(LookupError, match="a run has no depth; its fields are: model, data"):
        Run.decode(encoded | {"depth": 3}, tmp_path)
    with pytest.raises(LookupError, match="a run needs model"):
        Run.decode({k: v for k, v in encoded.items() if k != "model"}, tmp_path)
    with pytest.raises(ValueError, match="lr is a finite number greater than 0, found 'fast'"):
        Run.decode(encoded | {"lr": "fast"}, tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Run.load(tmp_path)


def test_a_real_model(tmp_path):
    """A few steps of MiniLM on WordNet: the loss falls."""
    folder = pytest.importorskip("undula.bundled").ASSETS["minilm"].folder
    if not folder.is_dir():
        pytest.skip("the bundled MiniLM is not fetched")
    task = Classification(max_length=32)
    run = classify("bundled:minilm", "bundled:wordnet", tmp_path, task=task, max_steps=30, train_rows=400,
                   eval_rows=64, lr=3e-3)  # fmt: skip
    report = undula.train(run)
    assert report["after"]["loss"] < report["before"]["loss"] - 0.1
    assert len(Run.load(tmp_path).task.names) == 20


def test_the_head_has_its_own_rate(bert, reviews, tmp_path):
    """A part with a rate of 1e-30 stays where it is, whatever the other part does."""

    def moved(name, **rates):
        run = Run(model=bert, data=reviews, task=Classification(), method=undula.LoRA(r=2), out=tmp_path / name,
                  max_steps=3, batch=8, warmup=0.0, **rates)  # fmt: skip
        undula.train(run)
        opened = restored(tmp_path / name)
        torch.manual_seed(run.seed)
        fresh = open_model(bert, opened.run.task, torch.float32, run.seed)[0]
        start = dict(fresh.named_parameters())
        head = max((t - start[n]).abs().max().item() for n, t in opened.adapter.full.items())
        return head, max(f["B"].abs().max().item() for f in opened.adapter.factors.values())

    head, B = moved("still", lr=1e-2, head_lr=1e-30)
    assert head < 1e-20
    assert B > 1e-3
    head, B = moved("alone", lr=1e-30, head_lr=1e-2)
    assert head > 1e-3
    assert B < 1e-20


@pytest.mark.parametrize("out", ["taken", "taken/below/it"])
def test_a_place_where_no_directory_can_be_is_refused_before_anything_is_read(out, tmp_path):
    (tmp_path / "taken").write_text("mine")
    run = Run("no model", "no data", Classification(), undula.LoRA(), tmp_path / out)
    with pytest.raises(FileExistsError, match=r"taken is a file, so .* can be no directory: name another"):
        undula.train(run)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    run = Run("no model", "no data", Classification(), undula.LoRA(), tmp_path / "below" / "it")
    with pytest.raises(PermissionError, match=r"nothing can be written to .*: name another"):
        undula.train(run)
