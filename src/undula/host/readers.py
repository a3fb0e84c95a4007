"""Which weights a module reads from its children, as `self.dt_proj.weight`, instead of calling them or beside it.

Told from the bytecode of its class, so that classes without source (notebooks, standard input) are read too.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Of these methods no forward is made: they make, fill, tie, resize, move and store weights.
VERBS = ("init", "reset", "tie", "resize", "get_", "set_", "load", "save", "from_", "post_init", "prune", "convert")
ELSEWHERE = (*VERBS, *(f"_{verb}" for verb in VERBS), "__", "extra_repr")
# What is asked of a weight here is not its numbers.
ASKED = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "layout"}
ASKING = {"isinstance", "hasattr", "getattr", "id", "type", "is_meta"}
# Layers that are called all the same: torch's encoder reads them on its fast path, which adapted layers leave (see
# `slots.Slot`); Bloom's reads are for one way of summing (`slow_but_exact`) of models that were cut for training.
CALLED = ("TransformerEncoderLayer.", "BloomAttention.", "BloomMLP.")


def readers(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a module: the one that reads its weight}, of each the first."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        for path in _read(type(module)):  # type: ignore[arg-type]
            found.setdefault(f"{name}.{path}" if name else path, module)
    return found


@functools.cache
def _read(cls: type[nn.Module]) -> frozenset[str]:
    """The paths x of all `self.x.weight` that the class reads in its forward or what that may call."""
    held: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in (object, nn.Module):
            held |= vars(base)
    found: set[str] = set()
    for name, what in held.items():
        function = inspect.unwrap(what.fget if isinstance(what, property) and what.fget else what)
        if isinstance(function, FunctionType) and not name.startswith(ELSEWHERE) and not _called(function):
            found.update(path for code in _codes(function.__code__) for path in _paths(code))
    return frozenset(found)


def _called(function: FunctionType) -> bool:
    return function.__qualname__.startswith(CALLED)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _paths(code: CodeType) -> Iterator[str]:
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP")]
    for i, step in enumerate(steps):
        if not _loads_self(step):
            continue
        names: list[str] = []
        for after in steps[i + 1 :]:
            if after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            names.append(str(after.argval))
        if "weight" in names[1:]:
            k = names.index("weight", 1)
            rest = steps[i + 1 + len(names) : i + 3 + len(names)]
            asked = len(names) > k + 1 and names[k + 1] in ASKED
            if not asked and not _is_asked(steps[max(0, i - 1) : i], rest if len(names) == k + 1 else []):
                yield ".".join(names[:k])


def _loads_self(step: dis.Instruction) -> bool:
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval  # of two loads in one
    return bool(name == "self")


def _is_asked(before: list[dis.Instruction], after: list[dis.Instruction]) -> bool:
    """Whether the weight is asked what it is (`isinstance(self.x.weight, ...)`), or whether it is there."""
    if any(s.opname.startswith("LOAD_") and s.argval in ASKING for s in before):
        return True
    return bool(after) and ("NONE" in after[0].opname or [s.opname for s in after] == ["LOAD_CONST", "IS_OP"])
