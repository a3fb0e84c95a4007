"""Opening pretrained models: from a folder, a hub or the bundled ones."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data.load import BUNDLED
from .tasks.task import Processor, Task

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

    from ..bundled import Asset


LACKING = "_undula_lacking"


def model_folder(source: str) -> str:
    """What `from_pretrained` takes for `source`: `bundled:NAME` becomes the folder where that model is."""
    from ..bundled import enable, model_path

    enable()
    if not source.startswith(BUNDLED):
        return source
    return str(model_path(source.removeprefix(BUNDLED)))


def asset_of(source: str) -> Asset | None:
    """The bundled model that `bundled:NAME` means; None for another source."""
    from ..bundled import ASSETS

    return ASSETS.get(source.removeprefix(BUNDLED)) if source.startswith(BUNDLED) else None


def called_elsewhere(source: str) -> str:
    """What a directory that may leave this machine calls its base: a bundled model by its name on the hub."""
    asset = asset_of(source)
    return source if asset is None else asset.hub or source


def same_base(source: str, said: str) -> bool:
    """Whether `said`, in a directory of an adapter, is the base `source`: by a name of it or as the same folder."""
    asset = asset_of(source)
    if said in (source, called_elsewhere(source)) or Path(said).resolve() == Path(source).resolve():
        return True
    return asset is not None and Path(said).name.startswith(f"{asset.name}-")  # a folder of some machine's cache


def open_model(
    source: str, task: Task, dtype: torch.dtype, seed: int, bits: int | None = None
) -> tuple[PreTrainedModel, Processor]:
    """The pretrained model with the task's head (a new one follows `seed`), and its tokenizer or image processor.  With
    `bits` = 4 or 8 its linear layers, the heads apart, are quantised by bitsandbytes.

    Raises FileNotFoundError that says what was looked for and why it could not be opened.
    """
    from ..integrations import gqsa  # noqa: F401 (tells transformers of the format)

    folder = model_folder(source)
    quantised = {} if bits is None else {"quantization_config": _quantised(bits)}
    with quiet(), opening(source):
        processor = task.processor(folder)
        torch.manual_seed(seed)
        model, told = _with_info(task.model(folder, dtype, output_loading_info=True, **quantised))
    keys = {str(key[0] if isinstance(key, tuple | list) else key) for key in told}
    model.__dict__[LACKING] = tuple(n for n, _ in model.named_parameters() if n in keys)
    task.agree(processor, model)
    channels_last(model)
    return model, processor


def channels_last(model: torch.nn.Module) -> None:
    """Lays the weights of 2d convolutions on a CPU as its kernels read them: the same numbers, and no copies into that
    order and back in each pass (a third of a step of EfficientNet-Lite0)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _with_info(made: Any) -> tuple[Any, list[Any]]:
    """(the model, what its files lack or have in other shapes) of what `from_pretrained` gave."""
    if not isinstance(made, tuple):
        return made, []  # a task of someone's own
    return made[0], [*made[1].get("missing_keys", ()), *made[1].get("mismatched_keys", ())]


def lacking(model: Any) -> tuple[str, ...]:
    """The parameters that the files of an opened model lack, or have in another shape: random numbers stand there."""
    found: tuple[str, ...] = model.__dict__.get(LACKING, ())
    return found


@contextlib.contextmanager
def opening(source: str) -> Iterator[None]:
    """Whatever a model's files make transformers raise (a cut file, a pickle, a config of another kind) is said as one
    FileNotFoundError; what is no fault of theirs (a missing package, too little memory) passes."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise FileNotFoundError(_unopened(source, model_folder(source), error)) from error


def config_of(source: str) -> PretrainedConfig:
    """The configuration of a pretrained model, its weights unopened.  Raises FileNotFoundError as `open_model` does."""
    from transformers import AutoConfig

    with quiet(), opening(source):
        return AutoConfig.from_pretrained(model_folder(source))


def _quantised(bits: int) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"a base in {bits} bits needs the package bitsandbytes, which is not installed: pip install 'undula[bits]'",
            name="bitsandbytes",
        )
    from transformers import BitsAndBytesConfig

    if bits == 4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return BitsAndBytesConfig(load_in_8bit=True)


def _unopened(source: str, folder: str, error: Exception) -> str:
    path, reason = Path(folder), f"{str(error).strip()}\n".split("\n")[0][:300] or type(error).__name__
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            return (
                f"model={source} is an adapter, not a model: a model with it is written by `undula merge {source} "
                "--out DIRECTORY`"
            )
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        return f"model={source} is a folder, but no model could be opened in it ({reason}); it has: {there}"
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, 1)
    hint = f" Did you mean '{path.parent / close[0]}'?" if close else ""
    hint += " A base that lies elsewhere is named by model=..., or --model (a folder, or bundled:NAME)"
    return f"model={source!r} is no folder here, and the hub gave no model of that name ({reason}).{hint}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' notes and bars (that a head is new is no news here)."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
