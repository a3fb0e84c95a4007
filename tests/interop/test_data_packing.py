"""A training on packed rows is the training on padded ones."""

import pytest
import transformers
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.train import CausalLM, Run, evaluate, look, prepare

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}[CLS] {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny.llama(path)
    words = tiny.tokenizer(path)
    words.chat_template = TEMPLATE
    words.save_pretrained(path)
    return str(path)


def text(i):
    return " ".join(tiny.WORDS[(i + j) % len(tiny.WORDS)] for j in range(1 + i % 7))


FORMS = {
    "pairs": lambda i: {"prompt": text(i), "completion": text(3 * i + 1)},
    "texts": lambda i: {"text": text(i) + " " + text(2 * i)},
    "conversations": lambda i: {
        "messages": [{"role": "user", "content": text(i)}, {"role": "assistant", "content": text(5 * i + 2)}]
    },
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_those_of_padded_rows(form, accumulate, model, tmp_path):
    """In each step the same rows, and of them the same mean over the learned tokens; the adapters come out alike."""
    data = tiny.jsonl(tmp_path / "d.jsonl", [FORMS[form](i) for i in range(30)])
    found = []
    for packing in (False, True):
        task = CausalLM(generate=0, packing=packing)
        run = Run(model, data, task, undula.LoRA(r=2), tmp_path / f"o{packing}", batch=4, accumulate=accumulate)
        report = undula.train(Run(**{**vars(run), "max_steps": 4, "lr": 1e-2}))
        found.append(report)
    one, other = ([loss for _, loss in report["losses"]] for report in found)
    assert other == pytest.approx(one, rel=1e-4)
    assert found[1]["after"]["loss"] == pytest.approx(found[0]["after"]["loss"], rel=1e-4)
    assert evaluate(tmp_path / "oTrue") == pytest.approx(found[1]["after"])


def test_a_model_that_mixes_rows_is_refused_before_it_trains(tmp_path):
    words = tiny.tokenizer(tmp_path / "m")
    config = transformers.BloomConfig(vocab_size=len(words), hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "m")
    data = tiny.jsonl(tmp_path / "d.jsonl", [FORMS["texts"](i) for i in range(8)])
    run = Run(str(tmp_path / "m"), data, CausalLM(packing=True), undula.LoRA(r=1), tmp_path / "o")
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be trained on packed rows"):
        prepare(run)
    assert not (tmp_path / "o").exists()


def test_the_option(model, tmp_path):
    data = tiny.jsonl(tmp_path / "d.jsonl", [FORMS["pairs"](i) for i in range(12)])
    usual = ["train", "--model", model, "--data", data, "--task", "causal-lm", "--task-set", "packing=true"]
    done = CliRunner().invoke(app, [*usual, "--out", str(tmp_path / "o"), "--dry-run"])
    assert done.exit_code == 0, done.output
    run = Run(model, data, CausalLM(packing=True), undula.LoRA(r=1), tmp_path / "o")
    assert Run.decode(run.encode(), run.out).task.packing
    assert "packing" not in CausalLM().encode()
    assert look(run).seconds > 0
