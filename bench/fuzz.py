"""Damaged files, made with knowledge of their structure: does every reader refuse or read them, and at what cost?

    python bench/fuzz.py --cases 20000 --json bench/results/fuzz.json

Directories of every registered method, wrappers, plain LoRAs, diffusers' files, kohya's and llama.cpp's LoRAs,
shards, what others make (LoHa, MLX, prompts), an allocator's state and a GGUF file are read as adapters or looked at
(`undula inspect`), and changed at one to three places: values, types, keys and nesting of the JSON; names, types,
shapes, offsets and numbers of the tensors; bytes. The targets: nothing but the documented errors, nothing slow, no
memory out of proportion to the files, and what is accepted attaches and runs, or is refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

import undula
from undula import (
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
    Method,
    Sum,
)
from undula.io import diffusers, files, gguf

DOCUMENTED = (FileNotFoundError, ValueError, LookupError)
SECONDS, TIMES, FREE = (
    3.0,
    8,
    96 << 20,
)  # the most that a case may cost: CPU seconds; bytes of memory per byte, and more


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).eval()


@dataclass
class Kind:
    """One way to store something: its files, and what reads them."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]


@dataclass
class Tally:
    """What became of the cases."""

    ended: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0  # bytes of memory beyond the allowance's slope
    slow_ones: list[str] = field(default_factory=list)
    large: int = 0


def methods() -> Iterator[Method]:
    """Every registered method that needs no parts, and wrappers around some."""
    for name, cls in undula.methods().items():
        if not cls.__module__.startswith("undula."):
            continue  # another package's, or a test's
        if name not in ("Dropout", "Centred", "Sum", "LoRASB"):
            yield cls()
    yield from (Dropout(LoRA(r=2), 0.5), DoRA(LoRAN(r=2)), undula.Centred(LoRA(r=2)), Dropout(undula.VeRA(r=4), 0.1))
    yield from (Sum((LoRA(r=2), undula.SHiRA(r=1)), (1.0, 0.5)), undula.Restarted(LoRA(r=2), past=1))
    yield undula.SHiRA(r=1, mask=undula.starts.masks.Magnitude())
    yield undula.S2FT(share=0.3, selection=undula.starts.channels.Weight())


def kinds(folder: Path) -> list[Kind]:
    """What is damaged."""
    made = []

    def directory(
        name: str, write: Callable[[Path], object], read: Callable[[Path], Any] = undula.Adapter.load
    ) -> None:
        path = folder / str(len(made))
        path.mkdir()
        write(path)
        found = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "README.md"}
        made.append(Kind(name, found, read))

    for method in methods():
        adapter = undula.attach(model(), method, where=["0", "2"], full=[])
        directory(repr(method)[:60], lambda p, a=adapter: a.save(p, base="some/model", task="SEQ_CLS"))
    lora = undula.attach(model(), LoRA(r=2, alpha=3.0), where=["0"], full=["2"])
    directory("full", lora.save)
    directory("PEFT", lambda p: undula.io.export_lora(lora, p))
    directory("PEFT, options", lambda p: _options(lora, p))
    plain = undula.attach(model(), LoRA(r=2, alpha=3.0), where=["0"])
    directory("diffusers", lambda p: diffusers.export_diffusers(plain, p))
    values, tensors = {"step": 3, "path": [{"x": 1.5}]}, {"mean": torch.ones(3), "theta": torch.zeros(2, 2)}
    directory("state", lambda p: files.write_state(p, "s", values, tensors), lambda p: files.read_state(p, "s"))
    made.append(Kind("GGUF", {"model.gguf": _gguf()}, _read_gguf))
    return made + list(others(lora))


