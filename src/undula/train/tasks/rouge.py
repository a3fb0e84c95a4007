"""Generated texts against those that were wanted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..data.spans import words_of


@functools.cache
def _scorer() -> Any:
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    stem = PorterStemmer().stem

    class Words:
        """rouge_score's words where all is ASCII; words in any other script too, of which it would make nothing."""

        def tokenize(self, text: str) -> list[str]:
            words = [text[a:b] for text in (text.lower(),) for a, b in words_of(text)]
            return [stem(w) if w.isascii() and len(w) > 3 else w for w in words if any(c.isalnum() for c in w)]

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())


SHOWN, KEPT = 300, 5  # letters of a text that a report shows, and texts


def agreement(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """The means of ROUGE-1, -2 and -L (F, 0 to 1; English words stemmed), and the share that is the same to the letter,
    white space at both ends apart."""
    scores = [_scorer().score(want, text) for want, text in zip(wanted, found, strict=True)]
    rouge = {k: sum(s[k].fmeasure for s in scores) / len(scores) for k in ("rouge1", "rouge2", "rougeL")}
    same = sum(want.strip() == text.strip() for want, text in zip(wanted, found, strict=True))
    return rouge | {"exact_match": same / len(found)}


def shortened(text: str, most: int = SHOWN) -> str:
    """The text, or so many of its letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def compared(asked: Sequence[str], wanted: Sequence[str], found: Sequence[str]) -> list[dict[str, str]]:
    """What was asked, wanted and written, of the first rows."""
    rows = list(zip(asked, wanted, found, strict=True))[:KEPT]
    return [{"asked": shortened(a, 2 * SHOWN), "wanted": shortened(w, 2 * SHOWN), "written": shortened(f, 2 * SHOWN)}
            for a, w, f in rows]  # fmt: skip
