"""What a class weighs while it trains, and activations that are computed again."""

import dataclasses
import math

import numpy
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.study.read import parse
from undula.train import (
    CausalLM,
    Classification,
    ImageClassification,
    Recipe,
    Run,
    config,
    prepare,
)
from undula.train.tasks.weighing import weighed, weights
from undula.train.trainer import trainer

RARE = [*({"text": f"the film was {w}", "label": "bad"} for w in tiny.BAD * 6),
        *({"text": f"the food was {w}", "label": "good"} for w in tiny.GOOD * 2)]  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    model = folder / "bert"
    tiny.bert(model)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('_prob": 0.1', '_prob": 0.0'))
    return Run(
        model=str(model), data=tiny.jsonl(folder / "rare.jsonl", RARE), task=Classification(class_weights="balanced"),
        method=undula.LoRA(r=2), out=folder / "out", lr=5e-3, max_steps=3, batch=8, eval_every=0,
    )  # fmt: skip


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0, 0, 0, 1, 2, 2]
    wanted = list(compute_class_weight("balanced", classes=numpy.arange(3), y=labels))
    assert weights("balanced", ["a", "b", "c"], labels) == pytest.approx(wanted)
    assert weights("balanced", ["a", "b", "c", "none"], labels)[:3] == pytest.approx(wanted)
    given = weights({"c": 4.0}, ["a", "b", "c"], labels)
    assert given[2] / given[0] == pytest.approx(4)
    assert sum(given[y] for y in labels) / len(labels) == pytest.approx(1)


def test_the_loss_is_torchs_weighted_one_by_rows(float64):
    logits, labels, weight = torch.randn(7, 3), torch.randint(0, 3, (7,)), torch.rand(3) + 0.5
    wanted = cross_entropy(logits.float(), labels, weight.float(), reduction="sum") / 7
    torch.testing.assert_close(weighed(logits, labels, weight), wanted)


def test_it_is_what_the_training_goes_down(usual):
    """The gradient of the head is that of the weighted loss, and the metrics stay unweighted."""
    ready = prepare(usual)
    made = trainer(dataclasses.replace(ready.run, plain=True), ready.model.eval(), ready.train, ())
    batch = made.data_collator([ready.train[i] for i in range(8)])
    loss = made.compute_loss(ready.model, dict(batch))
    logits = ready.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    own = weights("balanced", ready.run.task.names, ready.train.rows["label"][:])
    assert own[0] != pytest.approx(own[1])
    torch.testing.assert_close(loss, weighed(logits, batch["labels"], torch.tensor(own)))
    plain = dataclasses.replace(ready.run.task, class_weights=None)
    assert ready.run.task.score(ready.model, ready.held, 8) == plain.score(ready.model, ready.held, 8)
    assert ready.figures["class_weights"] == dict(zip(ready.run.task.names, own, strict=True))


def close(one, other):
    one, other = undula.Adapter.load(one), undula.Adapter.load(other)
    for site, name, t in one.tensors():
        torch.testing.assert_close(t, other.factors[site][name], rtol=1e-4, atol=1e-6)
    for name, t in one.full.items():
        torch.testing.assert_close(t, other.full[name], rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_batch(usual, tmp_path):
    """Whatever classes each of them has."""
    undula.train(dataclasses.replace(usual, out=tmp_path / "one"))
    undula.train(dataclasses.replace(usual, batch=2, accumulate=4, out=tmp_path / "four"))
    close(tmp_path / "one", tmp_path / "four")


def test_images_are_weighed_too(tmp_path):
    tiny.classes(tmp_path / "pets", {"train": tiny.pictures(12)})
    run = Run(
        model=tiny.vit(tmp_path / "vit"), data=str(tmp_path / "pets"), task=ImageClassification(), out=tmp_path / "a",
        method=undula.LoRA(r=1), max_steps=2, batch=4, eval_every=0, lr=1e-2,
    )  # fmt: skip
    plain = undula.train(run)
    name = next(iter(plain["data"]["classes"]["train"]))
    heavy = dataclasses.replace(run, task=ImageClassification(class_weights={name: 9.0}), out=tmp_path / "b")
    assert undula.train(heavy)["losses"] != plain["losses"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--task-set", "class_weights=balanced"], "balanced"),
        (
            ["--task-set", "class_weights.good=2", "--task-set", "class_weights.v1.5 b=0.5"],
            {"good": 2.0, "v1.5 b": 0.5},
        ),
        ([], None),
    ],
)
def test_the_command_line_says_it_and_files_hold_it(words, found, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr("undula.cli.training._fit", lambda run, *_: ran.append(run))
    usual = ["train", "--model", "m", "--data", "d", "--task", "classification", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*usual, *words])
    assert done.exit_code == 0, done.output
    (run,) = ran
    assert run.task.class_weights == found
    assert ("class_weights" in run.encode()["task"]) == (found is not None)  # keys of old studies stay what they are
    (tmp_path / "c.toml").write_text(config.written(run))
    assert Recipe.load(tmp_path / "c.toml").task == run.task


