"""Penalties in the whole of a training: `undula.train`, its files, the command line, a Trainer of one's own."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.optim.optimisers import LoRAFA, LoRSum
from undula.penalties import L1, NLG, WGSEF, BALoRA, GroupLasso, KLToBase, Orthogonal, OrthogonalToEarlier, Ranks
from undula.study.read import Faults, parse
from undula.train import CausalLM, Classification, MultiLabel, Preference, Regression, Run, Similarity, prepare
from undula.train.look import check_course

STEPS = 6
BOTH = KLToBase(0.5) + WGSEF(0.01, sparsity=0.5, settle=0.5)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A language model, whose head is its own: what the base answers means something."""
    home = tmp_path_factory.mktemp("home")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(40)]
    data = tiny.jsonl(home / "rows.jsonl", rows)
    return Run(model=tiny.llama(home / "base"), data=data, task=CausalLM(generate=0), method=undula.LoRA(r=2),
               out="unused", where=("q_proj", "down_proj"), lr=1e-2, max_steps=STEPS, batch=4, save_every=2, seed=3,
               eval_every=0, eval_rows=8)  # fmt: skip


def trained(usual, out, callbacks=(), **changes):
    report = undula.train(dataclasses.replace(usual, out=out, **changes), callbacks=callbacks)
    return load_file(out / "adapter_model.safetensors"), report


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Falls(TrainerCallback):
    """Falls over after step 3, without a checkpoint of it."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise MemoryError("fallen over")


@pytest.fixture(scope="module")
def plain(usual, tmp_path_factory):
    return trained(usual, tmp_path_factory.mktemp("plain") / "out")[0]


@pytest.fixture(scope="module")
def both(usual, tmp_path_factory):
    return trained(usual, tmp_path_factory.mktemp("both") / "out", penalty=BOTH)


def test_a_weight_of_zero_is_the_run_without_to_the_bit(usual, plain, tmp_path):
    """Clipping and the way a step is taken included."""
    assert same(plain, trained(usual, tmp_path, penalty=0 * (BOTH + L1()))[0])


def test_the_report_says_what_penalties_came_to(both, plain):
    """And the sparsity that was asked for is there in the file."""
    found, report = both
    kl, sparse = report["penalties"]
    assert (kl["is"], sparse["is"]) == ("KLToBase", "WGSEF")
    assert sparse["result"]["zero"] == sparse["result"]["groups"] // 2 > 0
    zeros = sum(int((t.abs().sum(1) == 0).sum()) for key, t in found.items() if key.endswith(".A"))
    assert zeros == sparse["result"]["zero"]
    assert not same(found, plain)
    assert Run.load(report["out"]).penalty == BOTH.procedures


def test_an_interruption_changes_nothing(usual, both, tmp_path):
    """What is settled, and where the schedule is, comes back."""
    with pytest.raises(MemoryError, match="fallen over"):
        trained(usual, tmp_path, penalty=BOTH, callbacks=(Falls(),))
    report = undula.train(Run.load(tmp_path), resume=True)
    assert report["resumed_from_step"] == 2
    assert same(both[0], load_file(tmp_path / "adapter_model.safetensors"))


def test_batches_that_are_accumulated_are_as_one(usual, tmp_path):
    """Rows of unlike lengths: what is of the answers weighs by tokens, as the loss does."""
    how = {"penalty": KLToBase(5.0) + GroupLasso(0.01), "dtype": torch.float64}
    one = trained(usual, tmp_path / "1", batch=8, **how)[0]
    two = trained(usual, tmp_path / "2", batch=4, accumulate=2, **how)[0]
    for key, t in one.items():
        torch.testing.assert_close(two[key], t)


def test_the_teacher_is_the_same_where_activations_are_computed_again(usual, tmp_path):
    """With the adapter off for its pass, between a forward pass and its backward one, which computes it again."""
    how = {"penalty": KLToBase(5.0) + BALoRA(form=NLG()), "dtype": torch.float64}
    one, two = (trained(usual, tmp_path / str(a), gradient_checkpointing=a, **how)[0] for a in (False, True))
    for key, t in one.items():
        torch.testing.assert_close(two[key], t)


def test_what_compares_with_random_numbers_or_sees_no_answers_is_refused(usual, tmp_path):
    """A new head answers nothing yet; a task with a loss of its own shows no answers."""
    reviews = tiny.jsonl(tmp_path / "r.jsonl", tiny.reviews(20))
    new = dataclasses.replace(
        usual, model=tiny.bert(tmp_path / "bert"), data=reviews, task=Classification(), where="query"
    )
    for how in (KLToBase(), BALoRA()):
        with pytest.raises(ValueError, match="is new, at random numbers"):
            undula.train(dataclasses.replace(new, penalty=how, out=tmp_path / "out"))
    for task in (Similarity(), Preference()):
        with pytest.raises(ValueError, match=f"{type(task).__name__} has a loss of its own"):
            dataclasses.replace(usual, task=task, penalty=KLToBase())
    with pytest.raises(ValueError, match=r"NLU\(\) is the form of classes, and LlamaForCausalLM answers tokens"):
        check_course(prepare(dataclasses.replace(usual, penalty=BALoRA(), out=tmp_path / "out")))
    dataclasses.replace(usual, task=Similarity(), penalty=GroupLasso())


def test_answers_that_are_no_probabilities_are_refused(usual):
    """Of one number a softmax is 1 whatever it is, and a set of classes has none."""
    for task in (Regression(), MultiLabel()):
        for how in (KLToBase(), BALoRA()):
            with pytest.raises(ValueError, match=f"{type(task).__name__} has none: take a penalty of the factors"):
                dataclasses.replace(usual, task=task, penalty=how)
        dataclasses.replace(usual, task=task, penalty=GroupLasso() + KLToBase(0.0))


def test_what_an_optimiser_cannot_see_is_refused_before_rows_are_measured(usual, tmp_path):
    """So that the directory is free for the run that can be; and looking leaves what trains as it was."""
    odd = dataclasses.replace(usual, method=undula.Dropout(undula.LoRA(r=2), 0.1), optimiser=LoRSum(), out=tmp_path)
    with pytest.raises(TypeError, match=r"LoRSum sees inputs .* stands Dropout.* on a Linear"):
        undula.train(odd)
    assert not (tmp_path / "run.json").exists()
    ready = prepare(dataclasses.replace(usual, optimiser=LoRAFA(), out=tmp_path))
    check_course(ready)
    assert all(p.requires_grad for _, _, p in ready.adapter.tensors())


def test_an_earlier_adapter_that_is_not_there_is_told_before_anything_is_read(usual, tmp_path):
    how = OrthogonalToEarlier(earlier=(str(tmp_path / "nowhere"),))
    with pytest.raises(FileNotFoundError, match="nowhere is no adapter directory"):
        prepare(dataclasses.replace(usual, penalty=how), read=None)


def test_on_the_command_line(usual, tmp_path):
    words = ["train", "--model", usual.model, "--data", usual.data, "--task", "causal-lm", "--task-set", "generate=0",
             "--max-steps", 2, "--batch", 4, "--eval-rows", 4, "--out", tmp_path / "a"]  # fmt: skip

    def call(*more):
        return CliRunner().invoke(app, [str(w) for w in (*words, *more)])

    done = call("--penalty", "group-lasso,weight=1e6,groups=ranks", "--penalty", "kltobase")
    assert done.exit_code == 0, done.output
    assert Run.load(tmp_path / "a").penalty == (GroupLasso(1e6, groups=Ranks()), KLToBase())
    assert "has drawn all of its" in " ".join(done.output.split())  # nothing is left of the adapter
    bad = {
        "grouplaso": "no penalty is called 'grouplaso'",
        "l1,strength=2": "L1 has no option strength; it has: weight",
        "l1,weight=-1": "L1.weight is at least 0",
    }
    for text, message in bad.items():
        done = call("--penalty", text)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
    done = call("--penalty", "orthogonal", "--method", "aurora")
    assert "works on LowRank, not on AuroRA" in " ".join(done.output.split())


STUDY = """
title = "x"
seeds = [1]
models = [{source = "bundled:minilm"}]
data = [{source = "bundled:sst2", task = "classification"}]
methods = [
  {method = "lora", rates = [1e-3]},
  {method = "METHOD", rates = [1e-3], penalty = [{is = "group-lasso", weight = 0.5}, "l1"]},
]
"""


def test_an_arm_of_a_study_may_have_penalties():
    """By the same words, and refused for the method that it does not fit."""
    study = parse(STUDY.replace("METHOD", "lora"), check=False)
    plain, sparse = study.arms
    assert sparse.name == "LoRA penalty=GroupLasso(weight=0.5) + L1()"
    assert [study.settings(arm)["penalty"] for arm in (plain, sparse)] == [(), (GroupLasso(0.5), L1())]
    odd = STUDY.replace("METHOD", "aurora").replace('"l1"', '"orthogonal"')
    with pytest.raises(Faults, match=r"Orthogonal.*works on LowRank"):
        parse(odd, check=False)


def test_under_a_trainer_of_ones_own(usual, tmp_path):
    """`penalised` adds the terms; a callback alone, which sees no answers, says so."""
    model = AutoModelForCausalLM.from_pretrained(usual.model)
    adapter = undula.attach(model, undula.LoRA(r=2))
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]} for _ in range(8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                             gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True)  # fmt: skip
    how = KLToBase(0.5) + GroupLasso(1e6) + Orthogonal()
    undula.penalised(Trainer)(penalty=how, model=model, args=args, train_dataset=rows).train()
    assert not any(p.any() for p in adapter.parameters())
    alone = Trainer(model=model, args=args, train_dataset=rows, callbacks=[undula.allocating(KLToBase())])
    with pytest.raises(RuntimeError, match=r"undula\.penalised\(Trainer\)"):
        alone.train()
