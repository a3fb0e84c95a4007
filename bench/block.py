"""What dropout and LoRAN's sines cost in the linear layers of one block of SmolLM2-135M: each way against the other.

    python bench/block.py --rounds 16

Forward and backward of its seven layers by themselves (4 x 128 tokens, float32, rank 8): CPU time on one thread, all
variants one after another within a round; medians of the ratios, with the middle half of the rounds.  A minute, where
`bench/step.py` takes half an hour for the whole model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from step import ratios
from torch import nn

from undula import Dropout, LoRA, LoRAN, Method, SineLoRA
from undula.host.views import site, view
from undula.kernels import in_c
from undula.methods import dropout

TOKENS = 512
SHAPES = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))  # (I, O)
Step = Callable[[], None]


def never(*_: Any) -> bool:
    return False


def other_way(step: Step, module: Any, name: str) -> Step:
    """The step where the question `module.name` is answered with no."""

    def run() -> None:
        asked = getattr(module, name)
        setattr(module, name, never)
        try:
            step()
        finally:
            setattr(module, name, asked)

    return run


def variants() -> dict[str, Step]:
    layers = [nn.Linear(i, o, bias=False).requires_grad_(False) for i, o in SHAPES]
    inputs = {i: torch.randn(TOKENS, i, requires_grad=True) for i, _ in SHAPES}
    pulls = {o: torch.randn(TOKENS, o) for _, o in SHAPES}

    def floor(products: bool = False) -> None:
        for layer, (i, o) in zip(layers, SHAPES, strict=True):
            layer.weight.requires_grad_(products)
            layer(inputs[i]).backward(pulls[o])
            inputs[i].grad = layer.weight.grad = None  # as below: a gradient that is there would be added to
            layer.weight.requires_grad_(False)

    def adapted(method: Method) -> Step:
        views = [view(layer) for layer in layers]
        factors = [method.init(site("l", seen)) for seen in views]

        def step() -> None:
            for seen, f, (i, o) in zip(views, factors, SHAPES, strict=True):
                method.forward(inputs[i], seen, f).backward(pulls[o])
                for t in (inputs[i], *f.values()):
                    t.grad = None

        return step

    dropped, loran, sine = adapted(Dropout(LoRA(r=8), 0.05)), adapted(LoRAN(r=8)), adapted(SineLoRA(r=8))
    return {
        "floor": floor,
        "floor+products": lambda: floor(products=True),
        "lora": adapted(LoRA(r=8)),
        "dropout 0.05": dropped,
        "dropout 0.05, masks": other_way(dropped, dropout, "few"),
        "loran": loran,
        "loran, torch": other_way(loran, in_c, "applies"),
        "sinelora": sine,
        "sinelora, torch": other_way(sine, in_c, "applies"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = variants()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds + 1):
        for name in steps if i % 2 else reversed(steps):
            start = time.process_time()
            steps[name]()
            if i:
                seconds[name].append(time.process_time() - start)
    for name, own in seconds.items():
        told = (
            f"x {other} {r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})"
            for other in ("floor", "floor+products", "lora")
            for r in [ratios(own, seconds[other])]
        )
        print(f"{name:20} {1e3 * statistics.median(own):8.1f} ms  {'  '.join(told)}")


if __name__ == "__main__":
    main()
