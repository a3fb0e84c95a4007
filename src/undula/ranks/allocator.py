"""Who gets how much rank, when."""

from __future__ import annotations

from .procedure import Procedure


class Allocator(Procedure):
    """A procedure that changes ranks: it opens, closes, chooses or stacks them.  It works at every site of the adapter,
    so a training has at most one."""

    @property
    def entrywise(self) -> bool:
        return True
