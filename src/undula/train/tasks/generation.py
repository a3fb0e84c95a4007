"""Writing on: greedy, or drawn with a seed of its own for every row, so that a draw depends on neither its neighbours
nor the batch; whole or piece by piece."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from ...core.given import Checked
from ...core.ranges import Count, Natural, NotNegative, SomeShare
from .lending import generating
from .limits import UNLIMITED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling(metaclass=Checked):
    """How the next token is chosen.

    temperature T: 0 is the likeliest token; else one is drawn from softmax(logits / T), of the likeliest tokens that
    together have `top_p` of it.  The draws of a row follow `seed` and the row's number alone.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0
    top_p: SomeShare = 1.0
    seed: Natural = 0


@dataclass(frozen=True)
class Written:
    """What was written, and whether it ended by itself (or was cut at `max_new_tokens`, or where the model ends)."""

    text: str
    ended: bool


class Draw:
    """A logits processor that makes the likeliest token a draw from softmax(logits / T) within `top_p`: by adding
    Gumbel noise, whose argmax is such a draw (Gumbel 1954; Maddison et al. 2014), from a generator for each row."""

    def __init__(self, sampling: Sampling, rows: Sequence[int]):
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + row) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.sampling.temperature
        if self.sampling.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            p = ordered.softmax(-1)
            beyond = p.cumsum(-1) - p >= self.sampling.top_p  # the first that reaches it stays
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self.generators]
        return scores - torch.stack(noise).log().to(scores.device)


@torch.no_grad()
def write(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    sampling: Sampling,
    first: int = 0,
) -> list[Written]:
    """Goes on after each of these rows of tokens, by this model's next tokens alone: of its generation_config only what
    ends a text counts.  Rows of like length run together.  `first`: the number of the first row, which its draws
    follow.  Raises ValueError for a row that leaves no place for a token.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Written] = {}
    with ending(model, tokenizer) as ends:
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in numbers]}, padding_side="left", return_tensors="pt")
            width = inputs["input_ids"].shape[1]
            options = _options(sampling, [first + i for i in numbers], width, tokenizer)
            made = model.generate(**inputs.to(model.device), **options)[:, width:]  # type: ignore[operator]
            for i, row in zip(numbers, made.tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                found[i] = Written(str(text), any(token in ends for token in row))
    return [found[i] for i in range(len(ids))]


@torch.no_grad()
def speak(
    model: PreTrainedModel,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    hear: Callable[[str], None],
    number: int = 0,
) -> bool:
    """`write` for one row, of that number; `hear` gets the pieces of the text as they come.  Returns whether it ended
    by itself.  What `hear` raises ends it."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                hear(text)

    inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
    options = _options(sampling, [number], len(ids), tokenizer)
    with ending(model, tokenizer) as ends:
        streamer = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
        made = model.generate(**inputs.to(model.device), **options, streamer=streamer)  # type: ignore[operator]
    return bool(set(made[0, len(ids) :].tolist()) & ends)


def stream(
    model: PreTrainedModel, ids: list[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Iterator[str]:
    """The pieces of `write`'s text for one row as they come; closing the iterator stops the writing."""
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    closed = threading.Event()

    def hear(piece: str) -> None:
        if closed.is_set():
            raise InterruptedError
        pieces.put(piece)

    def run() -> None:
        try:
            speak(model, ids, tokenizer, sampling, hear)
            pieces.put(None)
        except BaseException as error:  # for the reader, in whose thread it belongs
            pieces.put(error)

    writer = threading.Thread(target=run, daemon=True)
    writer.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        writer.join()


def _options(sampling: Sampling, rows: Sequence[int], width: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `generate` takes for these rows, which have `width` tokens."""
    drawn = {"logits_processor": [Draw(sampling, rows)]} if sampling.temperature else {}
    return {"max_new_tokens": min(sampling.max_new_tokens, room_after(width, tokenizer)), **drawn}


def room_after(width: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model has places for after `width` of them.  Raises ValueError where there is none."""
    whole = min(tokenizer.model_max_length, UNLIMITED)
    if width >= whole:
        raise ValueError(f"the prompt has {width} tokens, and the model has places for {whole}: shorten it")
    return int(whole - width)


@contextlib.contextmanager
def ending(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[frozenset[int]]:
    """Within, the model is in evaluation mode and generates by its likeliest token alone: of its own generation_config,
    which may ask for beams, penalties or sampling, only the tokens that end a text stay.  Gives those tokens."""
    from transformers import GenerationConfig

    def plain(own: Any) -> Any:
        ends = getattr(own, "eos_token_id", None)
        return GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=getattr(own, "bos_token_id", None),
        )  # fmt: skip

    with generating(model, plain):
        ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
        yield frozenset([] if ends is None else ends if isinstance(ends, list | tuple) else [ends])
