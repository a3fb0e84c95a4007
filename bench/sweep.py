"""What a small study gains by `--together`: the whole of it, its sweeps, evaluations and final runs, in two ways.

    python bench/sweep.py --json bench/results/sweep.json       # SmolLM2 on docstrings: about six minutes of one core

A small form of `studies/summaries.toml`: LoRA on all linear layers, three rates, two seeds with a sweep each, so six
runs of the sweeps and two final ones.  Both ways take turns, each into a folder of its own; what is counted is the
processor time of the process, reading models and data included.  Said too: by how much their figures differ.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from record import record

from undula.study.drive import Finished, run
from undula.study.plan import Plan
from undula.study.read import parse
from undula.study.store import Store

STUDY = """
title = "small"
baseline = "LoRA"
seeds = [1, 2]
[train]
steps = {steps}
batch = {batch}
evaluations = 2
[sweep]
rates = [1e-3, 3.16e-3, 1e-2]
extend = 0
[[models]]
source = "bundled:smollm2"
[[data]]
source = "bundled:docstrings"
task = "causal-lm"
set = {{ max_length = {length}, generate = 0 }}
train = 400
validation = 8
test = 8
[[methods]]
name = "LoRA"
method = "lora"
set = {{ r = 8, alpha = 16 }}
"""
WAYS: dict[str, int | None] = {"separate": None, "together": 8}


def figures(found: Finished) -> dict[tuple[str, float, int], list[float]]:
    """{run: its losses and metrics}."""
    return {
        (o.stage, o.lr, o.seed): [*(v for _, v in o.losses), *(v for _, v in o.curve), *([o.test] if o.test else [])]
        for o in found.outcomes
    }


def compared(text: str, rounds: int) -> dict[str, Any]:
    study = parse(text)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    came: dict[str, Finished] = {}
    marked = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for way, together in list(WAYS.items())[:: 1 if number % 2 else -1]:
                out = Path(name) / f"{way}-{number}"
                begun = time.process_time()
                came[way] = run(study, out, together=together)
                seconds[way].append(time.process_time() - begun)
                print(f"{way}: {seconds[way][-1]:.1f} s of the processor", flush=True)
                if together:
                    records = Store(out / "runs.sqlite").records(Plan(study).trials()).values()
                    marked = sum(bool(r.result and r.result["made"].get("together")) for r in records)
    one, other = figures(came["separate"]), figures(came["together"])
    assert set(one) == set(other)
    off = [abs(a - b) / abs(a) for which in one for a, b in zip(one[which], other[which], strict=True)]
    ratios = [a / b for a, b in zip(seconds["separate"], seconds["together"], strict=True)]
    return {
        "seconds": seconds, "runs": len(one), "made_together": marked, "largest_relative_difference": max(off),
        "times_as_fast": statistics.median(ratios), "spread": [min(ratios), max(ratios)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    found = compared(STUDY.format(steps=asked.steps, batch=asked.batch, length=asked.length), asked.rounds)
    low, high = found["spread"]
    print(
        f"{found['times_as_fast']:.2f} times as fast together ({low:.2f} to {high:.2f}); figures differ by "
        f"{found['largest_relative_difference']:.1e} at most"
    )
    if asked.json:
        record(asked.json, {**{k: v for k, v in vars(asked).items() if k != "json"}, **found})


if __name__ == "__main__":
    main()
