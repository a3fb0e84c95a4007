"""What serving many adapters costs: requests a second of one engine, by how many adapters are in use and registered.

    python bench/serve.py --json bench/results/serve.json                  # SmolLM2, about 20 minutes of a free core
    python bench/serve.py --requests 16 --new 16 --rounds 1 --registered 1000   # a short look

All ways run in one process, one after another within a round, after one that warms up; figures are medians of the
rounds' ratios.  `base` is the same engine with requests of no adapter.  What a way writes, greedily, is compared token
by token with each adapter by itself; where they part, the logits there say whether it was a near tie (below `TIE`, what
float32 sums in another order may turn) or a fault.  Peers: PEFT's `adapter_names`, one adapter after another, and a
merge for each request.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from record import record, tell
from resident import now

import undula
from undula.bundled import model_path
from undula.compress.int8 import int8
from undula.serve.engine import Engine
from undula.serve.jobs import Limits
from undula.serve.pool import Pool
from undula.serve.request import Part, Request, Sampling

TIE = 1e-2  # of logits
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
MIXES: dict[str, tuple[Any, ...]] = {
    "lora8": (undula.LoRA(r=8),),
    "ranks": tuple(undula.LoRA(r=r) for r in (4, 8, 16, 32, 64)),
    "kinds": (
        undula.LoRA(r=8), undula.DoRA(undula.LoRA(r=8)), undula.LoRAN(r=8), undula.AuroRA(r=2), undula.VeRA(r=64),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to answer the requests: of which mix, and how many adapters they use in turn; 0: the base."""

    mix: str
    adapters: int
    requests: int
    shape: str = "decode"

    def names(self) -> list[str | None]:
        return [f"{self.mix}-{i % self.adapters}" if self.adapters else None for i in range(self.requests)]


@torch.no_grad()
def write(model: torch.nn.Module, folder: Path, mix: str, count: int, where: Any) -> None:
    """Random adapters whose answers differ."""
    for i in range(count):
        torch.manual_seed(i)
        method = MIXES[mix][i % len(MIXES[mix])]
        given = undula.attach(model, method, where, name="made")
        for parameter in given.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        undula.detach(model, "made").save(folder / f"{mix}-{i}")


def linked(folder: Path, like: Path, count: int) -> list[Path]:
    """So many more directories with the same content, without its bytes."""
    found = []
    for i in range(count):
        path = folder / f"more-{i}"
        path.mkdir()
        for file in like.iterdir():
            os.link(file, path / file.name)
        found.append(path)
    return found