def test_a_study_says_it():
    text = '[[models]]\nsource = "m"\n[[data]]\nsource = "d"\ntask = "classification"\nset = {class_weights = %s}\n'
    text += '[[methods]]\nmethod = "lora"\n'
    for said, found in (('"balanced"', "balanced"), ("{good = 2.0}", {"good": 2.0})):
        assert parse(text % said, check=False).data[0].task.class_weights == found


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("equal", 'class_weights is "balanced", or the weight of a class'),
        ({}, 'class_weights is "balanced"'),
        (3.0, 'class_weights is "balanced"'),
        ({"good": 0}, r"class_weights\['good'\] is greater than 0, found 0"),
        ({"good": "2"}, r"class_weights\['good'\] is a finite number greater than 0, found '2'"),
        ({"good": math.nan}, r"class_weights\['good'\] is a finite number greater than 0, found nan"),
    ],
)
def test_weights_that_are_none_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Classification(class_weights=wrong)


def test_weights_of_classes_that_are_not_there_are_refused(usual):
    with pytest.raises(LookupError, match=r"class_weights has 'god', and no class is called so; there are: bad, good"):
        prepare(dataclasses.replace(usual, task=Classification(class_weights={"god": 2.0})))


# Gradient checkpointing


METHODS = (
    undula.LoRA(r=2),
    undula.Dropout(undula.LoRA(r=2), p=0.5),
    undula.DoRA(undula.LoRA(r=2)),
    undula.AuroRA(r=2),
    undula.LoRAN(r=2),
)


@pytest.mark.parametrize(
    ("kind", "method"), [(k, m) for k, m in zip(("bert", "llama") * 3, METHODS, strict=False)], ids=repr
)
def test_activations_that_are_computed_again_give_the_same_training(kind, method, usual, tmp_path):
    """On a frozen base, whose first layers' inputs need no gradient and have none, with dropout of the base and of the
    method."""
    rows = [{"prompt": f"the {w}", "completion": f"{w} {w}"} for w in tiny.WORDS * 2]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    changes = {
        "bert": {"model": tiny.bert(tmp_path / "m"), "task": Classification()},
        "llama": {"model": tiny.llama(tmp_path / "m"), "data": data, "task": CausalLM(generate=0)},
    }[kind]  # fmt: skip
    run, calls, below = dataclasses.replace(usual, method=method, max_steps=2, **changes), {}, []
    for again in (False, True):
        ready = prepare(dataclasses.replace(run, gradient_checkpointing=again, out=tmp_path / str(again)))
        calls[again] = []
        norm = next(
            m for n, m in ready.model.named_modules() if n.endswith(("1.output.LayerNorm", "1.input_layernorm"))
        )
        norm.register_forward_pre_hook(lambda *_, c=calls[again]: c.append(1))
        lowest = next(m for n, m in ready.model.named_modules() if n.endswith(("layer.0", "layers.0")))
        lowest.register_forward_pre_hook(lambda _, given, b=below: b.append(given[0].requires_grad))
        torch.manual_seed(1)
        made = trainer(ready.run, ready.model, ready.train, ())
        calls[again].clear()  # it has looked at what the model takes
        made.train()
        ready.adapter.save(tmp_path / str(again))
    assert (len(calls[False]), len(calls[True])) == (2, 4)
    assert below
    assert not any(below)
    close(tmp_path / "False", tmp_path / "True")


def test_a_model_that_cannot_is_told_before_anything_is_measured(tmp_path):
    tiny.classes(tmp_path / "pets", {"train": tiny.pictures(8)})
    run = Run(
        model=tiny.efficientnet(tmp_path / "net"), data=str(tmp_path / "pets"), task=ImageClassification(),
        method=undula.LoRA(r=1), out=tmp_path / "out", gradient_checkpointing=True, where="all-linear",
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot compute activations again; leave it out"):
        undula.train(run)
    assert not (tmp_path / "out").exists()
