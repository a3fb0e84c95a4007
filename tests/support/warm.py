"""`undula` in a shell, without the seconds of imports that each process begins with.

    with warm.undula(folder):  # a command `undula` in this folder
        subprocess.run(["undula", "methods"], env={"PATH": folder})

One process has imported what the commands import, and run none of them.  The command in the folder hands it words,
directory, environment, standard streams and signals; a fork of it does the rest, by the function that the installed
command calls.  Commands of several shells run side by side.  What rests on a process that begins with nothing (what
is imported when, how an installation starts) is for tests that start one.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

IMPORTED = (
    "undula.cli.main", "undula.train", "undula.study", "undula.observe", "undula.combine",
    "undula.bundled.efficientnet",
    "transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "transformers.data.data_collator", "datasets", "peft", "accelerate",
    "sklearn.metrics", "scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo",
)  # fmt: skip

# -S -I: a process of a few milliseconds
COMMAND = """#!{python} -IS
import json, os, signal, socket, sys
warm = socket.socket(socket.AF_UNIX)
warm.connect({address!r})
told = json.dumps({{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(warm, [len(told).to_bytes(8, "big")], [0, 1, 2])
warm.sendall(told)
answer = warm.makefile()
process = int(answer.readline())
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(answer.readline() or 1)
if code < 0:  # by a signal: as a shell calls it
    code = 128 - code
sys.exit(code)
"""


@contextlib.contextmanager
def undula(folder):
    """As above; the folder's path has to be short enough for a socket's (100 characters)."""
    folder = Path(folder).resolve()
    address = str(folder / "warm")
    command = folder / "undula"
    command.write_text(COMMAND.format(python=sys.executable, address=address), encoding="utf-8")
    command.chmod(0o755)
    with subprocess.Popen([sys.executable, "-P", __file__, address], stdin=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 120
            while not os.path.exists(address):
                assert process.poll() is None, "the process that imports everything has ended"
                assert time.monotonic() < until, "no process that has imported everything within 120 s"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


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
        connection.sendall(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):  # who asked is gone
            connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    sys.argv[:] = ["undula", *told["words"]]


def main(address):
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a fork has no threads but its own
    gc.collect()
    gc.freeze()  # forks leave the pages of what they never change to the first
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
    become(connection)
    from undula.__main__ import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = (
            end.code if isinstance(end.code, int) else 0 if end.code is None else print(end.code, file=sys.stderr) or 1
        )
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
