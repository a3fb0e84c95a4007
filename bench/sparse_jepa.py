"""Do features serve better where each rank writes into few heads?  The probe of SparseJEPA, small.

    python bench/sparse_jepa.py --json bench/results/sparse-jepa.json      # rows that are there are not made again
    python bench/sparse_jepa.py --steps 4 --rows 600 --seeds 0             # a miniature

A ViT of four layers (width 64, four heads, patches of 7 x 7) begins at random numbers and learns from Fashion-MNIST
without labels, as a joint-embedding predictive model: what an encoder makes of an image with 60 % of its patches hidden
has to predict, at the hidden ones, what a slowly following copy makes of the whole image.  All linear layers carry a
LoRA of rank 16, embeddings and norms train in full.  With `SparseGroups` of several weights, and without; then a
logistic regression on the mean of the features: its accuracy on other images is the figure, beside that of the encoder
as it began and of the pixels.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from record import kept, record
from torch import Tensor, nn

import undula
from undula.bundled import dataset
from undula.penalties import HeadRanks, SparseGroups

WEIGHTS = (0.0, 0.1, 0.3, 1.0)
SIZE, PATCH, BATCH, LR, MOMENTUM, HIDDEN = 28, 7, 64, 1e-3, 0.99, 0.6


def encoder() -> Any:
    from transformers import ViTConfig, ViTModel

    how = {"image_size": SIZE, "patch_size": PATCH, "num_channels": 1, "hidden_size": 64, "intermediate_size": 128}
    config = ViTConfig(**how, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.1)
    return ViTModel(config, add_pooling_layer=False, use_mask_token=True)


def pictures(rows: Any) -> Tensor:
    """(N, 1, 28, 28), of mean 0 and about unit size."""
    found = numpy.stack(
        [numpy.asarray(each.convert("L").resize((SIZE, SIZE)), numpy.float32) for each in rows["image"]]
    )
    return torch.from_numpy(found)[:, None] / 127.5 - 1


def learn(model: Any, images: Tensor, weight: float, steps: int, seed: int) -> dict[str, Any]:
    """Trains what is adapted; returns what the penalty came to."""
    where = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    full = [n for n, _ in model.named_parameters() if "norm" in n or "embeddings" in n]
    adapter = undula.attach(model, undula.LoRA(r=16, alpha=16.0), where, full=full)
    follower = copy.deepcopy(model).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*adapter.parameters(), *predictor.parameters()], lr=LR, weight_decay=0.0)
    penalty = SparseGroups(weight, groups=HeadRanks(16))
    course = penalty.start(model, optimizer, steps=steps)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20) * (1 - step / steps)
        x = images[torch.randint(len(images), (BATCH,), generator=draws)]
        hidden = torch.rand(BATCH, (SIZE // PATCH) ** 2, generator=draws) < HIDDEN
        with torch.no_grad():
            aim = F.layer_norm(follower(x).last_hidden_state[:, 1:], (64,))
        course.before_forward()
        told = predictor(model(x, bool_masked_pos=hidden).last_hidden_state[:, 1:])
        F.mse_loss(told[hidden], aim[hidden]).backward()
        course.before_update()
        optimizer.step()
        course.after_update()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, p in zip(follower.parameters(), model.parameters(), strict=True):
                slow.lerp_(p, 1 - MOMENTUM)
    course.finish()
    found = penalty.figures(model)
    return {"groups": found["groups"], "zero": found["zero"]}


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part).last_hidden_state[:, 1:].mean(1) for part in images.split(256)])


def probed(train: Tensor, labels: list[int], test: Tensor, truth: list[int]) -> float:
    """The accuracy of a logistic regression on features of unit size."""
    from sklearn.linear_model import LogisticRegression

    mean, size = train.mean(0), train.std(0).clamp_min(1e-6)
    learned = LogisticRegression(max_iter=500).fit(((train - mean) / size).numpy(), labels)
    return float(learned.score(((test - mean) / size).numpy(), truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    data = dataset("fashion-mnist")
    train, test = (
        data["train"].shuffle(seed=0).select(range(args.rows)),
        data["test"].shuffle(seed=0).select(range(2000)),
    )
    images, others = pictures(train), pictures(test)
    known, labels, truth = images[:2000], train["label"][:2000], test["label"][:]
    how = {"steps": args.steps, "images": args.rows}
    rows = kept(args.json, how)
    pixels = probed(known.flatten(1), labels, others.flatten(1), truth)
    there = {(r["seed"], r["weight"]) for r in rows}
    for seed, weight in itertools.product(args.seeds, (None, *WEIGHTS)):  # None: as it began
        if (seed, weight) in there:
            continue
        torch.manual_seed(seed)
        model, found = encoder(), {}
        if weight is not None:
            found = learn(model.train(), images, weight, args.steps, seed)
        accuracy = probed(features(model, known), labels, features(model, others), truth)
        rows.append({"seed": seed, "weight": weight, "accuracy": round(accuracy, 4), **found})
        print(rows[-1], f"{time.process_time() - begun:.0f} s", flush=True)
        if args.json:
            record(args.json, {**how, "pixels": pixels, "rows": rows})
    made = [w for w in (None, *WEIGHTS) if any(r["weight"] == w for r in rows)]
    mean = {w: statistics.fmean(r["accuracy"] for r in rows if r["weight"] == w) for w in made}
    for weight, accuracy in mean.items():
        gain = [r["accuracy"] - p["accuracy"] for r in rows for p in rows
                if r["weight"] == weight and p["weight"] == 0.0 and r["seed"] == p["seed"]]  # fmt: skip
        print(f"weight {weight}: {accuracy:.4f}, beside none by seed: {', '.join(f'{g:+.4f}' for g in gain)}")
    print(f"pixels: {pixels:.4f}")


if __name__ == "__main__":
    main()
