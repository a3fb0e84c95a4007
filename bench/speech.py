"""Whisper tiny.en taught synthetic voices: LoRA, AuroRA, LoRAN and S2-LoRA, on voices and speakers unheard before.

    python bench/speech.py --work runs/speech --json bench/results/speech.json    # about 25 minutes of one core
    python bench/speech.py --work runs/speech --only "LoRA r=4" --seeds 1         # goes on where it was stopped
    python bench/speech.py --table bench/results/speech.json                      # as Markdown; measures nothing

Training: the bundled espeak-synopses (twelve voices of eSpeak NG reading synopses of Debian packages).  Tests: its test
part (six other voices, of other accents, other sentences), and prompts spoken by a person (asterisk-prompts), which no
training sees: what it costs elsewhere.  Word error rates are of what is spoken (small letters, no punctuation).

A step of Whisper costs the same for a word as for 30 seconds.  All sounds here have less than 6 seconds, so the encoder
is given 8 (`shortened`): the same weights, the first 400 of its 1,500 places.  That is another base, whose own error
rates are told beside those of 30 seconds; at the end LoRA's adapter is put into the model of 30 seconds too.

Every way trains at three rates (seed 0; LoRAN at two, sparse S2-LoRA at one); the one with the least loss on
validation rows (two other voices) is taken, and trained from more seeds.  Standard errors are over the test's clips;
differences are of the same clips.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import once, record

import undula
from undula.bundled import dataset, model_path
from undula.core.method import Method
from undula.io.whole import whole
from undula.penalties import Gates, GroupLasso, Penalty
from undula.train import Run, SpeechRecognition, Spoken, restored
from undula.train.base import open_model
from undula.train.run import REPORT, RUN

SECONDS, STEPS, BATCH, HELD, LONGEST = 8, 32, 4, 16, 24  # of the window, of a run, of validation; tokens of a text
CLIPS = {"voices": ("espeak-synopses", 48), "prompts": ("asterisk-prompts", 48)}
TASK = SpeechRecognition(normaliser=Spoken(), max_text=LONGEST)
RATES, SHARED_RATES = (3e-3, 1e-3, 1e-2), (1.5e-2, 5e-2, 5e-3)
S2 = undula.S2LoRA(r=16)
GATES = GroupLasso(0.5, groups=Gates())
WAYS: dict[str, tuple[Method, tuple[Penalty, ...], tuple[float, ...]]] = {
    "LoRA r=4": (undula.LoRA(r=4), (), RATES),
    "LoRA r=1": (undula.LoRA(r=1), (), RATES),
    "S2-LoRA r=16": (S2, (), SHARED_RATES),
    "S2-LoRA r=16, sparse": (S2, (GATES,), SHARED_RATES[:1]),
    "AuroRA r=4": (undula.AuroRA(r=4), (), RATES),
    "LoRAN r=4": (undula.LoRAN(r=4), (), RATES[:2]),  # at its published constants LoRA, to 4e-5
}
SIZES = {"seconds": SECONDS, "steps": STEPS, "batch": BATCH, "clips": CLIPS, "held": HELD, "longest": LONGEST}
WHOLE = "LoRA r=4"  # the way that is put into the model of 30 seconds too
Errors = list[tuple[int, int]]  # of each clip: (words that are wrong, words)


def shortened(seconds: int, out: Path) -> Path:
    """The bundled Whisper with an encoder that hears `seconds`: the first places of 50 a second.  All other weights
    are as they were, so adapters fit both."""
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    if out.is_dir():
        return out
    path, places = model_path("whisper-tiny-en"), 50 * seconds
    model, processor = WhisperForConditionalGeneration.from_pretrained(path), AutoProcessor.from_pretrained(path)
    encoder, maker = model.model.encoder, processor.feature_extractor
    first = encoder.embed_positions.weight.data[:places].clone()
    encoder.embed_positions = torch.nn.Embedding(places, first.shape[1], _weight=first)
    model.config.max_source_positions = places
    processor.feature_extractor = type(maker)(feature_size=maker.feature_size, chunk_length=seconds)
    with whole(out) as folder:
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return out


def clips(kind: str) -> Any:
    """The sounds of a test, by the trainer's own reading; of the prompts those that the window holds."""
    from datasets import concatenate_datasets

    from undula.train.data.audio import seconds

    name, many = CLIPS[kind]
    parts = dataset(name)
    rows = parts["test"] if kind == "voices" else concatenate_datasets([parts[p] for p in ("test", "train")])
    fits = [i for i, sound in enumerate(rows["audio"]) if seconds(sound) < SECONDS - 2]
    return TASK.rows(rows.select(fits[:many]))


