"""`undula inspect`: any adapter of the ecosystem is shown from its headers, and what is hostile is refused in a line.

Files of other makers are written here under the names that PEFT, LyCORIS, kohya's scripts, diffusers, MLX and llama.cpp
give (tests/interop/test_peft_lora.py has PEFT's own, each kind)."""

import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import undula
from undula.cli.main import app
from undula.io import inspect, lora_config

F = torch.zeros


def config(folder, **said):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def kohya(site="lora_unet_down_blocks_0_attn1_to_q", kind=None, **more):
    kinds = {
        None: {"lora_down.weight": F(4, 8), "lora_up.weight": F(6, 4)},
        "conv": {"lora_down.weight": F(4, 8, 1, 1), "lora_mid.weight": F(4, 4, 3, 3), "lora_up.weight": F(6, 4, 1, 1)},
        "LoHa": {"hada_w1_a": F(6, 4), "hada_w1_b": F(4, 8), "hada_w2_a": F(6, 4), "hada_w2_b": F(4, 8)},
        "LoKr": {"lokr_w1": F(2, 2), "lokr_w2_a": F(3, 4), "lokr_w2_b": F(4, 4)},
        "OFT": {"oft_blocks": F(4, 2, 2)},
        "IA3": {"weight": F(6), "on_input": F(())},
        "GLoRA": {"a1.weight": F(8, 4), "a2.weight": F(4, 8), "b1.weight": F(6, 4), "b2.weight": F(4, 8)},
        "DoRA": {"lora_down.weight": F(4, 8), "lora_up.weight": F(6, 4), "dora_scale": F(6, 1)},
        "full difference": {"diff": F(6, 8), "diff_b": F(6)},
    }
    leaves = dict(kinds[kind])
    if kind not in ("IA3", "full difference"):
        leaves["alpha"] = torch.tensor(2.0, dtype=torch.bfloat16)
    return {f"{site}.{leaf}": t.to(torch.float16) if t.ndim else t for leaf, t in (leaves | more).items()}


