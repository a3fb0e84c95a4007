"""GQSA on SmolLM2-135M: perplexity at each stage, size on disk, and single-token decoding from packed groups.

    python bench/gqsa.py --json bench/results/gqsa.json

One thread, groups of 16, half of them gone.  Stages: dense; rounded (groups chosen by calibration, nothing learned);
BQPO; E2E-OQP (scales and zeros alone); LoRA on top of it.  Beside them a LoRA on the dense model, trained alike.
The bundled SmolLM2 is made from weights of 4 bits: its own rounding is as coarse, so that what is lost here is by the
groups that go.
"""

import argparse
import tempfile
from pathlib import Path

import lm
import torch
from record import record

import undula
from undula.compress import bqpo
from undula.compress.gqsa import Form, compressed_layers
from undula.integrations.gqsa import marked


def compressed(form, ids, steps):
    model = lm.model()
    batches = [{"input_ids": part} for part in ids.split(lm.BATCH)]
    made = bqpo.calibrated(model, batches, form, bqpo.Learning(steps))
    return model, made


def tuned(model, ids, steps, lr):
    """E2E-OQP: scales and zeros alone, on the loss of the whole model."""
    layers = compressed_layers(model).values()
    scales, zeros = [m.scale for m in layers], [m.zero for m in layers]
    codes = [m.weight.clone() for m in layers]
    model.requires_grad_(False)
    for p in (*scales, *zeros):
        p.requires_grad_()
    lm.learn(model, [*scales, *zeros], ids, steps, lr)
    model.requires_grad_(False)
    assert all(torch.equal(m.weight, q) for m, q in zip(layers, codes, strict=True))


def repaired(model, ids, asked):
    """A LoRA on all linear layers."""
    adapter = undula.attach(model, undula.LoRA(r=8))
    lm.learn(model, adapter.parameters(), ids, asked.steps, asked.lr)


def size(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--block-steps", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12, help="of E2E-OQP, and of each LoRA")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a LoRA")
    parser.add_argument("--scale-lr", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    form = Form(asked.sparsity, asked.group)
    ids, held = lm.sequences("train", lm.BATCH * asked.steps), lm.sequences("test", lm.HELD)
    calibration, rows, more = ids[: 4 * lm.BATCH], {}, {}

    def told(name, model):
        """Measures a stage; the file is written after each, so that a run that is stopped leaves what it had."""
        rows[name] = lm.perplexity(model, held)
        print(name, round(rows[name], 3), flush=True)
        if asked.json:
            said = {k: v for k, v in vars(asked).items() if k != "json"} | {"threads": 1, "held_tokens": held.numel()}
            record(asked.json, {**said, "perplexity": rows, **more, "targets_met": met(rows, more)})

    dense = lm.model()
    told("dense", dense)
    told("rounded", compressed(form, calibration, 0)[0])
    model, made = compressed(form, calibration, asked.block_steps)
    told("BQPO", model)
    tuned(model, ids, asked.steps, asked.scale_lr)
    layers = compressed_layers(model).values()
    weights = sum(m.in_features * m.out_features for m in layers)
    more["bytes"] = {
        "dense, float32": size(dense),
        "GQSA": size(marked(model, form)),
        "linear layers, float32": 4 * weights,
        "linear layers, GQSA": int(made.bits * weights / 8),
    }
    more |= {"bits": made.bits, "speed": speeds(dense, model, held[:1, :32], asked.rounds)}
    print(more, flush=True)
    told("E2E-OQP", model)
    repaired(model, ids, asked)
    told("LoRA on E2E-OQP", model)
    repaired(dense, ids, asked)
    told("LoRA on dense", dense)


def speeds(dense, model, context, rounds):
    """CPU seconds of a token of decoding, and of the linear layers alone."""
    layers = compressed_layers(model)
    x = {m.in_features: torch.randn(1, m.in_features) for m in layers.values()}
    whole = [m for n, m in dense.named_modules() if n in layers]
    calls = {
        "dense": lambda: [m(x[m.in_features]) for m in whole],
        "GQSA": lambda: [m(x[m.in_features]) for m in layers.values()],
    }
    decoding = {"dense": lm.decoder(dense, context), "GQSA": lm.decoder(model, context)}
    found = {"decoding": lm.beside(decoding, rounds), "linear layers": lm.beside(calls, rounds)}
    return {what: {**each, "times as fast": each["dense"] / each["GQSA"]} for what, each in found.items()}


def met(rows, more):
    """What was aimed at, of the stages that are there."""
    found = {}
    for after, before in (("BQPO", "rounded"), ("E2E-OQP", "BQPO"), ("LoRA on E2E-OQP", "E2E-OQP")):
        if after in rows:
            found[f"{after} repairs"] = rows[after] < rows[before]
    if more:
        sizes = more["bytes"]
        found["linear layers below an eighth of float32"] = (
            sizes["linear layers, GQSA"] < sizes["linear layers, float32"] / 8
        )
        found["decoding beats dense"] = more["speed"]["decoding"]["times as fast"] > 1
    return found


if __name__ == "__main__":
    main()
