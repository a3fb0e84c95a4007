"""Rounds(server): a strategy of Flower's whose decisions are all those of `Server`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from logging import INFO
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore import log

from ...core.adapter import Adapter
from .. import messages
from ..messages import FROZEN, ROWS, Arrays, Failure, Reply
from ..part import Part
from ..private import DPSGD
from ..rounds import check_first
from ..server import Server
from .records import ARRAYS, CONFIG, COUNTS, ROUND, SETTINGS, counts_of, failure, numbers, record, reply_of, settings
from .secure import TRAIN, Masked

EVALUATE = "evaluate"
MASKED = (
    "a secure aggregation (SecAgg+): the server has seen the mean of what clients trained, and of no client its own. "
    "So neither their changes nor the bias are told, and bytes are those of the numbers before they were masked"
)
# seconds, where the federation has no timeout: nodes may connect; an answer may come.  A client's process that outlives
# its task at Flower's never answers, and Flower still hears from its node
PATIENCE, LONGEST = 60.0, 3600.0


class Rounds(FedAvg):
    """Who takes part in a round, what goes out and what is made of what comes back is `server`'s to say; a client is
    the node that is registered under its name.

    by: a strategy of Flower's, such as FedMedian(), Krum() or a wrapper of differential privacy: it makes one of the
    replies that count, and the federation's aggregation gets that in their place.  For FFA and FedSVD that is one B.
    Or SecAggPlusWorkflow(...): then the server learns the mean of the replies alone, see `secure`.
    Raises ValueError where that has no sense: with FLASC's packed messages, beside the federation's own privacy (of
    rows, "dp-sgd", a secure aggregation may stand beside), or where the mean alone is not enough.
    """

    def __init__(self, server: Server, by: Strategy | SecAggPlusWorkflow | None = None):
        super().__init__()
        self.secure = by if isinstance(by, SecAggPlusWorkflow) else None
        self.server, self.by, self.last = server, None if self.secure else by, record(server.brief())
        self.asked: list[tuple[str, Message]] = []
        self.absent: dict[str, Failure] = {}
        self.number = 0  # of the round, as Flower counts those of this start
        if by is None:
            return
        f, parts = server.federation, [name for name, part in server.parts.items() if not part.whole]
        private = f.privacy is not None and not (self.secure and isinstance(f.privacy, DPSGD))
        if parts or f.how.sparse or private or (self.secure and f.how.needs_each):
            what = f"the part that {parts[0]} has" if parts else f.privacy if private else f.how
            raise ValueError(f"{type(by).__name__} cannot stand beside {what}: leave one of them out")
        server.pool = self._one if self.secure else self._pooled
        if self.secure:
            server.sees_each = False
            server.notes.append(MASKED)

    def go_on(self, grid: Grid) -> None:
        """The rounds that are left."""
        f = self.server.federation
        if self.server.round == f.rounds and not self.server.measures():
            return
        if self.secure:
            grid = cast(Grid, Masked(grid, self.secure, self.timeout, self._like))
        self._connected(grid, f.names, len(f.names))
        if self.server.measures():  # it ended between a round and this
            asked = self.configure_evaluate(self.server.round, self.last, ConfigRecord(), grid)
            self.aggregate_evaluate(self.server.round, grid.send_and_receive(asked, timeout=self.timeout))
        self.start(grid, self.last, f.rounds - self.server.round, self.timeout)

    @property
    def timeout(self) -> float:
        """Seconds that an answer may take."""
        return self.server.federation.timeout or LONGEST

    def summary(self) -> None:
        """What Flower's log says of it."""
        f, by = self.server.federation, "" if self.by is None else f" after {type(self.by).__name__}"
        log(INFO, "\t└──> %r%s; %s clients, of which a round has %s", f.how, by, len(f.names), len(f.chosen(1)))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What goes out in a round.  Raises RuntimeError where another strategy has changed the server's adapter."""
        if {name: a.data for name, a in arrays.items()} != {name: a.data for name, a in self.last.items()}:
            raise RuntimeError(
                "a strategy around Rounds has changed the adapter, and the server's own rounds do not see it: give it "
                "as server_app(by=...)"
            )
        chosen = self.server.ask()
        there = self._connected(grid, chosen, self.server.federation.min_clients)
        self.absent = {n: Failure("absent", "its node is not connected") for n in chosen if n not in there}
        self._tell(config, self.server.round + 1)
        by_another = self.by is not None
        made = self._by_another(server_round, config, there) if by_another else self._made(config, there, TRAIN)
        return self._sent(there, made)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The server's next adapter.  Raises RuntimeError where no client gets through the first round."""
        said: dict[str, Reply | Failure] = {name: reply_of(m) for name, m in self._from(replies).items()}
        self.number = server_round
        made = self.server.take(self._none() | self.absent | said)
        check_first(made)
        self.last = record(self.server.brief())
        return self.last, MetricRecord({k: float(v) for k, v in made["server"].items()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What clients are to measure, where they are."""
        self.asked = []
        if not self.server.measures():
            return []
        names = self.server.federation.names
        there = self._connected(grid, names, 1)
        self.absent = {n: Failure("absent", "its node is not connected") for n in names if n not in there}
        self._tell(config, self.server.round)
        return self._sent(there, self._made(config, there, EVALUATE))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What clients have measured goes into the round's record."""
        if self.server.measures():
            found = {name: failure(m) or _counts(m.content) for name, m in self._from(replies).items()}
            self.server.spread(self._none() | self.absent | found)
        return None

    def _connected(self, grid: Grid, names: Sequence[str], enough: int) -> dict[str, int]:
        """{client: its node} of those that are connected; waits until there are `enough`, and then for no other."""
        end = time.monotonic() + (self.server.federation.timeout or PATIENCE)
        while True:
            nodes = {node.name: node.node_id for node in grid.get_nodes()}
            there = {name: nodes[name] for name in names if name in nodes}
            if len(there) >= enough or time.monotonic() > end:
                return there
            time.sleep(0.2)

    def _by_another(self, server_round: int, config: ConfigRecord, there: dict[str, int]) -> list[Message]:
        try:
            only = cast(Grid, _Only(list(there.values())))
            return list(cast(Strategy, self.by).configure_train(server_round, self.last, config, only))
        except _TooFew:
            why = f"{type(self.by).__name__} waits for more nodes than the {len(there)} that are connected"
            self.absent |= {
                name: Failure("absent", f"{why}: give it min_available_nodes and min_train_nodes that a round has")
                for name in there
            }
            return []

    def _tell(self, config: ConfigRecord, number: int) -> None:
        config[ROUND], config[SETTINGS] = number, settings(self.server.federation)
        config[FROZEN] = self.server.brief()[FROZEN].tobytes()

    def _made(self, config: ConfigRecord, there: dict[str, int], kind: str) -> list[Message]:
        """What goes to each node: the server's adapter, or the part that its client has."""
        groups: dict[Part, list[int]] = {}
        for name, node in there.items():
            groups.setdefault(self.server.part(name), []).append(node)
        found: list[Message] = []
        for part, nodes in groups.items():
            arrays = self.server.brief(part)
            told = ConfigRecord({**config, FROZEN: arrays[FROZEN].tobytes()})
            content = RecordDict({ARRAYS: self.last if part.whole else record(arrays), CONFIG: told})
            found += self._construct_messages(content, nodes, kind)
        return found

    def _sent(self, there: dict[str, int], made: Iterable[Message]) -> list[Message]:
        names = {node: name for name, node in there.items()}
        self.asked = [(names[m.metadata.dst_node_id], m) for m in made]
        return [m for _, m in self.asked]

    def _from(self, replies: Iterable[Message]) -> dict[str, Message]:
        """{client: its reply}: who was asked, not who says that it answers."""
        names = {m.metadata.message_id: name for name, m in self.asked}
        found = {names.get(m.metadata.reply_to_message_id): m for m in replies}
        return {name: m for name, m in found.items() if name is not None}

    def _none(self) -> dict[str, Any]:
        return {name: Failure("late", f"no answer within {self.timeout:g} s") for name, _ in self.asked}

    def _like(self) -> Arrays:
        """A reply's arrays."""
        return messages.reply(self.server.adapter, self.server.adapter, self.server.federation.how)

    @staticmethod
    def _one(sent: Adapter, adapters: list[Adapter], weights: list[float]) -> tuple[list[Adapter], list[float]]:
        """All adapters are the mean."""
        return adapters[:1], [1.0]

    def _pooled(
        self, sent: Adapter, adapters: list[Adapter], weights: list[float]
    ) -> tuple[list[Adapter], list[float]]:
        by, how = cast(Strategy, self.by), self.server.federation.how
        told = [messages.reply(sent, adapter, how) for adapter in adapters]
        found = [
            Message(RecordDict({ARRAYS: record(a), COUNTS: MetricRecord({ROWS: w})}), dst_node_id=1, message_type=TRAIN)
            for a, w in zip(told, weights, strict=True)
        ]
        made, _ = by.aggregate_train(self.number, found)
        if made is None:
            raise ValueError(f"{type(by).__name__} made nothing of {len(adapters)} replies")
        one = {name: a.astype(told[0][name].dtype) for name, a in numbers(made).items() if name in told[0]}
        return [messages.replied(one, sent, how, type(by).__name__)], [1.0]


class _TooFew(Exception):
    """A strategy waits for more nodes than a round has."""


class _Only:
    """A grid of the nodes of one round, for strategies that choose among those that they see."""

    def __init__(self, nodes: list[int]):
        self.nodes, self.looks = nodes, 0

    def get_node_ids(self) -> list[int]:
        """Raises _TooFew for one that looks again and again."""
        self.looks += 1
        if self.looks > 3:
            raise _TooFew
        return self.nodes


def _counts(content: RecordDict) -> dict[str, Any] | Failure:
    try:
        return counts_of(content)
    except ValueError as error:
        return Failure("refused", str(error))
