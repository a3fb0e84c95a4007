# ruff: noqa: B006 (typer wants lists as defaults of lists, and copies them)
"""`undula serve`: one base and many adapters behind an address that OpenAI's clients know."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.extras import needs
from ..io.files import CONFIG
from ..train.recipe import dtype_called
from . import shell
from .sizes import bytes_of

if TYPE_CHECKING:
    import socket

    from ..serve.server.keys import Keys
    from ..serve.server.opening import Plan
    from ..serve.server.served import Served

WHAT, WHO, MUCH = "What is served", "Address and keys", "How much"


class Order(enum.StrEnum):
    """Names of policies."""

    fcfs = enum.auto()
    fair = enum.auto()
    cluster = enum.auto()


def serve(
    base: Annotated[
        str, typer.Argument(help="The model, as `train` takes one; or the directory of one adapter, which says it.")
    ],
    more: Annotated[list[str], typer.Argument(hidden=True)] = [],
    *,
    adapters: Annotated[
        list[Path],
        typer.Option(
            help="A directory that holds adapters, a directory each. Repeatable.", metavar="DIR", rich_help_panel=WHAT
        ),
    ] = [],
    pin: Annotated[
        list[str], typer.Option(help="An adapter that stays loaded. Repeatable.", metavar="NAME", rich_help_panel=WHAT)
    ] = [],
    name: Annotated[
        str | None, typer.Option(help="What clients call the base. (default: its own name)", rich_help_panel=WHAT)
    ] = None,
    also: Annotated[
        list[str],
        typer.Option(
            "--base-also", help="Another name by which adapters may call this base. Repeatable.", rich_help_panel=WHAT
        ),
    ] = [],
    model: Annotated[
        str | None, typer.Option(help="The base, where the adapter does not say it.", rich_help_panel=WHAT)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the base: bfloat16 ...", rich_help_panel=WHAT)] = "float32",
    eight: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="The base's products in 8 bits: faster on CPUs, less exact (docs/serving.md).",
            rich_help_panel=WHAT,
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Where to listen.", rich_help_panel=WHO)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free.", min=0, max=65535, rich_help_panel=WHO)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="A file of keys: a line each, or TOML (docs/serving.md).", rich_help_panel=WHO)
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let everyone ask who reaches this address.", rich_help_panel=WHO)
    ] = False,
    allow_host: Annotated[
        list[str],
        typer.Option(
            help="A name besides localhost that a keyless server answers to. Repeatable.", rich_help_panel=WHO
        ),
    ] = [],
    memory: Annotated[
        str, typer.Option(help="Bytes that adapters may take on the model: 500MB, 2GB, 1GiB.", rich_help_panel=MUCH)
    ] = "2GB",
    cache: Annotated[
        str, typer.Option(help="Bytes of keys and values of running requests.", rich_help_panel=MUCH)
    ] = "1GiB",
    copies: Annotated[
        str | None,
        typer.Option(
            help="Bytes for copies of weights, which make LoRAN, SHiRA and others that share no product fast.",
            rich_help_panel=MUCH,
        ),
    ] = None,
    running: Annotated[int, typer.Option(help="Requests in a batch at most.", min=1, rich_help_panel=MUCH)] = 64,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come again.", min=0, rich_help_panel=MUCH)
    ] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1, rich_help_panel=MUCH)] = 4096,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds to the first token; later ones are refused.", rich_help_panel=MUCH)
    ] = None,
    policy: Annotated[
        Order,
        typer.Option(
            help="Whose turn it is: fcfs, first come; fair, adapters and keys share; cluster, together by adapter.",
            metavar="NAME",
            rich_help_panel=MUCH,
        ),
    ] = Order.fcfs,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Of the computation. (default: the physical cores that it may use)", min=1, rich_help_panel=MUCH
        ),
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that running requests may take once it is to stop.", rich_help_panel=MUCH)
    ] = 300.0,
) -> None:
    """Serve one base and many adapters at an address as OpenAI's.  Ctrl-C lets running requests finish, a second one
    does not."""
    check_alone(base, more)
    found = checked_keys(keys, host, no_keys)
    sizes = bytes_of(memory, "--memory"), bytes_of(cache, "--cache"), bytes_of(copies, "--copies") if copies else 0
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    listening, hosts = listen(host, port, found, no_keys, allow_host)
    try:
        plan = planned(base, adapters, pin, name, also, model, dtype, sizes, (running, max_waiting), policy)
        plan = bounded(replace(plan, int8=eight), found, hosts, max_tokens, max_waiting, deadline)
        run(plan, listening, drain)
    finally:
        listening.close()


def check_alone(base: str, more: list[str]) -> None:
    """Raises ValueError for what stands behind the base without an option: directories of adapters, most likely."""
    if more:
        places = [str(Path(one).parent) if (Path(one) / CONFIG).is_file() else one for one in more]
        if (Path(base) / CONFIG).is_file():  # several adapters, as `predict` takes them
            base, places = "BASE", [str(Path(base).parent), *places]
        meant = " ".join(f"--adapters {shlex.quote(place)}" for place in dict.fromkeys(places))
        raise ValueError(f"one base is served; adapters lie in directories that are named: undula serve {base} {meant}")


@needs("serve")
def checked_keys(path: Path | None, host: str, no_keys: bool) -> Keys:
    """The keys.  Raises ValueError where everyone on the network could ask unasked for."""
    from ..serve.server.keys import keys_of, readable_by_others
    from ..serve.server.running import is_loopback

    found = keys_of(path)
    if no_keys and len(found):
        raise ValueError("--no-keys lets everyone ask, and there are keys (--keys, UNDULA_KEYS): say one of the two")
    if not is_loopback(host) and not found and not no_keys:
        raise ValueError(
            f"--host {host} lets others on the network ask, and there are no keys: name a file of them with --keys, or "
            "say --no-keys if everyone may"
        )
    if path is not None and readable_by_others(path):
        shell.remark(f"others on this machine may read {path}: chmod 600 {path}")
    if found and not is_loopback(host):
        shell.remark("keys travel as they are: put a proxy with TLS in front (docs/serving.md)")
    return found


@needs("serve")
def listen(
    host: str, port: int, keys: Keys, no_keys: bool, allowed: list[str]
) -> tuple[socket.socket, frozenset[str] | None]:
    """The socket, taken before anything is loaded, and the names that a server without keys answers to."""
    from ..serve.server.running import LOOPBACK, bound, is_loopback

    own = frozenset({*LOOPBACK, host.lower(), *(name.lower() for name in allowed)})
    return bound(host, port), own if not keys and is_loopback(host) and not no_keys else None


@needs("serve")
def planned(
    base: str, adapters: list[Path], pin: list[str], name: str | None, also: list[str], model: str | None, dtype: str,
    sizes: tuple[int, int, int], room: tuple[int, int], policy: Order,
) -> Plan:  # fmt: skip
    """What is to be served."""
    from ..serve.engine import Limits
    from ..serve.policy import ClusterByAdapter, FairShare, Fcfs
    from ..serve.server.opening import Plan, meant
    from ..serve.server.places import Places

    found = meant(base, model)
    limits = Limits(running=room[0], waiting=room[1], batch_tokens=max(512, room[0]), cache=sizes[1], copies=sizes[2])
    order = {Order.fcfs: Fcfs, Order.fair: FairShare, Order.cluster: ClusterByAdapter}[policy]()
    return Plan(
        base=found.base,
        places=Places.of(tuple(adapters)),
        single=found.adapter,
        pinned=tuple(pin),
        memory=sizes[0],
        called=name,
        also=tuple(also),
        dtype=dtype_called(dtype),
        policy=order,
        limits=limits,
    )


def bounded(
    plan: Plan, keys: Keys, hosts: frozenset[str] | None, tokens: int, waiting: int, deadline: float | None
) -> Plan:
    """The same with the bounds of requests and who may ask."""
    from ..serve.server.bounds import Bounds

    if deadline is not None and deadline <= 0:
        raise ValueError(f"--deadline is a number of seconds above 0, found {deadline:g}")
    return replace(plan, keys=keys, hosts=hosts, bounds=Bounds(tokens=tokens, waiting=waiting, deadline=deadline))


@needs("serve")
def run(plan: Plan, listening: socket.socket, drain: float) -> None:
    """Opens and serves until it is told to stop."""
    from ..serve.server.opening import opened
    from ..serve.server.running import address, serve

    served, count = opened(plan, lambda text: heard(shell.remark, text))
    listening.listen(2048)  # who reads the address may ask at once: requests wait until the server takes them
    heard(lambda text: tell(served, count, plan, text), address(listening))
    log()
    whole = serve(served, listening, drain)
    heard(shell.note, "Stopped" + (": every request has its answer" if whole else "; what still ran was cancelled"))
    let_go()


def heard(say: Callable[[str], None], text: str) -> None:
    """Says it, where it can be written: a server whose log lies on a full disk serves all the same."""
    with contextlib.suppress(OSError):
        say(text)


def let_go() -> None:
    """What the streams still hold and cannot write is dropped, so that it is no error as the process ends."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def log() -> None:
    """From here on what goes wrong is written beside, with its time and traceback: it is nobody's screen any more."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for name, level in (("undula.serve", logging.WARNING), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**7 else f"{count:,} bytes"


def tell(served: Served, count: int, plan: Plan, url: str) -> None:
    """What a person wants to know of a server that begins."""
    adapters = f"{count} adapter{'' if count == 1 else 's'} registered"
    shell.note(f"{served.names[0]}: {adapters}, {_size(plan.memory)} for those that are loaded")
    if not count:
        shell.remark(
            "no adapter is served: " + (f"there is none that can be in {', '.join(map(str, plan.places.roots))}"
            if plan.places.roots else "--adapters DIR names a directory that holds some")
        )  # fmt: skip
    who = f"{len(plan.keys)} keys" if len(plan.keys) else "no keys: whoever reaches it may ask"
    shell.note(f"{url}/v1 ({who}); {url}/ shows how it goes")
    names = served.shelf.names()
    model = names[0] if names else served.names[0]
    bearer = " -H 'Authorization: Bearer KEY'" if len(plan.keys) else ""
    if served.engine is None:
        what = "v1/embeddings", '"input": "a text"'
    elif served.engine.tokenizer.chat_template:
        what = "v1/chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    else:
        what = "v1/completions", '"prompt": "Once"'
    body = f'{{"model": {json.dumps(model, ensure_ascii=False)}, {what[1]}}}'
    shell.note(f"curl {url}/{what[0]}{bearer} --json {shlex.quote(body)}")
