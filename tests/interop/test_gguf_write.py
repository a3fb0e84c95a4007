"""GGUF files are what llama.cpp's own runtime computes with as the model does, and read back as they were written."""

from random import Random

import gguf
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import undula
from undula.io import Encoding, export_gguf, export_gguf_lora
from undula.io.gguf import read_gguf
from undula.io.gguf_words import SPLITTINGS

from ..support.llamacpp import ask, greedy, split
from ..support.numbers import shake

TEXTS = [
    "The quick brown fox, it's 2024 and 12345 things aren't 3.14!  Two  spaces\n\n\tA tab. don't",
    "Größe, naïve café, Ωmega; 日本語のテキスト und русский язык: emoji 🙂🙂 — dashes… I'LL they're",
    "def f(x):\n    return x ** 2  # comment\n\n\n" * 2,
]
CROWDED = ["".join(Random(i).choices("abcd", k=9)) for i in range(60)]  # where merges compete for the same letters
SPECIAL = ["<|unk|>", "<|begin|>", "<|end|>"]


def trained(splitting=SPLITTINGS[1]):
    """A byte-level BPE with a splitting that llama.cpp knows."""
    made = Tokenizer(models.BPE(ignore_merges=splitting.whole_first))
    kinds = {
        "ByteLevel": lambda prefix, regex: pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex),
        "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
        "Split": lambda pattern, how, invert: pre_tokenizers.Split(Regex(pattern), how.lower(), invert),
    }
    steps = [kinds[kind](*values) for kind, *values in splitting.steps]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if splitting.normal:
        made.normalizer = getattr(normalizers, splitting.normal)()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return fast(made)


