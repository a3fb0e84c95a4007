"""When does a nonlinear adapter pay?  What few trained numbers can hold.

    python bench/capacity.py planted --json bench/results/capacity-planted.json           # some minutes of one core
    python bench/capacity.py labels --ranks 1 --json bench/results/capacity-labels.json   # MiniLM; 4 s a training
    python bench/capacity.py facts --ranks 1 --sizes 300 1000 --json bench/results/capacity-facts.json   # 25 s
    python bench/capacity.py facts --sizes 100 --ranks 1 --methods LoRA --seeds 0
    python bench/capacity.py lemmas                                                       # SmolLM2; never run in full
    python bench/capacity.py labels --table bench/results/capacity-labels.json            # Markdown; measures nothing

planted   a matrix (64, 64) is to become W + D, D random and so of full rank: the share of |D|^2 that is reached, beside
          the truncated singular value decomposition's, the most that an update of rank r can.  AuroRA's B h(x) has
          that rank too, whatever h is; methods that bend the product itself may have more
labels    WordNet glosses with labels of two drawn by lot, a frozen random head: the share of labels that is right
          after training on them; chance is one half
facts     WordNet glosses -> two of twelve words drawn by lot (log2 144 = 7.2 bits, which no language model could
          guess): the share of rows whose words are both the likeliest of the twelve, the second given the first
lemmas    WordNet glosses -> their words, of those that are two tokens at most (bundled:wordnet-lemmas, which apt
          fetches): facts that a language model knows in part, so the score before is told.  The likeliest of the
          tokens that end any of 3,000 such rows

Numbers are to bind, so labels, facts and lemmas adapt one matrix, the one that widens in the last block (MiniLM's
`intermediate.dense`, SmolLM2's `up_proj`).  What comes before it never changes and is computed once for each row; what
comes after it is the model's own modules.  Every method has as many trained numbers as LoRA of that rank, or as near as
its form allows (told in each row).  Rates are swept on the first seed, on while an edge is best (EXTEND times at
most), and the best serves the others.  A seed draws D, or labels and words, factors, frozen matrices and the head; the
glosses are the same.  There are no other rows: what is asked is what training on rows leaves of them.  Rows that the
file holds are not made again; a kill loses one row, or one sweep.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
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
RATES = {"planted": (1e-2, 3e-2, 1e-1), "labels": (1e-2, 3e-2), "facts": (1e-2, 3e-2), "lemmas": (1e-2, 3e-2)}
RANKS = {"planted": (1, 2, 4), "labels": (1, 2, 4), "facts": (1, 2, 4), "lemmas": (1,)}
SIZES = {"planted": (64,), "labels": (500, 2000), "facts": (100, 300, 1000), "lemmas": (100, 300)}
STEPS = {"planted": 400, "labels": 1000, "facts": 1000, "lemmas": 1000}
ROUNDING = 1e-6  # of a share, in float32
EXTEND = 4  # rates beyond the edge of a sweep at most, each three times further
BATCH, LENGTH = 64, 32
CODES = ("red", "blue", "green", "stone", "river", "cloud", "bread", "horse", "piano", "tiger", "north", "seven")
Loss = Callable[[int], Tensor]  # of a step


def method_of(name: str, r: int, O: int, I: int, seed: int) -> undula.Method:
    """At rank r; VeRA's so that its rank + O numbers are the r (O + I) of LoRA, its frozen matrices drawn by `seed`."""
    kind, options = METHODS[name]
    if name == "VeRA":
        return undula.Method.build(kind, {"r": max(1, r * (O + I) - O), "seed": seed})
    return undula.Method.build(kind, {"r": r, "alpha": 2 * r, **options})


def trained(adapter: undula.Adapter, loss: Loss, steps: int, lr: float) -> None:
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
    adapter = undula.attach(model, method_of(name, r, size, size, seed), "*")
    one = torch.eye(size)
    trained(adapter, lambda _: (model(one).T - W - D).square().sum(), steps, lr)
    with torch.no_grad():
        left = (model(one).T - W - D).square().sum() / D.square().sum()
    most = torch.linalg.svdvals(D).square()
    bound = float(most[:r].sum() / most.sum())
    return {"score": float(1 - left), "linear_bound": bound, "trained": adapter.num_parameters()}


class Tail(nn.Module):
    """A model from what comes into its last block's widening matrix, with the model's own modules.

    x: (rows, positions, width), what `before` hears come in; forward gives (rows, positions, answers).
    """

    before: str  # the module whose first input is x
    wide: str  # of the tail: the matrix that is adapted

    @torch.no_grad()
    def heard(self, model: nn.Module, batches: Iterator[dict[str, Tensor]], keep: int | slice) -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule(self.before).register_forward_pre_hook(lambda _, x: found.append(x[0][:, keep]))
        for batch in batches:
            model(**batch)
        hook.remove()
        return torch.cat(found)