def errors(model: Any, processor: Any, rows: Any) -> Errors:
    """Of each clip how many words are wrong (substituted, left out or added), and how many there are."""
    import jiwer

    found: Errors = []
    same = Spoken()
    with torch.no_grad():
        said = TASK.answers(model.eval(), rows, processor, 8)
        for wanted, answer in zip(rows["text"], said, strict=True):
            made = jiwer.process_words(same(wanted), same(answer["text"]))
            found.append((made.substitutions + made.deletions + made.insertions, len(same(wanted).split())))
    return found


def rate(found: Errors) -> tuple[float, float]:
    """(word error rate of all clips together, its standard error over clips: that of a ratio)."""
    words = sum(w for _, w in found)
    r = sum(e for e, _ in found) / words
    return r, math.sqrt(sum((e - r * w) ** 2 for e, w in found)) / words


def gain(base: list[Errors], other: list[Errors]) -> tuple[float, float]:
    """(WER of `other` - WER of `base`, its standard error), of the same clips: means over runs of each clip."""

    def mean(runs: list[Errors]) -> list[float]:
        return [statistics.fmean(e for e, _ in clip) for clip in zip(*runs, strict=True)]

    off = [b - a for a, b in zip(mean(base), mean(other), strict=True)]
    words = [w for _, w in base[0]]
    r = sum(off) / sum(words)
    return r, math.sqrt(sum((d - r * w) ** 2 for d, w in zip(off, words, strict=True))) / sum(words)


def timed(path: Path, make: Callable[[], dict[str, Any]], **how: str) -> dict[str, Any]:
    """What `make` gives and its time, kept in a file with the sizes of this program and `how`, see `once`."""

    def made() -> dict[str, Any]:
        begun = time.process_time()
        found = make() | {"cpu_seconds": round(time.process_time() - begun, 1)}
        shown = {k: v for k, v in found.items() if k not in ("voices", "prompts", "losses", "pattern")}
        rates = {k: round(rate(found[k])[0], 3) for k in CLIPS if k in found}
        print(path.stem, rates, shown, flush=True)
        return found

    told: dict[str, Any] = once(path, {**SIZES, **how}, made)
    return told


