"""Preference pairs, in every form that people have them in, and DPO through TRL: its loss, our checkpoints."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

import undula
from tests.support import tiny
from tests.support.models import shake
from undula.host.reference import alone
from undula.starts import LoRAGA
from undula.train import (
    Chat,
    Preference,
    Run,
    evaluate,
    look,
    prepare,
    restored,
)
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.tasks.preference import LOSSES

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


def said(role, text):
    return {"role": role, "content": text}


ASKED, GOOD, BAD = "the film was", "very good", "very bad"
USER, RIGHT, WRONG = said("user", ASKED), said("assistant", GOOD), said("assistant", BAD)
SYSTEM = said("system", "a day")
FORMS = {  # (a row as people have it, what becomes of it)
    "texts with a prompt": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    "texts that begin alike": (
        {"chosen": f"{ASKED}: {GOOD}", "rejected": f"{ASKED}: {BAD}"},
        {"text": f"{ASKED}: very", "chosen": " good", "rejected": " bad"},
    ),
    "texts that part within a word": (
        {"chosen": f"{ASKED} great", "rejected": f"{ASKED} grim"},
        {"text": ASKED, "chosen": " great", "rejected": " grim"},
    ),
    "conversations that begin alike": (
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
    "several turns": (
        {"chosen": [SYSTEM, USER, WRONG, USER, RIGHT], "rejected": [SYSTEM, USER, WRONG, USER, WRONG]},
        {"messages": [SYSTEM, USER, WRONG, USER], "chosen": GOOD, "rejected": BAD},
    ),
    "a prompt of messages": (
        {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"messages": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    ),
    "a prompt of messages, answers of text": (
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
    "a prompt of text, answers of messages": (
        {"prompt": ASKED, "chosen": [RIGHT], "rejected": [WRONG]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
    "a prompt that stands in the conversations too": (
        {"prompt": ASKED, "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
    "ShareGPT's names": (
        {"chosen": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}],
         "rejected": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": BAD}]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
    "conversations as JSON text": (
        {"chosen": json.dumps([USER, RIGHT]), "rejected": json.dumps([USER, WRONG])},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_prompt_and_two_answers(form, tmp_path):
    given, wanted = FORMS[form]
    path = tiny.jsonl(tmp_path / "d.jsonl", [given, given])
    _, parts = Preference().read(load_data(path), "train")
    assert parts["train"].to_list() == [wanted] * 2
    words = tiny.tokenizer(tmp_path)
    words.chat_template = TEMPLATE
    example = Preference().example(wanted, words)
    assert example["prompt_ids"]
    assert example["chosen_ids"] != example["rejected_ids"]
    assert {example["chosen_ids"][-1], example["rejected_ids"][-1]} == {words.eos_token_id}


FAULTY = {
    "the two are the same": {"prompt": "a", "chosen": GOOD, "rejected": GOOD},
    "no beginning in common": {"chosen": "good", "rejected": "bad"},
    "after what both begin with one of them is empty": {"chosen": f"{ASKED} ", "rejected": f"{ASKED} bad"},
    "column 'chosen' is empty": {"prompt": "a", "chosen": " ", "rejected": BAD},
    "holds no preference: line 2 (the two are the same)": {"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]},
    "differ by more than their last turn": {"chosen": [USER, RIGHT, USER, RIGHT], "rejected": [USER, WRONG]},
    "the last turn is not the assistant's": {"chosen": [RIGHT, USER], "rejected": [RIGHT, SYSTEM]},
    "have no turn in common": {"chosen": [RIGHT], "rejected": [WRONG]},
    "rejected: found [": {"chosen": [USER, RIGHT], "rejected": []},
}


@pytest.mark.parametrize("why", FAULTY)
def test_what_is_no_preference_is_a_fault_of_its_row(why, tmp_path):
    bad = FAULTY[why]
    good = next(
        given for given, _ in FORMS.values() if set(given) == set(bad) and type(given["chosen"]) is type(bad["chosen"])
    )
    path = tiny.jsonl(tmp_path / "d.jsonl", [good, bad, good, good])
    with pytest.raises(ValueError, match="line 2") as error:
        Preference().read(load_data(path), "train")
    assert why in str(error.value)
    faults = Faults(0.3)
    _, parts = Preference().read(load_data(path, faults), "train", faults=faults)
    assert len(parts["train"]) == 3


def test_what_would_do_nothing_is_refused():
    with pytest.raises(LookupError, match="no loss of preferences is called 'dop'; there are: sigmoid, hinge"):
        Preference(loss_type="dop")
    with pytest.raises(ValueError, match="completion, generate would do nothing"):
        Preference(completion="x", generate=3)
    with pytest.raises(ValueError, match="needs label_smoothing"):
        Preference(loss_type="exo_pair")
    with pytest.raises(LookupError, match="no column for rejected"):
        Preference().columns(["prompt", "chosen"])


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def pairs(path, number=24):
    asked = [f"the {a} {b} was" for a in tiny.WORDS[10:16] for b in tiny.WORDS[12:16]][:number]
    return tiny.jsonl(path, [{"prompt": text, "chosen": GOOD, "rejected": BAD} for text in asked])


def run_of(model, data, out, task=None, **changes):
    usual = {"lr": 1e-2, "max_steps": 12, "batch": 4, "method": undula.LoRA(r=4), "save_every": 4}
    return Run(model=model, data=data, task=task or Preference(), out=out, **(usual | changes))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("trained")
    run = run_of(model, pairs(tmp / "d.jsonl"), tmp / "out")
    return run, undula.train(run)


def test_it_learns_what_is_preferred(trained):
    """Before, the model is its own reference: margin 0, loss log 2, as good as a guess."""
    run, report = trained
    assert report["before"] == pytest.approx({"loss": math.log(2), "accuracy": 0.5, "margin": 0.0}, abs=1e-6)
    assert report["after"]["accuracy"] == 1.0
    assert report["after"]["margin"] > 0.3
    assert report["losses"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert report["losses"][-1][1] < 0.5
    assert evaluate(run.out) == pytest.approx(report["after"])
    assert not any("trl" in path.read_text().lower() for path in run.out.rglob("README.md"))  # no card of TRL's


def test_a_preferred_model_writes(trained):
    run, _ = trained
    opened = restored(run.out)
    rows = [{"prompt": "the film food was"}]
    (answer,) = run.task.answers(opened.model, rows, opened.processor, 1)
    assert set(answer) == {"text", "ended"}


def test_loss_and_margin_are_watched_while_it_trains(trained):
    run, report = trained
    opened = restored(run.out)
    assert run.task.watched(opened.model, opened.examples(), 4) == pytest.approx(report["after"])


def test_the_loss_is_trls(model, tmp_path):
    """Of the same adapter on the same rows: two implementations."""
    from undula.train.trainer import trainer

    ready = prepare(run_of(model, pairs(tmp_path / "d.jsonl"), tmp_path / "out", task=Preference(beta=0.3)))
    shake(ready.adapter.parameters())
    ready.model.eval()
    fitter = trainer(ready.run, ready.model, ready.train, ())
    batch = ready.run.task.collator(ready.processor)([ready.train[i] for i in range(5)])
    with torch.no_grad():
        theirs = float(fitter.compute_loss(ready.model, batch))
        margins = ready.run.task.margins(ready.model, batch)
        ours = float(ready.run.task.loss()(ready.model, batch))
    assert abs(ours - math.log(2)) > 1e-3
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert fitter._metrics["eval"]["rewards/margins"] == pytest.approx([float(margins.mean())], abs=1e-5)


def test_the_reference_is_the_base(model, tmp_path):
    ready = prepare(run_of(model, pairs(tmp_path / "d.jsonl"), tmp_path / "out"))
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([ready.train[0]["input_ids"]])
    shake(ready.adapter.parameters())
    with torch.no_grad():
        with alone(ready.model):
            torch.testing.assert_close(ready.model(ids).logits, base(ids).logits)
        assert not torch.allclose(ready.model(ids).logits, base(ids).logits)


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6:
            raise InterruptedError


def test_a_training_is_resumed(trained, tmp_path):
    """From the checkpoint of step 4 on as without the interruption."""
    whole, report = trained
    run = dataclasses.replace(whole, out=tmp_path / "cut")
    with pytest.raises(InterruptedError):
        undula.train(run, callbacks=[Stop()])
    again = undula.train(Run.load(run.out), resume=True)
    assert again["resumed_from_step"] == 4
    assert again["losses"][-8:] == report["losses"][-8:]
    assert again["after"] == report["after"]


def test_accumulated_batches_are_one(model, tmp_path):
    data, found = pairs(tmp_path / "d.jsonl", 20), []
    for batch, accumulate in ((6, 1), (2, 3)):
        run = run_of(model, data, tmp_path / f"o{batch}", batch=batch, accumulate=accumulate, max_steps=4)
        undula.train(run)
        found.append(undula.Adapter.load(run.out))
    for one, other in zip(*(a.parameters() for a in found), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trls_trains(loss, model, tmp_path):
    task = Preference(loss_type=loss, label_smoothing=0.1 if loss in ("exo_pair", "robust") else None)
    report = undula.train(run_of(model, pairs(tmp_path / "d.jsonl", 8), tmp_path / "o", task=task, max_steps=1))
    assert math.isfinite(report["losses"][0][1])


@pytest.mark.parametrize("method", [undula.LoRAN(r=2), undula.DyLoRA(r=2), None], ids=str)
def test_other_methods_and_none(method, model, tmp_path):
    changes = {"full": ("lm_head.weight",), "where": "all-linear"} if method is None else {}
    run = run_of(model, pairs(tmp_path / "d.jsonl", 16), tmp_path / "o", method=method, max_steps=6, **changes)
    assert undula.train(run)["after"]["loss"] < math.log(2)


def test_a_start_from_data_sees_the_preference(model, tmp_path):
    method = undula.Centred(undula.LoRA(r=2), LoRAGA())
    run = run_of(model, pairs(tmp_path / "d.jsonl", 16), tmp_path / "o", method=method, max_steps=2, probe_batches=1)
    assert math.isfinite(undula.train(run)["after"]["loss"])


def test_an_adapter_on_the_head_is_refused(model, tmp_path):
    """TRL multiplies by the head's weight itself: such an adapter would never train."""
    with pytest.raises(ValueError, match="adapter on it would not train: leave it out, exclude='lm_head'"):
        undula.train(run_of(model, pairs(tmp_path / "d.jsonl"), tmp_path / "o", where=("lm_head", "q_proj")))


