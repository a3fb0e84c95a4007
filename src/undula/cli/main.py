"""The command-line tool: verbs that map one to one to library functions ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import undula

from . import (
    adapters,
    collapsing,
    combining,
    compare,
    exporting,
    federating,
    finding,
    forgetting,
    generating,
    gguf,
    gqsa,
    helping,
    importing,
    inspecting,
    lists,
    many,
    predicting,
    prune_base,
    pushing,
    serving,
    shell,
    squeezing,
    studies,
    threads,
    training,
    tuning,
    writing,
)

app = typer.Typer(
    cls=shell.Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Low-rank adaptation of PyTorch models: train, measure, squeeze, merge and export adapters.",
)


def _version(asked: bool) -> None:
    if asked:
        shell.note(f"undula {undula.__version__}")
        raise typer.Exit


@app.callback()
def main(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """The options before the verb."""
    shell.check_alone(ctx.invoked_subcommand)


LOOK, TRAIN, USE, WRITE = "Look", "Train and compare", "Use", "Merge, export, convert"
VERBS: dict[str, tuple[str, Callable[..., None]]] = {
    "train": (TRAIN, training.train),
    "tune": (TRAIN, tuning.tune),
    "train-many": (TRAIN, many.train_many),
    "library": (TRAIN, generating.library),
    "from-description": (TRAIN, generating.from_description),
    "forget": (TRAIN, forgetting.forget),
    "federate": (TRAIN, federating.federate),
    "eval": (TRAIN, training.evaluate),
    "compare": (TRAIN, compare.compare),
    "study": (TRAIN, studies.study),
    "predict": (USE, predicting.predict),
    "generate": (USE, writing.generate),
    "chat": (USE, writing.chat),
    "serve": (USE, serving.serve),
    "find": (USE, finding.find),
    "merge": (WRITE, adapters.merge),
    "export": (WRITE, exporting.export),
    "import": (WRITE, importing.import_),
    "combine": (WRITE, combining.combine),
    "collapse": (WRITE, collapsing.collapse),
    "squeeze": (WRITE, squeezing.squeeze),
    "quantise": (WRITE, squeezing.quantise),
    "prune": (WRITE, adapters.prune),
    "prune-base": (WRITE, prune_base.prune_base),
    "gqsa": (WRITE, gqsa.gqsa),
    "cut": (WRITE, adapters.cut),
    "gguf": (WRITE, gguf.gguf),
    "push": (WRITE, pushing.push),
    "show": (LOOK, adapters.show),
    "inspect": (LOOK, inspecting.inspect),
    "methods": (LOOK, lists.methods),
    "assets": (LOOK, lists.assets),
}
for name, (panel, verb) in VERBS.items():
    app.command(
        name,
        cls=helping.Weighted if verb is combining.combine else helping.Verb,
        help=helping.paragraphs(verb.__doc__),
        short_help=helping.first_sentence(verb.__doc__),
        rich_help_panel=panel,
    )(shell.speaking(verb if panel == LOOK else threads.threaded(verb)))
