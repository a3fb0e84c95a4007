"""Secure aggregation: the server learns the mean of what clients train, and of no client its own.

Flower's SecAgg+ (Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, eprint 2020/704) masks what each client sends, so that
the masks go out in the sum.  It speaks Flower's older messages: here they stand around those of our rounds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key
from flwr.compat.common import recorddict_compat as older
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import Strategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as Workflow
from flwr.serverapp import Grid

from ..messages import ROWS, Arrays, Counts
from ..spec import ALIKE, Federation
from .records import ARRAYS, CONFIG, COUNTS, record

ASKED, NAMES = "fitins.parameters", "names"  # the older record of what a client is sent; what its arrays are called
TRAIN = "train"


class Masked:
    """A grid in which clients answer a training with the mean of all of theirs: all that the server learns.

    like: a reply's arrays, of which names, shapes and types are looked at.
    """

    def __init__(self, grid: Grid, workflow: SecAggPlusWorkflow, timeout: float, like: Callable[[], Arrays]):
        self.grid, self.workflow, self.like, self.rounds = grid, copy.copy(workflow), like, 0
        self.workflow.timeout = workflow.timeout or timeout
        self.errors: dict[int, Error] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """What clients answer; of a training, once their masked numbers are summed."""
        asked = list(messages)
        if not asked or asked[0].metadata.message_type != TRAIN:
            return list(self.grid.send_and_receive(asked, timeout=timeout))
        self.errors, self.rounds = {}, self.rounds + 1
        for i, message in enumerate(asked):  # as Flower's grids number what they send
            message.metadata.__dict__["_message_id"] = f"{self.rounds}.{i}"
        ends = _Ends(asked)
        state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Workflow.CURRENT_ROUND: self.rounds})})
        state[MAIN_PARAMS_RECORD] = record({})
        context = LegacyContext(Context(0, 0, {}, state, {}), strategy=cast(Strategy, ends))
        why = "the secure aggregation ended before its sum: too few clients were left"
        try:
            self.workflow(cast(Grid, SimpleNamespace(send_and_receive=self._heard)), context)
        except Exception as error:  # of what clients sent: sums of other shapes, records that are missing
            why = f"the secure aggregation failed: {type(error).__name__}: {error!s:.300}"
        return [self._reply(m, ends.results.get(m.metadata.dst_node_id), why) for m in asked]

    def _heard(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """One stage of the protocol; who failed in it is remembered."""
        found = list(self.grid.send_and_receive(messages, timeout=timeout))
        self.errors |= {m.metadata.src_node_id: m.error for m in found if m.has_error()}
        return found

    def _reply(self, asked: Message, result: FitRes | None, why: str) -> Message:
        if result is None:  # who fails once its masked numbers have come is in the sum all the same
            failed = self.errors.get(asked.metadata.dst_node_id)
            return Message(failed or Error(ErrorCode.UNKNOWN, why), reply_to=asked)
        like, mean = self.like(), parameters_to_ndarrays(result.parameters)
        try:
            arrays = {n: a.astype(like[n].dtype) for n, a in zip(sorted(like), mean, strict=True)}
            counts = MetricRecord(cast(dict[str, Any], result.metrics))
        except (TypeError, ValueError) as error:
            return Message(Error(ErrorCode.UNKNOWN, f"{type(error).__name__}: {error!s:.300}"), reply_to=asked)
        return Message(RecordDict({ARRAYS: record(arrays), COUNTS: counts}), reply_to=asked)


class _Ends:
    """What the protocol asks a strategy of the older kind: whom to ask for what, and what to do with the sum."""

    def __init__(self, asked: list[Message]):
        self.asked, self.results = asked, dict[int, FitRes]()

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=m.metadata.dst_node_id), _fit_ins(m.content)) for m in self.asked]

    def aggregate_fit(self, server_round: int, results: list[tuple[Any, FitRes]], failures: Any) -> tuple[None, dict]:  # type: ignore[type-arg]
        self.results = {proxy.node_id: result for proxy, result in results}
        return None, {}


def _fit_ins(content: RecordDict) -> FitIns:
    arrays, config = content[ARRAYS], dict(content[CONFIG])
    told = Parameters([a.data for a in arrays.values()], "numpy.ndarray")
    return FitIns(told, {**config, NAMES: json.dumps(list(arrays))})


def asked_securely(message: Message) -> bool:
    """Whether a client is asked in the older form, or for a stage of the protocol."""
    return ASKED in message.content or RECORD_KEY_CONFIGS in message.content


def plainly(message: Message, context: Context) -> tuple[Mapping[str, Any], ArrayRecord]:
    """(config, arrays) of a message in the older form.  Raises ValueError where no masks stand around the answer."""
    if RECORD_KEY_STATE not in context.state:
        raise ValueError("the server wants a secure aggregation: client_app(mods=[secaggplus_mod])")
    ins = older.recorddict_to_fitins(message.content, True)
    arrays = message.content[ASKED]
    return ins.config, ArrayRecord({n: arrays[str(i)] for i, n in enumerate(json.loads(str(ins.config[NAMES])))})


def secure_answer(
    message: Message, context: Context, federation: Federation, arrays: Arrays, counts: Counts
) -> Message:
    """A client's reply, for the protocol to mask.  Raises ValueError where its numbers, or its weight, do not fit the
    range in which they are summed: there they would be cut without a word."""
    told = context.state[RECORD_KEY_STATE]
    rows = 1 if federation.weights == ALIKE else int(counts[ROWS])
    most, clip = float(told[Key.MAX_WEIGHT]), float(told[Key.CLIPPING_RANGE])
    if rows > most:
        raise ValueError(f"a weight of {rows} is above max_weight={most:g} of SecAggPlusWorkflow: set it to the most")
    name, largest = max(((n, float(np.abs(a).max(initial=0))) for n, a in arrays.items()), key=lambda found: found[1])
    if largest * rows / most > clip:
        raise ValueError(
            f"{name} has a number of size {largest:.3g}, and with its weight that is above clipping_range={clip:g} of "
            "SecAggPlusWorkflow: set it higher"
        )
    parameters = ndarrays_to_parameters([arrays[name] for name in sorted(arrays)])
    result = FitRes(Status(Code.OK, ""), parameters, rows, dict(counts))
    return Message(older.fitres_to_recorddict(result, keep_input=False), reply_to=message)
