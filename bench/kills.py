"""Kills of processes that save an adapter over another one, while others read: is every directory one adapter or the
other?

    python bench/kills.py --json bench/results/kills.json

Each round starts one or two processes that save two adapters over each other for ever (`Adapter.save`, or
`export_lora`), reads the directory until it kills them at a random moment, and reads it once more.  Two adapters differ
in their configuration and in all their numbers, so that a mixture is told by its numbers alone.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from record import record
from torch import nn

import undula


def adapter(alpha, value):
    made = undula.attach(nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), undula.LoRA(r=4, alpha=alpha))
    for p in made.parameters():
        p.data.fill_(value)
    return made


def what(found):
    """What a LoRA of constant factors does: its scale times the squares of its numbers."""
    return {float(found.delta(site).flatten()[0]) for site in found.factors}


def saver(pair, path, export, first):
    pid = os.fork()
    if pid:
        return pid
    try:
        i = first
        while True:
            undula.io.export_lora(pair[i % 2], path) if export else pair[i % 2].save(path)
            i += 1
    finally:
        os._exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, pair = random.Random(given.seed), (adapter(16.0, 1.0), adapter(64.0, 2.0))
    whole = [what(a) for a in pair]
    after, meanwhile, temporaries = collections.Counter(), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a configuration of another save is told: it is what is looked for
        for n in range(given.rounds):
            path = Path(folder, f"{n % 4}")
            pair[0].save(path) if n % 4 < 2 else undula.io.export_lora(pair[0], path)
            temporaries += sum(p.name.startswith(".") for p in path.iterdir())
            pids = [saver(pair, path, n % 4 >= 2, first) for first in range(1 + n % 2)]
            until = time.monotonic() + rng.uniform(0.01, 0.25)
            while time.monotonic() < until:
                meanwhile["whole" if what(undula.Adapter.load(path)) in whole else "mixture"] += 1
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            after["whole" if what(undula.Adapter.load(path)) in whole else "mixture"] += 1
    found = {
        "rounds": given.rounds,
        "kills": given.rounds + given.rounds // 2,
        "read after a kill": dict(after),
        "read meanwhile": dict(meanwhile),
        "temporary files left after the next save": temporaries,
    }
    found["targets_met"] = not (after["mixture"] or meanwhile["mixture"] or temporaries)
    print(found)
    if given.json:
        record(given.json, found)
    sys.exit(not found["targets_met"])


if __name__ == "__main__":
    main()
