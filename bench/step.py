"""What a training step costs: every method against the floor and against PEFT's LoRA, interleaved.

    python bench/step.py --json bench/results/step.json            # everything, about half an hour
    python bench/step.py --case lm-4x128 --rounds 5 --only lora loran-qv
    python bench/step.py --device cuda                             # on an accelerator, see bench/gpu.sh

The floor is the frozen base: forward, and backward to its input, without weight gradients.  A step here is forward and
backward of the mean loss (no optimiser).  Times are medians of ratios within one round, all variants one after another;
peak memory is measured in a process of its own for each variant, above the loaded model.

On another device than the CPU the base is one of the shape of Llama-3-8B, of `--layers` layers with random bfloat16
weights that are made there; a clock waits for the device, and torch tells the peak of the memory that it took.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import resident
import shaped
import torch
from record import record
from torch import nn

import undula
from undula import (
    AuroRA,
    AuroRAStatic,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
    LoRANActivation,
    Method,
    SineLoRA,
)
from undula.core.wrapper import Wrapper
from undula.kernels import frozen, mixture
from undula.study.sizes import at_rank

CASES = {"lm-4x128": (4, 128), "lm-1x512": (1, 512), "layer-4096": (1, 512)}
AWAY = {"llama-8b-4x512": (4, 512), "llama-8b-1x2048": (1, 2048)}  # on another device; --tiny: 2 x 16 tokens
ON_DEVICE = ("floor", "floor+products", "peft-lora", "peft-dora", "lora", "lora-dropout", "loran", "aurora", "dora")
QV = ["q_proj", "v_proj"]
METHODS = {
    "lora": (LoRA(r=8), "all-linear"),
    "lora-dropout": (Dropout(LoRA(r=8), 0.05), "all-linear"),
    "loran": (LoRAN(r=8), "all-linear"),
    "sinelora": (SineLoRA(r=8), "all-linear"),
    "loran-activation": (LoRANActivation(r=8), "all-linear"),
    "aurora": (AuroRA(), "all-linear"),
    "aurora-r8": (AuroRA(r=8), "all-linear"),
    "aurora-static": (AuroRAStatic(), "all-linear"),
    "dora": (DoRA(LoRA(r=8)), "all-linear"),
    "lora-qv": (LoRA(r=8), QV),
    "loran-qv": (LoRAN(r=8), QV),
}
LISTED = ("lora", "dora", "dropout", "loran", "sinelora", "loranactivation", "aurora", "aurorastatic", "centred", "sum")


def relatives() -> dict[str, tuple[Method, str]]:
    """Every other registered method at rank 8 where it has a rank, at its defaults otherwise."""
    found = {}
    for name, cls in undula.methods().items():
        if not issubclass(cls, Wrapper) and name.lower() not in LISTED:
            method = cls()
            found[name.lower()] = (at_rank(method, 8) or method, "all-linear")
    return found


METHODS |= relatives()
OUTSIDE = ("floor", "floor+products", "lora+drawing", "peft-lora", "peft-lora-dropout", "peft-dora")
# name: (a, b, bound): a's figure is at most bound times b's
TIME_TARGETS = {
    "LoRA / floor": ("lora", "floor", 1.10),
    "LoRA / PEFT LoRA": ("lora", "peft-lora", 0.97),
    "AuroRA r=8 / LoRA": ("aurora-r8", "lora", 1.15),
    "LoRAN q,v / LoRA q,v": ("loran-qv", "lora-qv", 1.25),
    "LoRAN / (floor + products)": ("loran", "floor+products", 1.15),
    **{f"{name} / LoRA": (name, "lora", 1.3) for name in relatives() if name != "nola"},
    "nola / (LoRA + drawing its bases twice)": ("nola", "lora+drawing", 1.15),
}
MEMORY_TARGETS = {"LoRA / PEFT LoRA": ("lora", "peft-lora", 1.0), "LoRAN / LoRA": ("loran", "lora", 1.05)}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: for one thread on a machine that is shared

Step = Callable[[], None]


class Layer(nn.Module):
    """One frozen linear layer behind an embedding-like input."""

    def __init__(self, d: int):
        super().__init__()
        self.proj = nn.Linear(d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).square().mean()


def base(case: str) -> tuple[nn.Module, torch.Tensor]:
    """The frozen model and one batch."""
    torch.manual_seed(0)
    batch, length = CASES[case]
    if case.startswith("layer"):
        return Layer(4096).requires_grad_(False), torch.randn(batch, length, 4096)
    from transformers import AutoModelForCausalLM

    from undula.bundled import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    return model.requires_grad_(False), torch.randint(5, 40000, (batch, length))


def variant(name: str, model: nn.Module, batch: torch.Tensor) -> tuple[Step, Step]:
    """(prepare, step) of one variant on `model`; prepare is not timed."""
    if name in METHODS:
        undula.select(model, None)
        method, where = METHODS[name]
        probe = undula.Probe([batch], lambda model, batch: loss(model, batch, leaf=False))
        undula.attach(model, method, where if not isinstance(model, Layer) else "*", name=name, probe=probe)
        return lambda: undula.select(model, name), lambda: step(model, batch, leaf=isinstance(model, Layer))
    if name == "lora+drawing":
        undula.select(model, None)
        where = "*" if isinstance(model, Layer) else "all-linear"
        undula.attach(model, LoRA(r=8), where, name=name)
        shapes = [undula.host.views.site(n, layer).shape for n, layer in undula.host.where.choose(model, where).items()]

        def both() -> None:
            step(model, batch, leaf=isinstance(model, Layer))
            draw(shapes, undula.NOLA(r=8))

        return lambda: undula.select(model, name), both
    if name.startswith("floor"):
        products = name == "floor+products"

        def prepare() -> None:
            undula.select(model, None)
            toggle(model, products)

        return prepare, lambda: step(model, batch, leaf=True)
    wrapped = peft_model(name, model)
    return lambda: None, lambda: step(wrapped, batch, leaf=isinstance(model, Layer))


def draw(shapes: list[tuple[int, int]], nola: Method) -> None:
    """Draws the numbers that NOLA's step needs, forwards and backwards, and does nothing with them."""
    words = torch.tensor(frozen.words(0, ("bench",)), dtype=torch.int32)
    for O, I in shapes * 2:
        for K, n in ((nola.k, nola.r * I), (nola.l, nola.r * O)):
            each = max(1, mixture.BLOCK // n)
            for i in range(0, K, each):
                frozen.floats(frozen.numbers(words, i * n, min(each, K - i) * n))


def toggle(model: nn.Module, on: bool) -> None:
    """Weight gradients of every adapted matrix: computed, then dropped at once.  Deselects."""
    undula.select(model, None)  # adapted layers are not chosen again
    for layer in undula.host.where.choose(model, "*" if isinstance(model, Layer) else "all-linear").values():
        weight = layer.module.weight
        weight.requires_grad_(on)
        if on and not weight._post_accumulate_grad_hooks:
            weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def peft_model(name: str, model: nn.Module) -> nn.Module:
    """PEFT on a twin of the model that shares its weights."""
    import copy

    import peft

    undula.select(model, None)
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, memo=dict(shared))
    twin.__dict__.pop("_undula", None)
    targets = "all-linear" if not isinstance(model, Layer) else ["proj"]
    dropout = 0.05 if name == "peft-lora-dropout" else 0.0
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, lora_dropout=dropout, use_dora=name == "peft-dora"
    )
    return peft.get_peft_model(twin, config)


