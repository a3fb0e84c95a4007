"""One step of an engine: the tokens of all running requests through the model, in one flat batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from ..compress.int8 import Int8Linear
from ..host.mixing import rows
from ..host.state import find
from .attention import Plan, Stretch, attending, register
from .prefixes import SaltedCache


class Narrow(ValueError):
    """A cache that holds next to nothing."""


class Turns(Scheduler):
    """Who takes part in a step: all that write, then prompts that are begun, then those that were admitted, in turn.

    Which request is admitted when is not decided here: all that are known to this are to be computed, a step's budget
    of tokens says how fast.
    """

    cache: SaltedCache

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        writing: list[RequestState] = []
        reading: list[RequestState] = []
        for state in self.active_requests.values():
            (writing if state.status == RequestStatus.DECODING else reading).append(state)
        admitted = list(self.waiting_requests.values())
        begun: set[str] = set()
        found, _, fast, queries, keys = self._process_candidates(
            [*writing, *reading, *admitted], token_budget, cache_budget, begun
        )
        self._cleanup_waiting_queue(begun)
        return found, fast, queries, keys

    def forget(self, request_id: str) -> None:
        """Takes a request out wherever it is, and frees its blocks."""
        self.active_requests.pop(request_id, None)
        if self.waiting_requests.pop(request_id, None) is not None:
            self.waiting_requests_order.remove(request_id)
        self.cache.forget(request_id)


class Model:
    """A causal language model whose forward takes flat batches of requests, each through its own adapter."""

    def __init__(self, model: Any):
        register()
        self.model = model
        found = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
        self.configs = list({id(c): c for c in found}.values())
        self.layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.keeps = bool(getattr(model, "_supports_logits_to_keep", lambda: False)())
        head = model.get_output_embeddings()
        self.head = next((name for name, m in model.named_modules() if m is head), None)
        self._around = contextlib.ExitStack()
        self._within = False

    def enter(self) -> None:
        """Begins a block of `rows` around the steps, within which each step costs its rows alone (see `leave`)."""
        if not self._within:
            self._around.enter_context(rows(self.model, []))
            self._within = True

    def leave(self) -> None:
        """Ends that block: before adapters come or go, and where nothing is computed."""
        self._around.close()
        self._within = False

    @torch.no_grad()
    def forward(self, cache: SaltedCache, batch: Sequence[FutureRequestState], names: Sequence[str | None]) -> Tensor:
        """The logits (requests, V) of those of the batch that have a next token, after their tokens went through the
        adapters of these names.  Their keys and values are in the cache then."""
        device, at = self.model.device, 0
        ids: list[int] = []
        places: list[int] = []
        last, stretches = [], []
        indices: list[tuple[list[int], list[int]]] = [([], []) for _ in cache.cache_allocators]
        for future in batch:
            state, new = future.state, future.query_length
            past = state.position_offset
            for (write, read), kind in zip(indices, cache.cache_allocators.values(), strict=True):
                write += kind.get_write_indices(state.request_id, past, new)
                if past:
                    read += kind.get_read_indices(state.request_id, past, 0)
            ids += state.tokens_to_process
            places += range(past, past + new)
            stretches.append(Stretch(at, new, past))
            at += new
            if future.has_new_token:
                last.append(at - 1)
        if self.model.training:  # somebody called `model.train()`: answers have no dropout
            self.model.eval()
        plan = Plan(cache, stretches, indices)
        after = torch.tensor(last, device=device, dtype=torch.long)
        given: dict[str, Any] = {"logits_to_keep": after} if self.keeps and not self._adapts_head(names) else {}
        counts = [future.query_length for future in batch]
        self.enter()
        with rows(self.model, names, tokens=counts), attending(self.configs):
            logits = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([places], device=device),
                plan=plan,
                use_cache=False,
                **given,
            ).logits[0]
        if plan.called != self.layers:
            raise RuntimeError(
                f"{type(self.model).__name__}: {plan.called} of {self.layers} layers computed their attention where "
                "requests are kept apart"
            )
        return logits if given else logits[after]

    @torch.no_grad()
    def check(self, cache: SaltedCache) -> None:
        """Raises ValueError where the cache holds no two requests, and where those of one batch, in pieces, do not get
        the logits of each alone: of models whose layers see the batch otherwise than by attention, or in another form
        (states, biases by position)."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        prompts = [[(7 * i + 1) % vocabulary for i in range(n)] for n in (5, 3)]
        states = [RequestState(f"check {i}", prompt) for i, prompt in enumerate(prompts)]
        kind = type(self.model).__name__
        try:
            with rows(self.model, [None]):
                want = [self.model(torch.tensor([p], device=self.model.device)).logits[0, -1] for p in prompts]
            for counts in ((3, 2), (2, 1)):
                for state, n in zip(states, counts, strict=True):
                    cache.salts[state.request_id] = ""
                    state.tokens_to_process = state.initial_tokens[state.position_offset : state.position_offset + n]
                    if not cache.can_store_request_tokens(state, n):
                        raise Narrow(f"the cache (--cache) has no room for 8 tokens of {kind}: give it more bytes")
                batch = [FutureRequestState(state, True, {}, n) for state, n in zip(states, counts, strict=True)]
                found = self.forward(cache, batch, [None, None])
                for state, n in zip(states, counts, strict=True):
                    state.position_offset += n
        except Narrow:
            raise
        except Exception as error:
            raise ValueError(f"{kind} cannot be served: two requests in one batch fail in it: {error}") from error
        finally:
            self.leave()
            for state in states:
                cache.forget(state.request_id)
        off = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(found, want, strict=True))
        # of eight bits too: the last digit of a float moves an input by a whole step of them
        narrow = torch.finfo(self.model.dtype).bits < 32 or any(isinstance(m, Int8Linear) for m in self.model.modules())
        if not off < (0.1 if narrow else 1e-3):
            raise ValueError(
                f"{kind} cannot be served: requests of one batch get other logits than each alone (by {off:.1e} of the "
                "largest), so its layers see more of a batch than attention tells them"
            )

    def _adapts_head(self, names: Sequence[str | None]) -> bool:
        """Whether an adapter of the batch changes the layer that gives the logits: it has to see every token then."""
        return self.head is not None and any(
            self.head in find(self.model, name)[1].factors for name in set(names) if name is not None
        )


def longest(model: Any) -> int:
    """Up to how many tokens a model's positions go.  Where the embedding of positions changes with the longest of a
    batch (dynamic and long RoPE), only so far as it does not: no request is to depend on others."""
    config = model.config.get_text_config(decoder=True)
    most = int(getattr(config, "max_position_embeddings", 0) or 2**31)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in [rope, *(r for r in rope.values() if isinstance(r, dict))]:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            most = min(most, int(original or most))
    return most
