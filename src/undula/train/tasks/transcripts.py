"""How well transcripts agree: word and character error rates, as written or normalised."""

from __future__ import annotations

import abc
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.choice import Choice
from ...core.extras import needs


class Normaliser(Choice):
    """What of a transcript counts, before words are compared."""

    @abc.abstractmethod
    def __call__(self, text: str) -> str:
        """The text without what does not count."""


@Normaliser.register
@dataclass(frozen=True)
class Spoken(Normaliser):
    """Small letters, and no punctuation but the apostrophe within a word: what can be heard.  Numbers and abbreviations
    stay as they are written."""

    def __call__(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
        kept = [c if c == "'" or unicodedata.category(c)[0] not in "PS" else " " for c in text]
        return " ".join(word for word in (w.strip("'") for w in "".join(kept).split()) if word)


@needs("speech")
def error_rates(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """{wer, cer}: insertions, deletions and substitutions of words (of characters) over how many there are, of all rows
    together (jiwer).  Where a reference is empty, all that was found are insertions."""
    import jiwer

    pairs = list(zip(wanted, found, strict=True))
    full = [(want, text) for want, text in pairs if want.strip()]
    extra = [text for want, text in pairs if not want.strip()]
    words = jiwer.process_words([w for w, _ in full], [t for _, t in full]) if full else None
    letters = jiwer.process_characters([w for w, _ in full], [t for _, t in full]) if full else None
    return {
        "wer": _rate(words, sum(len(text.split()) for text in extra)),
        "cer": _rate(letters, sum(len(text.strip()) for text in extra)),
    }


def _rate(made: object, extra: int) -> float:
    count = {k: int(getattr(made, k, 0)) for k in ("substitutions", "deletions", "insertions", "hits")}
    there = count["substitutions"] + count["deletions"] + count["hits"]
    wrong = count["substitutions"] + count["deletions"] + count["insertions"] + extra
    return wrong / there if there else float(wrong > 0)
