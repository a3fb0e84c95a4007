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


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_weighs_by_the_tokens_that_its_loss_is_the_mean_of(packing, model):
    """The first token of a row without a begin token is learned by nobody: nothing stands before it."""
    task, tokenizer = CausalLM(packing=packing), transformers.AutoTokenizer.from_pretrained(model)
    opened = transformers.AutoModelForCausalLM.from_pretrained(model)
    batch = task.gatherer(tokenizer, opened)([task.example({"text": text(i)}, tokenizer) for i in (1, 4)])
    assert task.items(batch) == 2 + 5  # words and the end token, but the first


def talks(folder, train, validation):
    """Conversations whose questions have so many words."""
    folder.mkdir()
    for name, lengths in (("train", train), ("validation", validation)):
        asked = [" ".join(["film"] * n) for n in lengths]
        both = [[{"role": "user", "content": q}, {"role": "assistant", "content": "very good"}] for q in asked]
        tiny.jsonl(folder / f"{name}.jsonl", [{"messages": messages} for messages in both])
    return str(folder)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_of_which_nothing_is_left_to_learn_changes_nothing(packing, model, tmp_path):
    """Its loss is 0, not 0 / 0, which would end the training as if it had diverged."""
    data, task = talks(tmp_path / "d", [30, 2, 3, 4], [2]), CausalLM(generate=0, packing=packing, max_length=12)
    run = Run(model, data, task, undula.LoRA(r=2), tmp_path / "o", batch=1, epochs=1.0)
    report = undula.train(run)
    assert report["state"] == "done"
    assert sorted(loss > 0 for _, loss in report["losses"]) == [False, True, True, True]
    assert any("1 of 4 train rows: nothing is left that would be learned" in note for note in report["data"]["notes"])


@pytest.mark.parametrize(("part", "train", "held"), [("train", [30, 31], [2]), ("validation", [2, 3], [30])])
def test_rows_of_which_nothing_is_left_to_learn_are_refused_before_the_start(part, train, held, model, tmp_path):
    data, task = talks(tmp_path / "d", train, held), CausalLM(max_length=12)
    with pytest.raises(ValueError, match=rf"nothing is left to learn of any of the . {part} rows.*Raise max_length=12"):
        prepare(Run(model, data, task, undula.LoRA(r=2), tmp_path / "o"))


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