def pieces(prefix=True):
    """A BPE over SentencePiece's pieces, with bytes for what it does not know, as Llama 2's."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    made.train_from_iterator(
        [*TEXTS[:1] * 3, *CROWDED], trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *bytes_])
    )
    state = transformers.tokenization_utils_fast.json.loads(made.to_str())
    state["added_tokens"] = state["added_tokens"][:1]  # bytes are pieces, and no tokens of their own in texts
    made = Tokenizer.from_str(transformers.tokenization_utils_fast.json.dumps(state))
    made.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL[1:]])
    return fast(made, unk="<unk>")


def fast(made, unk=SPECIAL[0], begin=True):
    if begin:
        first = (SPECIAL[1], made.token_to_id(SPECIAL[1]))
        made.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[1]} $A", special_tokens=[first])
    words = {"unk_token": unk, "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **words)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
STRETCHED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED["original_max_position_embeddings"] = 32
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama 3.1's frequencies": ("Llama", {"rope_parameters": STRETCHED}),
    "llama, linear frequencies": ("Llama", {"rope_parameters": LINEAR}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def random(name, size, **more):
    torch.manual_seed(0)
    kind, options = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=size, **SIZES | options | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    shake([p for n, p in model.named_parameters() if p.ndim == 1])  # biases are zeros, norms ones
    return model


@torch.no_grad()
def check_same(model, answer, ids, tolerance=0.01):
    """Each of llama.cpp's tokens is the likeliest one under the model too: by chance one of 400 would be, 24 times."""
    tokens = answer["tokens"]
    logits = model(torch.tensor([ids + tokens])).logits.float()[0, len(ids) - 1 : -1]
    assert len(tokens) == 24
    assert logits.std(-1).min() > 20 * tolerance
    torch.testing.assert_close(logits[torch.arange(24), tokens], logits.amax(-1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_the_model_does(name, tmp_path):
    tokenizer = trained()
    model, ids = random(name, len(tokenizer) + 3), [5, 99, 301, 7, 60, 200, 5] * 5
    lost = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert set(lost.values()) == {0.0}
    (answer,) = ask(tmp_path / "m.gguf", greedy(ids, 24))
    check_same(model, answer, ids)


@pytest.mark.parametrize("splitting", SPLITTINGS, ids=lambda s: s.name)
def test_llama_cpp_splits_texts_as_the_tokenizer(splitting, tmp_path):
    tokenizer = trained(splitting)
    export_gguf(random("llama", len(tokenizer)), tokenizer, tmp_path / "m.gguf")
    texts = [*TEXTS, f"{SPECIAL[1]}one{SPECIAL[2]}\ntwo", " lead", "1234567"]
    answers = ask(tmp_path / "m.gguf", *(split(text) for text in texts))
    assert [a["tokens"] for a in answers] == [tokenizer(text)["input_ids"] for text in texts]
    assert read_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == splitting.name


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_splits_texts_into_pieces_as_the_tokenizer(prefix, tmp_path):
    tokenizer = pieces(prefix)
    export_gguf(random("llama", len(tokenizer)), tokenizer, tmp_path / "m.gguf")
    texts = [*TEXTS, " lead", "quick brown 🙂", "".join(CROWDED)]
    answers = ask(tmp_path / "m.gguf", *(split(text) for text in texts))
    assert [a["tokens"] for a in answers] == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("columns", [64, 80])
def test_what_is_written_reads_back(encoding, columns, tmp_path):
    """Our reader and the package's give the tensors, off by what was said."""
    tokenizer = trained()
    model = random("qwen2", len(tokenizer), hidden_size=columns)
    lost = export_gguf(model, tokenizer, tmp_path / "m.gguf", encoding)
    file = read_gguf(tmp_path / "m.gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    state = dict(model.named_parameters())
    places = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    }
    for own, place in places.items():
        read = file.tensor(place)
        again = torch.from_numpy(gguf.quants.dequantize(theirs[place].data, theirs[place].tensor_type).copy())
        torch.testing.assert_close(read, again.reshape(read.shape), rtol=0, atol=0)
        torch.testing.assert_close(float((read - state[own].detach()).norm()), lost[own])
        assert (lost[own] == 0) == (encoding is Encoding.f32)
        assert lost[own] < 0.01 * float(state[own].detach().norm())
    assert set(lost) == set(model.state_dict())
    assert file.metadata["tokenizer.ggml.tokens"] == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]


def test_a_merged_model_is_written(tmp_path):
    tokenizer = trained()
    model = random("llama", len(tokenizer))
    adapter = undula.attach(model, undula.LoRAN(r=2))
    shake(adapter.parameters())
    with pytest.raises(ValueError, match="merge it first"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    undula.merge(model)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    (answer,) = ask(tmp_path / "m.gguf", greedy([5, 9, 7], 24))
    check_same(model, answer, [5, 9, 7])


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_lora_is_an_adapter_of_llama_cpp(name, tmp_path):
    """Ranks differ between layers; llama.cpp knows one alpha."""
    tokenizer, ids = trained(), [5, 9, 7, 301]
    model = random(name, len(tokenizer))
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    adapter = undula.attach(model, undula.LoRA(r=2), overrides={"*.v_proj": undula.LoRA(r=5)})
    shake(adapter.parameters())
    export_gguf_lora(adapter, model.config, tmp_path / "lora.gguf")
    (answer,) = ask(tmp_path / "m.gguf", greedy(ids, 24), lora=tmp_path / "lora.gguf")
    check_same(model, answer, ids)
    undula.select(model, None)
    with pytest.raises(AssertionError):
        check_same(model, answer, ids)


def test_what_would_be_read_as_something_else_is_refused(tmp_path):
    tokenizer, file = trained(), tmp_path / "m.gguf"
    model = random("llama", len(tokenizer))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    cases = [(gpt2, tokenizer, "GPT2LMHeadModel is not written.*convert_hf_to_gguf.py")]
    cases.append((random("llama", len(tokenizer) - 1), tokenizer, "the model's embedding 402"))
    cases.append((random("llama", len(tokenizer), hidden_act="gelu"), tokenizer, "hidden_act is 'gelu'"))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    cases.append((random("llama", len(tokenizer), rope_parameters=yarn), tokenizer, "'yarn'"))
    cases.append((random("qwen2", len(tokenizer), rope_parameters=STRETCHED), tokenizer, "'llama3'.*qwen2"))
    for made, wanted in (
        (models.WordLevel({"a": 0, "<|unk|>": 1}, unk_token="<|unk|>"), "WordLevel"),
        (None, "splits"),
    ):
        other = Tokenizer(made) if made else Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        other.pre_tokenizer = pre_tokenizers.Whitespace()
        cases.append((model, fast(other, begin=False), wanted))
    rstrip = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rstrip.add_special_tokens([AddedToken("<|x|>", rstrip=True)])
    cases.append((random("llama", len(tokenizer) + 1), fast(rstrip), "'<|x|>' has rstrip"))
    for broken, words, message in cases:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            export_gguf(broken, words, file)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"output\.weight has numbers that f16 cannot hold"):
        export_gguf(model, tokenizer, file, Encoding.f16)
    assert not list(tmp_path.iterdir())


def test_adapters_that_llama_cpp_cannot_hold_are_refused(tmp_path):
    model = random("llama, tied", 400)
    for options, message in (
        ({"where": ["lm_head"]}, "lm_head is adapted"),
        ({"where": ["embed_tokens"]}, "embed_tokens.*is no factor of a linear layer"),
        ({"full": ["model.norm"]}, "trained in full: model.norm"),
    ):
        adapter = undula.attach(model, undula.LoRA(r=2), **options)
        with pytest.raises(ValueError, match=message):
            export_gguf_lora(adapter, model.config, tmp_path / "l.gguf")
        undula.detach(model)
    with pytest.raises(TypeError, match="it is no LoRA"):
        export_gguf_lora(undula.attach(model, undula.LoRAN()), model.config, tmp_path / "l.gguf")
