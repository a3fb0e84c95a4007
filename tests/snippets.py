"""Runs the documentation: every ```python and ```bash block of the given Markdown files.

    python tests/snippets.py README.md docs/*.md

A file's Python blocks share one namespace, in order; all blocks of a file run in one temporary directory.  Blocks of
any other kind (```text, ```toml, ```py) are only shown.  Two processes share the files; what a page prints comes when
it has ended.  They and `undula` in a bash block are forks of one process that has imported undula and what it uses
(support/warm.py): imports would take half of the time.
"""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the commands in bash blocks

import torch
from support import warm

LONG = ("README.md", "study.md", "compare.md", "jobs.md", "training.md")  # come first: none is left to one process
OWN = ("undula.cli.main", "undula.train.concluding", "undula.train.fit", "undula.train.page")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.M | re.S)


def run(path: Path) -> int:
    """Runs the blocks of one file; returns how many there were."""
    text, names = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        kind, code = block.groups()
        line = text[: block.start()].count("\n") + 2
        if kind == "python":
            # the blank lines make a traceback show the document's own line numbers
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL, check=False)
            if done.returncode:
                sys.exit(f"{path}:{line}: exit code {done.returncode}")
    return len(blocks)


@contextlib.contextmanager
def into(file: int) -> Iterator[None]:
    """Whatever this process and those that it starts print goes into a file."""
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(file, 1), os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        [os.close(one) for one in kept]


def page(path: Path) -> tuple[str, bool]:
    """(what running one file prints, whether all of it went well)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # a page prints and asserts the same whatever came before it
    start, sound = time.time(), False
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with into(told.fileno()):
            try:
                count, sound = run(path), True
                print(f"{path.name}: {count} snippets, {time.time() - start:.0f} s", flush=True)
            except SystemExit as stopped:
                print(stopped, flush=True)
            except BaseException:
                traceback.print_exc()
        os.chdir("/")
        told.seek(0)
        return told.read(), sound


def main() -> None:
    from undula.kernels import between, in_c

    paths = [Path(p).resolve() for p in sys.argv[1:]]
    in_c.passes(), between.passes()  # a compiler's seconds in each process
    with warm.forked(OWN) as folder:
        os.environ["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        pages(sorted(paths, key=lambda path: path.name not in LONG))


def pages(paths: list[Path]) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(page, path) for path in paths]):
            told, sound = done.result()
            print(told, end="", flush=True)
            if not sound:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(1)


if __name__ == "__main__":
    main()
