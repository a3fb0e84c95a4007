"""When does a nonlinear adapter pay?  What few trained numbers can hold.

    python bench/capacity.py planted --json bench/results/capacity-planted.json   # three minutes of one core
    python bench/capacity.py labels --json bench/results/capacity-labels.json     # MiniLM: ten minutes
    python bench/capacity.py facts --json bench/results/capacity-facts.json       # SmolLM2: an hour; --sizes 100 a part
    python bench/capacity.py lemmas --sizes 100 --json bench/results/capacity-lemmas.json
    python bench/capacity.py planted --ranks 1 --methods LoRA "LoRAN, learnable" --seeds 0

planted   a matrix (64, 64) is to become W + D, D random and so of full rank: the share of |D|^2 that is reached, beside
          the truncated singular value decomposition's, the most that an update of rank r can.  AuroRA's B h(x) has
          that rank too, whatever h is; methods that bend the product itself may have more
labels    WordNet glosses with labels of two drawn by lot, MiniLM with one adapted layer and a frozen random head: the
          share of labels that is right after training on them
facts     WordNet glosses -> two of twelve words drawn by lot (log2 144 = 7.2 bits, which no language model could
          guess), SmolLM2 with one adapted layer: the share of rows whose words are both the likeliest, the second
          given the first

lemmas    WordNet glosses -> their words, of those that are two tokens at most (bundled:wordnet-lemmas, which apt
          fetches): facts that a language model knows in part, so the score before is told

Numbers are to bind, so labels, facts and lemmas adapt one layer, at rank 1 unless said.  Every method has as many
trained numbers as LoRA of that rank, or as near as its form allows (told in each row).  Rates are swept on the first
seed, and the best serves the others.  Rows that the file holds are not made again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import kept, record
from torch import Tensor, nn

import undula
from undula.bundled import dataset, model_path

VISIBLE = {"is": "sinter", "a": 0.02, "w": 300.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "rsLoRA": ("lora", {"scaling": "rank-stabilised"}),
    "Sine-LoRA": ("sine-lora", {}),
    "LoRAN, visible": ("loran", {"activation": VISIBLE}),
    "LoRAN, learnable": ("loran", {"learn": ["a", "w"]}),
    "AuroRA": ("aurora", {}),
    "VeRA": ("vera", {}),
}
RATES = {"planted": (1e-2, 3e-2, 1e-1), "labels": (3e-3, 1e-2, 3e-2), "facts": (3e-3, 1e-2), "lemmas": (3e-3, 1e-2)}
RANKS = {"planted": (1, 2, 4), "labels": (1,), "facts": (1,), "lemmas": (1,)}
MANY = (100, 300, 1000, 3000)
SIZES = {"planted": (64,), "labels": (512,), "facts": MANY, "lemmas": MANY}  # of a matrix; of rows
STEPS = {"planted": 400, "labels": 250, "facts": 600, "lemmas": 600}
UP = "model.layers.20.mlp.up_proj"
LAYER = {"labels": "bert.encoder.layer.3.intermediate.dense", "facts": UP, "lemmas": UP}
BATCH, LENGTH = 32, 32
CODES = ("red", "blue", "green", "stone", "river", "cloud", "bread", "horse", "piano", "tiger", "north", "seven")


def method_of(name: str, r: int, O: int, I: int) -> undula.Method:
    """At rank r; VeRA's so that its rank + O numbers are the r (O + I) of LoRA."""
    kind, options = METHODS[name]
    if name == "VeRA":
        return undula.Method.build(kind, {"r": max(1, r * (O + I) - O)})
    return undula.Method.build(kind, {"r": r, "alpha": 2 * r, **options})


