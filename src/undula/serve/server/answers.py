"""Replies of the engine as OpenAI's clients read them: whole, and piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..request import Chosen, Piece
from .words import Words


@dataclass
class Written:
    """One answer, as far as it is written."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


def finite(logprob: float | None) -> float | None:
    """As JSON can write it: what cannot come at all has OpenAI's -9999."""
    return logprob if logprob is None else max(logprob, -9999.0)


def usage_of(replies: Sequence[Any], each: int) -> dict[str, Any]:
    """Tokens that were read and written; of `each` answers to one prompt it counts once."""
    used = [reply.usage for reply in replies]
    prompts = sum(one.prompt_tokens for one in used[::each])
    written = sum(one.completion_tokens for one in used)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in used[::each])},
    }


class Plain:
    """`/v1/completions`.  `before[i]` goes before the text of answer i (echo)."""

    def __init__(self, model: str, words: Words, logprobs: bool, before: Sequence[str]):
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                     "model": model}  # fmt: skip
        self.words, self.logprobs, self.before = words, logprobs, before
        self.at = [len(text) for text in before]

    def whole(self, answers: Sequence[Written], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(i, self.before[i] + a.text, a.tokens, a.finish) for i, a in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": usage}

    def opening(self, i: int) -> dict[str, Any] | None:
        return {**self.head, "choices": [self._choice(i, self.before[i], (), None)]} if self.before[i] else None

    def piece(self, i: int, piece: Piece) -> list[dict[str, Any]]:
        return [{**self.head, "choices": [self._choice(i, piece.text, piece.tokens, piece.finish)]}]

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": usage}

    def _choice(self, i: int, text: str, tokens: Sequence[Chosen], finish: str | None) -> dict[str, Any]:
        told = self._told(i, tokens) if self.logprobs else None
        return {"index": i, "text": text, "logprobs": told, "finish_reason": finish}

    def _told(self, i: int, tokens: Sequence[Chosen]) -> dict[str, Any]:
        texts = [self.words.said(one.token)[0] for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.at[i])
            self.at[i] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(one.logprob) for one in tokens],
            "top_logprobs": [{self.words.said(t)[0]: finite(p) for t, p in one.top} for one in tokens],
            "text_offset": offsets,
        }


class Talk:
    """`/v1/chat/completions`."""

    def __init__(self, model: str, words: Words, logprobs: bool):
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.words, self.logprobs = words, logprobs

    def whole(self, answers: Sequence[Written], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": a.text, "refusal": None},
                "logprobs": self._told(a.tokens),
                "finish_reason": a.finish,
            }
            for i, a in enumerate(answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def opening(self, i: int) -> dict[str, Any] | None:
        return self._chunk(i, {"role": "assistant", "content": ""}, (), None)

    def piece(self, i: int, piece: Piece) -> list[dict[str, Any]]:
        said = [self._chunk(i, {"content": piece.text}, piece.tokens, None)] if piece.text or piece.tokens else []
        return [*said, *([] if piece.finish is None else [self._chunk(i, {}, (), piece.finish)])]

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, i: int, delta: dict[str, Any], tokens: Sequence[Chosen], finish: str | None) -> dict[str, Any]:
        told = self._told(tokens) if tokens else None
        choice = {"index": i, "delta": delta, "logprobs": told, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _told(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**self._one(one.token, one.logprob), "top_logprobs": [self._one(t, p) for t, p in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self.words.said(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}
