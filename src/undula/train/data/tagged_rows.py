"""Rows of token classification: tokens with tags, or texts with spans, as columns hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from ..tasks.heads import HeadTask
from .columns import alike, in_order, known, spot, texts
from .faults import Faults
from .source import source_of
from .spans import span_lists, tag_lists, token_lists, words_of
from .tags import (
    OUTSIDE,
    Scheme,
    in_tag_order,
    kind_of,
    parted,
    tagged,
)

if TYPE_CHECKING:
    from datasets import Dataset

Tagged = tuple[list[list[str]], list[list[str]]]  # the tokens of each row, their tags


class TaggedRows(HeadTask):
    """A task whose rows are tokens with tags, see `TokenClassification`."""

    roles: ClassVar = {
        "tokens": ("tokens", "words"),
        "tags": ("tags", "ner_tags", "labels", "ner", "pos_tags"),
        "text": ("text", "sentence"),
        "spans": ("spans", "entities", "label", "labels"),
    }
    targets = ("tags", "spans")
    tokens: str | None
    tags: str | None
    text: str | None
    spans: str | None
    names: tuple[str, ...]

    def scheme(self) -> Scheme:
        """How these tags make entities."""
        return Scheme.of(self.names)

    def _form(self, there: Sequence[str]) -> tuple[str, str]:
        """The roles of the rows: those of the form that is named, else of the first whose input is there."""
        if self.text is not None or self.spans is not None:
            return "text", "spans"
        if self.tokens is not None or self.tags is not None:
            return "tokens", "tags"
        return ("tokens", "tags") if set(self.roles["tokens"]) & set(there) else ("text", "spans")

    def columns(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        return self._columns(self._form(there), there, faults)

    def inputs(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        return self._columns(self._form(there)[:1], there, faults)

    def check(self, split: Dataset, faults: Faults) -> None:
        columns = self.columns(split.column_names, faults)
        if len(columns) == 2:
            _, tags = self._tagged(split, columns, faults)
            if not self.names:
                flat = [(row, tag) for row, each in enumerate(tags) for tag in each]
                alike(split, list(columns.values())[1], [t for _, t in flat], faults, [r for r, _ in flat])

    def check_fitted(self, split: Dataset, faults: Faults) -> None:
        columns = self.columns(split.column_names)
        self._numbers(split, columns, self._tagged(split, columns, faults)[1], faults)

    def fitted(self, train: Dataset) -> Self:
        faults, columns = Faults(), self.columns(train.column_names)
        _, tags = self._tagged(train, columns, faults)
        faults.check()
        found = {tag for each in tags for tag in each}
        kind = train.features[columns["tags"]] if "tags" in columns else None
        declared = tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())
        if not self.names and not declared and len(found - {OUTSIDE}) < 1:
            raise ValueError("there is no entity in any row: all tags are O")
        return replace(self, names=self.names or declared or _all_tags(found))  # type: ignore[type-var]

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset, Features, List, Value

        faults, columns = Faults(), self.columns(split.column_names)
        tokens, tags = self._tagged(split, columns, faults)
        numbers = self._numbers(split, columns, tags, faults)
        faults.check()
        kinds = Features({"tokens": List(Value("string")), "tags": List(Value("int64"))})
        return Dataset.from_dict({"tokens": tokens, "tags": numbers}, features=kinds)

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        from datasets import Dataset

        columns = self.inputs(split.column_names, faults)
        if "text" in columns:
            written = texts(split, columns["text"], faults)
            words = [words_of(text) for text in written]
            tokens = [[text[a:b] for a, b in each] for text, each in zip(written, words, strict=True)]
            starts = [[a for a, _ in each] for each in words]
            return Dataset.from_dict({"text": written, "tokens": tokens, "starts": starts})
        tokens = token_lists(split, columns["tokens"], faults) if columns else []
        starts = [[sum(len(t) + 1 for t in each[:i]) for i in range(len(each))] for each in tokens]
        return Dataset.from_dict({"text": [" ".join(each) for each in tokens], "tokens": tokens, "starts": starts})

    def _tagged(self, split: Dataset, columns: Mapping[str, str], faults: Faults) -> Tagged:
        """The tokens of each row and their tags; of a text its words, cut at the edges of spans."""
        source = source_of(split)
        if "text" in columns:
            written = texts(split, columns["text"], faults)
            spans = span_lists(split, columns["spans"], written, faults)
            edges = [[at for _, *both in each for at in both] for each in spans]
            words = [words_of(text, cuts) for text, cuts in zip(written, edges, strict=True)]
            tokens = [[text[a:b] for a, b in each] for text, each in zip(written, words, strict=True)]
            return tokens, [tagged(each, spans[row]) for row, each in enumerate(words)]
        tokens = token_lists(split, columns["tokens"], faults)
        tags = tag_lists(split, columns["tags"], self.names, faults)
        for row, (a, b) in enumerate(zip(tokens, tags, strict=True)):
            if len(a) != len(b) and a and b:
                what = spot(
                    split, columns["tags"], f"has not as many tags as there are tokens in {columns['tokens']!r}"
                )
                faults.add(what, f"{source.place(row)} has {len(b)} for {len(a)}", row=source.key(row))
        return tokens, tags

    def _numbers(
        self, split: Dataset, columns: Mapping[str, str], tags: list[list[str]], faults: Faults
    ) -> list[list[int]]:
        places = [row for row, each in enumerate(tags) for _ in each]
        flat = [tag for each in tags for tag in each]
        numbers = iter(known(split, list(columns.values())[1], flat, self.names, faults, places))
        return [[next(numbers) for _ in each] for each in tags]

    def notes(self, split: Dataset) -> Iterator[str]:
        yield from super().notes(split)
        columns = self.columns(split.column_names)
        tokens, tags = self._tagged(split, columns, Faults())
        found = {tag for each in tags for tag in each}
        strays = [(row, each[i]) for row, each in enumerate(tags) for i in Scheme.of(found).strays(each)]
        if strays:
            row, tag = strays[0]
            yield (
                f"{len(strays)} tags, such as {tag} in {source_of(split).place(row)}, follow no tag that begins their "
                "entity, or do not end it: they are learned, and count as no entity"
            )
        if not Scheme.of(found).prefixes:
            of = "numbers without names (names lists them)" if all(t.isdigit() for t in found) else "without B- and I-"
            yield f"the tags are {of}: each token{'' if OUTSIDE not in found else ' but those of O'} is an entity"
        if "text" in columns:
            whole = [len(words_of(text)) for text in texts(split, columns["text"], Faults())]
            cut = sum(len(each) - n for each, n in zip(tokens, whole, strict=True))
            if cut:
                yield f"{cut} spans begin or end inside of a word, which is cut there; words to answer are not"


def _all_tags(found: Iterable[str]) -> tuple[str, ...]:
    """The tags of the data in order; of a type that begins with B- also I-, where nothing ends its entities."""
    names, scheme = set(found), Scheme.of(found)
    if not scheme.prefixes:
        return (OUTSIDE, *in_order(sorted(names - {OUTSIDE}))) if OUTSIDE in names else in_order(sorted(names))
    if not scheme.ends:
        names |= {f"I{tag[1:]}" for tag in names if parted(tag)[0] == "B" and kind_of(tag) != tag}
    return in_tag_order(names | {OUTSIDE})