def test_the_look_shows_both_answers(model, tmp_path):
    found = look(run_of(model, pairs(tmp_path / "d.jsonl"), tmp_path / "o", max_steps=None, epochs=2))
    assert found.form == "prompt is 'prompt', chosen is 'chosen', rejected is 'rejected'"
    texts, learned = zip(*found.examples[0], strict=True)
    assert learned == (False, True, False, True)
    assert texts[1].startswith("very good")
    assert texts[3].startswith("very bad")
    assert found.steps == 2 * math.ceil(found.rows["train"] / 4)


def test_answers_are_cut_and_told(model, tmp_path):
    rows = [{"prompt": ASKED, "chosen": "very " * n + "good", "rejected": "bad"} for n in range(1, 9)]
    data = tiny.jsonl(tmp_path / "d.jsonl", rows)
    found = look(run_of(model, data, tmp_path / "o", task=Preference(max_completion=4)))
    assert sum(part.lost_ends for part in found.lengths.values()) == 6
    assert any("an answer is cut at its end" in note for note in found.notes)


def test_a_run_is_written_and_read(tmp_path):
    task = Preference(beta=0.2, loss_type="ipo", format=Chat(template="chatml"))
    run = Run("m", "d.jsonl", task, undula.LoRA(r=1), tmp_path)
    assert Run.decode(json.loads(json.dumps(run.encode())), tmp_path).task == task
