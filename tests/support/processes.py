"""Several processes of one script, started as torchrun starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import traceback

# A process that leaves while another is in its last exchange may hold that one up for good
LEAVE = """
import pathlib, sys, time
folder, rank, world = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / f"done-{rank}").touch()
while not all((folder / f"done-{each}").exists() for each in range(int(world))):
    time.sleep(0.02)
"""


def together(python, folder, script, world, limit=240.0):
    """Runs `script` by this interpreter with the arguments FOLDER RANK WORLD in `world` processes, which leave
    together; where one fails, ends the others.  One that is not done in time says where it stands."""
    (folder / "script.py").write_text(
        f"import faulthandler\nfaulthandler.enable()\n{script}\n{LEAVE}", encoding="utf-8"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [python, folder / "script.py", folder, str(rank), str(world)],
            env={**os.environ, **common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    until = time.monotonic() + limit
    try:
        while (codes := [each.poll() for each in started]).count(0) < world:
            assert not any(codes), f"exit codes {codes}"
            if time.monotonic() > until:
                for each in started:
                    each.send_signal(signal.SIGABRT)
                time.sleep(1)  # it writes to the streams of the test
                raise AssertionError(f"not done after {limit:g} s: {codes}")
            time.sleep(0.05)
    finally:
        for each in started:
            each.kill()
            each.wait()


def forked(folder, world, work, limit=120.0):
    """Has `work(rank)` done by `world` forks of this process, which are one process group; each has to end well."""
    import torch

    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
            )
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + limit
    try:
        left = list(children)
        while left:
            done = [child for child in left if (ended := os.waitpid(child, os.WNOHANG))[0] and _well(ended[1])]
            left = [child for child in left if child not in done]
            assert time.monotonic() < until, f"not done after {limit:g} s"
            time.sleep(0.02)
            children = left
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _well(status):
    assert not status, f"a process ended with {os.waitstatus_to_exitcode(status)}"
    return True
