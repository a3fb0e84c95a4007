"""Several processes of one script, started as torchrun starts them."""

import os
import socket
import subprocess
import time


def together(python, folder, script, world, limit=240.0):
    """Runs `script` by this interpreter with the arguments FOLDER RANK WORLD in `world` processes; where one fails,
    ends the others."""
    (folder / "script.py").write_text(script, encoding="utf-8")
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
            assert time.monotonic() < until, f"not done after {limit:g} s: {codes}"
            time.sleep(0.05)
    finally:
        for each in started:
            each.kill()
            each.wait()
