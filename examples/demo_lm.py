"""`make demo-lm`: fine-tunes a real pretrained language model to write one-line summaries, with three kinds of adapter.

SmolLM2-135M-Instruct learns to turn the long description of a Debian package into its synopsis (where there is no apt:
a Python function into the first line of its docstring).  Every adapter is saved, loaded back, merged or collapsed, and
checked.  Writes report.json and report.png.
"""

from __future__ import annotations

import comparison
import torch
from comparison import Entry
from rich.console import Console

import undula
from undula import bundled
from undula.bundled import AssetError
from undula.train import CausalLM, Plain, Run

ENTRIES = (  # plausible learning rates, not swept: studies/summaries.toml does that
    Entry("LoRA", undula.LoRA(r=8), 2e-3),
    Entry("LoRAN", undula.LoRAN(r=8), 2e-3),
    Entry("AuroRA", undula.AuroRA(r=2), 5e-3),
)


def data(console: Console) -> str:
    """The summaries that this machine can have."""
    try:
        bundled.fetch("debian-synopsis", lambda text: console.print(text, highlight=False))
    except AssetError as error:
        console.print(f"{error}\nDocstrings instead.", highlight=False, markup=False)
        return "bundled:docstrings"
    return "bundled:debian-synopsis"


def main() -> None:
    given = comparison.arguments(__doc__.split("\n")[0], "demo-lm", threads=torch.get_num_threads())
    console = comparison.screen()
    run = Run(
        model="bundled:smollm2",
        data=data(console),
        task=CausalLM(
            format=Plain(between="\nSummary:\n"),
            max_length=64,
            max_completion=20,
            generate=2 if given.quick else 24,
        ),
        method=None,
        where=("q_proj", "v_proj"),
        out=given.out,
        max_steps=2 if given.quick else 100,
        batch=4,
        eval_rows=4 if given.quick else 64,
    )
    sizes = comparison.Sizes(checked=4 if given.quick else 8, calibration=16 if given.quick else 64)
    with comparison.timed(console):
        rows = comparison.compare(ENTRIES, run, sizes, console)
        comparison.tell(rows, ("loss", "rougeL"), console)
        about = {"model": run.model, "data": run.data, "batch": run.batch}
        comparison.write(rows, about, given.out / "report.json")
        comparison.draw(rows, "rougeL", given.out / "report.png")
        console.print(f"{given.out / 'report.json'} and {given.out / 'report.png'} are written", highlight=False)


if __name__ == "__main__":
    main()
