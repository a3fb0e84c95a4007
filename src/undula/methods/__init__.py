"""One file, one method.  Importing this package registers them all; `undula.methods()` lists what is registered."""

import importlib
import pkgutil
import sys
import types

from ..core.method import Method, load_installed

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


class _Methods(types.ModuleType):
    """This package is also a function, so that `undula.methods()` and `undula.methods.lora` are both what they say."""

    def __call__(self) -> dict[str, type[Method]]:
        """{name: class} of every method, those of other installed packages (entry points `undula.methods`) included."""
        load_installed()
        return {m.__name__: m for m in sorted(Method.registry.values(), key=lambda m: m.__name__.lower())}


sys.modules[__name__].__class__ = _Methods
