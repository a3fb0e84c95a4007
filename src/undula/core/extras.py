"""The optional packages, and which extra of undula brings each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BROUGHT = {
    "hf": ("transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "peft", "sklearn", "rouge_score"),
    "plot": ("matplotlib",),
    "study": ("scipy", "pyarrow"),
    "bits": ("bitsandbytes",),
}
EXTRAS = {package: extra for extra, packages in BROUGHT.items() for package in packages} | {"PIL": "hf"}


def advice(module: str | None) -> str:
    """What to do where a module is missing."""
    package = (module or "").partition(".")[0]
    how = f": pip install 'undula[{EXTRAS[package]}]'" if package in EXTRAS else ""
    return f"this needs the package {package}, which is not installed{how}"


def told(function: Callable[P, T]) -> Callable[P, T]:
    """The same function; where an optional package is missing, its ModuleNotFoundError says what to install."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRAS:
                raise
            raise ModuleNotFoundError(advice(error.name), name=error.name) from error

    return wrapped
