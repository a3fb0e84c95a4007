"""GQSA on SmolLM2-135M: perplexity at each stage, and size on disk.  (Speed: smaller_speed.py.)

    python bench/gqsa.py --work runs/gqsa --json bench/results/gqsa.json

One thread, groups of 16, of which none, 30 % and half go.  Stages: rounded (groups chosen by weights alone); fitted
(what is kept at its least squares); BQPO; E2E-OQP (scales and zeros alone); LoRA on top of it.  Beside them a LoRA on
BQPO, in the place of E2E-OQP, the dense model and a LoRA on it, trained alike.  Each stage is measured as it opens from
the disk and is kept in --work: a run that was stopped goes on.
The bundled SmolLM2 is made from weights of 4 bits: its own rounding is as coarse, so that what is lost here is by the
groups that go.
"""

import argparse
import itertools
import json
from pathlib import Path

import lm
import torch
from record import record
from transformers import AutoModelForCausalLM

import undula
from undula.compress import bqpo
from undula.compress.gqsa import Form, compress, compressed_layers
from undula.integrations.gqsa import marked

ROUNDED, FITTED, BQPO, E2E, LORA = STAGES = ("rounded", "fitted", "BQPO", "E2E-OQP", "LoRA")
INSTEAD = "BQPO, LoRA"


def compressed(form, ids, asked, stage):
    model = lm.model()
    if stage == ROUNDED:
        compress(model, form)
    else:
        learning = bqpo.Learning(asked.block_steps if stage == BQPO else 0, asked.block_lr)
        bqpo.calibrated(model, [{"input_ids": part} for part in ids.split(lm.BATCH)], form, learning)
    return marked(model, form)


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


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return opened(folder)


def size(folder):
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.0, 0.3])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="those before first")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rows", type=int, default=128, help="sequences to calibrate on")
    parser.add_argument("--block-steps", type=int, default=bqpo.Learning.steps)
    parser.add_argument("--block-lr", type=float, default=bqpo.Learning.lr)
    parser.add_argument("--steps", type=int, default=40, help="of E2E-OQP, and of each LoRA")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a LoRA")
    parser.add_argument("--scale-lr", type=float, default=1e-4)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    said = {k: v for k, v in vars(asked).items() if k not in ("json", "work", "sparsity", "stages")}
    said |= {"threads": 1, "held_tokens": lm.HELD * lm.LENGTH, "tokens_in_a_step": lm.BATCH * lm.LENGTH}
    kept = json.loads(asked.json.read_text()) if asked.json and asked.json.is_file() else {}
    same = all(kept.get(name) == value for name, value in said.items())
    rows, more = (kept["perplexity"], {k: kept[k] for k in ("bytes", "bits") if k in kept}) if same else ({}, {})

    def told(name, model):
        """Measures a stage; the file is written after each, so that a run that is stopped leaves what it had."""
        rows[name] = lm.perplexity(model, held)
        print(name, round(rows[name], 3), flush=True)
        write()

    def write():
        if asked.json:
            record(asked.json, {**said, "perplexity": rows, **more, "targets_met": met(rows, more)})

    ids, held = lm.sequences("train", max(lm.BATCH * asked.steps, asked.rows)), lm.sequences("test", lm.HELD)
    dense = lm.model()
    if "dense" not in rows:
        told("dense", dense)
    for sparsity in asked.sparsity:
        stages(sparsity, asked, ids, rows, told)
    if "bytes" not in more and E2E in asked.stages:
        more |= sizes(dense, asked)
        print(more, flush=True)
        write()
    if f"dense, {LORA}" not in rows and LORA in asked.stages:
        repaired(dense, ids, asked)
        told(f"dense, {LORA}", dense)


def called(sparsity, stage):
    return f"W4S{100 * sparsity:.0f} {stage}"


def stages(sparsity, asked, ids, rows, told):
    """The stages of one form that have no row yet."""
    form, calibration, before = Form(sparsity, asked.group), ids[: asked.rows], None
    for stage in asked.stages:
        name = called(sparsity, stage)
        if name not in rows:
            if stage in (ROUNDED, FITTED, BQPO):
                model = compressed(form, calibration, asked, stage)
            else:
                model = opened(asked.work / before)
                if stage == E2E:
                    tuned(model, ids, asked.steps, asked.scale_lr)
                else:
                    repaired(model, ids, asked)
            told(name, model if stage == LORA else saved(model, asked.work / name))
        before = name
    if (name := called(sparsity, INSTEAD)) not in rows and LORA in asked.stages:
        model = opened(asked.work / called(sparsity, BQPO))
        repaired(model, ids, asked)
        told(name, model)


def sizes(dense, asked):
    """Of the sparsest form."""
    sparsity = max(asked.sparsity)
    model = opened(asked.work / called(sparsity, E2E))
    layers = compressed_layers(model).values()
    weights = sum(m.in_features * m.out_features for m in layers)
    form = Form(sparsity, asked.group)
    bits = sum(m.in_features * m.out_features * form.bits(m.in_features) for m in layers) / weights
    saved(dense, asked.work / "dense")
    told = {
        "dense, float32": size(asked.work / "dense"),
        "GQSA": size(asked.work / called(sparsity, E2E)),
        "linear layers, float32": 4 * weights,
        "linear layers, GQSA": int(bits * weights / 8),
    }
    return {"bytes": told, "bits": bits}


def met(rows, more):
    """What was aimed at, of the stages that are there."""
    found = {}
    for sparsity in (0.0, 0.3, 0.5):
        for before, after in itertools.pairwise(STAGES if sparsity else (ROUNDED, *STAGES[2:])):  # nothing to fit
            if {name := called(sparsity, after), called(sparsity, before)} <= set(rows):
                found[f"{name} repairs"] = rows[name] < rows[called(sparsity, before)]
    if told := more.get("bytes"):
        eighth = told["linear layers, float32"] / 8
        found["linear layers below an eighth of float32"] = told["linear layers, GQSA"] < eighth
    return found


if __name__ == "__main__":
    main()