class Bench:
    """A model with an engine, prompts, and what each adapter says by itself."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        from transformers import AutoModelForCausalLM

        self.args, self.folder, self.clock = args, folder, CLOCKS[args.clock]
        self.path = args.model or str(model_path("smollm2"))
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.shapes = {"decode": (args.prompt, args.new), "prefill": (args.long_prompt, args.long_new)}
        self.vocabulary = self.model.config.vocab_size
        self.pool = Pool(self.model, args.memory)
        self.seen: dict[tuple[str | None, int, str], list[int]] = {}

    def in_eight_bits(self) -> Bench:
        """The same over a base of 8 bits, with nothing registered."""
        other = Bench(self.args, self.folder)
        int8(other.model)
        return other

    def prompt(self, i: int, shape: str) -> tuple[int, ...]:
        draw = random.Random(f"{i} {shape}")
        return tuple(draw.randrange(5, self.vocabulary) for _ in range(self.shapes[shape][0]))

    def request(self, name: str | None, i: int, shape: str) -> Request:
        sampling = Sampling(max_tokens=self.shapes[shape][1], ignore_eos=True)
        return Request(self.prompt(i, shape), (Part(name),) if name else (), sampling)

    def answer(self, engine: Engine, way: Way) -> float:
        """Seconds of all requests of a way; keeps what they said."""
        # a prefix that was computed is not computed again: each run has its own first token
        self.salt = getattr(self, "salt", 4) + 1
        requests = []
        for i, name in enumerate(way.names()):
            request = self.request(name, i, way.shape)
            requests.append((name, i, dataclasses.replace(request, prompt=(self.salt, *request.prompt[1:]))))
        start = self.clock()
        replies = [engine.submit(request) for _, _, request in requests]
        said = [[c.token for piece in reply for c in piece.tokens] for reply in replies]
        spent = self.clock() - start
        self.last = [(name, request.prompt, tokens) for (name, _, request), tokens in zip(requests, said, strict=True)]
        return spent

    @torch.no_grad()
    def checked(self, some: int) -> dict[str, int]:
        """Of the last run's answers so many: each token is the likeliest after those before it, through its adapter
        alone; or how near the likeliest it is."""
        counts = {"tokens": 0, "equal": 0, "near ties": 0, "different": 0}
        for name, prompt, said in self.last[:: max(1, len(self.last) // some)]:
            ids = torch.tensor([[*prompt, *said]])
            adapter = undula.Adapter.load(self.folder / name) if name else None
            if adapter is not None:
                undula.attach(self.model, adapter, name="alone", frozen=True)
                undula.select(self.model, "alone")
            logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
            if adapter is not None:
                undula.detach(self.model, "alone")
            undula.select(self.model, None)
            gaps = logits.amax(-1) - logits.gather(1, torch.tensor(said)[:, None])[:, 0]
            counts["tokens"] += len(said)
            counts["equal"] += int((gaps == 0).sum())
            counts["near ties"] += int(((gaps > 0) & (gaps < TIE)).sum())
            counts["different"] += int((gaps >= TIE).sum())
        return counts

    def limits(self) -> Limits:
        tokens = max(p + n for p, n in self.shapes.values()) + 32
        config = self.model.config
        per_token = 8 * config.num_hidden_layers * config.num_key_value_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )  # fmt: skip
        return Limits(
            running=self.args.requests, batch_tokens=512, cache=int(1.3 * tokens * self.args.requests * per_token)
        )

    def rounds(self, ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
        """Of each way: tokens a second, and the ratio to the base's time of the same shape and requests."""
        spent: dict[str, list[float]] = {name: [] for name in ways}
        checks: dict[str, dict[str, int]] = {}
        for i in range(rounds + 1):
            with Engine(self.model, None, self.pool, limits=self.limits()) as engine:
                for name, way in ways.items():
                    seconds = self.answer(engine, way)
                    if i:
                        spent[name].append(seconds)
                    elif way.adapters:
                        checks[name] = {}
                    print(f"  round {i} {name:28} {seconds:8.2f} s", flush=True)
                    if not i and self.args.check:
                        kept = self.last
                        checks[name] = {"later": len(kept)}
                        self.kept = {**getattr(self, "kept", {}), name: kept}
        for name in ways if self.args.check else ():
            self.last = self.kept[name]
            checks[name] = self.checked(self.args.check)
        found = {}
        for name, way in ways.items():
            of = next(
                n for n, w in ways.items() if not w.adapters and (w.shape, w.requests) == (way.shape, way.requests)
            )
            ratios = [b / s for s, b in zip(spent[name], spent[of], strict=True)]
            written = way.requests * self.shapes[way.shape][1]
            found[name] = {
                "tokens a second": written / statistics.median(spent[name]),
                "throughput / base": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                **({"checked": checks[name]} if name in checks else {}),  # type: ignore[dict-item]
            }
            print(
                f"{name:30} {found[name]['tokens a second']:8.1f} tok/s  x base {found[name]['throughput / base']:.3f}"
            )
        return found

    def peers(self, way: Way, rounds: int) -> dict[str, float]:
        """Tokens a second of PEFT: one batch with adapter_names, adapters one after another, a merge for each."""
        import peft
        from transformers import AutoModelForCausalLM

        used = sorted({name for name in way.names() if name})
        theirs = self.folder / "peft"
        for name in used:
            undula.io.export_lora(undula.Adapter.load(self.folder / name), theirs / name)
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        model = peft.PeftModel.from_pretrained(model, str(theirs / used[0]), adapter_name=used[0])
        for name in used[1:]:
            model.load_adapter(str(theirs / name), adapter_name=name)
        model.eval()
        new = self.shapes[way.shape][1]
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        prompts = torch.tensor([self.prompt(i, way.shape) for i in range(way.requests)])

        def mixed() -> int:
            model.generate(input_ids=prompts, adapter_names=list(way.names()), **settings)
            return way.requests * new

        def alone(merge: bool) -> int:
            some = way.names()[:2]
            for i, name in enumerate(some):
                model.set_adapter(name)
                if merge:
                    model.merge_adapter([name])
                model.generate(input_ids=prompts[i : i + 1], **settings)
                if merge:
                    model.unmerge_adapter()
            return len(some) * new

        found: dict[str, list[float]] = {}
        ways: dict[str, Callable[[], int]] = {
            "peft adapter_names": mixed,
            "one adapter after another": lambda: alone(False),
            "merged for each request": lambda: alone(True),
        }
        with torch.no_grad():
            for _ in range(rounds):
                for name, go in ways.items():
                    start = self.clock()
                    count = go()
                    found.setdefault(name, []).append(count / (self.clock() - start))
                    print(f"  {name:28} {found[name][-1]:8.1f} tok/s", flush=True)
        return {name: statistics.median(values) for name, values in found.items()}

    def first_tokens(self, way: Way, rate: float, count: int) -> dict[str, float]:
        """Seconds to the first token where requests come at random, `rate` of them in a second."""
        draw, replies = random.Random(0), []
        with Engine(self.model, None, self.pool, limits=self.limits()) as engine:
            for i, name in enumerate((way.names() * count)[:count]):
                replies.append(engine.submit(self.request(name, 1000 + i, way.shape)))
                time.sleep(draw.expovariate(rate))
            for reply in replies:
                reply.text()
        first = sorted(r.usage.first for r in replies)
        return {f"p{p}": first[min(len(first) - 1, math.ceil(p / 100 * len(first)) - 1)] for p in (50, 95, 99)}


