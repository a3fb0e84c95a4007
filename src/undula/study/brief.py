"""Choices in the names of arms."""

from __future__ import annotations

import dataclasses

from ..core.choice import Choice
from ..core.method import Method


def brief(choice: Choice) -> str:
    """A choice without the options that have their default: `DoRA(LoRAN(r=8))`; a rank is always told."""
    parts = []
    for field in dataclasses.fields(choice):  # type: ignore[arg-type]
        value = getattr(choice, field.name)
        if isinstance(value, Method):
            parts.append(brief(value))
        elif field.name == "r" or value != field.default:
            parts.append(f"{field.name}={brief(value) if isinstance(value, Choice) else value}")
    return f"{choice.public().__name__}({', '.join(parts)})"
