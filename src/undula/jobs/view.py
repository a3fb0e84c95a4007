"""What watches jobs while they train."""

from __future__ import annotations

from typing import Protocol

from .job import Job


class View(Protocol):
    """Is told of what happens."""

    def begun(self, job: Job) -> None: ...

    def stepped(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...

    def said(self, text: str) -> None: ...


class Silent:
    """Says nothing."""

    def begun(self, job: Job) -> None: ...

    def stepped(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...

    def said(self, text: str) -> None: ...
