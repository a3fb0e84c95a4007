"""Runs the documentation: every ```python and ```bash block of the given Markdown files.

    python tests/snippets.py README.md docs/*.md

A file's Python blocks share one namespace, in order; all blocks of a file run in one temporary directory.  Blocks of
any other kind (```text, ```toml) are only shown.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

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


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands in bash blocks
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for path in [Path(p).resolve() for p in sys.argv[1:]]:
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            torch.manual_seed(0)  # a page prints and asserts the same whatever came before it
            count = run(path)
            os.chdir("/")
        print(f"{path.name}: {count} snippets, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
