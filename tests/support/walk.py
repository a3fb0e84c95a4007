"""A walk of a new user: files in a fresh directory, and the command line alone."""

import os
import subprocess
import sys
import time


class Walk:
    """Commands in one directory, each in a process of its own of this interpreter, and the seconds that all took."""

    def __init__(self, folder, interpreter=sys.executable):
        self.folder, self.interpreter, self.seconds = folder, interpreter, 0.0

    def undula(self, *words, code=0, stdin=None):
        """What `undula words...` says, output and notes in one, white space made one; it ends with `code`."""
        return self.run(self.interpreter, "-m", "undula", *words, code=code, stdin=stdin)

    def python(self, text, *words):
        """What a program says that knows of no undula."""
        return self.run(self.interpreter, "-c", "import sys; sys.modules['undula'] = None\n" + text, *words)

    def run(self, *command, code=0, stdin=None):
        start = time.monotonic()
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
        )
        self.seconds += time.monotonic() - start
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == code, said[-4000:]
        assert "Traceback" not in said, said[-4000:]
        return " ".join(said.split())
