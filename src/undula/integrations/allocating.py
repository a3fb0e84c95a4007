"""An allocator under `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..adapter import Adapter
from ..host import selected
from ..io import files
from ..ranks import Allocator, Course, Quality
from ..ranks.surgery import adopt

STATE = "allocator"  # the stem of its two files in a checkpoint


class Allocating(TrainerCallback):
    """Calls the moments of an allocator's course at the Trainer's own, once per update whatever the accumulation.

        Trainer(model, ..., callbacks=[Allocating(undula.ranks.AdaLoRA(target=4))])

    `quality` tells allocators that want to know how good the model is (ALoRA).  The adapter and the course's state go
    into every checkpoint, and come back where the Trainer resumes from one, on a model with the adapter attached anew.
    """

    def __init__(self, allocator: Allocator, quality: Quality | None = None):
        if allocator.needs_quality and quality is None:
            raise ValueError(
                f"{allocator!r} scores ranks by the model's quality: give quality=, a function without "
                "arguments that returns it (higher is better) on fixed data"
            )
        self.allocator, self.quality = allocator, quality
        self.course: Course | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        model = found["model"]
        self.course = self.allocator.start(model, found["optimizer"], state.max_steps, self.quality)
        if state.global_step:
            folder = _checkpoint(args, state)
            values, tensors = files.read_state(folder, STATE)
            adopt(model, Adapter.load(folder))  # `start` has changed what the Trainer had loaded
            self.course.restore(tensors, values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._course.before_forward()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._course.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._course.after_update()

    def on_save(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            if not (folder / files.CONFIG).is_file():  # `undula.train` has written it
                selected(found["model"]).save(folder)
            self.write(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            self._course.finish()

    def write(self, folder: Path) -> None:
        """The course's state, beside the Trainer's."""
        tensors, values = self._course.state()
        files.write_state(folder, STATE, values, tensors)

    @property
    def _course(self) -> Course:
        assert self.course is not None, "the training has not begun"
        return self.course


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
