"""An index over 10,000 adapters: the time of the first update, of later ones, of a search, and the memory.

    python bench/find_index.py --json bench/results/find-index.json      # some minutes of one core
    python bench/find_index.py --adapters 200 --quick                    # to see that it runs

The adapters are copies of one small LoRA (rank 2 at four layers of 64 x 64) with other numbers and another card, whose
words are drawn from WordNet's glosses; every 500th is cut in the middle of its tensors.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import record, tell
from torch import nn

import undula
from undula import bundled, retrieve
from undula.io.files import CONFIG, TENSORS

CUT = 500


def made(root: Path, number: int) -> None:
    """So many adapters in ROOT, in folders of a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    undula.attach(model, undula.LoRA(r=2), "*").save(root / "template", base="a-base")
    config, tensors = ((root / "template" / name).read_bytes() for name in (CONFIG, TENSORS))
    shutil.rmtree(root / "template")
    head = 8 + int.from_bytes(tensors[:8], "little")
    texts, draw = bundled.dataset("wordnet")["train"]["text"][:], random.Random(0)
    for i in range(number):
        put(root / f"{i // 100:03d}" / f"a{i:05d}", config, tensors[:head], len(tensors) - head, draw.choice(texts), i)


def put(folder: Path, config: bytes, head: bytes, size: int, words: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = 0.1 * torch.randn(size // 4, generator=torch.Generator().manual_seed(seed))
    body = numbers.numpy().tobytes()
    (folder / CONFIG).write_bytes(config)
    (folder / TENSORS).write_bytes(head + (body[: size // 2] if seed % CUT == CUT - 1 else body))
    (folder / "README.md").write_text(f"# For what is called: {words}\n")


def timed(what: str, work: Any, rows: list[dict[str, Any]]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    rows.append({"what": what, "seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu})
    rows[-1]["read"] = getattr(found, "read", None)
    print(rows[-1], flush=True)
    return found


def changed(root: Path, number: int) -> int:
    """A hundredth of the folder in three equal parts: other numbers, gone, new.  Returns how many are to be read."""
    some = max(number // 300, 1)
    every = sorted(root.glob("*/a*"))
    config = (every[0] / CONFIG).read_bytes()
    tensors = (every[0] / TENSORS).read_bytes()
    head = 8 + int.from_bytes(tensors[:8], "little")
    for i in range(some):
        put(every[i], config, tensors[:head], len(tensors) - head, "something else altogether", number + CUT * i)
        shutil.rmtree(every[-1 - i])
        put(root / "new" / f"b{i}", config, tensors[:head], len(tensors) - head, "a new one", 2 * number + CUT * i)
    return 2 * some


def run(root: Path, number: int, again: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    made(root, number)
    time.sleep(2.1)  # what is younger is read again
    first = timed("first update", lambda: retrieve.update(root), rows)
    timed("nothing has changed", lambda: retrieve.update(root), rows)
    wanted = changed(root, number)
    later = timed("a hundredth has changed", lambda: retrieve.update(root), rows)
    asked = retrieve.question("animals that live in water")
    encoder = retrieve.Encoder(len(asked)).eval()
    timed("a search by words and weights", lambda: retrieve.ranked(later, asked, encoder, top=10), rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {
        "adapters": number, "rows": rows, "peak GiB": peak, "file MB": (root / FILE).stat().st_size / 1e6,
        "skipped": len(first.skipped), "wanted to read": wanted,
    }  # fmt: skip
    if again:
        fresh = timed("an index from the start", lambda: retrieve.update(root, root.parent / "fresh.safetensors"), rows)
        near = torch.allclose(later.texts, fresh.texts, atol=1e-5) and torch.equal(later.weights, fresh.weights)
        found["equal"] = near and [e.name for e in later.entries] == [e.name for e in fresh.entries]
    return found


FILE = ".undula-index.safetensors"


def judged(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, bool]]:
    took = {row["what"]: row for row in found["rows"]}
    first, nothing = took["first update"]["cpu seconds"], took["nothing has changed"]["cpu seconds"]
    targets = {
        "CPU seconds of the first update <= 600": first,
        "CPU seconds where nothing has changed <= 10": nothing,
        "GiB of memory at most <= 2": found["peak GiB"],
        "adapters that were skipped and should not have been, or the other way": abs(
            found["skipped"] - found["adapters"] // CUT
        ),
        "adapters that were read and had not changed": abs(
            took["a hundredth has changed"]["read"] - found["wanted to read"]
        ),
    }
    if "equal" in found:
        targets["differences of the last update from an index from the start"] = float(not found["equal"])
    return targets, dict(zip(targets, (first <= 600, nothing <= 10, found["peak GiB"] <= 2,
                                       *(v == 0 for v in list(targets.values())[3:])), strict=True))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--again", action="store_true", help="compare the last update with an index from the start")
    parser.add_argument("--quick", action="store_true", help="times are not judged")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder) / "adapters", given.adapters, given.again)
        targets, met = judged(found)
        found |= {"targets": targets, "targets_met": met}
        tell(targets, met)
        if given.json:
            record(given.json, found)
    sys.exit(0 if given.quick or all(met.values()) else 1)


if __name__ == "__main__":
    main()