SINGLE = {  # tensors, form, kind, use, (rank, scale, shape) of the first site
    "kohya": (kohya(), "kohya", "LoRA", "import", (4, 0.5, (6, 8))),
    "LoCon in CP form": (kohya(kind="conv"), "kohya", "LoRA", "import", (4, 0.5, (6, 72))),
    "DoRA": (kohya(kind="DoRA"), "kohya", "DoRA", "import", (4, 0.5, (6, 8))),
    "LoHa": (kohya(kind="LoHa"), "kohya", "LoHa", "show", (4, 0.5, (6, 8))),
    "LoKr": (kohya(kind="LoKr"), "kohya", "LoKr", "show", (4, 0.5, None)),
    "OFT": (kohya(kind="OFT"), "kohya", "OFT", "show", (None, None, None)),
    "IA3": (kohya("lycoris_a", "IA3"), "kohya", "IA3", "show", (None, None, None)),
    "GLoRA": (kohya(kind="GLoRA"), "kohya", "GLoRA", "show", (None, None, None)),
    "differences": (kohya("lora_te_x", "full difference"), "kohya", "full difference", "show", (None, None, None)),
    "diffusers": (
        {"unet.a.to_q.lora_A.weight": F(2, 8), "unet.a.to_q.lora_B.weight": F(6, 2)},
        "diffusers", "LoRA", "train", (2, 1.0, (6, 8)),
    ),
    "diffusers, two parts": (
        {f"{p}.q.lora_{k}.weight": F(*s) for p in ("unet", "text_encoder") for k, s in (("A", (2, 8)), ("B", (6, 2)))},
        "diffusers", "LoRA", "import", (2, 1.0, (6, 8)),
    ),
    "diffusers, older": (
        {"unet.a.processor.to_q_lora.down.weight": F(2, 8), "unet.a.processor.to_q_lora.up.weight": F(6, 2)},
        "diffusers, older", "LoRA", "show", (2, 1.0, (6, 8)),
    ),
    "ComfyUI": (
        {"diffusion_model.x.0.lora_A.weight": F(2, 8), "diffusion_model.x.0.lora_B.weight": F(6, 2)},
        "ComfyUI", "LoRA", "train", (2, 1.0, (6, 8)),
    ),
    "no configuration": (
        {"base_model.model.q.lora_A.weight": F(2, 8), "base_model.model.q.lora_B.weight": F(6, 2)},
        "tensors", "LoRA", "show", (2, None, (6, 8)),
    ),
    "a model": ({"model.embed.weight": F(9, 4), "norm.weight": F(4)}, "whole model", "whole model", "show", None),
    "8-bit floats": (
        {"lora_unet_x.lora_down.weight": F(2, 8).to(torch.float8_e4m3fn), "lora_unet_x.lora_up.weight": F(6, 2)},
        "kohya", "LoRA", "import", (2, 1.0, (6, 8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_of_any_kind_is_shown(name, tmp_path):
    tensors, form, kind, use, first = SINGLE[name]
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "sd_v1"})
    found = inspect(tmp_path / "x.safetensors")
    assert (found.form, found.kind, found.use, found.base) == (form, kind, use, "sd_v1")
    assert found.parameters == sum(t.numel() for t in tensors.values())
    spot = found.sites[0]
    assert first is None or (spot.rank, spot.scale, spot.shape) == first
    assert inspect(tmp_path).kind == kind  # the one file of a folder


def test_undulas_own_are_shown_as_they_load(tmp_path):
    """Wrappers by name, ranks and scales as the methods have them, tensors that seeds give again included."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    methods = {"1": undula.DoRA(undula.AuroRAStatic(r=2, alpha=3.0))}
    adapter = undula.attach(model, undula.NOLA(r=2), overrides=methods, full=["0.bias"])
    adapter.save(tmp_path / "a", base="some/model", task="SEQ_CLS")
    found = inspect(tmp_path / "a")
    assert (found.form, found.base, found.task, found.use) == ("undula", "some/model", "SEQ_CLS", "train")
    nola, dora, full = found.sites
    assert (nola.kind, nola.rank, nola.shape) == ("NOLA", 2, (8, 6))
    assert (dora.kind, dora.rank, dora.alpha, dora.scale) == ("DoRA(AuroRAStatic)", 2, 3.0, 1.5)
    assert (full.site, full.kind) == ("0.bias", "in full")
    assert inspect(tmp_path / "a" / "adapter_model.safetensors").encode()["sites"] == found.encode()["sites"]


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_are_values_whatever_they_are_stored_as(bits, tmp_path):
    """Of integers with scales: what they stand for; the bytes are said beside it.  15 and 25 numbers are no whole
    bytes of 4 bits each."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5))
    adapter = undula.attach(model, undula.LoRA(r=5), full=["0.bias"])
    adapter.save(tmp_path / "a")
    undula.compress.quantise_directory(tmp_path / "a", tmp_path / "b", bits, 8)
    one, other = inspect(tmp_path / "a"), inspect(tmp_path / "b")
    assert one.parameters == other.parameters == adapter.num_parameters() == 5 * (5 + 6 + 6 + 5) + 6
    assert [s.parameters for s in one.sites] == [s.parameters for s in other.sites]
    assert f"stored as integers of {bits} bits in groups of 8 with a scale each, read as float32" in other.notes


def test_directories_of_others_are_shown(tmp_path):
    """MLX's, whose factors stand the other way round; a soft prompt of PEFT's; AdapterHub's configuration."""
    mlx = config(tmp_path / "mlx", fine_tune_type="lora", model="m", lora_parameters={"rank": 2, "scale": 20.0})
    save_file({"model.q.lora_a": F(8, 2), "model.q.lora_b": F(2, 6)}, mlx / "adapters.safetensors")
    found = inspect(mlx)
    spot = found.sites[0]
    assert (found.form, found.base, spot.rank, spot.scale, spot.shape) == ("MLX", "m", 2, 20.0, (6, 8))
    prompt = config(tmp_path / "prompt", peft_type="PROMPT_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=4)
    save_file({"prompt_embeddings": F(4, 8)}, prompt / "adapter_model.safetensors")
    assert (inspect(prompt).kind, inspect(prompt).use, inspect(prompt).task) == ("prompt tuning", "show", "CAUSAL_LM")
    later = config(tmp_path / "later", peft_type="TOMORROW")
    save_file({"q.tomorrow_A": F(4, 8)}, later / "adapter_model.safetensors")
    assert "TOMORROW (a type of PEFT's that undula does not know)" in inspect(later).kind


def test_a_gguf_adapter_is_shown(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", F(3, 8).numpy())
    writer.add_tensor("blk.0.attn_q.weight.lora_b", F(6, 3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "a.gguf")
    spot = found.sites[0]
    assert (found.form, found.kind, found.use, found.base) == ("GGUF", "LoRA", "import", "llama")
    assert (spot.site, spot.rank, spot.alpha, spot.scale, spot.shape) == ("blk.0.attn_q", 3, 6.0, 2.0, (6, 8))
    assert "undula import FILE" in found.why
    model = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    model.add_tensor("blk.0.attn_q.weight", F(6, 8).numpy())
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()
    whole = inspect(tmp_path / "m.gguf")
    assert (whole.kind, whole.use) == ("whole model", "show")
    assert "its models not at all" in whole.why


def sharded(folder, places, held):
    for name, keys in held.items():
        save_file({k: F(2, 8) if "_A" in k else F(6, 2) for k in keys}, folder / name)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


A, B = (f"base_model.model.q.lora_{side}.weight" for side in "AB")


def test_shards_are_one_adapter_and_their_index_is_not_trusted(tmp_path):
    folder = config(tmp_path / "a", peft_type="LORA", r=2, lora_alpha=4)
    sharded(folder, {A: "x-1.safetensors", B: "x-2.safetensors"}, {"x-1.safetensors": [A], "x-2.safetensors": [B]})
    found = inspect(folder)
    assert (found.sites[0].rank, found.sites[0].scale, len(found.files)) == (2, 2.0, 2)
    for places, what in [
        ({A: "../x-1.safetensors"}, "not the name of a file beside it"),
        ({A: "/etc/passwd"}, "not the name of a file beside it"),
        ({A: "x.bin"}, "is a pickle"),
        ({A: "x-2.safetensors", B: "x-2.safetensors"}, "does not hold it"),
        ({A: "x-1.safetensors", B: "x-1.safetensors"}, "does not hold it"),
        ({A: 3}, "does not name a file for each"),
    ]:
        sharded(folder, places, {})
        with pytest.raises(ValueError, match=what):
            inspect(folder)
    sharded(folder, {A: "lost.safetensors"}, {})
    with pytest.raises(FileNotFoundError, match=r"there is no .*lost\.safetensors"):
        inspect(folder)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize("how", ["plain", "zip"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.ckpt", "adapter_model.safetensors"])
def test_a_pickle_is_never_opened(name, how, tmp_path, monkeypatch):
    """By its name or by what it holds, alone or in a directory; it says what to do."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = config(tmp_path / "a", peft_type="LORA")
    data = pickle.dumps(Trap())
    if how == "zip":
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("archive/data.pkl", data)
    else:
        (folder / name).write_bytes(data)
    for place in (folder, folder / name):
        with pytest.raises(ValueError, match=r"is a pickle: opening one runs .*torch\.load\('.*weights_only=True"):
            inspect(place)
    assert not (tmp_path / "sprung").exists()


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "begins at byte"),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "begins at byte"),
    "beyond the file": ({"a": entry(0, 1 << 40, [1 << 38])}, 8, "claims"),
    "more than it takes": ({"a": entry(0, 8, [1 << 38])}, 8, "takes"),
    "negative": ({"a": entry(-8, 0, [2])}, 0, "cut or damaged"),
    "many dimensions": ({"a": entry(0, 4, [1] * 99)}, 4, "at most 8 sizes"),
    "unknown type": ({"a": entry(0, 4, [1], "F33")}, 4, "of the type 'F33'"),
    "no JSON": (b"{" * 9, 0, "is not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, 0, "nested more than"),
    "twice": (b'{"a":1,"a":2}', 0, "there twice"),
    "no text": (b"\xff\xfe{}", 0, "not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name, tmp_path):
    header, size, what = HOSTILE[name]
    file = raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=what):
        inspect(file)


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, what in [("link", "is a link to"), ("loop", "is a link to"), ("lost", "there is no")]:
        with pytest.raises(FileNotFoundError, match=what):
            inspect(tmp_path / name)
    with pytest.raises(ValueError, match="a pipe, a socket or a device"):
        inspect(tmp_path / "pipe.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        inspect(tmp_path)
    save_file(kohya(), tmp_path / "real")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "real")  # as the hub's cache has them
    assert inspect(tmp_path / "x.safetensors").kind == "LoRA"


def test_of_several_one_is_to_be_named(tmp_path):
    for name in ("a", "b"):
        config(tmp_path / name, peft_type="LORA")
    with pytest.raises(LookupError, match="is no adapter, and has some in it: name one: a, b"):
        inspect(tmp_path)
    for name in ("x", "y"):
        save_file(kohya(), tmp_path / f"{name}.safetensors")
    with pytest.raises(LookupError, match=r"holds 2 files of tensors: name one of them: x\.safetensors, y"):
        inspect(tmp_path)


def test_a_folder_of_very_many_names_is_not_walked(tmp_path, monkeypatch):
    """A thousandth of the bound here: what is looked at is counted, not timed."""
    monkeypatch.setattr("undula.io.stored.MOST_NAMES", 10)
    seen = []
    scandir = os.scandir

    class Scan:
        def __init__(self, path):
            self.found = scandir(path)

        def __enter__(self):
            return (seen.append(e) or e for e in self.found)

        def __exit__(self, *_):
            self.found.close()

    monkeypatch.setattr("undula.io.stored.os.scandir", Scan)
    for i in range(100):
        (tmp_path / f"{i:03}.txt").touch()
    with pytest.raises(FileNotFoundError, match="of its first 10 names: there are more"):
        inspect(tmp_path)
    assert len(seen) <= 11


NAMES = ["\x1b[31mred\x1b[0m", "a\x07\x9b2J", "right\u202eto left", "half\ud800", "[bold]markup[/]", "two\nlines\r"]


def test_names_reach_a_terminal_as_text(tmp_path):
    """Escapes, bells, marks that turn the writing, halves of characters: no command for who looks."""
    header = {f"{name}.hada_w1_a": entry(i * 48, i * 48 + 48, [6, 2]) for i, name in enumerate(NAMES)}
    header["__metadata__"] = {"ss_sd_model_name": "".join(NAMES)}
    file = raw(tmp_path / "x.safetensors", header, bytes(48 * len(NAMES)))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "\x1b]0;title\x07").touch()
    for words, code in [([file], 0), ([file, "--all"], 0), ([file, "--json", "-"], 0), ([tmp_path / "more"], 2)]:
        done = CliRunner().invoke(app, ["inspect", *map(str, words)])
        assert done.exit_code == code, done.output
        for char in done.output.replace("\n", ""):
            assert char.isprintable(), (words, char)
        assert code == 2 or "[bold]markup[/]" in done.output


def test_the_verb_says_it_in_a_table_and_as_json(tmp_path):
    tensors = {k: t for i in range(12) for k, t in kohya(f"lora_unet_blocks_{i}_to_q").items()}
    tensors |= kohya("lora_unet_mid", "LoHa")
    save_file(tensors, tmp_path / "x.safetensors")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.stderr
    assert "lora_unet_blocks_*_to_q" in done.output
    assert "LoRA (12), LoHa (1)" in done.output
    assert "can be shown only: LoHa at 1 layers: no LoRA" in done.output
    told = json.loads((tmp_path / "out.json").read_text())
    assert (len(told["sites"]), told["use"], told["dtypes"]["F16"]) == (13, "show", 28)
    assert "blocks_7_to_q" in CliRunner().invoke(app, ["inspect", str(tmp_path), "--all"]).output


def test_a_file_of_very_many_layers_fills_no_terminal(tmp_path, monkeypatch):
    """Layers that are all called otherwise, and patterns as many: nothing is done for each of them times each other."""
    many, calls, patterns = 600, [], lora_config.patterns
    monkeypatch.setattr(lora_config, "patterns", lambda *words: calls.append(words) or patterns(*words))
    folder = config(tmp_path, peft_type="LOHA", r=4, alpha_pattern={f"w{i}y": i for i in range(many)})
    raw(tmp_path / "adapter_model.safetensors", {f"w{i}y.hada_w1_a": entry(0, 0, [0, 4]) for i in range(many)}, b"")
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output
    assert len(calls) < 5
    assert done.output.count("LoHa") < 300
    assert f"{many - 200:,} more lines: --all shows them" in done.output
    assert inspect(folder).sites[-1].alpha == many - 1


def test_inspect_reads_headers_alone(tmp_path):
    """A file of a hundred gigabytes that holds nothing costs what its header does."""
    size = 100 << 30
    file = raw(tmp_path / "x.safetensors", {"lora_unet_x.lora_down.weight": entry(0, size, [size // 8, 2])})
    with open(file, "r+b") as opened:
        opened.truncate(os.path.getsize(file) + size)
    begun = time.process_time()
    assert inspect(file).parameters == size // 4
    assert time.process_time() - begun < 5