def in_turns(benches: dict[str, Bench], ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Of each bench and way tokens a second, and the ratio to the first bench's at that way."""
    spent: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):
        for kind, bench in benches.items():
            with Engine(bench.model, None, bench.pool, limits=bench.limits()) as engine:
                for name, way in ways.items():
                    spent.setdefault((kind, name), []).append(bench.answer(engine, way))
                    print(f"  {name + ', ' + kind:28} {spent[kind, name][-1]:8.2f} s", flush=True)
    found: dict[str, dict[str, float]] = {}
    for (kind, name), seconds in spent.items():
        times = [a / b for a, b in zip(spent[next(iter(benches)), name][1:], seconds[1:], strict=True)]
        bench, way = benches[kind], ways[name]
        found[f"{name}, {kind}"] = {
            "tokens a second": way.requests * bench.shapes[way.shape][1] / statistics.median(seconds[1:]),
            "throughput / float's": statistics.median(times),
            "low": min(times),
            "high": max(times),
        }
    return found


def registered(bench: Bench, paths: Sequence[Path]) -> dict[str, float]:
    """Registers these; seconds of the first of them and of the last."""
    spent = []
    for path in paths:
        start = time.perf_counter()
        bench.pool.register(path.name, path)
        spent.append(time.perf_counter() - start)
    return {"first": statistics.median(spent[:9]), "last": statistics.median(spent[-9:]), "all": sum(spent)}


def ways_of(args: argparse.Namespace, few: int, small: int) -> dict[str, Way]:
    """What is compared: requests through no adapter, one, few, as many as there are requests, and mixes."""
    n = args.requests
    ways = {"base": Way("", 0, n), "1 adapter": Way("lora8", 1, n), f"{few} adapters": Way("lora8", few, n)}
    ways[f"{n} adapters"] = Way("lora8", n, n)
    for mix in args.mixes[1:]:
        ways[f"{min(n, args.mixed)} adapters, {mix}"] = Way(mix, min(n, args.mixed), n)
    ways |= {"base, 16 rows": Way("", 0, small), "16 rows of 16 adapters": Way("lora8", small, small)}
    if args.long_prompt:
        ways |= {
            "base, prefill": Way("", 0, small, "prefill"),
            f"{few} adapters, prefill": Way("lora8", few, small, "prefill"),
        }
    return ways


def growing(
    bench: Bench, args: argparse.Namespace, folder: Path, pair: dict[str, Way], way: str
) -> Iterator[tuple[int, dict[str, float]]]:
    """(how many adapters are registered, what adding them took and what `way` still gives) of each number."""
    first = len(bench.pool.names())
    more = linked(folder, folder / "lora8-0", max(args.registered))
    for total in args.registered:
        have, grown = len(bench.pool.names()), now()
        adding = registered(bench, more[have - first : total - first])
        yield (
            total,
            {
                "seconds to add one": adding["last"],
                "seconds to add all of them": adding["all"],
                "bytes of each that is registered": (now() - grown) / max(1, total - have),
                "throughput / base": bench.rounds(pair, args.rounds)[way]["throughput / base"],
            },
        )