def others(lora: Any) -> Iterator[Kind]:
    """What other programs write: read with the model, and looked at."""

    def bytes_of(tensors: dict[str, torch.Tensor]) -> bytes:
        return save(tensors, {"format": "pt", "ss_network_module": "networks.lora"})

    def config(**said: Any) -> bytes:
        return json.dumps(said).encode()

    def looked(path: Path) -> str:
        return json.dumps(undula.io.inspect(path).encode())

    pair = {"lora_down.weight": torch.ones(2, 12), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(3.0)}
    kohya = {f"lora_unet_0.{name}": t for name, t in pair.items()}
    loha = {f"q.hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    weights, single = {"base_model.model.0.lora_A.weight": torch.ones(2, 12)}, "x.safetensors"
    weights |= {"base_model.model.0.lora_B.weight": torch.ones(16, 2)}
    bias = {"base_model.model.0.lora_B.bias": torch.ones(16)}
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["0"], "alpha_pattern": {"0": 4}}
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors")}
    for name, read in (("kohya", lambda p: undula.io.load_kohya(p / single, model())), ("kohya, looked at", looked)):
        yield Kind(name, {single: bytes_of(kohya)}, read)
    block = {f"lora_unet_input_blocks_1_0_in_layers_2.{name}": t for name, t in pair.items()}
    shapes = {"down_blocks.0.resnets.0.conv1": (16, 12)}
    yield Kind("kohya, Stability", {single: bytes_of(block)}, lambda p: repr(undula.io.load_kohya(p / single, shapes)))
    part = {f"unet.0.{name}.weight": t for name, t in (("lora_A", torch.ones(2, 12)), ("lora_B", torch.ones(16, 2)))}
    yield Kind("a file of diffusers", {single: bytes_of(part)}, lambda p: undula.Adapter.load(p / single))
    llama = {"model.gguf": _gguf_lora()}
    yield Kind("GGUF LoRA", llama, lambda p: repr(undula.io.load_gguf_lora(p / "model.gguf", LLAMA)))
    for name, read in (("lora_bias", lambda p: undula.io.load_for(p, model())), ("lora_bias, looked at", looked)):
        yield Kind(name, {files.CONFIG: config(**said, lora_bias=True), files.TENSORS: bytes_of(weights | bias)}, read)
    yield Kind("LoHa", {files.CONFIG: config(peft_type="LOHA", r=2), files.TENSORS: bytes_of(loha)}, looked)
    yield Kind("shards", {files.CONFIG: config(**said), "a.safetensors": bytes_of(weights),
                          f"{files.TENSORS}.index.json": json.dumps(index).encode()}, looked)  # fmt: skip
    mlx = config(fine_tune_type="lora", lora_parameters={"rank": 2, "scale": 20.0})
    turned = {"q.lora_a": torch.ones(12, 2), "q.lora_b": torch.ones(2, 16)}
    yield Kind("MLX", {files.CONFIG: mlx, "adapters.safetensors": bytes_of(turned)}, looked)
    prompt = {
        files.CONFIG: config(peft_type="PROMPT_TUNING"),
        files.TENSORS: bytes_of({"prompt_embeddings": torch.ones(2, 4)}),
    }
    yield Kind("prompt", prompt, looked)
    yield Kind("GGUF, looked at", {"model.gguf": _gguf()}, looked)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(folder)
        own = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "README.md"}
    yield Kind("own, looked at", own, looked)


def _options(adapter: Any, path: Path) -> None:
    undula.io.export_lora(adapter, path)
    config = json.loads((path / files.CONFIG).read_text())
    config |= {"use_dora": False, "use_rslora": True, "alpha_pattern": {"0": 4, "x.*": 2}, "rank_pattern": {}}
    (path / files.CONFIG).write_text(json.dumps(config))


