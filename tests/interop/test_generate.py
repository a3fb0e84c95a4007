"""A real language model: generation with a different adapter per row, with its key-value cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import undula
from undula.bundled import model_path


@pytest.fixture(scope="module")
def smollm2():
    path = model_path("smollm2")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def test_rows_generate_what_each_adapter_generates_alone(smollm2):
    model, tokenizer = smollm2
    names = ["a", None, "b", "c", "b"]
    methods = {"a": undula.LoRA(r=4), "b": undula.LoRA(r=4), "c": undula.AuroRA()}
    for name, method in methods.items():
        adapter = undula.attach(model, method, ["q_proj", "v_proj", "down_proj"], name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn_like(p))
    ids = tokenizer(["The capital of France is"] * len(names), return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    alone = []
    for name in names:
        undula.select(model, name)
        alone.append(model.generate(**{k: t[:1] for k, t in ids.items()}, **options)[0])
    undula.select(model, "a")
    with undula.rows(model, names):
        together = model.generate(**ids, **options)
    assert [t.tolist() for t in together] == [t.tolist() for t in alone]
    assert len({tuple(t.tolist()) for t in alone}) == 4  # three adapters and the base say different things
    undula.select(model, None)
    assert "Paris" in tokenizer.decode(alone[1])
    for name in methods:
        undula.detach(model, name)
