"""Processes without the seconds of imports that each begins with.

    with warm.commands(folder):  # commands `python` and `undula` in this folder
        subprocess.run([folder / "python", "-c", "import undula"])

One process has imported other packages that undula uses (not undula itself), and nothing more.  The command in the
folder hands it words, directory, environment, standard streams and signals; a fork of it does the rest: `python` with
-c, -m, a file or -, `undula` as the installed command.  Commands of several processes run side by side; one that is
killed takes its fork along.  What rests on what is imported when is for tests that start a process of their own.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

IMPORTED = (
    "torch", "torch.distributed.fsdp", "torch._dynamo", "transformers.trainer", "transformers.data.data_collator",
    "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "transformers.image_processing_utils", "datasets", "peft",
    "accelerate", "sklearn.metrics", "scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "typer", "rich.table", "pydantic", "safetensors.torch",
)  # fmt: skip

# -S -I: a process of a few milliseconds
COMMAND = """#!{python} -IS
import json, os, signal, socket, sys
warm = socket.socket(socket.AF_UNIX)
warm.connect({address!r})
words = {words!r} + sys.argv[1:]
told = json.dumps({{"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(warm, [len(told).to_bytes(8, "big")], [0, 1, 2])
warm.sendall(told)
answer = warm.makefile()
process = int(answer.readline())
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT:
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(answer.readline() or 1)
if code < 0:  # by a signal: as a shell calls it
    code = 128 - code
sys.exit(code)
"""


def start(folder):
    """Begins to make the commands, which `ready` waits for.  The process ends with this one."""
    return subprocess.Popen([sys.executable, "-P", __file__, written(folder)], stdin=subprocess.DEVNULL)


def written(folder):
    """Writes the commands; returns where they look for the process, a path that has to be short enough for a socket's
    (100 characters)."""
    folder = Path(folder).resolve()
    address = str(folder / "warm")
    for name, words in ("python", []), ("undula", ["-m", "undula"]):
        text = COMMAND.format(python=sys.executable, address=address, words=words)
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return address


def ready(folder, limit=180.0):
    until = time.monotonic() + limit
    while not (Path(folder) / "warm").exists():
        assert time.monotonic() < until, f"no process that has imported everything within {limit:g} s"
        time.sleep(0.05)


@contextlib.contextmanager
def commands(folder):
    """As above."""
    with start(folder) as process:
        try:
            ready(folder)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def forked(more):
    """A folder with the commands, by a fork of this process, which imports everything, `more` too, and may have no
    threads."""
    imported(more)
    folder = tempfile.mkdtemp()  # whose removal no fork takes over
    address = written(folder)
    if not (process := os.fork()):
        try:
            main(address)
        finally:
            os._exit(1)
    try:
        ready(folder)
        yield folder
    finally:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
        shutil.rmtree(folder)


def exactly(connection, count):
    told = b""
    while len(told) < count and (more := connection.recv(count - len(told))):
        told += more
    return told


def become(connection):
    """In a fork: reads what is to be run and starts it in another, of which it tells number and exit code.  Returns
    in that other one, which has become the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, *_ = socket.recv_fds(connection, 8, 3)
    told = json.loads(exactly(connection, int.from_bytes(length, "big")))
    if child := os.fork():
        [os.close(stream) for stream in streams]
        connection.sendall(f"{child}\n".encode())
        watched = os.pidfd_open(child)
        if connection in select.select([connection, watched], [], [])[0]:  # who asked is gone
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    asked = told["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in asked if path and path not in sys.path]
    return told["words"]


def perform(words):
    """What `python` does with these words."""
    if words[0] in ("-c", "-"):
        text = words.pop(1) if words[0] == "-c" else sys.stdin.read()
        sys.argv[:] = words
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), vars(main))
    elif words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def imported(more=()):
    for name in (*IMPORTED, *more):
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")  # makes a thousand patterns, for models of all kinds
    torch.set_num_threads(1)  # a fork has no threads but its own
    gc.collect()
    gc.freeze()  # forks leave the pages of what they never change to the first


def main(address):
    imported()
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address + ".new")
        listening.listen()
        listening.settimeout(2)
        os.rename(address + ".new", address)  # from here on it may be called
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                if not os.fork():
                    break
                connection.close()
        else:
            return
    words, code = become(connection), 1
    try:
        perform(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:  # to take down all that was imported takes a process seconds, and nobody waits for it
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
