"""Adapters that nobody trained: made from a description, or from a few rows, by what a library of experts knows.

    library = undula.generate.build("tasks.toml", out="library")
    undula.generate.SGLoRA.fit(library).generate("Does the review praise the film?")

Nothing here is loaded until it is asked for: `import undula.generate`.
"""

from .building import build
from .icmlora import ICMLoRA
from .library import Expert, Library
from .mixture import Mixture, mixture
from .pack import Layout
from .sglora import SGLoRA
from .writing import write

__all__ = ["Expert", "ICMLoRA", "Layout", "Library", "Mixture", "SGLoRA", "build", "mixture", "write"]
