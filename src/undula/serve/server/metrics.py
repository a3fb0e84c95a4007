"""What Prometheus reads: a registry of this server's own."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ..request import Part, Piece

NAMED = 200  # adapters with a line of their own; those that come later are counted together
REST = "(others)"
BASE = "(base)"
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
EACH = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# What of the engine's and the pool's own figures is shown: name, kind, words
ENGINE = (
    ("waiting", "undula_requests_waiting", "gauge", "Requests that wait for their first step."),
    ("running", "undula_requests_running", "gauge", "Requests in the batch."),
    ("prompt_tokens", "undula_prompt_tokens", "counter", "Tokens of prompts that were computed or found."),
    ("cached_tokens", "undula_cached_prompt_tokens", "counter", "Tokens of prompts that were found computed."),
    ("completion_tokens", "undula_generation_tokens", "counter", "Tokens that were written."),
    ("steps", "undula_steps", "counter", "Steps of the engine."),
    ("step_seconds", "undula_step_seconds", "counter", "Seconds in them."),
    ("cache_used", "undula_cache_bytes_used", "gauge", "Bytes of keys and values in use."),
    ("cache_total", "undula_cache_bytes", "gauge", "Bytes that keys and values may take."),
    ("rows", "undula_rows", "counter", "Texts that an encoder has read."),
    ("batches", "undula_batches", "counter", "Batches of them."),
)
POOL = (
    ("registered", "undula_adapters_registered", "gauge", "Adapters that may be asked for."),
    ("loaded", "undula_adapters_loaded", "gauge", "Adapters on the model."),
    ("in_use", "undula_adapters_in_use", "gauge", "Adapters of running requests."),
    ("bytes", "undula_adapter_bytes", "gauge", "Bytes of adapters on the model."),
    ("budget", "undula_adapter_bytes_budget", "gauge", "Bytes that adapters may take on the model."),
    ("hits", "undula_adapter_hits", "counter", "Requests whose adapter was on the model."),
    ("misses", "undula_adapter_misses", "counter", "Requests whose adapter had to be read."),
    ("evictions", "undula_adapter_evictions", "counter", "Adapters that made room for others."),
    ("waiting", "undula_adapters_waiting", "gauge", "Adapters that wait for room, or to be read."),
    ("load_seconds", "undula_adapter_load_seconds", "counter", "Seconds in reading adapters."),
    ("failures", "undula_adapter_failures", "counter", "Adapters that could not be read."),
)


class Metrics:
    """Counters of the server, and at each reading the figures of what computes (`worker`) and of the adapters' `shelf`,
    each of which `rows` tells."""

    def __init__(self, worker: Any, shelf: Any, rows: Callable[[], Sequence[Any]], since: float):
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("undula_http_requests", "Requests by address and status.", ["path", "status"], **own)
        self.refused = Counter("undula_refused", "Requests that were not answered, by reason.", ["reason"], **own)
        self.adapters = Counter("undula_adapter_requests", "Answers by adapter.", ["adapter"], **own)
        self.ended = Counter("undula_answers", "Answers by what ended them.", ["finish"], **own)
        self.first = Histogram("undula_time_to_first_token_seconds", "Until the first token.", buckets=FIRST, **own)
        self.each = Histogram("undula_time_per_output_token_seconds", "Between tokens.", buckets=EACH, **own)
        self.whole = Histogram("undula_request_seconds", "From a request to its end.", buckets=WHOLE, **own)
        self.registry.register(_Figures(worker, shelf, rows, since))  # type: ignore[arg-type]
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def asked(self, parts: tuple[Part, ...]) -> None:
        """Counts an answer that is begun through these adapters."""
        for name in [part.name for part in parts] or [BASE]:
            self.adapters.labels(self._bounded(name)).inc()

    async def heard(self, reply: Any) -> AsyncIterator[Piece]:
        """The pieces of a reply, timed."""
        last: float | None = None
        async for piece in reply:
            now = time.monotonic()
            if piece.tokens:
                if last is None:
                    self.first.observe(now - reply.request.arrived)
                else:
                    for _ in piece.tokens:  # of text that was held back several come at a time
                        self.each.observe((now - last) / len(piece.tokens))
                last = now
            if piece.finish is not None:
                self.whole.observe(now - reply.request.arrived)
                self.ended.labels(piece.finish).inc()
            yield piece

    def _bounded(self, name: str) -> str:
        with self._lock:
            if name not in self._named and len(self._named) >= NAMED:
                return REST
            self._named.add(name)
            return name

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Figures:
    """What engine and pool say of themselves, when it is asked for."""

    def __init__(self, worker: Any, shelf: Any, rows: Callable[[], Sequence[Any]], since: float):
        self.worker, self.shelf, self.rows, self.since = worker, shelf, rows, since

    def describe(self) -> list[Metric]:
        return []  # asked for no names before there is a model

    def collect(self) -> Iterator[Metric]:
        yield from _shown(self.worker, ENGINE)
        yield from _shown(self.shelf, POOL)
        info = GaugeMetricFamily(
            "undula_lora_requests_info",
            "As vLLM's: the adapters of running and of waiting requests.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        rows = self.rows()
        running = [row.name for row in rows if row.state == "in use"][:NAMED]
        waiting = [row.name for row in rows if row.state in ("waiting", "loading")][:NAMED]
        info.add_metric([",".join(running), ",".join(waiting), ""], self.since)
        yield info


def _shown(of: Any, figures: tuple[tuple[str, str, str, str], ...]) -> Iterator[Metric]:
    stats = of.stats() if callable(getattr(of, "stats", None)) else None
    for field, name, kind, words in figures:
        value = getattr(stats, field, None)
        if value is not None:
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(name, words, value=float(value))
