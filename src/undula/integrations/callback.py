"""Allocators, restarts and penalties under `transformers.Trainer`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..core.adapter import Adapter
from ..host.host import selected
from ..io import files
from ..ranks import Course, Procedure, Quality
from ..ranks.memory import finite
from ..ranks.surgery import adopt

STATE = "allocator"  # the stem of its two files in a checkpoint
RUN = "undula_run"  # under which name checkpoints know the run that they are of


class Allocating(TrainerCallback):
    """Calls the moments of a procedure's course at the Trainer's own, once per update whatever the accumulation.

        Trainer(model, ..., callbacks=[Allocating(undula.ranks.AdaLoRA(target=4))])

    `quality` tells allocators that want to know how good the model is (ALoRA).  The adapter and the course's state go
    into every checkpoint, and come back where the Trainer resumes from one, on a model with the adapter attached anew;
    `checkpoint` says which one, where that is not in the Trainer's own output_dir.  With load_best_model_at_end the
    best checkpoint's adapter comes back whole, as it was measured.  `clip` clips the norm of the gradients after the
    course has seen them; give the Trainer max_grad_norm=0 then.  A Trainer that saves whole models
    (`saves_whole_models`) writes its last checkpoint before the course finishes: transformers refuses to save tensors
    that are shared then (DiffoRA).
    """

    def __init__(
        self,
        allocator: Procedure,
        quality: Quality | None = None,
        *,
        clip: float | None = None,
        checkpoint: str | Path | None = None,
        saves_whole_models: bool = True,
    ):
        if allocator.needs_quality and quality is None:
            raise ValueError(
                f"{allocator!r} scores ranks by the model's quality: give quality=, a function without "
                "arguments that returns it (higher is better) on fixed data"
            )
        self.allocator, self.quality, self.clip = allocator, quality, clip
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.saves_whole_models = saves_whole_models
        self.course: Course | None = None
        self.run = ""
        self.looked = False  # whether the course was shown answers
        self.hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        model = found["model"]
        folder = self._resumed(args, state) if state.global_step else None
        if folder is not None:
            adopt(model, Adapter.load(folder))
        self.course = self.allocator.start(model, found["optimizer"], state.max_steps, self.quality)
        if folder is not None:
            values, tensors = files.read_state(folder, STATE)
            self.course.restore(tensors, values)
        self.course.begin()
        self.run = state.stateful_callbacks.setdefault(RUN, {}).setdefault("run", uuid.uuid4().hex)
        if args.load_best_model_at_end:  # before the Trainer loads it: shapes may have grown since then
            self.hook = model.register_load_state_dict_pre_hook(lambda *_: self._take_best(model, state))

    def _resumed(self, args: Any, state: Any) -> Path:
        """The folder of the checkpoint that the Trainer resumes from; a callback is not told which."""
        run = state.stateful_callbacks.get(RUN, {}).get("run")
        own, given = _checkpoint(args, state), args.resume_from_checkpoint
        tried = [p for p in (self.checkpoint, Path(given) if isinstance(given, str) else None, own) if p is not None]
        for folder in tried:
            if (folder / f"{STATE}.json").is_file():
                values = files.read_state(folder, STATE)[0]
                if values.get("run") == run and values["step"] <= state.global_step:
                    return folder
        raise FileNotFoundError(
            f"the Trainer resumes at step {state.global_step} from a checkpoint whose allocator's state is not in "
            f"{', '.join(map(str, tried))} (not there, or another run's). Say which folder that is: "
            "undula.allocating(..., checkpoint='the/folder/that/resume_from_checkpoint/names')"
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._course.before_forward()

    def term(self, inputs: Any, outputs: Any) -> Any:
        """What a penalty of the answers adds to the loss of a batch; see `Course.term`."""
        self.looked = True
        return self._course.term(inputs, outputs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        if self.allocator.answers and not self.looked:
            raise RuntimeError(
                f"{self.allocator!r} is of the model's answers, which a callback does not see: make the trainer with "
                "undula.penalised(Trainer)(penalty=..., model=..., ...)"
            )
        self._course.before_update()
        if self.clip:
            parameters = [p for group in found["optimizer"].param_groups for p in group["params"]]
            norm = float(nn.utils.clip_grad_norm_(parameters, self.clip))
            self._course.clipped = min(1.0, self.clip / (norm + 1e-6))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._course.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        at_end = state.global_step >= state.max_steps and not args.load_best_model_at_end
        if at_end and not self.saves_whole_models:
            self._course.finish()  # before anything is measured or saved of the end

    def on_save(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            if not (folder / files.CONFIG).is_file():  # `undula.train` has written it, but where it has diverged
                adapter = selected(found["model"])
                if not self.saves_whole_models and not finite(adapter.parameters()):
                    return
                adapter.save(folder)
            self.write(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_best(found["model"], state)
        else:
            self._course.finish()

    @torch.no_grad()
    def _take_best(self, model: nn.Module, state: Any) -> None:
        if state.best_model_checkpoint is not None:
            adopt(model, Adapter.load(state.best_model_checkpoint))

    def write(self, folder: Path) -> None:
        """The course's state, beside the Trainer's."""
        tensors, values = self._course.state()
        files.write_state(folder, STATE, {**values, "run": self.run}, tensors)

    @property
    def _course(self) -> Course:
        assert self.course is not None, "the training has not begun"
        return self.course


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
