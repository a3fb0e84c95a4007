"""Tags of tokens (BIO, BIOES, BILOU) as entities, and how well two sequences of entities agree: exact, by whole spans.

The strict reading of seqeval (Nakayama 2018): an entity begins with B- and goes on with I- of the same type; with E- or
S- (L- or U-) among the tags it must end with E- (L-), or be the single S- (U-).  What does not fit so is no entity.
Tags without such a prefix (parts of speech) are entities of one token each, of any name but O.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
TAG = re.compile(r"([BIOESLU])(?:[-_](.+))?", re.S)  # B alone: of the one type that there is
SAME = {"L": "E", "U": "S"}  # BILOU's names for BIOES's
Span = tuple[str, int, int]  # type, first token, the one behind the last


@dataclass(frozen=True)
class Scheme:
    """How tags make entities.  `prefixes`: whether tags have them; `ends`: whether an entity says its own end."""

    prefixes: bool
    ends: bool

    @staticmethod
    def of(names: Iterable[str]) -> Scheme:
        """By the names of all tags: prefixes, where each tag but O has one; ends, where one is E, S, L or U."""
        found = [TAG.fullmatch(name) for name in names if name != OUTSIDE]
        prefixes = bool(found) and all(found)
        return Scheme(prefixes, prefixes and any(SAME.get(m[1], m[1]) in "ES" for m in found if m))

    def spans(self, tags: Sequence[str]) -> list[Span]:
        """The entities of a sequence of tags, in order."""
        if not self.prefixes:
            return [(tag, i, i + 1) for i, tag in enumerate(tags) if tag != OUTSIDE]
        found: list[Span] = []
        at = 0
        while at < len(tags):
            prefix, kind = parted(tags[at])
            end = at + 1
            if prefix == "B":
                last = prefix
                while end < len(tags) and last != "E" and parted(tags[end]) in (("I", kind), ("E", kind)):
                    last = parted(tags[end])[0]
                    end += 1
                if not self.ends or last == "E":
                    found.append((kind, at, end))
            elif prefix == "S":
                found.append((kind, at, end))
            at = end
        return found

    def strays(self, tags: Sequence[str]) -> list[int]:
        """The tokens whose tags are in no entity, though they are not O."""
        inside = {i for _, first, end in self.spans(tags) for i in range(first, end)}
        return [i for i, tag in enumerate(tags) if tag != OUTSIDE and i not in inside]


def parted(tag: str) -> tuple[str, str]:
    """(prefix, type) of a tag, BILOU's prefixes as BIOES's; ("O", "") of what has none."""
    found = TAG.fullmatch(tag)
    return (SAME.get(found[1], found[1]), found[2] or "") if found and found[1] != OUTSIDE else (OUTSIDE, "")


def kind_of(tag: str) -> str:
    """The type of entity that a tag is of: without its prefix."""
    return parted(tag)[1] or tag


def agreement(wanted: Iterable[Sequence[Span]], found: Iterable[Sequence[Span]]) -> dict[str, float]:
    """Micro precision, recall and F1 of whole entities; 0 where there is nothing to divide by."""
    right = asked = given = 0
    for want, have in zip(wanted, found, strict=True):
        right += sum((Counter(want) & Counter(have)).values())
        asked, given = asked + len(want), given + len(have)
    precision, recall = (right / n if n else 0.0 for n in (given, asked))
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


def in_tag_order(names: Iterable[str]) -> tuple[str, ...]:
    """O, then type by type, the first of an entity before what follows it."""
    order = "SBIE"
    return tuple(sorted(names, key=lambda n: (n != OUTSIDE, kind_of(n), order.find(parted(n)[0]), n)))


def tagged(words: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[str]:
    """Tags in BIO of words, each (first character, the one behind its last), by spans of characters."""
    tags = [OUTSIDE] * len(words)
    for kind, start, end in spans:
        inside = [i for i, (a, b) in enumerate(words) if a < end and b > start]
        for number, i in enumerate(inside):
            tags[i] = f"{'I' if number else 'B'}-{kind}"
    return tags
