"""What a start costs: peak memory and time of attaching LoRA r=8 to SmolLM2-135M, at every start.

    python bench/probe.py --json bench/results/probe.json

All linear layers; the probe has batches of 2 x 64 tokens (of this project's licence).  Each variant runs in a process
of its own.  Memory is the peak above the loaded model; passes are runs of the model on one batch.  With hold=0 there is
one for each of 210 layers and each batch, so that variant has fewer batches (about three minutes each).
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import resident
import torch
from record import record
from torch import nn

import undula
from undula import Centred, LoRA, Probe, bundled
from undula.kernels.solver import Randomised
from undula.observe.probe import loss_of
from undula.starts import (
    EVA,
    Kaiming,
    LoRAGA,
    LoRASB,
    MiLoRA,
    OLoRA,
    Orthogonal,
    PiSSA,
)

DEFAULT, UNLIMITED = 1 << 28, 1 << 60
VARIANTS = {  # name: (start, bytes to hold, batches)
    "kaiming": (Kaiming(), DEFAULT, 8),
    "orthogonal": (Orthogonal(), DEFAULT, 8),
    "olora": (OLoRA(), DEFAULT, 8),
    "pissa-randomised": (PiSSA(Randomised()), DEFAULT, 8),
    "pissa": (PiSSA(), DEFAULT, 8),
    "milora": (MiLoRA(), DEFAULT, 8),
    "eva": (EVA(), DEFAULT, 8),
    "lora-sb": (LoRASB(), DEFAULT, 8),
    "lora-ga, all at once": (LoRAGA(), UNLIMITED, 8),
    "lora-ga": (LoRAGA(), DEFAULT, 8),
    "lora-ga, all at once, 1 batch": (LoRAGA(), UNLIMITED, 1),
    "lora-ga, 1 batch": (LoRAGA(), DEFAULT, 1),
    "lora-ga, hold=0, 1 batch": (LoRAGA(), 0, 1),
    "lora-ga, hold=0, 2 batches": (LoRAGA(), 0, 2),
}
ROWS, LENGTH = 2, 64


def texts(folder: Path, batches: int) -> list[dict[str, torch.Tensor]]:
    from transformers import AutoTokenizer

    licence = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(licence)["input_ids"])
    rows = ids[: batches * ROWS * LENGTH].view(batches, ROWS, LENGTH)
    return [{"input_ids": b, "labels": b} for b in rows]


def measured(name: str) -> dict[str, float]:
    """One variant, in this process (which does nothing else)."""
    from transformers import AutoModelForCausalLM

    folder = bundled.model_path("smollm2")
    start, hold, count = VARIANTS[name]
    batches = texts(folder, count)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model(input_ids=batches[0]["input_ids"][:1, :1])  # pages the weights in
    runs = 0

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return loss_of(model, batch)

    before = resident.begin()
    wall, cpu = time.perf_counter(), time.process_time()
    undula.attach(model, Centred(LoRA(r=8), start), probe=Probe(batches, loss, hold))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "memory_mib": (resident.most() - before) / 2**20, "passes": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to put the figures; variants that are there already are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    rows = json.loads(args.json.read_text())["variants"] if args.json and args.json.exists() else {}
    for name in args.only:
        command = [sys.executable, __file__, "--one", name, "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows[name] = {"date": f"{datetime.date.today()}", "threads": args.threads, **row}
        print(f"{name:30} {row['seconds']:8.1f} s  {row['memory_mib']:7.0f} MiB  {row['passes']:5} passes", flush=True)
        if args.json:
            kept = {"variants": {n: rows[n] for n in VARIANTS if n in rows}}
            record(args.json, kept, command="python bench/probe.py --json bench/results/probe.json")


if __name__ == "__main__":
    main()
