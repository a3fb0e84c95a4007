"""The text of an answer while its tokens come, held back where the next token may still change it."""

from __future__ import annotations

from typing import Any

HALF = "\ufffd"  # what a tokenizer puts for bytes that are no whole character yet
LONGEST = 8  # tokens that one character may take; after so many, what is no character stays none


class Words:
    """Turns tokens into text, one by one: no half character is given out, and nothing that may be the beginning of a
    stop text; `stopped` says that one came, the text before it is the last."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.tokens: list[int] = []
        self.context = self.given = 0  # tokens[context:given] are decoded again with new ones: spaces depend on them
        self.held = ""

    def add(self, token: int) -> str:
        """The text that is sure after one more token."""
        self.tokens.append(token)
        return self._sure(self._new(last=False), last=False)

    def end(self) -> str:
        """What was held back, for nothing more comes."""
        return self._sure(self._new(last=True), last=True)

    def _new(self, last: bool) -> str:
        if self.tokenizer is None:
            return ""
        known = self._text(self.tokens[self.context : self.given])
        text = self._text(self.tokens[self.context :])
        waited = len(self.tokens) - self.given
        if text.endswith(HALF) and not last and waited < LONGEST:
            return ""
        if len(text) <= len(known):  # special tokens have no text
            if waited >= LONGEST:
                self.context = self.given = len(self.tokens)
            return ""
        self.context, self.given = self.given, len(self.tokens)
        if text.endswith(HALF):
            self.context = self.given
        return text[len(known) :]

    def _text(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        # an answer's spaces stay as they were written
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _sure(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        begun = 0 if last else max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
