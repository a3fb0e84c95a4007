"""`make demo`: fine-tunes a real pretrained encoder on a real classification set with five kinds of adapter.

all-MiniLM-L6-v2 (22.7 M parameters) learns to sort dictionary glosses into 20 classes.  Every adapter is saved, loaded
back, merged or collapsed, and checked: what was merged predicts what was trained.  Writes report.json and report.png.
"""

from __future__ import annotations

import comparison
from comparison import Entry

import undula
from undula.methods.activations import Sinter
from undula.train import Classification, Run

ENTRIES = (  # rates that did well in short trials with one rate for head and adapter; not swept beside head_lr
    Entry("head only", None, 5e-2),
    Entry("LoRA", undula.LoRA(r=8), 3e-3),
    Entry("LoRAN", undula.LoRAN(r=8), 3e-3),  # the published constants: a = 5e-5, w = 1e4
    Entry("LoRAN visible", undula.LoRAN(r=8, activation=Sinter(a=0.02, w=300.0)), 3e-3),  # more than bf16 rounds away
    Entry("AuroRA", undula.AuroRA(r=2), 1e-2),
)


def main() -> None:
    given = comparison.arguments(__doc__.split("\n")[0], "demo", threads=1)
    console = comparison.screen()
    run = Run(
        model="bundled:minilm",
        data="bundled:wordnet",
        task=Classification(max_length=48),
        method=None,
        out=given.out,
        head_lr=3e-2,  # the same new head for every adapter; at the adapter's rate it would learn next to nothing
        max_steps=8 if given.quick else 100,
        batch=16,
        eval_rows=64 if given.quick else 400,
    )
    with comparison.timed(console):
        rows = comparison.compare(ENTRIES, run, comparison.Sizes(checked=64, calibration=256), console)
        comparison.tell(rows, ("accuracy",), console)
        about = {"model": run.model, "data": run.data, "batch": run.batch}
        comparison.write(rows, about, given.out / "report.json")
        comparison.draw(rows, "accuracy", given.out / "report.png")
        console.print(f"{given.out / 'report.json'} and {given.out / 'report.png'} are written", highlight=False)


if __name__ == "__main__":
    main()
