"""Arrays and counts as Flower's records, and back; what comes is believed in nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from numpy.lib import format as npy

from ...core.choice import as_json
from ...train.recipe import Recipe
from ..messages import FROZEN, Arrays, Counts, Failure, Reply
from ..spec import Federation

ARRAYS, COUNTS, CONFIG = "arrays", "metrics", "config"  # the names that Flower's strategies and mods go by
ROUND, SETTINGS, EPSILON = "server-round", "settings", "epsilon of "
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
OF_ONE_PARTY = ("model", "data", "begin_from")  # paths: what they hold is told apart by other means
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


def record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """All but what tells the frozen factors, which goes beside them: mods that clip a change take all arrays for
    numbers that train."""
    return ArrayRecord({name: Array(a) for name, a in arrays.items() if name != FROZEN})


def numbers(given: ArrayRecord) -> Arrays:
    """{name: array}.  Raises ValueError for bytes that are no plain array of the size that they say, before any is
    made."""
    return {name: _array(name, a.data) for name, a in given.items()}


def _array(name: str, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    try:
        shape, columns, kind = HEADERS[npy.read_magic(stream)](stream)
        if kind.hasobject or math.prod(shape) * kind.itemsize != len(data) - stream.tell():
            raise ValueError(f"{kind} {shape} in {len(data) - stream.tell()} bytes")
        return np.frombuffer(data, kind, offset=stream.tell()).reshape(shape, order="F" if columns else "C")
    except Exception as error:  # numpy reads a header as Python's: nested deeply it raises a RecursionError
        raise ValueError(f"{name:.100} is no array of numbers: {error!s:.200}") from None


def reply_of(message: Message) -> Reply | Failure:
    """What a client sent in a round."""
    if (failed := failure(message)) is not None:
        return failed
    content = message.content
    if set(content) != {ARRAYS, COUNTS} or not isinstance(content[ARRAYS], ArrayRecord):
        return Failure("refused", f"{ARRAYS} and {COUNTS} were asked for, found {', '.join(content) or 'nothing':.200}")
    try:
        return numbers(content[ARRAYS]), counts_of(content)
    except ValueError as error:
        return Failure("refused", str(error))


def counts_of(content: RecordDict) -> dict[str, Any]:
    """Raises ValueError where there are none."""
    found = content.get(COUNTS)
    if not isinstance(found, MetricRecord):
        raise ValueError(f"{COUNTS} were asked for, found {', '.join(content) or 'nothing':.200}")
    return dict(found)


def failure(message: Message) -> Failure | None:
    """Why a message is no answer."""
    if not message.has_error():
        return None
    kind = "absent" if message.error.code in GONE else "error"
    return Failure(kind, str(message.error.reason or f"error {message.error.code}"))


def answer(message: Message, counts: Counts, arrays: Arrays | None = None) -> Message:
    """A client's reply: counts, and arrays where it has trained; nothing else."""
    content = RecordDict({COUNTS: MetricRecord(dict(counts))})
    if arrays is not None:
        content[ARRAYS] = record(arrays)
    return Message(content, reply_to=message)


def settings(federation: Federation) -> str:
    """JSON {setting: 8 hexadecimal digits} of what all parties have to agree on."""
    recipe, kept = federation.recipe.encode(), {f.name: f.metadata for f in fields(Recipe)}
    values = {k: v for k, v in recipe.items() if k not in OF_ONE_PARTY and kept[k].get("figures", True)}
    values |= {k: as_json(getattr(federation, k)) for k in ("how", "split", "privacy", "rounds")}
    values["clients"] = {party.name: party.part for party in federation.clients if party.part}
    if federation.privacy is not None:  # noise is set by the rounds that a client is in
        values |= {k: as_json(getattr(federation, k)) for k in ("fraction", "min_clients", "names")}
    own = {_budget(party.name): party.epsilon for party in federation.clients if party.epsilon is not None}
    return json.dumps({k: _digest(v) for k, v in sorted((values | own).items())})


def check_settings(federation: Federation, told: Any, name: str) -> None:
    """Raises ValueError that names what a client has otherwise than the server: of the budgets of clients its own,
    where the server says one (its record would say that of what has had less noise)."""
    mine, theirs = json.loads(settings(federation)), json.loads(str(told))
    budget = {_budget(name)} & {*theirs}
    shared = budget | {k for k in {*mine, *theirs} if not k.startswith(EPSILON)}
    if odd := sorted(k for k in shared if mine.get(k) != theirs.get(k)):
        named = ", ".join("epsilon" if k in budget else k for k in odd)
        raise ValueError(f"{named}: not as in the server's file. Give all parties one file")


def _budget(client: str) -> str:
    """What a client's own budget is called, which tells the other clients no name."""
    return EPSILON + _digest(client)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
