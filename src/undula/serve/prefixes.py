"""transformers' paged cache with prefix blocks that belong to the adapter that they were computed through."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.initialization import resolve_continuous_batching_config
from transformers.generation.continuous_batching.requests import RequestState


class SaltedCache(PagedAttentionCache):
    """A paged cache that shares blocks of equal tokens among requests of equal salt alone.

    Keys and values depend on the weights that they were computed with: `salts` says for each request which those are
    (the id of its adapter's version, its scales included; "" the base).  Block i of a request is known by
    h_i = SHA-256(h_{i-1}, its tokens), h_{-1} = SHA-256(salt): transformers' own chain begins with nothing, and its
    64 bits can be made to collide by who chooses the prompts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.salts: dict[str, str] = {}

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many of the prompt's tokens are there already, as a prefix computed through the same weights; the request
        has their blocks from now on."""
        if not self.use_prefix_sharing:
            return 0
        found: dict[str, list[int]] = {}
        for name, kind in self.cache_allocators.items():
            known, blocks, size = self._root(request_id), [], kind.tokens_per_page
            for end in range(size, len(prompt_ids), size):  # the last token is always computed
                known = _block(known, prompt_ids[end - size : end])
                block = kind.ledger.hash_to_block.get(known)  # type: ignore[call-overload]
                if block is None:
                    break
                blocks.append(block)
            found[name] = blocks
        shared = min(len(b) * self.cache_allocators[name].tokens_per_page for name, b in found.items())
        if shared:
            for name, blocks in found.items():
                self.cache_allocators[name].acquire_prefix_blocks(request_id, shared, blocks)
        return shared

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Makes known the blocks that a step completed; one whose equal is known already gives way to that."""
        if not self.use_prefix_sharing or not complete_blocks:
            return
        tokens = state.initial_tokens + state.generated_tokens
        for name in complete_blocks:
            kind = self.cache_allocators[name]
            table, size, known = kind.block_table[state.request_id], kind.tokens_per_page, self._root(state.request_id)
            ledger: Any = kind.ledger
            for i in range(state.current_len() // size):
                block = table[i]
                had = ledger.block_to_hash.get(block)
                known = had if had is not None else _block(known, tokens[i * size : (i + 1) * size])
                equal = ledger.register_new_hash(block, known) if had is None else None
                if equal is not None:
                    ledger.acquire(equal)
                    table[i] = equal
                    if ledger.release(block):
                        self.pool.free_blocks(kind.index, [block])

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """Whether there is room for so many more tokens of a request, and gives it; prefixes that nobody uses give way,
        the oldest first."""
        while not super().can_store_request_tokens(state, request_len, dry_run):
            if dry_run or not self._evict(8):
                return False
        return True

    def _evict(self, most: int) -> bool:
        evicted = False
        for kind in self.cache_allocators.values():
            ledger = kind.ledger
            for block in list(ledger.cached_blocks)[:most]:
                del ledger.cached_blocks[block]
                del ledger.hash_to_block[ledger.block_to_hash.pop(block)]
                self.pool.free_blocks(kind.index, [block])
                evicted = True
        if evicted:
            self.pool.try_to_free_sectors()
        return evicted

    def _root(self, request_id: str) -> bytes:
        return hashlib.sha256(self.salts[request_id].encode()).digest()

    def forget(self, request_id: str) -> None:
        """Frees a request's blocks; those that are complete stay known while there is room."""
        self.free_blocks(request_id)
        self.salts.pop(request_id, None)

    def used(self) -> int:
        """Bytes of blocks that requests have."""
        kinds = self.cache_allocators.values()
        kept = sum(len(kind.ledger.cached_blocks) * kind.bytes_per_block for kind in kinds)
        return int(self.num_sectors * self.bytes_per_sector - self.compute_free_capacity(relative=False) - kept)


def _block(before: bytes, tokens: list[int]) -> bytes:
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


def cache_of(model: Any, tokens: int, page: int, batch_tokens: int, running: int) -> SaltedCache:
    """A cache for so many tokens of requests.  Raises ValueError for a model or a size that there is none for."""
    asked = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=-(-tokens // page),
        max_batch_tokens=batch_tokens,
        max_requests_per_batch=running,
        max_memory_percent=1.0,
        use_cuda_graph=False,
        use_async_batching=False,
        max_blocks_per_request=0,
    )
    config = model.config.get_text_config(decoder=True)
    asked = resolve_continuous_batching_config(config, asked, None, False, model.device)
    alone = DistributedHelper(device_mesh=None, cpu_group_timeout=None)
    try:
        return SaltedCache(config, asked, model.device, alone, dtype=model.dtype, model_supports_logits_to_keep=True)
    except ValueError as error:  # attention of a kind that it does not know
        raise ValueError(f"{type(model).__name__} cannot be served: no cache is made for it: {error}") from error
    except MemoryError as error:
        raise ValueError(f"keys and values of {tokens:,} tokens do not fit into memory: {error}") from error


def tokens_that_fit(model: Any, size: int) -> int:
    """How many tokens' keys and values are `size` bytes: each is 2 x key heads x head size numbers a layer."""
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    config = model.config.get_text_config(decoder=True)
    numbers = 2 * find_num_key_value_heads(config) * find_head_dim(config) * config.num_hidden_layers
    return size // (numbers * torch.empty((), dtype=model.dtype).element_size())
