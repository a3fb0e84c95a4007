"""Adapters in other forms, by the verbs: opened as they are, or refused with the command that converts them."""

import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import undula
from tests.support.layers import net
from tests.support.models import gpt2, llama, tokens
from tests.support.numbers import shake
from undula.cli.main import app
from undula.io import export_diffusers, export_gguf_lora, export_kohya, load_gguf_lora

from .test_peft_lora import theirs

close = torch.testing.assert_close


def call(*words, code=0):
    """(output, errors) of `undula words...`, white space made one."""
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return " ".join(done.stdout.split()), " ".join(done.stderr.split())


def same(found, wanted):
    assert set(found.methods) == set(wanted.methods)
    for site in wanted.methods:
        close(found.delta(site), wanted.delta(site))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a folder with one LoRA in many forms, that LoRA)."""
    room, model = tmp_path_factory.mktemp("forms"), net()
    adapter = undula.attach(model, undula.LoRA(r=3, alpha=2.0))
    shake(adapter.parameters())
    adapter.save(room / "own")
    export_kohya(adapter, room / "kohya.safetensors")
    export_diffusers(adapter, room / "pipe")
    (room / "pipe" / "pytorch_lora_weights.safetensors").rename(room / "diffusers.safetensors")
    save_file({k: t for k, t in model.state_dict().items() if ".undula" not in f".{k}"}, room / "net.safetensors")
    loha = {f"lora_unet_0.hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(loha, room / "loha.safetensors")
    return room, adapter.copy()


def test_a_file_without_the_layers_names_is_imported_with_those_of_the_base(made, tmp_path):
    """Of the base the headers alone are read."""
    room, adapter = made
    told, _ = call("import", room / "kohya.safetensors", "--model", room / "net.safetensors", "--out", tmp_path / "a")
    assert "LoRA, stored as: kohya; 2 layers" in told
    same(undula.Adapter.load(tmp_path / "a"), adapter)
    call("import", room / "diffusers.safetensors", "--out", tmp_path / "b")
    same(undula.Adapter.load(tmp_path / "b"), adapter)
    told = call("import", room / "kohya.safetensors", "--out", tmp_path / "c", code=2)[1]
    assert "name the base (--model)" in told
    assert "LoHa at 1 layers: no LoRA" in call("import", room / "loha.safetensors", "--out", tmp_path / "c", code=2)[1]
    assert not (tmp_path / "c").exists()


VERBS = {
    "squeeze": ("--rank", 2), "quantise": (), "export": (), "collapse": ("--how", "truncate", "--set", "r=2"),
    "combine": ("{own}",),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_opens_a_file_that_says_all_and_refuses_another_with_what_to_type(verb, made, tmp_path):
    room, adapter = made
    more = [str(w).format(own=room / "own") for w in VERBS[verb]]
    told, _ = call(verb, room / "diffusers.safetensors", *more, "--out", tmp_path / "a")
    assert "bytes before: 0" not in told
    assert set(undula.Adapter.load(tmp_path / "a").methods) == set(adapter.methods)
    call(verb, room / "own" / "adapter_model.safetensors", *more, "--out", tmp_path / "b")
    told = call(verb, room / "kohya.safetensors", *more, "--out", tmp_path / "c", code=2)[1]
    assert "`undula import FILE --model BASE --component PART --out DIRECTORY`" in told
    told = call(verb, room / "loha.safetensors", *more, "--out", tmp_path / "c", code=2)[1]
    assert "LoHa at 1 layers: no LoRA" in told
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("words", [("show",), ("merge", "--out", "o"), ("predict", "x"), ("serve", "--port", "0")])
def test_verbs_that_want_a_base_refuse_such_a_file_too(words, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb, *more = words
    told = call(verb, made[0] / "kohya.safetensors", *more, code=2)[1]
    assert "`undula import FILE --model BASE --component PART --out DIRECTORY`" in told
    assert not list(tmp_path.iterdir())


def test_what_changes_numbers_of_the_base_is_opened_with_it(tmp_path):
    """`lora_bias` of PEFT's: by `merge`; by `import` for the verbs that open no base, which say so."""
    x, own = tokens(), gpt2()
    own.save_pretrained(tmp_path / "base")
    model = theirs(own, ["c_attn"], r=2, lora_bias=True, fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "a")
    call("merge", tmp_path / "a", "--model", tmp_path / "base", "--out", tmp_path / "merged")
    close(type(own).from_pretrained(tmp_path / "merged")(x).logits, model(x).logits)
    told = call("squeeze", tmp_path / "a", "--rank", 1, "--out", tmp_path / "b", code=2)[1]
    assert f"`undula import {tmp_path / 'a'} --model BASE --out DIRECTORY` writes it anew" in told
    call("import", tmp_path / "a", "--model", tmp_path / "base", "--out", tmp_path / "b")
    fresh = gpt2()
    undula.attach(fresh, undula.Adapter.load(tmp_path / "b"))
    close(fresh(x).logits, model(x).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_lora_of_llama_cpp_is_read_again(tied, tmp_path):
    """Names, the order of rows, and one alpha for several ranks."""
    pytest.importorskip("gguf")
    model = llama(tie_word_embeddings=tied)
    adapter = undula.attach(model, undula.LoRA(r=2), overrides={"*.v_proj": undula.LoRA(r=5)})
    shake(adapter.parameters())
    file = tmp_path / "x.gguf"
    export_gguf_lora(adapter, model.config, file)
    same(load_gguf_lora(file, model.config), adapter)
    model.config.save_pretrained(tmp_path / "base")
    assert undula.io.inspect(file).use == "import"
    call("import", file, "--model", tmp_path / "base", "--out", tmp_path / "a")
    same(undula.Adapter.load(tmp_path / "a"), adapter)
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"'blk\.1\.\S+' is no factor of a linear layer of the base"):
        load_gguf_lora(file, model.config)


