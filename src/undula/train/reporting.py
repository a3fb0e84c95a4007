"""Where the figures of a training go while it trains, beside its own report: TensorBoard, W&B, MLflow, by the callbacks
that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.extras import Missing

if TYPE_CHECKING:
    from transformers import TrainerCallback

LOGS = "logs"  # the folder in OUT where TensorBoard finds them
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "clearml": "clearml"}  # of names that differ


def reporters(names: str | Iterable[str], out: Path) -> list[TrainerCallback]:
    """The callbacks of these services.  Raises LookupError for a name that is none, Missing for one whose package is
    not installed."""
    asked = [names] if isinstance(names, str) else list(names)
    if not asked:
        return []
    from transformers.integrations import INTEGRATION_TO_CALLBACK as KNOWN

    made = []
    for name in (each.strip().lower() for text in asked for each in text.split(",")):
        if name not in KNOWN:
            raise LookupError(f"nothing is called {name!r} to report to; there are: {', '.join(sorted(KNOWN))}")
        made.append(_reporter(name, KNOWN[name], out))
    return made


def _reporter(name: str, kind: Any, out: Path) -> TrainerCallback:
    try:
        found = kind()
    except (ImportError, RuntimeError) as error:  # so transformers says that a package is missing
        package = PACKAGES.get(name, name)
        raise Missing(
            f"reporting to {name} needs the package {package}, which is not installed: pip install {package}", name=name
        ) from error
    if name == "tensorboard" and found.logging_dir is None:
        found.logging_dir = str(out / LOGS)
    return found
