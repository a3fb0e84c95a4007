# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula generate` and `undula chat`: what a language model writes, while it does."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import answers_out, predicting, shell
from .several import Several

if TYPE_CHECKING:
    from ..train.restored import Restored
    from ..train.tasks.generation import Sampling

Most = Annotated[int | None, typer.Option(help="Tokens to write at most. (default: as in training, else 256)", min=1)]
Temperature = Annotated[float, typer.Option(help="0: the likeliest token each time; higher: more varied.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
Seed = Annotated[int, typer.Option(help="Of the draws.", min=0)]
System = Annotated[str | None, typer.Option(help="A message that goes before, where the model has a chat template.")]


def generate(
    path: predicting.Saved,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR...] [PROMPT...|FILE]",
            help="More adapters of the same base; then prompts; "
            "a .txt file, which is one prompt; or a file of rows as `train` reads it (.jsonl, .csv ...). "
            "(default: the input, as one prompt)",
        ),
    ] = None,
    *,
    out: predicting.OutFile = None,
    form: predicting.Form = None,
    max_new_tokens: Most = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Put the prompt to the model as it is, without a format.")] = False,
    column: predicting.Column = [],
    split: predicting.Split = None,
    skip_faulty: shell.Skip = None,
    batch: Annotated[int, typer.Option(help="Rows at once; what is written does not depend on it.", min=1)] = 8,
    model: shell.Base = None,
) -> None:
    """Have a language model write after prompts, put to it as in training.  One prompt is shown as it is written; rows
    of a file come back as JSON lines.

    Several adapters of one base write one after another (of rows: in columns called NAME.text ...); with weights, as in
    A:0.5 B:0.5, their sum does."""
    several, prompt = Several.of(path, prompt or [])
    shape = answers_out.form_of(out, form, answers_out.As.jsonl, prompt)
    every = several.opened(model)
    for opened in every:
        opened.check_writes()
    hows = [sampling(opened, max_new_tokens, temperature, top_p, seed) for opened in every]
    given = _prompts(prompt)
    if len(given) == 1 and out is None and form is None and not _rows(given[0], prompt):
        _show(every, hows, several.names if several.beside else [""], given[0], system, raw)
        return
    asked = predicting.rows_asked(every[0].run, every[0].roles, given, column, split, skip_faulty)
    said = [row.get("messages") or row.get("prompt") or row.get("text") for row in asked.asked]
    ended: list[bool] = []

    def counted(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for answer in answers:
            ended.append(answer["ended"])
            yield answer

    def written(opened: Restored, how: Sampling) -> Iterator[dict[str, Any]]:
        put = [row for one in said for row in opened.written_rows(one, system, raw)]
        return opened.run.task.answers(opened.model, put, opened.processor, batch, how)  # type: ignore[call-arg]

    with answers_out.opened(out) as to, predicting.bar(len(said) * len(every), out) as bar:
        found = bar(counted(itertools.chain.from_iterable(map(written, every, hows))))
        answers = found
        if several.beside:
            answers = several.merged([list(itertools.islice(found, len(said))) for _ in every])
        names = answers_out.write(to, shape, asked.rows, answers, False)
    predicting.told(out, len(said), names)
    _tell_cut(ended.count(False), len(ended), hows[0])


def sampling(opened: Restored, most: int | None, temperature: float, top_p: float, seed: int) -> Sampling:
    """How is written, with the training's own number of tokens where none is given."""
    from ..train.tasks.causal_lm import WRITTEN
    from ..train.tasks.generation import Sampling

    return Sampling(most or opened.run.task.max_completion or WRITTEN, temperature, top_p, seed)  # type: ignore[attr-defined]


def _show(
    every: Sequence[Restored],
    hows: Sequence[Sampling],
    names: Sequence[str],
    prompt: str,
    system: str | None,
    raw: bool,
) -> None:
    """Writes what each writes after one prompt into the output, as it comes; under its name, where it has one."""
    for opened, how, name in zip(every, hows, names, strict=True):
        if name:
            shell.out.print(f"[{name}]", markup=False, highlight=False)
        _, whole = _spoken(opened, opened.written_rows(prompt, system, raw)[0], how, 0)
        _tell_cut(0 if whole else 1, 1, how)


def _rows(given: str, typed: Sequence[str] | None) -> bool:
    """Whether the one argument that was typed is a file of rows."""
    return list(typed or ()) == [given] and predicting.is_place(given)


def _prompts(given: Sequence[str]) -> list[str]:
    """The prompts, or the one file of rows that holds them; a text file is one prompt."""
    from ..train.asking import TEXTS
    from ..train.data.decoding import encoding_of, opened
    from ..train.data.faults import Faults

    if not given or list(given) == ["-"]:
        if sys.stdin.isatty():
            raise ValueError("nothing to write after: give a prompt, name a file, or send one into the input")
        return [sys.stdin.read().rstrip("\r\n")]
    path = Path(given[0])
    if len(given) > 1 or path.suffix.lower() not in TEXTS or not predicting.is_place(given[0]):
        return list(given)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    faults = Faults()
    encoding = encoding_of(path, faults)
    faults.check()
    with opened(path, encoding) as file:
        return [file.read().rstrip("\r\n")]


def _tell_cut(cut: int, rows: int, how: Sampling) -> None:
    if cut:
        what = "the text does" if rows == 1 else f"{cut} of {rows} texts do"
        shell.remark(
            f"{what} not end by itself: cut at {how.max_new_tokens} tokens (--max-new-tokens), or where the model has "
            "no more places"
        )


def _spoken(opened: Restored, row: dict[str, Any], how: Sampling, number: int) -> tuple[str, bool]:
    """Writes the answer to a row into the output as it comes.  Returns it, and whether it ended by itself."""
    from ..train.tasks.generation import speak

    ids = opened.run.task.asked_ids(row, opened.processor, how.max_new_tokens)  # type: ignore[attr-defined]
    pieces: list[str] = []

    def hear(piece: str) -> None:
        pieces.append(piece if pieces else piece.lstrip())
        sys.stdout.write(pieces[-1])
        sys.stdout.flush()

    try:
        ended = speak(opened.model, ids, opened.processor, how, hear, number)
    except KeyboardInterrupt:
        ended = True  # as was asked
        pieces.append("")
        shell.say("\n(stopped)", "yellow")
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(pieces), ended


HELP = (
    "/reset forgets what was said, /system TEXT sets the message that goes before, /quit ends; Ctrl-C stops an answer"
)


def chat(
    path: predicting.Saved,
    *,
    system: System = None,
    max_new_tokens: Most = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    model: shell.Base = None,
) -> None:
    """Talk with a language model in the terminal.  /reset, /system TEXT, /quit; Ctrl-C stops an answer."""
    from ..train.tasks.causal_lm import Chat, Plain

    opened = predicting.open_saved(path, model)
    opened.check_writes()
    form = opened.run.task.format  # type: ignore[attr-defined]
    if isinstance(form, Plain) or not opened.processor.chat_template:
        raise ValueError(
            "this model is asked without a chat template, so it knows no turns: `undula generate` writes after a prompt"
        )
    how = sampling(opened, max_new_tokens, temperature, top_p, seed)
    before = form.instruction if isinstance(form, Chat) else ""
    shell.say(HELP, "dim")
    said: list[dict[str, str]] = []
    for number, line in enumerate(_lines()):
        if line == "/quit":
            return
        if line == "/reset":
            said = []
        elif line == "/help":
            shell.say(HELP, "dim")
        elif line.startswith("/system"):
            system = line.removeprefix("/system").strip() or None
        elif line.startswith("/"):
            shell.say(f"no command is called {line.split()[0]}: {HELP}", "yellow")
        else:
            said = _turn(opened, said, before + line, system, how, number)


def _turn(
    opened: Restored, said: list[dict[str, str]], line: str, system: str | None, how: Sampling, number: int
) -> list[dict[str, str]]:
    """What has been said after an answer to `line`; as it was, where there was none."""
    asked = [*said, {"role": "user", "content": line}]
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        text, ended = _spoken(opened, {"messages": [*first, *asked]}, how, number)
    except ValueError as error:  # too long, or refused by the template
        shell.say(f"{error} (/reset begins anew)", "red")
        return said
    _tell_cut(0 if ended else 1, 1, how)
    return [*asked, {"role": "assistant", "content": text}] if text.strip() else said


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the end of the input; Ctrl-C between answers is told how to end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (history and editing of lines)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            shell.say("\n(/quit ends)", "dim")
            continue
        if line:
            yield line