def measured(
    args: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Everything; `keep` is given what there is after each part of it."""
    bench, n = Bench(args, folder), args.requests
    few, small = min(8, n), min(16, n)
    for mix in args.mixes:
        write(bench.model, folder, mix, max(n, small) if mix == "lora8" else min(n, args.mixed), args.where)
        registered(bench, [folder / f"{mix}-{i}" for i in range(len(list(folder.glob(f"{mix}-*"))))])
    ways, before = ways_of(args, few, small), now()
    found: dict[str, Any] = {"ways": bench.rounds(ways, args.rounds)}
    stats = bench.pool.stats()
    found["bytes of an adapter"] = {
        "lora8, its tensors": sum(f.stat().st_size for f in (folder / "lora8-0").glob("*.safetensors")),
        "all that are loaded, as counted": stats.bytes,
        "loaded": stats.loaded,
        "grown by, of the process": now() - before,
    }
    keep(found)
    if args.peers:
        found["peers, tokens a second"] = bench.peers(ways[f"{n} adapters"], max(1, args.rounds // 2))
        keep(found)
    pair = {"base": ways["base"], f"{few} adapters": ways[f"{few} adapters"]}
    if args.int8:
        narrow = bench.in_eight_bits()
        registered(narrow, [folder / f"lora8-{i}" for i in range(few)])
        found["8 bits"] = in_turns({"float32": bench, "8 bits": narrow}, pair, args.rounds)
        narrow.pool.close()
        del narrow
        keep(found)
    found["registered"] = at = {}
    for total, figures in growing(bench, args, folder, pair, f"{few} adapters"):
        eight = found["ways"][f"{few} adapters"]["throughput / base"]
        at[str(total)] = figures | {"throughput / that of few": figures["throughput / base"] / eight}
        keep(found)
    rate = 0.7 * found["ways"][f"{few} adapters"]["tokens a second"] / args.new
    if args.clock == "wall":
        found["seconds to the first token at 0.7 of the throughput"] = {
            "requests a second": rate,
            **bench.first_tokens(ways[f"{few} adapters"], rate, args.arrivals),
        }
    bench.pool.close()
    return found


def judged(found: dict[str, Any], n: int) -> tuple[dict[str, float], dict[str, bool]]:
    """The targets' figures, and which are met."""
    ways, few = found["ways"], min(8, n)
    targets = {f"throughput of {few} adapters / base >= 0.95": ways[f"{few} adapters"]["throughput / base"]}
    step = ways["16 rows of 16 adapters"]["throughput / base"]
    targets["a decode step of 16 rows of 16 adapters / base <= 1.15"] = 1 / step
    for total, figures in found.get("registered", {}).items():
        targets[f"throughput with {total} registered / with few >= 0.9"] = figures["throughput / that of few"]
        targets[f"ms to add the {total}th <= 50"] = 1e3 * figures["seconds to add one"]
    if "peers, tokens a second" in found:
        theirs = found["peers, tokens a second"]["peft adapter_names"]
        targets[f"throughput of {n} adapters / PEFT's mixed batch >= 4"] = (
            ways[f"{n} adapters"]["tokens a second"] / theirs
        )
    wrong = sum(way["checked"].get("different", 0) for way in ways.values() if "checked" in way)
    targets["tokens that differ from the adapter's alone, beyond near ties <= 0"] = float(wrong)

    def met(name: str, value: float) -> bool:
        bound = float(name.rpartition(" ")[2])
        return value >= bound if ">=" in name else value <= bound

    return targets, {name: met(name, value) for name, value in targets.items()}


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: SmolLM2-135M)")
    parser.add_argument("--where", nargs="+", default="all-linear")
    parser.add_argument("--requests", type=int, default=64, help="at a time, as many as adapters at most")
    parser.add_argument("--mixed", type=int, default=16, help="adapters of the mixes of ranks and of kinds")
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=512)
    parser.add_argument("--long-new", type=int, default=8)
    parser.add_argument("--registered", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--memory", type=int, default=6 * 10**9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arrivals", type=int, default=200)
    parser.add_argument("--check", type=int, default=8, help="answers of each way that are checked")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where the machine does other things too")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    head = {"threads": args.threads, "clock": args.clock, "requests": args.requests}

    def keep(found: dict[str, Any]) -> None:
        targets, met = judged(found, args.requests)
        tell(targets, met)
        if args.json:
            record(args.json, {**head, "targets_met": all(met.values()), "met": met, "targets": targets, **found})

    with tempfile.TemporaryDirectory() as folder:
        keep(measured(args, Path(folder), keep))


if __name__ == "__main__":
    main()
