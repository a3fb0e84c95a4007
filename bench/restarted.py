"""What a stack of frozen pairs costs in a training step: one layer of SmolLM2's shapes, forward and backward with dx.

    python bench/restarted.py --rounds 15

Prints the median CPU time of each method over that of LoRA r=8, interleaved, one thread, float32, 4 x 128 tokens.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from record import record
from torch import nn

from undula import LoRA, Restarted
from undula.host.views import site, view
from undula.kernels.bottleneck import bottleneck


class Stacked(Restarted):
    """The same law as one trained pair of rank r + past would compute it."""

    def forward(self, x, layer, f):
        B_OR, A_RI = self.pair(f)
        return bottleneck(x, layer, A_RI, B_OR)


def stepper(module, method, x, g):
    layer = view(module)
    f = method.init(site("l", layer))
    inputs = [x, *(t for t in f.values() if t.requires_grad)]
    return lambda: torch.autograd.grad(method.forward(x, layer, f), inputs, g)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = {"LoRA": LoRA(r=8), "LoRA again": LoRA(r=8)}
    for past in (8, 32, 128):
        methods[f"Restarted, past {past}"] = Restarted(LoRA(r=8), past)
        methods[f"stacked, past {past}"] = Stacked(LoRA(r=8), past)
    rows = []
    for O, I in ((576, 576), (1536, 576), (576, 1536)):
        torch.manual_seed(0)
        module = nn.Linear(I, O, bias=False).requires_grad_(False)
        x, g = torch.randn(4, 128, I, requires_grad=True), torch.randn(4, 128, O)
        steps = {name: stepper(module, m, x, g) for name, m in methods.items()}
        times = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                step()
                start = time.process_time()
                for _ in range(3):
                    step()
                times[name].append((time.process_time() - start) / 3)
        floor = statistics.median(times["LoRA"])
        print(f"{I} -> {O}: LoRA {1e3 * floor:.1f} ms")
        for name, found in times.items():
            low, middle, high = (q / floor for q in statistics.quantiles(found, n=4))
            print(f"  {name:20} {middle:.2f} x  ({low:.2f}-{high:.2f})")
            rows.append({"layer": f"{I} -> {O}", "method": name, "median": middle, "low": low, "high": high})
    if args.json:
        record(args.json, {"threads": 1, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
