"""The optional packages, and which extra of undula brings each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BROUGHT = {  # what each brings itself, beside the extras that it includes
    "cli": ("typer", "rich"),
    "flower": ("flwr",),
    "simulation": ("ray",),
    "hf": ("transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "peft", "numpy"),
    "train": ("sklearn", "rouge_score", "PIL", "scipy"),
    "plot": ("matplotlib",),
    "study": ("pyarrow",),
    "search": ("optuna",),
    "bits": ("bitsandbytes",),
    "gguf": ("gguf",),
    "speech": ("soundfile", "jiwer"),
    "similarity": ("sentence_transformers",),
    "preference": ("trl",),
    "serve": ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"),
    "ray": ("ray",),
    "federated": ("opacus",),
    "triton": ("triton",),
}
INCLUDED = {
    "flower": ("train",),
    "simulation": ("flower",),
    "train": ("hf", "cli", "plot"),
    "study": ("train", "plot"),
    "search": ("train",),
    "bits": ("hf",),
    "gguf": ("hf",),
    "speech": ("train",),
    "similarity": ("train",),
    "preference": ("train",),
    "serve": ("train",),
    "ray": ("serve",),
    "federated": ("train",),
}
EXTRAS = {package: extra for extra, packages in BROUGHT.items() for package in packages}  # the smallest that brings it


def advice(module: str | None, wanted: str | None = None) -> str:
    """What to do where a module is missing: install the extra `wanted`, where that brings it, or the smallest one."""
    package = (module or "").partition(".")[0]
    extra = wanted if wanted and package in packages(wanted) else EXTRAS.get(package)
    how = f": pip install 'undula[{extra}]'" if extra else ""
    return f"this needs the package {package}, which is not installed{how}"


def packages(extra: str | None) -> set[str]:
    """All that an extra brings, or that any does."""
    if extra is None:
        return set(EXTRAS)
    return {*BROUGHT[extra], *(p for included in INCLUDED.get(extra, ()) for p in packages(included))}


class Missing(ModuleNotFoundError):
    """An optional package is not installed; the message says what to install."""


def needs(extra: str | None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same function; where a package that `extra` brings is missing, its ModuleNotFoundError says to install that.
    None: any optional package, and the smallest extra that brings it."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except ModuleNotFoundError as error:  # of an extra that is named, the outermost: it knows the whole task
                said = isinstance(error, Missing) and extra is None
                if said or (error.name or "").partition(".")[0] not in packages(extra):
                    raise
                raise Missing(advice(error.name, extra), name=error.name) from error

        return wrapped

    return decorated


told = needs(None)