class Bench:
    def __init__(self, work: Path):
        self.work = work
        self.short = shortened(SECONDS, work / f"whisper-{SECONDS}s")
        self.rows = {kind: clips(kind) for kind in CLIPS}

    def base(self, seconds: int) -> dict[str, Any]:
        """The error rates of the model as it is."""
        source = "bundled:whisper-tiny-en" if seconds == 30 else str(self.short)
        model, processor = open_model(source, TASK, torch.float32, 0)
        return {kind: errors(model, processor, rows) for kind, rows in self.rows.items()}

    def out(self, way: str, lr: float, seed: int) -> Path:
        return self.work / f"{way.replace(' ', '_').replace(',', '')}-{lr:g}-{seed}"

    def kept(self, out: Path, what: str, way: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """WHAT of the run in OUT, which was made as this program makes it now."""
        method, penalty, _ = WAYS[way]
        how = {"method": repr(method), "penalty": repr(penalty)}
        once(out.with_name(f"{out.name}.how.json"), {**SIZES, **how}, dict)  # before the run: of it too
        return timed(out.with_name(f"{out.name}.{what}.json"), make, **how)

    def trained(self, way: str, lr: float, seed: int) -> dict[str, Any]:
        """A run: losses, and validation's before and after."""
        out, (method, penalty, _) = self.out(way, lr, seed), WAYS[way]

        def make() -> dict[str, Any]:
            if not (out / REPORT).is_file():
                undula.train(
                    Run(
                        model=str(self.short), data="bundled:espeak-synopses", task=TASK, method=method, out=out, lr=lr,
                        where="all-linear", penalty=penalty, batch=BATCH, max_steps=STEPS, warmup=0.1,
                        eval_rows=HELD, eval_every=0, seed=seed,
                    ),
                    resume=(out / RUN).is_file(),
                )  # fmt: skip
            report = json.loads((out / REPORT).read_text(encoding="utf-8"))
            told = {name: report[name] for name in ("before", "after", "losses", "trainable_parameters")}
            return told | {"pattern": pattern(restored(out).adapter)}

        return self.kept(out, "train", way, make)

    def tested(self, way: str, lr: float, seed: int, seconds: int = SECONDS) -> dict[str, Any]:
        """The errors of a trained adapter, in the window that it was trained in or in that of 30 seconds."""
        out = self.out(way, lr, seed)

        def make() -> dict[str, Any]:
            found = restored(out, None if seconds == SECONDS else "bundled:whisper-tiny-en")
            return {kind: errors(found.model, found.processor, rows) for kind, rows in self.rows.items()}

        return self.kept(out, f"{seconds}s", way, make)

    def way(self, name: str, seeds: int) -> dict[str, Any]:
        """All of a way."""
        rates = WAYS[name][2]
        sweep = {lr: self.trained(name, lr, 0)["after"]["loss"] for lr in rates}
        chosen = min(sweep, key=lambda lr: sweep[lr])
        runs = [self.trained(name, chosen, seed) for seed in range(seeds)]
        tests = [self.tested(name, chosen, seed) for seed in range(seeds)]
        return {
            "trains": runs[0]["trainable_parameters"],
            "validation_loss": {f"{lr:g}": loss for lr, loss in sweep.items()},
            "lr": chosen,
            "at_the_edge": len(rates) > 1 and chosen in (min(rates), max(rates)),
            "loss": [run["after"]["loss"] for run in runs],
            "validation_wer": [run["after"]["wer"] for run in runs],
            "errors": {kind: [test[kind] for test in tests] for kind in CLIPS},
            "errors_30s": self.tested(name, chosen, 0, 30) if name == WHOLE else None,
            "pattern": runs[0]["pattern"],
            "cpu_seconds_of_a_run": [run["cpu_seconds"] for run in runs],
        }


def pattern(adapter: undula.Adapter) -> dict[str, Any] | None:
    """Where an adapter of S2-LoRA uses its ranks.  |e_k| |b_k| |a_k| is the size of a rank's update at a site, which
    does not change where B grows and e shrinks; of encoder and decoder: the share of the squares of these sizes, the
    sites, and the share of ranks that are off (e = 0) or below a tenth of the largest of the model."""
    f = adapter.factors
    if "e" not in next(iter(f.values())):
        return None
    sizes = {s: (t["e"].abs() * t["B"].norm(dim=0) * t["A"].norm(dim=1)).detach() for s, t in f.items()}
    whole = sum(float(v.square().sum()) for v in sizes.values())
    most = max(float(v.max()) for v in sizes.values())
    told: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        own = torch.stack([v for s, v in sizes.items() if f".{side}." in s])
        told[side] = {
            "sites": len(own),
            "share": float(own.square().sum()) / whole,
            "off": float((own == 0).float().mean()),
            "small": float((own < 0.1 * most).float().mean()),
        }
    kinds: dict[str, list[float]] = {}
    for s, v in sizes.items():
        side, rest = ("encoder", s) if ".encoder." in s else ("decoder", s)
        kinds.setdefault(f"{side} {'.'.join(rest.split('.')[4:])}", []).append(float(v.square().sum()) / whole)
    told["share_of_kinds"] = {kind: sum(parts) for kind, parts in sorted(kinds.items())}
    return told


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The aims, which were set before the runs, of what is there."""
    ways, base = found["ways"], found["base"][f"{SECONDS} s"]
    aims = {}
    for name, way in ways.items():
        less, error = gain([base["voices"]], way["errors"]["voices"])
        aims[f"{name}: fewer errors on unheard voices"] = less + 2 * error < 0
        more, _ = gain([base["prompts"]], way["errors"]["prompts"])
        aims[f"{name}: at most 0.05 more on a person's prompts"] = more <= 0.05
    if {"S2-LoRA r=16", "LoRA r=1", "LoRA r=4"} <= set(ways):
        s2 = ways["S2-LoRA r=16"]
        off, error = gain(ways["LoRA r=1"]["errors"]["voices"], s2["errors"]["voices"])
        aims["S2-LoRA is no worse than LoRA of as many numbers"] = off <= 2 * error
        off, error = gain(ways["LoRA r=4"]["errors"]["prompts"], s2["errors"]["prompts"])
        aims["S2-LoRA is no worse than LoRA r=4 on the other domain"] = off <= 2 * error
        side = s2["pattern"]
        aims["S2-LoRA uses the encoder more"] = side["encoder"]["share"] > side["decoder"]["share"]
    return aims


def table(found: dict[str, Any]) -> Iterator[str]:
    yield "| | trains | rate | validation loss | WER, unheard voices | WER, a person's prompts | both at 30 s |"
    yield "|---|---|---|---|---|---|---|"

    def said(errors: list[Errors]) -> str:
        each = [rate(run) for run in errors]
        seeds = "" if len(each) == 1 else f" ({', '.join(f'{r:.3f}' for r, _ in each)})"
        return f"{statistics.fmean(r for r, _ in each):.3f} ± {statistics.fmean(e for _, e in each):.3f}{seeds}"

    base, whole = found["base"][f"{SECONDS} s"], found["base"]["30 s"]
    long = f"{rate(whole['voices'])[0]:.3f}, {rate(whole['prompts'])[0]:.3f}"
    first = f"{found['loss']:.2f} | {said([base['voices']])} | {said([base['prompts']])}"
    yield f"| Whisper as it is | 0 | | {first} | {long} |"
    for name, way in found["ways"].items():
        whole = way["errors_30s"]
        long = ", ".join(f"{rate(whole[kind])[0]:.3f}" for kind in CLIPS) if whole else ""
        yield (
            f"| {name} | {way['trains']:,} | {way['lr']:g} | {statistics.fmean(way['loss']):.2f} | "
            f"{said(way['errors']['voices'])} | {said(way['errors']['prompts'])} | {long} |"
        )


def measured(work: Path, only: list[str], seeds: int) -> dict[str, Any]:
    bench = Bench(work)
    base = {f"{s} s": timed(work / f"base-{s}s.json", lambda s=s: bench.base(s)) for s in (SECONDS, 30)}
    ways: dict[str, Any] = {}
    for name in only:
        ways[name] = bench.way(name, seeds)
        first = bench.trained(name, ways[name]["lr"], 0)["before"]
    found = {"base": base, "loss": first["loss"], "validation_wer_before": first["wer"], "ways": ways}
    return found | {"differences": differences(found), "targets_met": judged(found)}


def differences(found: dict[str, Any]) -> dict[str, Any]:
    """{way: {kind: (WER less that of LoRA r=4, standard error)}}."""
    ways = found["ways"]
    against = ways.get("LoRA r=4", {}).get("errors", {})
    return {
        name: {kind: gain(against[kind], way["errors"][kind]) for kind in CLIPS}
        for name, way in ways.items()
        if against and name != "LoRA r=4"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder to work in, which is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", type=Path, help="show what is in this file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_text(encoding="utf-8")))))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as closes:
        work = args.work or Path(closes.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        found = measured(work, args.only, args.seeds)
    print("\n".join(table(found)))
    print(json.dumps({k: found[k] for k in ("differences", "targets_met")}, indent=1))
    if args.json:
        record(args.json, {**SIZES, "seeds": args.seeds, **found})


if __name__ == "__main__":
    main()