def trained(adapter: undula.Adapter, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """AdamW along `loss(step)`, its rate falling to zero."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        loss(step).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def planted(name: str, r: int, size: int, seed: int, lr: float, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    D = torch.randn(size, size) / size**0.5
    W = model[0].weight.detach().clone()
    adapter = undula.attach(model, method_of(name, r, size, size), "*")
    one = torch.eye(size)
    trained(adapter, lambda _: (model(one).T - W - D).square().sum(), steps, lr)
    with torch.no_grad():
        left = (model(one).T - W - D).square().sum() / D.square().sum()
    most = torch.linalg.svdvals(D).square()
    bound = float(most[:r].sum() / most.sum())
    return {"score": float(1 - left), "linear_bound": bound, "trained": adapter.num_parameters()}


def rows_of(step: int, size: int) -> Tensor:
    """The rows of a step: all in turn, in an order of each turn's own."""
    at = step * BATCH + torch.arange(BATCH)
    orders = {
        int(turn): torch.randperm(size, generator=torch.Generator().manual_seed(int(turn))) for turn in at // size
    }
    return torch.stack([orders[int(i) // size][int(i) % size] for i in at])


def attached(model: Any, kind: str, name: str, r: int) -> undula.Adapter:
    layer = model.requires_grad_(False).get_submodule(LAYER[kind])
    return undula.attach(model, method_of(name, r, layer.out_features, layer.in_features), [LAYER[kind]])


def labels(name: str, r: int, size: int, seed: int, lr: float, steps: int) -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_path("minilm"), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    words = tokenizer(glosses(size), max_length=LENGTH, truncation=True, padding=True, return_tensors="pt")
    truth = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed))
    adapter = attached(model.eval(), "labels", name, r)

    def answers(at: Tensor) -> Tensor:
        return model(input_ids=words["input_ids"][at], attention_mask=words["attention_mask"][at]).logits

    def loss(step: int) -> Tensor:
        at = rows_of(step, size)
        return nn.functional.cross_entropy(answers(at), truth[at])

    trained(adapter, loss, steps, lr)
    with torch.no_grad():
        right = [answers(at).argmax(1) == truth[at] for at in torch.arange(size).split(64)]
    return {"score": float(torch.cat(right).double().mean()), "trained": adapter.num_parameters()}


def facts(name: str, r: int, size: int, seed: int, lr: float, steps: int) -> dict[str, Any]:
    return remembered(drawn, "facts", name, r, size, seed, lr, steps)


def lemmas(name: str, r: int, size: int, seed: int, lr: float, steps: int) -> dict[str, Any]:
    return remembered(looked_up, "lemmas", name, r, size, seed, lr, steps)


Pairs = Callable[[Any, int, int], tuple[list[str], Tensor]]  # (tokenizer, rows, seed) -> (texts, two tokens of each)


def remembered(
    pairs: Pairs, kind: str, name: str, r: int, size: int, seed: int, lr: float, steps: int
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how = {"max_length": LENGTH, "truncation": True, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    texts, truth = pairs(tokenizer, size, seed)
    words = tokenizer(texts, **how)
    ids = torch.cat([words["input_ids"], truth], 1)
    mask = torch.cat([words["attention_mask"], torch.ones_like(truth)], 1)
    adapter = attached(model.eval(), kind, name, r)

    def answers(at: Tensor) -> Tensor:
        return model(input_ids=ids[at], attention_mask=mask[at], logits_to_keep=3).logits[:, :2]

    def loss(step: int) -> Tensor:
        at = rows_of(step, size)
        return nn.functional.cross_entropy(answers(at).flatten(0, 1), truth[at].flatten())

    @torch.no_grad()
    def score() -> float:
        right = [(answers(at).argmax(-1) == truth[at]).all(1) for at in torch.arange(size).split(BATCH)]
        return float(torch.cat(right).double().mean())

    before = score()
    trained(adapter, loss, steps, lr)
    return {"score": score(), "before": before, "trained": adapter.num_parameters()}


def drawn(tokenizer: Any, size: int, seed: int) -> tuple[list[str], Tensor]:
    """Glosses, and two words drawn by lot for each."""
    codes = torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in CODES])
    lots = torch.randint(len(codes), (size, 2), generator=torch.Generator().manual_seed(seed))
    return glosses(size), codes[lots]


def looked_up(tokenizer: Any, size: int, seed: int) -> tuple[list[str], Tensor]:
    """Glosses and their words, of those that are one token or two (one: and the end)."""
    texts, truth = [], []
    for row in dataset("wordnet-lemmas")["train"].shuffle(seed=seed):
        ids = tokenizer(f" {row['summary']}")["input_ids"]
        if len(ids) <= 2 and len(texts) < size:
            texts.append(f"{row['text']}:")
            truth.append([*ids, tokenizer.eos_token_id][:2])
    return texts, torch.tensor(truth)


def glosses(size: int) -> list[str]:
    return list(dataset("wordnet")["train"].shuffle(seed=0).select(range(size))["text"])


KINDS = {"planted": planted, "labels": labels, "facts": facts, "lemmas": lemmas}


def made(args: argparse.Namespace, there: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each (size, rank, method, seed) that is not there; the first seed's tells its sweep."""
    measure, rates = KINDS[args.kind], RATES[args.kind]
    held = {(r["size"], r["r"], r["method"], r["seed"]): r for r in there}
    for size, r, name in itertools.product(args.sizes, args.ranks, args.methods):
        best: float | None = None
        for seed in args.seeds:
            row = held.get((size, r, name, seed))
            if row is None:
                tried = {
                    lr: measure(name, r, size, seed, lr, args.steps) for lr in (rates if best is None else (best,))
                }
                lr = max(tried, key=lambda rate: tried[rate]["score"])
                swept = {f"{rate:g}": t["score"] for rate, t in tried.items()} if best is None else {}
                what = {"method": name, "r": r, "size": size, "seed": seed, "lr": lr}
                yield (row := {**what, **tried[lr], "swept": swept})
            best = row["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", nargs="*", type=int)
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    args.sizes, args.ranks = args.sizes or SIZES[args.kind], args.ranks or RANKS[args.kind]
    args.steps = args.steps or STEPS[args.kind]
    torch.set_num_threads(1)
    how = {"kind": args.kind, "steps": args.steps}
    rows = kept(args.json, how)
    for row in made(args, list(rows)):
        rows.append(row)
        print(row, flush=True)
        if args.json:
            record(args.json, {**how, "rows": rows})


if __name__ == "__main__":
    main()
