"""Where adapters may lie: in the directories that were named, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...io.files import CONFIG
from ..folder import check_place
from ..version import check_name as named
from .errors import Wrong


@dataclass(frozen=True)
class Places:
    """Directories of adapters, resolved: each adapter is a directory in one of them."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, paths: tuple[Path, ...]) -> Places:
        """Raises NotADirectoryError, and ValueError for an adapter in the place of the directory that holds it."""
        for path in paths:
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f"{path} is a file: --adapters takes a directory that holds adapters")
            if not path.is_dir():
                raise NotADirectoryError(f"there is no directory {path} (--adapters)")
            if (path / CONFIG).is_file():
                raise ValueError(
                    f"{path} is an adapter itself, and --adapters takes a directory that holds adapters, a directory "
                    f"each: --adapters {path.parent if path.name else path.resolve().parent}"
                )
        return cls(tuple(dict.fromkeys(path.resolve() for path in paths)))

    def inside(self, said: str) -> Path:
        """The directory that a client means by a name or a path.  Raises Wrong, in the same words for what is not there
        and for what lies elsewhere."""
        if "\0" in said:
            raise Wrong("lora_path has a character that no path has", "lora_path")
        for root in self.roots:
            path = (root / said).resolve()
            if path != root and path.is_relative_to(root) and path.is_dir():
                try:
                    check_place(path, root)
                except ValueError as error:
                    raise Wrong(str(error), "lora_path") from None
                return path
        raise Wrong(
            f"there is no adapter {said[:200]!r} in the directories that this server serves from (--adapters): give "
            "the name of a directory there as lora_path, or as lora_name alone",
            "lora_path",
            404,
            "adapter_not_found",
        )


def check_name(name: str, taken: tuple[str, ...] = ()) -> None:
    """Raises Wrong for what is no name of an adapter; `taken` are the base's."""
    try:
        named(name)
    except ValueError as error:
        raise Wrong(str(error), "lora_name") from None
    if name in taken:
        raise Wrong(f"{name!r} is the base's name: an adapter needs another", "lora_name")
