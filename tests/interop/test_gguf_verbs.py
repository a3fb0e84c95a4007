"""`undula gguf` and `undula export --format gguf`: files that llama.cpp computes with as the adapted model does."""

import pytest
import torch
import transformers

import undula
from undula.io.gguf import read_gguf

from ..support.llamacpp import ask, greedy
from ..support.numbers import shake
from .test_gguf_write import check_same, random, trained
from .test_verbs import call

IDS = [5, 9, 7, 301]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("base"), trained()
    random("llama, tied", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def opened(base, path, method=None, size=0.2):
    """The base with an adapter that is saved in `path`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapter = undula.attach(model, method or undula.LoRA(r=2))
    shake(adapter.parameters(), size)
    adapter.save(path, base=str(base), task="CAUSAL_LM")
    return model


def test_an_adapter_and_what_it_is_merged_into_become_the_same_file(base, tmp_path):
    model = opened(base, tmp_path / "a", undula.LoRAN(r=2))
    said, _ = call("gguf", tmp_path / "a", "--out", tmp_path / "a.gguf")
    assert "storing them costs 0.0e+00 of the change at most" in said
    (answer,) = ask(tmp_path / "a.gguf", greedy(IDS, 24))
    check_same(model, answer, IDS)
    call("merge", tmp_path / "a", "--out", tmp_path / "merged")
    call("gguf", tmp_path / "merged", "--out", tmp_path / "m.gguf")
    one, two = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "m.gguf")
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        torch.testing.assert_close(one.tensor(name), two.tensor(name))


def test_an_adapter_leaves_for_llama_cpp_beside_its_base(base, tmp_path):
    model = opened(base, tmp_path / "a")
    call("gguf", base, "--out", tmp_path / "base.gguf")
    call("export", tmp_path / "a", "--format", "gguf", "--out", tmp_path / "lora.gguf")
    (answer,) = ask(tmp_path / "base.gguf", greedy(IDS, 24), lora=tmp_path / "lora.gguf")
    check_same(model, answer, IDS)


def test_a_file_that_loses_the_change_says_so(base, tmp_path):
    opened(base, tmp_path / "a", size=1e-3)
    _, told = call("gguf", tmp_path / "a", "--out", tmp_path / "a.gguf", "--encoding", "q8_0")
    assert "of what the adapter does at model.layers" in told
    assert "--encoding f32" in told


def test_what_is_asked_wrongly_is_refused(base, tmp_path):
    opened(base, tmp_path / "a", undula.AuroRA(r=2))
    _, told = call("gguf", tmp_path / "a", "--out", tmp_path / "out", code=2)
    assert "--out" in told
    assert "out.gguf instead of" in told
    _, told = call("gguf", tmp_path / "a", "--out", tmp_path / "a.gguf", code=2)
    assert "cannot be merged" in told
    assert "`undula collapse`" in told
    (tmp_path / "there.gguf").write_text("x")
    _, told = call("gguf", base, "--out", tmp_path / "there.gguf", code=2)
    assert "is there already" in told
    _, told = call("gguf", base, "--out", tmp_path / "m.gguf", "--model", base, code=2)
    assert "is a whole model" in told
    _, told = call("gguf", tmp_path / "nothing", "--out", tmp_path / "m.gguf", code=2)
    assert "nothing" in told
    holes = transformers.AutoModelForCausalLM.from_pretrained(base)
    kept = {k: v for k, v in holes.state_dict().items() if "layers.1.mlp" not in k and k != "lm_head.weight"}
    holes.save_pretrained(tmp_path / "holes", state_dict=kept)
    trained().save_pretrained(tmp_path / "holes")
    _, told = call("gguf", tmp_path / "holes", "--out", tmp_path / "m.gguf", code=2)
    assert "is no whole model: its files lack model.layers.1.mlp" in told
    assert not (tmp_path / "m.gguf").exists()