def step(model: nn.Module, batch: torch.Tensor, leaf: bool) -> None:
    """Forward and backward; `leaf`: the gradient reaches the model's input."""
    loss(model, batch, leaf).backward()


def loss(model: nn.Module, batch: torch.Tensor, leaf: bool) -> torch.Tensor:
    if batch.is_floating_point():
        return model(batch.detach().requires_grad_(leaf))
    if leaf:
        inner = model.get_input_embeddings()(batch).detach().requires_grad_()
        return model(inputs_embeds=inner, labels=batch).loss
    return model(input_ids=batch, labels=batch).loss


def timed(case: str, names: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every round, variants interleaved, after one warm-up round."""
    model, batch = base(case)
    model.train()
    return rounds_of({n: variant(n, model, batch) for n in names}, case, model, rounds, clock)


Variants = dict[str, tuple[Step, Step]]


def rounds_of(
    variants: Variants, case: str, model: nn.Module, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    names = list(variants)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for i in range(rounds + 1):
        order = list(variants) if i % 2 else list(reversed(variants))
        for n in order:
            prepare, go = variants[n]
            prepare()
            model.zero_grad(set_to_none=True)
            start = clock()
            go()
            if i:
                seconds[n].append(clock() - start)
            toggle(model, False)
        print(f"  {case}: round {i} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def on_device(
    case: str, names: list[str], rounds: int, where: shaped.Where
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds, MiB above what the model and all adapters take) of every variant on the device."""
    batch, length = (2, 16) if where.tiny else AWAY[case]
    model = shaped.llama(where)
    tokens = torch.randint(5, model.config.vocab_size, (batch, length), device=where.device)
    model.train()
    variants = {n: variant(n, model, tokens) for n in names}
    memory: dict[str, float] = {}
    for n, (prepare, go) in variants.items() if where.away else ():
        prepare()
        model.zero_grad(set_to_none=True)
        go()
        model.zero_grad(set_to_none=True)
        memory[n] = where.peak(go) / 2**20
        model.zero_grad(set_to_none=True)
        toggle(model, False)
    return rounds_of(variants, case, model, rounds, where.clock), memory


def peak(case: str, name: str) -> float:
    """MiB above the loaded model, in this process (which does nothing else)."""
    model, batch = base(case)
    model.train()
    prepare, go = variant(name, model, batch)
    prepare()
    before = resident.begin()
    for _ in range(2):
        go()
        model.zero_grad(set_to_none=True)
    return (resident.most() - before) / 2**20


def ratios(a: list[float], b: list[float]) -> dict[str, float]:
    r = sorted(x / y for x, y in zip(a, b, strict=True))
    quarter = len(r) // 4
    return {"median": statistics.median(r), "low": r[quarter], "high": r[-1 - quarter]}


def judged(case: str, seconds: dict[str, list[float]], memory: dict[str, float]) -> list[dict]:
    """Every target whose two variants were run."""
    found = []
    for name, (a, b, bound) in TIME_TARGETS.items():
        if a in seconds and b in seconds:
            figure = ratios(seconds[a], seconds[b])
            found.append({"case": case, "target": f"time: {name}", "bound": bound, **figure})
    for name, (a, b, bound) in MEMORY_TARGETS.items():
        if a in memory and b in memory:
            found.append({"case": case, "target": f"memory: {name}", "bound": bound, "median": memory[a] / memory[b]})
    for t in found:
        t["met"] = t["median"] <= t["bound"]
    return found


def report(case: str, names: list[str], seconds: dict[str, list[float]], memory: dict[str, float]) -> list[dict]:
    rows = []
    for n in names:
        row: dict = {"case": case, "variant": n, "memory_mib": memory.get(n)}
        if n in seconds:
            row["seconds"] = statistics.median(seconds[n])
        for other in ("floor", "peft-lora"):
            if n in seconds and other in seconds:
                row[f"time / {other}"] = ratios(seconds[n], seconds[other])
            if memory.get(n) and memory.get(other):
                row[f"memory / {other}"] = memory[n] / memory[other]
        rows.append(row)
        floor, peft = row.get("time / floor"), row.get("time / peft-lora")
        spread = f"{floor['median']:6.3f} ({floor['low']:.3f}-{floor['high']:.3f})" if floor else ""
        print(
            f"{case:12} {n:18} {row.get('seconds', float('nan')) * 1e3:9.1f} ms  x floor {spread}  x PEFT LoRA "
            f"{peft['median'] if peft else float('nan'):6.3f}  {memory.get(n, float('nan')):8.0f} MiB"
        )
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=[*CASES, *AWAY])
    parser.add_argument("--only", nargs="*", choices=[*OUTSIDE, *METHODS])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", help="as torch names it: the base is then one of Llama-3-8B's shape")
    parser.add_argument("--layers", type=int, default=4, help="of that base")
    parser.add_argument("--tiny", action="store_true", help="of that base, to try the program: --device cpu --tiny")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true", help="peak memory alone, which other work does not disturb")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(*args.peak))
        return
    rows, targets = [], []
    if args.device:
        where = shaped.Where(torch.device(args.device), args.layers, args.tiny)
        names = [n for n in args.only or ON_DEVICE if not n.startswith("peft") or importlib.util.find_spec("peft")]
        for case in args.case or AWAY:
            seconds, memory = on_device(case, names, args.rounds, where)
            rows += report(case, names, seconds, memory)
            targets += judged(case, seconds, memory)
        figures = {"device": where.card(), "layers": args.layers, "tiny": args.tiny, "targets": targets, "rows": rows}
        if args.json:
            record(args.json, figures)
        return
    for case in args.case or CASES:
        names = [n for n in args.only or [*OUTSIDE, *METHODS] if not (case.startswith("layer") and n.endswith("-qv"))]
        command = [sys.executable, __file__, "--threads", str(args.threads), "--peak", case]
        memory = {}
        if not args.no_memory:
            for n in names:
                memory[n] = float(subprocess.run([*command, n], capture_output=True, text=True, check=True).stdout)
        seconds = {} if args.no_time else timed(case, names, args.rounds, CLOCKS[args.clock])
        rows += report(case, names, seconds, memory)
        targets += judged(case, seconds, memory)
    for t in targets:
        print(f"{'met ' if t['met'] else 'MISSED'}  {t['case']:12} {t['target']:36} {t['median']:.3f} <= {t['bound']}")
    if args.json:
        figures = {
            "threads": args.threads,
            "clock": args.clock,
            "targets_met": all(t["met"] for t in targets),
            "targets": targets,
            "rows": rows,
        }
        record(args.json, figures)


if __name__ == "__main__":
    main()
