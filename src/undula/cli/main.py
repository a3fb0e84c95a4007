"""The command-line tool: verbs that map one to one to library functions ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import undula

from . import (
    adapters,
    collapsing,
    compare,
    gguf,
    lists,
    predicting,
    pushing,
    shell,
    studies,
    training,
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


VERBS: dict[str, Callable[..., None]] = {
    "methods": lists.methods,
    "train": training.train,
    "eval": training.evaluate,
    "predict": predicting.predict,
    "generate": writing.generate,
    "chat": writing.chat,
    "show": adapters.show,
    "compare": compare.compare,
    "merge": adapters.merge,
    "collapse": collapsing.collapse,
    "prune": adapters.prune,
    "cut": adapters.cut,
    "export": collapsing.export,
    "gguf": gguf.gguf,
    "push": pushing.push,
    "study": studies.study,
    "assets": lists.assets,
}
for name, verb in VERBS.items():
    app.command(name)(shell.speaking(verb))
