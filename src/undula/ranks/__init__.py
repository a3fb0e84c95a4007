"""One file, one allocator: who gets how much rank, when.  Importing this package registers them all."""

import importlib
import pkgutil

from .allocator import Allocator, Course, Quality
from .gates import live

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Allocator", "Course", "Quality", "live"]


def __getattr__(name: str) -> type[Allocator]:
    """Every allocator by its name."""
    for allocator in Allocator.registry.values():
        if allocator.__name__ == name:
            return allocator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
