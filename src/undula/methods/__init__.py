"""One file, one method.  Importing this package registers them all; `undula.methods()` lists what is registered."""

import importlib
import pkgutil

from ..core.method import Method, load_installed

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def methods() -> dict[str, type[Method]]:
    """{name: class} of every method, those of other installed packages (entry points `undula.methods`) included."""
    load_installed()
    return {m.__name__: m for m in sorted(Method.registry.values(), key=lambda m: m.__name__.lower())}