def test_a_text_encoder_is_called_as_others_call_it(tmp_path):
    """transformers 5 has no `text_model` in CLIP's names; files have."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=16, **sizes))
    adapter = undula.attach(model, undula.LoRA(r=2), ["q_proj", "fc1"])
    shake(adapter.parameters())
    export_kohya(adapter, tmp_path / "x.safetensors", "lora_te1")
    with open(tmp_path / "x.safetensors", "rb") as file:
        assert b'"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"' in file.read(10_000)
    undula.detach(model)
    same(undula.io.load_kohya(tmp_path / "x.safetensors", model), adapter.copy())
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    words = ["import", tmp_path / "x.safetensors", "--model", tmp_path / "pipeline", "--out", tmp_path / "a"]
    assert "is a pipeline: name the part (--component); it has text_encoder" in call(*words, code=2)[1]
    call(*words, "--component", "lora_te1")
    same(undula.Adapter.load(tmp_path / "a"), adapter.copy())


WRITES = {
    "squeeze": ("{own}", "--rank", 2), "quantise": ("{own}",), "combine": ("{own}", "{own}"), "export": ("{own}",),
    "collapse": ("{own}", "--how", "truncate", "--set", "r=2"),
    "import": ("{room}/kohya.safetensors", "--model", "{room}/net.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("moment", ["first", "last"])
@pytest.mark.parametrize("verb", [*WRITES, "a file"])
def test_a_verb_that_is_killed_leaves_nothing_under_the_name_and_the_next_one_cleans_up(verb, moment, made, tmp_path):
    """SIGKILL as the first file is put in its place, and as the whole is."""
    room, _ = made
    words = [str(w).format(own=room / "own", room=room) for w in WRITES.get(verb, WRITES["export"])]
    out = tmp_path / ("o.safetensors" if verb == "a file" else "o")
    more = ["--format", "kohya", "--component", "unet"] if verb == "a file" else []
    words = ["export" if verb == "a file" else verb, *words, *more, "--out", out]
    pid = os.fork()
    if not pid:
        replace = os.replace

        def dying(source, target):
            if moment == "first" or os.fspath(target) == os.fspath(out):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        try:
            CliRunner().invoke(app, [str(w) for w in words])
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    call(*words)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
