"""The look before a training: what it says is what the training does, and looking changes nothing."""

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.ranks import ALoRA
from undula.train import (
    CausalLM,
    Classification,
    ImageClassification,
    Regression,
    Run,
    look,
    prepare,
)
from undula.train.look import looked

CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% if m.role == 'assistant' %}[SEP]{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def conversation(i):
    return [{"role": "user", "content": tiny.WORDS[i]}, {"role": "assistant", "content": ["good", "bad"][i % 2]}]


def classified(tmp):
    return tiny.bert(tmp / "m"), tiny.jsonl(tmp / "d.jsonl", tiny.reviews(40)), Classification()


def numbers(tmp):
    rows = [{"text": f"the film was {w}", "label": i / 4} for i, w in enumerate(tiny.WORDS)]
    return tiny.bert(tmp / "m"), tiny.jsonl(tmp / "d.jsonl", rows), Regression()


def pairs(tmp):
    rows = [{"prompt": f"the {w} was", "completion": "very good"} for w in tiny.WORDS]
    return tiny.llama(tmp / "m"), tiny.jsonl(tmp / "d.jsonl", rows), CausalLM()


def talks(tmp):
    model = tiny.llama(tmp / "m", chat=True)
    words = tiny.tokenizer(tmp / "m")
    words.chat_template = CHAT
    words.save_pretrained(tmp / "m")
    rows = [{"messages": conversation(i)} for i in range(12)]
    return model, tiny.jsonl(tmp / "d.jsonl", rows), CausalLM()


def plain(tmp):
    rows = [{"text": f"the {w} was very good"} for w in tiny.WORDS]
    return tiny.llama(tmp / "m"), tiny.jsonl(tmp / "d.jsonl", rows), CausalLM()


def pictures(tmp):
    return tiny.vit(tmp / "m"), tiny.classes(tmp / "d", {"train": tiny.pictures(24)}), ImageClassification()


KINDS = {  # (what makes it, what its form begins with, how what is learned ends, without spaces)
    "classification": (classified, "text is 'text'", "bad"),
    "regression": (numbers, "text is 'text'", "0.0"),
    "pairs": (pairs, "pairs: prompt is 'prompt'", "verygood[SEP]"),
    "conversations": (talks, "conversations: messages is 'messages'", "good[SEP]"),
    "texts": (plain, "texts: text is 'text'", "verygood[SEP]"),
    "images": (pictures, "image is 'image'", "red"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    tmp = tmp_path_factory.mktemp(request.param)
    make, form, learned = KINDS[request.param]
    model, data, task = make(tmp)
    return (
        tmp,
        Run(model, data, task, undula.Dropout(undula.LoRA(r=2), p=0.5), tmp / "out", batch=4, epochs=2),
        form,
        learned,
    )


def test_a_dry_run_shows_and_writes_nothing(kind):
    tmp, run, form, learned = kind
    before = sorted(tmp.rglob("*"))
    typed = ["--model", run.model, "--data", run.data, "--out", run.out, "--batch", "4", "--epochs", "2"]
    task = {"CausalLM": "causal-lm", "ImageClassification": "image-classification"}
    task = task.get(type(run.task).__name__, type(run.task).__name__.lower())
    done = CliRunner().invoke(
        app, ["train", *map(str, typed), "--task", task, "--set", "r=2", "--dry-run", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    assert sorted(tmp.rglob("*")) == before
    found = json.loads(done.stdout)
    assert found["rows"]["train"] > found["rows"]["validation"] > 0
    assert found["form"].startswith(form)
    pieces = [said for example in found["examples"] for said, own in example if own]
    assert any("".join(said.split()).endswith(learned) for said in pieces)
    shown = "".join(done.stderr.split())
    assert f"{learned}⟧" in shown
    assert f"{found['steps']},about" in shown
    assert f"{found['trainable_parameters']:,}of{found['parameters']:,}train" in shown


def test_a_look_changes_nothing(kind):
    """Neither numbers of the model or the adapter, nor modes, gradients or random generators: dropout is on."""
    _, run, _, _ = kind
    ready = prepare(run)
    ready.model.eval()
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)

    def state():
        tensors = {n: t.clone() for n, t in (*ready.model.named_parameters(), *ready.model.named_buffers())}
        return tensors, [p.grad for p in ready.model.parameters()], [m.training for m in ready.model.modules()]

    def drawn():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, generators = state(), drawn()
    found = looked(ready)
    after = state()
    assert drawn() == generators
    assert all(torch.equal(t, after[0][name]) for name, t in before[0].items())
    assert before[1:] == after[1:]
    assert found.seconds > 0


def test_a_training_that_was_looked_at_is_the_same(kind, tmp_path):
    _, run, _, _ = kind
    reports = []
    for name, begins in (("plain", None), ("seen", looked)):
        changed = {"out": tmp_path / name, "max_steps": 2, "eval_rows": 4}
        changed |= {"task": CausalLM(generate=0)} if isinstance(run.task, CausalLM) else {}
        made = undula.train(Run(**{**vars(run), **changed}), begins=begins)
        reports.append({k: made[k] for k in ("losses", "before", "after")})
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "how",
    [{"epochs": 3, "batch": 8, "accumulate": 1}, {"epochs": 1.5, "batch": 5, "accumulate": 3}, {"max_steps": 4},
     {"epochs": 1, "batch": 4, "allocator": ALoRA(rounds=1), "method": undula.GatedLoRA(r=2, open=2)}],
    ids=str,
)  # fmt: skip
def test_the_steps_are_those_of_the_training(how, tmp_path):
    model, data, task = classified(tmp_path)
    run = Run(model, data, task, **{"method": undula.LoRA(r=1), **how}, out=tmp_path / "out")
    seen = []
    report = undula.train(run, begins=lambda ready: seen.append(looked(ready)))
    assert seen[0].steps == report["steps_asked"]
    assert seen[0].trainable_parameters == report["trainable_parameters"]
    assert seen[0].rows_in_a_step == report["rows_in_a_step"]


def test_cuts_and_lost_ends_are_counted(tmp_path):
    """A completion without its end token teaches a model that never stops."""
    rows = [{"prompt": "the film was", "completion": "very " * n + "good"} for n in (1, 1, 1, 9, 20)]
    model, data = tiny.llama(tmp_path / "m"), tiny.jsonl(tmp_path / "d.jsonl", rows)
    run = Run(model, data, CausalLM(max_completion=6), undula.LoRA(r=1), tmp_path / "out")
    found = look(run).lengths
    assert sum(part.cut for part in found.values()) == 2
    assert sum(part.lost_ends for part in found.values()) == 2
    assert max(part.longest for part in found.values()) <= 3 + 6


def test_a_long_example_is_shown_by_its_ends(tmp_path):
    rows = [{"prompt": "the " * 1500, "completion": f"{w} good"} for w in tiny.WORDS]
    model, data = tiny.llama(tmp_path / "m"), tiny.jsonl(tmp_path / "d.jsonl", rows)
    (asked, learned), *_ = look(Run(model, data, CausalLM(), undula.LoRA(r=1), tmp_path / "out")).examples
    assert "characters ...]" in asked[0]
    assert len(asked[0]) < 1300
    assert learned[0].endswith("good [SEP]")
    assert not Path(tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    model, data, _ = classified(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    usual = ["train", "--model", model, "--data", data, "--task", "classification", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*usual, "--dry-run"])
    assert done.exit_code == 2
    assert "holds a run already" in done.stderr
    done = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 2
    assert "leave out --dry-run" in done.stderr
