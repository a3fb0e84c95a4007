"""What a client calls a model: the base, an adapter, `base:adapter`, or the base with adapters and weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..request import Part, Unknown
from .errors import Wrong
from .keys import Key
from .schemas import Weighted

if TYPE_CHECKING:
    from .served import Served

FEW, LOOKED_THROUGH = 8, 1000  # names that a refusal tells, and among which it looks for one that was meant


def parts_of(served: Served, key: Key, model: str, adapters: Sequence[Weighted] = ()) -> tuple[Part, ...]:
    """The adapters that a request means.  Raises Wrong: 404 for one that is not there or not for this key, in the
    same words; 400 for what cannot be meant."""
    names = served.names
    if adapters:
        if model not in names:
            raise Wrong(
                f"adapters are added to the base: give {names[0]!r} as model, or leave adapters out", "adapters"
            )
        return _weighted(served, key, adapters)
    if model in names:
        if not key.base:
            raise unknown(served, key, model)
        return ()
    base = max((name for name in names if model.startswith(f"{name}:")), key=len, default=None)
    name = model if base is None else model[len(base) + 1 :]
    return (Part(known(served, key, name, model)),)


def _weighted(served: Served, key: Key, adapters: Sequence[Weighted]) -> tuple[Part, ...]:
    if len(adapters) > served.bounds.parts:
        raise Wrong(f"adapters names {len(adapters)}; one request takes {served.bounds.parts} at most", "adapters")
    names = [one.name for one in adapters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Wrong(f"adapters names {twice!r} twice: add the weights up", "adapters")
    return tuple(Part(known(served, key, one.name, one.name), float(one.scale)) for one in adapters)


def known(served: Served, key: Key, name: str, said: str) -> str:
    """The name of an adapter that is registered and that this key may use.  Raises Wrong (404)."""
    if not key.may(name) or not served.has(name):
        raise unknown(served, key, said)
    return name


def unknown(served: Served, key: Key, name: str, field: str = "model") -> Wrong:
    """The same words for what is not there and what is not for this key, with the names that it may use: all of a few,
    those that are alike of more."""
    where = f"no model is called {name[:200]!r} here" + (", or this key may not use it" if len(served.keys) else "")
    said, mine = "/v1/models lists those that may be asked", list[str]()
    if len(served.shelf.names()) <= LOOKED_THROUGH:
        mine = [one["id"] for one in listed(served, key)]
    if 0 < len(mine) <= FEW:
        said = f"{'there is' if len(mine) == 1 else 'there are'}: {', '.join(mine)}"
    elif close := difflib.get_close_matches(name[:200], mine, 3):
        said = f"did you mean {' or '.join(map(repr, close))}? {said}"
    return Wrong(f"{where}; {said}", field, 404, Unknown.code)


def listed(served: Served, key: Key) -> Iterator[dict[str, Any]]:
    """The models that a key may use, as `/v1/models` shows them."""
    if key.base:
        yield _shown(served, served.names[0], None)
    for name in sorted(served.shelf.names()):
        if key.may(name):
            yield _shown(served, name, served.names[0])


def shown(served: Served, key: Key, name: str) -> dict[str, Any]:
    """One of them.  Raises Wrong (404)."""
    parts = parts_of(served, key, name)
    return _shown(served, parts[0].name, served.names[0]) if parts else _shown(served, served.names[0], None)


def _shown(served: Served, name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(served.since),
        "owned_by": "undula",
        "root": name if parent is None else parent,
        "parent": parent,
        "max_model_len": served.longest,
    }