class Classifies(Tail):
    before, wide = "bert.encoder.layer.5.intermediate", "block.intermediate.dense"

    def __init__(self, model: Any):
        super().__init__()
        self.block, self.pooler, self.classifier = model.bert.encoder.layer[5], model.bert.pooler, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pooler(self.block.output(self.block.intermediate(x), x)))[:, None]


class Speaks(Tail):
    before, wide = "model.layers.29.post_attention_layernorm", "block.mlp.up_proj"

    def __init__(self, model: Any, tokens: Tensor):
        super().__init__()
        self.block, self.norm, self.answers = (
            model.model.layers[29],
            model.model.norm,
            model.lm_head.weight[tokens].detach(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block.mlp(self.block.post_attention_layernorm(x))
        return self.norm(x) @ self.answers.T


Rows = tuple[Tail, Tensor, Tensor]  # the tail, what comes into it, the answers (rows, positions)


def rows_of(step: int, size: int) -> Tensor:
    """The rows of a step: all in turn, in an order of each turn's own."""
    at = step * BATCH + torch.arange(BATCH)
    orders = {
        int(turn): torch.randperm(size, generator=torch.Generator().manual_seed(int(turn))) for turn in at // size
    }
    return torch.stack([orders[int(i) // size][int(i) % size] for i in at])


def batches(words: Any) -> Iterator[dict[str, Tensor]]:
    for at in torch.arange(len(words["input_ids"])).split(BATCH):
        yield {k: words[k][at] for k in ("input_ids", "attention_mask")}


@functools.cache
def labelled(size: int, seed: int) -> Rows:
    """MiniLM with a head drawn by `seed`, at the first token of each gloss; labels drawn by lot."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_path("minilm"), num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    words = tokenizer(glosses(size), max_length=LENGTH, truncation=True, padding=True, return_tensors="pt")
    tail = Classifies(model).requires_grad_(False)
    truth = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed))
    return tail, tail.heard(model, batches(words), slice(0, 1)), truth


def remembered(texts: list[str], truth: Tensor, tokens: Tensor, model: Any, tokenizer: Any) -> Rows:
    """SmolLM2 where it says the two tokens after each text, of `tokens` the likeliest."""
    how = {"max_length": LENGTH, "truncation": True, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    words = tokenizer(texts, **how)
    ids = torch.cat([words["input_ids"], truth], 1)
    both = {"input_ids": ids, "attention_mask": torch.cat([words["attention_mask"], torch.ones_like(truth)], 1)}
    tail = Speaks(model, tokens).requires_grad_(False)
    x = tail.heard(model, batches(both), slice(-3, -1))
    return tail, x, torch.searchsorted(tokens, truth)


@functools.cache
def speaker() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(model_path("smollm2")).eval(), tokenizer


@functools.cache
def drawn(size: int, seed: int) -> Rows:
    """Glosses, and two words drawn by lot for each."""
    model, tokenizer = speaker()
    codes = torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in CODES]).sort().values
    lots = torch.randint(len(codes), (size, 2), generator=torch.Generator().manual_seed(seed))
    return remembered(glosses(size), codes[lots], codes, model, tokenizer)


@functools.cache
def looked_up(size: int, seed: int) -> Rows:
    """Glosses and their words, of those that are one token or two (one: and the end)."""
    model, tokenizer = speaker()
    texts, truth = [], []
    for row in dataset("wordnet-lemmas")["train"].shuffle(seed=seed):
        ids = tokenizer(f" {row['summary']}")["input_ids"]
        if len(ids) <= 2 and len(texts) < 3000:
            texts.append(f"{row['text']}:")
            truth.append([*ids, tokenizer.eos_token_id][:2])
    all_of_them = torch.tensor(truth)
    return remembered(texts[:size], all_of_them[:size], all_of_them.unique(), model, tokenizer)


def held(
    rows: Callable[[int, int], Rows], name: str, r: int, size: int, seed: int, lr: float, steps: int
) -> dict[str, Any]:
    """The share of rows whose answers are all the likeliest, before and after training on them."""
    tail, x, truth = rows(size, seed)
    layer = tail.get_submodule(tail.wide)
    torch.manual_seed(seed)
    adapter = undula.attach(tail, method_of(name, r, layer.out_features, layer.in_features, seed), [tail.wide])

    def loss(step: int) -> Tensor:
        at = rows_of(step, size)
        return nn.functional.cross_entropy(tail(x[at]).flatten(0, 1), truth[at].flatten())

    @torch.no_grad()
    def score() -> float:
        right = [(tail(x[at]).argmax(-1) == truth[at]).all(1) for at in torch.arange(size).split(BATCH)]
        return float(torch.cat(right).double().mean())

    before = score()
    trained(adapter, loss, steps, lr)
    told = {"score": score(), "before": before, "trained": adapter.num_parameters()}
    undula.detach(tail)
    return told


def glosses(size: int) -> list[str]:
    return list(dataset("wordnet")["train"].shuffle(seed=0).select(range(size))["text"])


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "planted": planted,
    "labels": functools.partial(held, labelled),
    "facts": functools.partial(held, drawn),
    "lemmas": functools.partial(held, looked_up),
}


def swept(
    measure: Callable[[float], dict[str, Any]], rates: tuple[float, ...]
) -> tuple[float, dict[float, dict[str, Any]]]:
    """The best rate, and what each gave; on beyond an edge that is best.  What has diverged (NaN) is never best."""
    tried = {lr: measure(lr) for lr in rates}

    def best() -> float:
        return max(tried, key=lambda lr: -math.inf if math.isnan(tried[lr]["score"]) else tried[lr]["score"])

    for _ in range(EXTEND):
        here = best()
        if min(tried) < here < max(tried) or tried[here]["score"] == 1:
            break
        further = float(f"{here * 10**0.5 if here == max(tried) else here / 10**0.5:.1g}")
        tried[further] = measure(further)
    return best(), tried


Group = tuple[int, int, str]  # size, rank, method


def grouped(rows: list[dict[str, Any]]) -> dict[Group, list[dict[str, Any]]]:
    """In the order in which groups begin; rows of later seeds may stand anywhere."""
    found: dict[Group, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["size"], row["r"], row["method"]), []).append(row)
    return found


def made(args: argparse.Namespace, there: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each (size, rank, method, seed) that is not there; the first of a method tells its sweep, whose rate
    serves all seeds."""
    found = grouped(there)
    for size, r, name in itertools.product(args.sizes, args.ranks, args.methods):
        rows = found.get((size, r, name), [])
        best = rows[0]["lr"] if rows else None
        for seed in (seed for seed in args.seeds if seed not in {row["seed"] for row in rows}):
            measure = functools.partial(KINDS[args.kind], name, r, size, seed, steps=args.steps)
            what = {"method": name, "r": r, "size": size, "seed": seed}
            if best is None:
                best, tried = swept(lambda lr, measure=measure: measure(lr=lr), RATES[args.kind])
                yield {**what, "lr": best, **tried[best], "swept": {f"{k:g}": t["score"] for k, t in tried.items()}}
            else:
                yield {**what, "lr": best, **measure(lr=best)}


def bits(kind: str, row: dict[str, Any]) -> float:
    """What a row's training has written down: of labels n (1 - H(p)), of facts log2 144 for each that is right; of
    lemmas those that are right and were not before."""
    n, p = row["size"], row["score"]
    if kind == "labels":
        wrong = sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
        return n * (1 + wrong)
    return n * p * math.log2(len(CODES) ** 2) if kind == "facts" else n * (p - row["before"])


def table(kind: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds; beside them what rank r can reach at most (planted), or what was right before the training."""
    beside, last = ("before", "rows a number") if kind == "lemmas" else ("before", "bits a number")
    if kind == "planted":
        beside, last = "linear_bound", "over the bound"
    yield f"| size | r | method | numbers | lr | {beside} | held | least, most | {last} |"
    yield "|---:|---:|---|---:|---:|---:|---:|---|---:|"
    for (size, r, name), each in grouped(rows).items():
        scores = [row["score"] for row in each]
        if kind == "planted":
            told = f"{sum(row['score'] > row[beside] + ROUNDING for row in each)} of {len(each)}"
        else:
            told = f"{statistics.fmean(bits(kind, row) / row['trained'] for row in each):.3f}"
        yield (
            f"| {size} | {r} | {name} | {each[0]['trained']} | {each[0]['lr']:g} "
            f"| {statistics.fmean(row[beside] for row in each):.3f} | {statistics.fmean(scores):.3f} "
            f"| {min(scores):.3f}, {max(scores):.3f} | {told} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", nargs="*", type=int)
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--table", type=Path, help="show what is in this file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.kind, json.loads(args.table.read_text(encoding="utf-8"))["rows"])))
        return
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
