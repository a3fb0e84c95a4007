"""Which weights a module reads from its children, as `self.dt_proj.weight`, instead of calling them or beside it.

Told from the bytecode of its class, so that classes without source (notebooks, standard input) are read too.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Of these methods no forward is made: they make, fill, tie, resize, move and store weights.
VERBS: tuple[str, ...] = (
    "init",
    "reset",
    "tie",
    "resize",
    "get_",
    "set_",
    "load",
    "save",
    "from_",
    "post_init",
    "prune",
    "convert",
)
VERBS += ("rescale", "bnb", "fuse", "unfuse")  # they write into weights
ELSEWHERE = (*VERBS, *(f"_{verb}" for verb in VERBS), "__", "extra_repr")
# What is asked of a weight here is not its numbers.
ASKED = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "layout"}
ASKING = {"isinstance", "hasattr", "getattr", "id", "type", "is_meta"}
# Layers that are called all the same: torch's encoder reads them on its fast path, which adapted layers leave (see
# `slots.Slot`); Bloom's reads are for one way of summing (`slow_but_exact`) of models that were cut for training.
CALLED = ("TransformerEncoder.", "TransformerEncoderLayer.", "BloomAttention.", "BloomMLP.")


@dataclass(frozen=True)
class Reading:
    """A `x.path.weight` in a class: x is `self`, or a local variable or an element, which may be an argument."""

    path: tuple[str, ...]
    of_self: bool
    argument: str | None = None


def readers(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a module: the one that reads its weight}, of each the first."""
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        own = getattr(module.__dict__.get("forward"), "__func__", module.__dict__.get("forward"))
        here = set(_of(own)) if isinstance(own, FunctionType) else set()
        for reading in here | _read(type(module), getattr(type(module).forward, "__code__", None)):  # type: ignore[arg-type]
            for path in _meant(name, module, reading, modules):
                found.setdefault(path, module)
    return found


def _meant(name: str, module: nn.Module, reading: Reading, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of what is read: of a variable, all that it may hold of the module's children and what these keep in
    lists; of an argument, what has its name."""
    if reading.of_self:
        yield ".".join([*([name] if name else []), *reading.path])
        return
    for element in _elements(module):
        yield ".".join([*([name] if name else []), element, *reading.path])
    if reading.argument is not None:
        yield from (".".join([n, *reading.path]) for n in modules if n.rpartition(".")[2] == reading.argument)


LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _elements(module: nn.Module) -> Iterator[str]:
    """The names of a module's children, and of what those hold that are lists, in lists too."""
    for child, held in module.named_children():
        if isinstance(held, LISTS):
            yield from (f"{child}.{element}" for element in _elements(held))
        else:
            yield child


@functools.cache
def _read(cls: type[nn.Module], forward_code: CodeType | None) -> frozenset[Reading]:
    """What the class reads in its forward or what that may call.  A forward that is replaced later is another one."""
    held: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in (object, nn.Module):
            held |= vars(base)
    functions = {name: function for name, what in held.items() if (function := _function(what)) is not None}
    forward = _reached(functions)
    found: set[Reading] = set()
    for name, function in functions.items():
        if (name in forward or not name.startswith(ELSEWHERE)) and not _called(function):
            found.update(reading for reading in _of(function) if reading.of_self or name in forward)
    return frozenset(found)


def _function(held: Any) -> FunctionType | None:
    """The function that a class holds, within what decorates it."""
    function = inspect.unwrap(held.fget if isinstance(held, property) and held.fget else held)
    return function if isinstance(function, FunctionType) else None


def _reached(functions: Mapping[str, FunctionType]) -> set[str]:
    """The names of those that the forward may call."""
    found, left = set(), ["forward"]
    while left:
        name = left.pop()
        if name in functions and name not in found:
            found.add(name)
            left += [called for code in _codes(functions[name].__code__) for called in code.co_names]
    return found


def _called(function: FunctionType) -> bool:
    return function.__qualname__.startswith(CALLED)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _of(function: FunctionType) -> Iterator[Reading]:
    """What a function reads; its first argument is the module."""
    code = function.__code__
    me = code.co_varnames[0] if code.co_argcount else "self"
    held: dict[str, tuple[str, ...]] = {me: ()}
    for part in _codes(code):
        yield from _readings(part, held)


def _readings(code: CodeType, held: dict[str, tuple[str, ...]]) -> Iterator[Reading]:
    """`held` are the variables that are the module or something of it, by the path to it: what is assigned joins."""
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    steps = [
        s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP", "COPY")
    ]
    for i, step in enumerate(steps):
        first = i
        while _loads_part(steps[first - 1]) and first > 1:
            first -= 1
        path, root = tuple(str(s.argval) for s in steps[first:i]), steps[first - 1]
        if step.opname in ("STORE_FAST", "STORE_DEREF") and i and (whole := _variable(root)) in held:
            held[str(step.argval)] = (*held[whole], *path)
        if not _loads_part(step) or step.argval != "weight":
            continue
        after = steps[i + 1 : i + 3]
        if (after and _loads_part(after[0]) and after[0].argval in ASKED) or _is_asked(
            steps[first - 2 : first - 1], after
        ):
            continue
        variable = _variable(root)
        if variable in held and (held[variable] or path):
            yield Reading((*held[variable], *path), of_self=True)
        elif variable is not None and variable not in held:
            yield Reading(path, of_self=False, argument=variable if variable in arguments else None)


def _loads_part(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _variable(step: dis.Instruction) -> str | None:
    """The variable that is loaded, "[]" for an element of something, None for anything else."""
    if step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and "[" in step.argrepr):
        return "[]"
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST", "STORE_DEREF")):  # stored and used at once
        return None
    return str(step.argval[-1] if isinstance(step.argval, tuple) else step.argval)  # the last of two loads in one


def _is_asked(before: list[dis.Instruction], after: list[dis.Instruction]) -> bool:
    """Whether the weight is asked what it is (`isinstance(self.x.weight, ...)`), or whether it is there."""
    if any(s.opname.startswith("LOAD_") and s.argval in ASKING for s in before):
        return True
    return bool(after) and ("NONE" in after[0].opname or [s.opname for s in after] == ["LOAD_CONST", "IS_OP"])