def _gguf() -> bytes:
    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    pairs = text("general.alignment") + struct.pack("<II", 4, 32) + text("a") + struct.pack("<IIQ", 9, 5, 3)
    pairs += struct.pack("<3i", 1, 2, 3) + text("s") + struct.pack("<I", 8) + text("llama")
    tensors = text("t") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0) + text("q") + struct.pack("<IQIQ", 1, 32, 8, 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + pairs + tensors
    return head + b"\0" * (-len(head) % 32) + struct.pack("<8f", *range(8)) + bytes(range(34))


LLAMA = types.SimpleNamespace(
    model_type="llama", architectures=None, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    tie_word_embeddings=False,
)  # fmt: skip


def _gguf_lora() -> bytes:
    site = "model.layers.0.self_attn.q_proj"
    factors = {site: {"A": torch.ones(2, 12), "B": torch.ones(16, 2)}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        undula.io.export_gguf_lora(undula.Adapter({site: LoRA(r=2)}, factors, {site: (16, 12)}), LLAMA, file)
        return file.read_bytes()


def _read_gguf(path: Path) -> None:
    found = gguf.read_gguf(path / "model.gguf")
    for name in found.tensors:
        found.tensor(name)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 16, 10**6, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e-300, 1e300, -2.5, "", "0",
    "nan", "1e308", "LoRA", "(a+)+", "a.b", "../x", "\ud800", "A" * 2000, [], [1], [[]], {}, {"is": "LoRA"},
    {"a": {"b": [1]}},
    {"is": "DoRA", "inner": {"is": "AuroRA"}}, [0, 4000, 4000], [0, 2**31 - 1, 2**31 - 1], [0, 1, 10**9],
)  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree."""
    found, left = [], [tree]
    while left:
        at = left.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            left.append(at[key])
    return found


def damaged_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with a value, a key or some text changed."""
    if rng.random() < 0.1:
        return damaged_bytes(text, rng)
    tree = json.loads(text)
    spots = places(tree)
    at, key = rng.choice(spots)
    other = rng.choice(spots)
    match rng.randrange(7):
        case 0 | 1 | 2:
            at[key] = rng.choice(VALUES)
        case 3:
            at[key] = copy.deepcopy(other[0][other[1]])
        case 4:
            del at[key]
        case 5 if isinstance(at, dict):
            at[str(rng.choice(VALUES))] = at.pop(key) if rng.random() < 0.5 else rng.choice(VALUES)
        case _:
            for _ in range(rng.choice((3, 90, 300))):
                at[key] = [at[key]] if rng.random() < 0.5 else {"is": "Dropout", "inner": at[key]}
    made = json.dumps(tree)
    if rng.random() < 0.1:  # what `dumps` cannot say
        old, new = rng.choice(
            (("{", '{"a": 1, "a": 2, '), ("1", "NaN"), ("0", "-Infinity"), ("2", "1e999"), ("[", "[" * 3000))
        )
        made = made.replace(old, new, 1)
    return made.encode("utf-8", "surrogatepass")


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or moved; or a number in them set to an extreme."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 4))):
        i = rng.randrange(max(1, len(made)))
        match rng.randrange(5):
            case 0:
                made[i : i + 1] = bytes([rng.randrange(256)])
            case 1:
                del made[i:]
            case 2:
                made[i:i] = made[: rng.choice((1, 8, 100))]
            case 3:
                made[i : i + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1)))
            case _:
                del made[i : i + rng.choice((1, 4, 50))]
    return bytes(made)


def damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header or other tensors."""
    choice = rng.random()
    if choice < 0.15:
        return damaged_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    if choice < 0.5:
        header = damaged_json(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    meta = json.loads(data[8 : 8 + length]).get("__metadata__") if rng.random() < 0.7 else None
    tensors = load(data)
    key = rng.choice(sorted(tensors))
    t = tensors[key]
    match rng.randrange(6):
        case 0:
            del tensors[key]
        case 1:
            tensors[rng.choice((key + "x", "x", "base_model.model.x.y", key.replace("0", "7")))] = t.clone()
        case 2:
            dtype = rng.choice((torch.int8, torch.int64, torch.bool, torch.float16, torch.float64, torch.bfloat16))
            tensors[key] = t.to(dtype)
        case 3:
            tensors[key] = torch.full_like(t, rng.choice((0, -1, 1, 7, 120)))
        case 4 if t.is_floating_point():
            tensors[key] = torch.full_like(t, rng.choice((float("nan"), float("inf"), 1e30, -1e38)))
        case _:
            shape = list(t.shape) or [1]
            shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 5))
            tensors[key] = torch.zeros([max(0, n) for n in shape], dtype=t.dtype)
    return save(tensors, meta)


def damage(kind: Kind, rng: random.Random) -> dict[str, bytes]:
    """The kind's files, changed at one to three places."""
    made = dict(kind.files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(made))
        with contextlib.suppress(Exception):  # what is damaged already cannot always be damaged with knowledge
            change = damaged_tensors if name.endswith("safetensors") else damaged_json
            made[name] = (damaged_bytes if name.endswith("gguf") else change)(made[name], rng)
    return made


