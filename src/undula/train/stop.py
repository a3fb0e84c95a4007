"""What ends a training before its last step: a signal, or a loss that is not finite."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from . import processes


class Finite(TrainerCallback):
    """Ends the training once its loss is not finite: no step leads back."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True


class Stop(TrainerCallback):
    """Ends the training after a step, with a checkpoint, once a signal has `asked` any process for it.  Comes last:
    what another callback of one process decides, all do, since each waits for the others' gradients."""

    asked = False  # this process
    agreed = False  # by all

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        found = [self.asked, control.should_save, control.should_training_stop]
        self.agreed, control.should_save, control.should_training_stop = processes.agreed(found, args.device)
        if self.agreed:
            if not self.asked and processes.is_first():
                print(STOPPING, file=sys.stderr, flush=True)
            control.should_save = control.should_training_stop = True


STOPPING = "\nstopping after this step, with a checkpoint (again: at once, without)"


@contextlib.contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Within the context the first SIGINT or SIGTERM asks for a stop; the second ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        if processes.is_first():
            print(STOPPING, file=sys.stderr, flush=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
