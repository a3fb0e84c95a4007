"""What a run costs: peak memory, and with what it was made."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context; afterwards `bytes` is the peak within it, and `how` says what was measured.

    On a GPU: what torch allocated.  On Linux: the resident set's high-water mark (VmHWM), reset at the beginning.
    Elsewhere: the high-water mark of the process since it began.
    """

    bytes: int = 0
    how: str = ""

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            RESET.write_text("5")
            self.fresh = True
        except OSError:
            self.fresh = False
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> None:
        """Takes the peak so far."""
        if torch.cuda.is_available():
            self.bytes, self.how = torch.cuda.max_memory_allocated(), "largest allocation of torch on the GPU"
        elif self.fresh:
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            self.bytes, self.how = int(line.split()[1]) * 1024, "resident set of the process, its peak within the run"
        else:
            import resource

            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.bytes = most if sys.platform == "darwin" else most * 1024
            self.how = "resident set of the process, its peak since the process began"


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    names = ("undula", "torch", "transformers", "accelerate", "datasets")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