def high_water() -> int:
    """Peak resident memory since `lower`, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def lower() -> None:
    """Begins a new measurement of the peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def tried(kind: Kind, made: dict[str, bytes], path: Path, tally: Tally) -> None:
    """Reads one case; what is accepted as an adapter is attached and run."""
    for name, data in made.items():
        (path / name).write_bytes(data)
    lower()
    before, begun = high_water(), time.process_time()
    try:
        ended = "accepted" if accepted(kind, path) else "accepted, refused by the model"
    except DOCUMENTED as error:
        ended = type(error).__name__
    except Exception as error:
        ended = f"UNDOCUMENTED {type(error).__name__}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        tally.faults.append(
            f"{kind.name}: {type(error).__name__}: {error!s:.160} ({Path(where.filename).name}:{where.lineno})"
        )
    took, size = time.process_time() - begun, sum(map(len, made.values()))
    over = high_water() - before - TIMES * size
    tally.ended[ended] += 1
    tally.slowest, tally.largest = max(tally.slowest, took), max(tally.largest, over)
    if took > SECONDS:
        tally.slow_ones.append(f"{kind.name}: {took:.1f} s")
    if over > FREE:
        tally.large += 1
        tally.faults.append(f"{kind.name}: {over >> 20} MiB over {size} bytes of files")


def accepted(kind: Kind, path: Path) -> bool:
    """Reads; False where the model that the file was made for refuses what was read."""
    found = kind.read(path)
    if not isinstance(found, undula.Adapter):
        return True
    fresh = model()
    try:
        undula.attach(fresh, found)
    except DOCUMENTED:
        return False
    with torch.no_grad():
        fresh(torch.ones(2, 12))
    return True


def run(cases: int, seed: int, folder: Path) -> Tally:
    """So many cases, always the same ones for a seed."""
    rng, tally = random.Random(seed), Tally()
    (folder / "seeds").mkdir()
    (folder / "case").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = kinds(folder / "seeds")
        for kind in every:
            tried(kind, kind.files, folder / "case", untouched := Tally())
            assert untouched.ended == {"accepted": 1}, (kind.name, untouched)
            _empty(folder / "case")
        for _ in range(cases):
            kind = rng.choice(every)
            tried(kind, damage(kind, rng), folder / "case", tally)
            _empty(folder / "case")
    return tally


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        tally = run(given.cases, given.seed, Path(folder))
    found = {
        "cases": given.cases,
        "seed": given.seed,
        "ended": dict(tally.ended.most_common()),
        "slowest_s": round(tally.slowest, 2),
        "slower_than_s": {str(SECONDS): len(tally.slow_ones)},
        "memory_beyond_files_mib": tally.largest >> 20,
        "over_the_allowance": tally.large,
        "allowance": f"{TIMES} x the files + {FREE >> 20} MiB",
        "faults": (tally.faults + tally.slow_ones)[:40],
        "targets_met": not (tally.faults or tally.slow_ones),
    }
    print(json.dumps(found, indent=1))
    if given.json:
        from record import record

        record(given.json, found)
    sys.exit(not found["targets_met"])


if __name__ == "__main__":
    main()
