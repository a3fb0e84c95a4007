"""A training whose steps do nothing in vain is the training that it is by itself, `plain`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

import undula
from tests.support import tiny
from undula.train import CausalLM, Classification, MultiLabel, Regression, Run, TokenClassification, prepare
from undula.train.tasks import made
from undula.train.tasks.step import Step
from undula.train.trainer import trainer


def still(path):
    """A model's folder, without dropout: its draws would be of other shapes."""
    config = Path(path) / "config.json"
    told = json.loads(config.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(told))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    bloom = folder / "bloom"
    config = transformers.BloomConfig(vocab_size=len(tiny.tokenizer(bloom)), hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(bloom)
    return {
        "llama": tiny.llama(folder / "llama"),
        "bert": still(tiny.bert(folder / "bert")),
        "roberta": still(tiny.roberta(folder / "roberta")),
        "bloom": str(bloom),
    }


def text(i):
    return " ".join(tiny.WORDS[(i + j) % len(tiny.WORDS)] for j in range(1 + i % 7))


def tags(i):
    words = text(i).split()
    return {"tokens": words, "tags": ["O" if word in tiny.GOOD else "B-X" for word in words]}


WEIGHED = Classification(class_weights={"a": 3.0})
TASKS = {
    "pairs": (CausalLM(generate=0), "llama", lambda i: {"prompt": text(i), "completion": text(3 * i + 1)}),
    "texts": (CausalLM(generate=0), "llama", lambda i: {"text": f"{text(i)} {text(2 * i)}"}),
    "padded": (CausalLM(generate=0), "bloom", lambda i: {"prompt": text(i), "completion": text(3 * i + 1)}),
    "classes": (WEIGHED, "bert", lambda i: {"text": text(i), "label": "ab"[i % 3 > 0]}),
    "two texts": (
        Classification(),
        "roberta",
        lambda i: {"premise": text(i), "hypothesis": text(2 * i), "label": "ab"[i % 2]},
    ),
    "numbers": (Regression(), "roberta", lambda i: {"text": text(i), "label": float(i % 5)}),
    "sets": (MultiLabel(), "bert", lambda i: {"text": text(i), "labels": ["a", "b", "c"][i % 2 : 1 + i % 3]}),
    "tags": (TokenClassification(), "bert", tags),
}


def run_of(name, models, folder, **changes):
    task, model, row = TASKS[name]
    data = tiny.jsonl(folder / "d.jsonl", [row(i) for i in range(30)])
    usual = {"batch": 4, "max_steps": 3, "lr": 1e-2, "eval_every": 0.0}
    return Run(models[model], data, task, undula.LoRA(r=2), folder / "out", **usual | changes)


def trained(run):
    """The losses of its steps, what was trained, and its trainer."""
    ready = prepare(run)
    fitter = trainer(ready.run, ready.model, ready.train, ())
    transformers.set_seed(run.seed)
    fitter.train()
    losses = [entry["loss"] for entry in fitter.state.log_history if "loss" in entry]
    return losses, {f"{site}.{name}": t.detach() for site, name, t in ready.adapter.tensors()}, fitter


@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in TASKS), ("pairs", 3), ("classes", 3)])
def test_a_training_is_that_of_plain_steps(name, accumulate, models, tmp_path, caplog):
    """Rows are padded only where they would see each other, and that is told."""
    run = run_of(name, models, tmp_path, accumulate=accumulate)
    wanted, theirs, plain = trained(dataclasses.replace(run, plain=True, out=tmp_path / "plain"))
    assert plain.step == Step()
    losses, ours, fast = trained(run)
    assert losses == pytest.approx(wanted, rel=1e-4)
    for site, t in theirs.items():
        torch.testing.assert_close(ours[site], t, rtol=1e-2, atol=1e-3)
    examples = [fast.train_dataset[i] for i in range(4)]
    whole = sum(len(each["input_ids"]) for each in examples)
    assert (fast.data_collator(examples)["input_ids"].shape == (1, whole)) == (name != "padded")
    assert (fast.step.head is not None) == isinstance(run.task, CausalLM)
    assert ("rows are padded to the longest of their batch: BloomForCausalLM" in caplog.text) == (name == "padded")


def test_a_run_that_an_older_version_began_goes_on_as_it_was(models, tmp_path):
    """Its steps were plain, and what comes is to be what it would have been."""
    run = run_of("pairs", models, tmp_path)
    run.save(None)
    told = json.loads((run.out / "run.json").read_text())
    assert not Run.load(run.out).plain
    (run.out / "run.json").write_text(json.dumps(told | {"version": 3}))
    assert Run.load(run.out).plain


@pytest.mark.parametrize("name", ["pairs", "classes", "numbers", "sets", "tags"])
def test_a_row_is_tokenised_once(name, models, tmp_path, monkeypatch):
    """What is had again is the caller's to change, and no more is kept than there is room for."""
    ready = prepare(run_of(name, models, tmp_path))
    first = [ready.train[i] for i in range(3)]
    wanted = [ready.run.task.example(ready.train.rows[i], ready.processor) for i in range(3)]
    assert first == wanted
    monkeypatch.setattr(type(ready.run.task), "traced", None)
    first[0]["input_ids"].clear()
    assert [ready.train[i] for i in range(3)] == wanted


def test_examples_are_kept_while_there_is_room(monkeypatch):
    monkeypatch.setattr(made, "NUMBERS", 7)
    kept = made.Made()
    for i, ids in enumerate(([1, 2], [3, 4, 5], [6], ["a"], [2**40])):
        kept.keep(i, {"input_ids": ids, "labels": 0.5})
    assert [kept.get(i) for i in range(5)] == [
        {"input_ids": [1, 2], "labels": 0.5},
        {"input_ids": [3, 4, 5], "labels": 0.5},
        None,
        None,
        None,
    ]
    whole = made.Made()
    whole.keep(0, {"pixel_values": torch.zeros(3), "labels": 1})
    whole.keep(1, {"input_ids": [2**40]})
    assert whole.kept == {}


def test_the_benchmarks_limit_counts_frozen_matrices_by_hand(monkeypatch):
    """2 operations a parameter and token forward, 2 to its input's gradient, which the first layer's input does not
    want; factors are not counted, neither ours nor PEFT's, which are layers."""
    import peft

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import finetune

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=11,
    )  # fmt: skip
    model, row = transformers.LlamaForCausalLM(config), torch.arange(5)[None]
    first = 8 * 8 + 2 * 8 * 4  # q, k, v
    by_hand = 5 * (4 * 2 * (first + 8 * 8 + 3 * 8 * 16) - 2 * first)
    undula.attach(model, undula.LoRA(r=2))
    assert finetune.operations(model.base_model, input_ids=row) == by_hand
    undula.detach(model)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert finetune.operations(model.base_model, input_ids=row) == by_hand
