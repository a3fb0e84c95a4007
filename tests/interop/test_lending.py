"""One model that several ask at once answers all of them as if each were alone, and is afterwards what it was."""

import contextlib
import threading

import pytest
import torch
from transformers import GenerationConfig

import undula
from tests.support import tiny
from undula.train import Classification, Run
from undula.train.tasks.decoders import greedy
from undula.train.tasks.generation import ending
from undula.train.tasks.lending import evaluating


class Words:
    eos_token_id, pad_token_id = 3, 0


LENT = {"mode": evaluating, "greedy": greedy, "writing": lambda model: ending(model, Words())}


@pytest.mark.parametrize("kind", LENT)
@pytest.mark.parametrize("training", [True, False])
@torch.enable_grad()  # left as it was, whoever leaves first
def test_who_leaves_first_changes_nothing_for_who_stays(kind, training):
    model = torch.nn.Dropout().train(training)
    model.generation_config = own = GenerationConfig(do_sample=True, num_beams=3, eos_token_id=5)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    for each in (first, second):
        each.enter_context(LENT[kind](model))
    lent = model.generation_config
    for left in (second, first):
        assert not model.training
        assert model.generation_config is lent
        assert (lent.do_sample, lent.eos_token_id) == (kind == "mode", 5)
        if left is second:
            first.close()
    second.close()
    assert model.training is training
    assert model.generation_config is own


def test_threads_ask_a_model_in_training_mode(tmp_path):
    """Dropout of one half: whoever meets training mode is off by far."""
    (tmp_path / "bert").mkdir()
    rows = tiny.reviews(24)
    undula.train(Run(
        tiny.bert(tmp_path / "bert"), tiny.jsonl(tmp_path / "d.jsonl", rows), Classification(), undula.LoRA(r=2),
        tmp_path / "out", max_steps=1, batch=8, eval_every=0,
    ))  # fmt: skip
    opened = undula.load(tmp_path / "out")
    for module in opened.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    texts, found = [row["text"] for row in rows], []
    alone = opened.predict(texts, batch=4)
    opened.model.train()
    asking = [threading.Thread(target=lambda: found.append(opened.predict(texts, batch=4))) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert opened.model.training
    assert len(found) == 4
    for answers in found:
        assert [a["probability"] for a in answers] == pytest.approx([a["probability"] for a in alone], rel=1e-4)
