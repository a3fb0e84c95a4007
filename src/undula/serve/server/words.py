"""What single tokens say: as text, and as bytes where a token is a part of a letter."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 1 << 16  # tokens that are remembered


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """{letter: byte} of byte-level BPE: printable bytes stand for themselves, the others for letters from 256 on
    (GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Words:
    """(text, bytes) of the tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.kind = "" if backend is None else json.dumps(json.loads(backend.to_str()).get("decoder"))
        self.said = lru_cache(maxsize=KEPT)(self._said)

    def _said(self, token: int) -> tuple[str, bytes]:
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(raw, str):
            return "", b""
        if token in self.special:
            return raw, raw.encode()
        found = self._bytes(raw)
        return found.decode("utf-8", "replace"), found

    def _bytes(self, raw: str) -> bytes:
        if "ByteLevel" in self.kind:
            letters = _bytes_of_letters()
            return bytes(letters[c] for c in raw) if all(c in letters for c in raw) else raw.encode()
        if len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">"):
            return bytes.fromhex(raw[3:5])
        return raw.replace("\u2581", " ").encode("utf-8", "replace")
