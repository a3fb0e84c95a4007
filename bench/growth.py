"""How the cost of a training step grows: with the length of a row, the rank, the adapted layers, the model's size.

    python bench/growth.py --json bench/results/growth.json --plot docs/growth.svg      # about three minutes of a core

One row, LoRA on all linear layers of a Llama from a configuration (random weights), forward and backward of the mean
loss, CPU time of one thread, the middle of `--rounds` after one that warms up; the points of a curve take turns.
Beside each curve stands its arithmetic: products of frozen matrices forward and to the input's gradient, the
vocabulary's, the factors' (three each) and the two of attention, at the rate of one large product measured in the same
run.  Models 4096 wide are of layers that share one set of frozen weights, so that eight of them fit into 1 GB: it is
larger than any cache, and costs what different ones would.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record

import undula

VOCABULARY = 4096
ORDER = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj", "gate_proj")


@dataclasses.dataclass(frozen=True)
class Point:
    """A model and a row."""

    width: int = 512
    inner: int = 1408
    layers: int = 4
    length: int = 128
    rank: int = 8
    sites: int = 7  # adapted matrices of each layer, in `ORDER`

    def operations(self) -> float:
        """See the module."""
        square, wide = self.width**2, self.width * self.inner
        sizes = {name: square if name in ORDER[:4] else wide for name in ORDER}
        edges = {n: 2 * self.width if n in ORDER[:4] else self.width + self.inner for n in ORDER}
        frozen = self.layers * sum(sizes.values()) + VOCABULARY * self.width
        factors = self.layers * self.rank * sum(edges[n] for n in ORDER[: self.sites])
        attention = self.layers * self.length * self.width  # of a token, with half of the tokens before it, twice
        return self.length * (4.0 * frozen + 6.0 * factors + 6.0 * attention)


def curve(**changes: tuple[int, ...]) -> list[Point]:
    ((name, values),) = changes.items()
    return [dataclasses.replace(Point(), **{name: value}) for value in values]


CURVES = {
    "tokens of a row": ("length", curve(length=(32, 64, 128, 256, 512, 1024))),
    "rank": ("rank", curve(rank=(1, 4, 16, 64, 256))),
    "adapted matrices a layer": ("sites", curve(sites=(1, 2, 4, 5, 7))),
    "layers 4096 wide": ("layers", [Point(4096, 11008, n, 32) for n in (1, 2, 4, 8)]),
}


def made(point: Point) -> Callable[[], None]:
    """A step of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=point.width, intermediate_size=point.inner, num_hidden_layers=1, vocab_size=VOCABULARY,
        num_attention_heads=point.width // 64, num_key_value_heads=point.width // 64, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).train()
    _repeat(model, point.layers)
    undula.attach(model, undula.LoRA(r=point.rank), [f"*.{name}" for name in ORDER[: point.sites]])
    row = torch.randint(0, VOCABULARY, (1, point.length))
    embedded = model.get_input_embeddings()(row)

    def step() -> None:
        given = embedded.detach().requires_grad_()  # a layer below asks for the gradient, as in a deeper model
        model(inputs_embeds=given, labels=row).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _repeat(model: Any, times: int) -> None:
    """Further layers of the first one's parameters."""
    import copy

    first = model.model.layers[0]
    shared = {id(p): p for p in first.parameters()}
    for i in range(1, times):
        layer = copy.deepcopy(first, memo=dict(shared))
        layer.self_attn.layer_idx = i
        model.model.layers.append(layer)
    model.config.num_hidden_layers = times


def rate() -> float:
    """Operations a second of one large product, the best of three."""
    a, best = torch.randn(1024, 1024), 0.0
    for _ in range(3):
        begun = time.process_time()
        for _ in range(4):
            a @ a
        best = max(best, 4 * 2 * 1024**3 / (time.process_time() - begun))
    return best


def timed(points: list[Point], rounds: int) -> list[list[float]]:
    """CPU seconds of each point's steps, in turns."""
    steps = [made(point) for point in points]
    found: list[list[float]] = [[] for _ in points]
    for i in range(rounds + 1):
        for spent, step in zip(found, steps, strict=True):
            begun = time.process_time()
            step()
            if i:
                spent.append(time.process_time() - begun)
    return found


def plot(curves: dict[str, Any], gflops: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), layout="constrained")
    for axis, (title, found) in zip(axes, curves.items(), strict=True):
        middles = [p["seconds"] for p in found["points"]]
        spread = [
            [p["seconds"] - p["low"] for p in found["points"]],
            [p["high"] - p["seconds"] for p in found["points"]],
        ]
        axis.errorbar(found["values"], middles, yerr=spread, marker="o", label="step")
        axis.plot(
            found["values"], [p["limit"] for p in found["points"]], "--", label=f"arithmetic, {gflops:.0f} GFLOP/s"
        )
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.set_xticks(found["values"], [str(v) for v in found["values"]], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds of one core")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[name for name, _ in CURVES.values()])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    speed, found = rate(), {}
    for title, (name, points) in CURVES.items():
        if args.only and name not in args.only:
            continue
        seconds = timed(points, args.rounds if points[0].width < 4096 else max(1, args.rounds // 2))
        speed = max(speed, rate())
        rows = []
        for point, spent in zip(points, seconds, strict=True):
            ordered = sorted(spent)
            quarter = len(ordered) // 4
            row = {"seconds": statistics.median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}
            rows.append(dataclasses.asdict(point) | row | {"operations": point.operations()})
        found[title] = {"varied": name, "values": [getattr(p, name) for p in points], "points": rows}
    for title, told in found.items():
        for value, row in zip(told["values"], told["points"], strict=True):
            row["limit"] = row["operations"] / speed
            print(
                f"{title:26} {value:5}  {row['seconds']:8.3f} s ({row['low']:.3f}-{row['high']:.3f})  arithmetic "
                f"{row['limit']:8.3f} s, x {row['seconds'] / row['limit']:.2f}"
            )
    print(f"{speed / 1e9:.0f} GFLOP/s", file=sys.stderr)
    if args.json:
        record(args.json, {"threads": 1, "clock": "cpu", "gflops": speed / 1e9, "curves": found})
    if args.plot:
        plot(found, speed / 1e9, args.plot)


if __name__ == "__main__":
    main()
