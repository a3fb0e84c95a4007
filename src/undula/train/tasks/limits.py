"""What a model can take: how long a row may be, which ids it knows, what it pads with.  Told before anything runs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEARD = "the sound is cut at its end"  # of which seconds are counted
END = "its end token included"  # what is said of a cut that takes the end of what is learned
NOTHING = "nothing is left that would be learned"
UNLIMITED = 10**9  # tokenizers write 10^30 where they do not know


@dataclass
class Cuts:
    """How many rows lost tokens of what, the longest of them, and what remained of it."""

    found: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, what: str, had: int, kept: int) -> None:
        count, longest, remained = self.found.get(what, (0, 0, 0))
        self.found[what] = (count + 1, *max((longest, remained), (had, kept)))

    def told(self, rows: int, name: str) -> Iterator[str]:
        for what, (count, longest, kept) in self.found.items():
            unit = "seconds" if what == HEARD else "tokens"
            yield f"{count} of {rows} {name} rows: {what} (the longest has {longest} {unit}, {kept} are kept)"


MANY = 0.1  # the share of a part's tokens that may be unknown before it is worth a word


@dataclass
class Unknown:
    """How many tokens the tokenizer has no entry for, and how many rows have none but such.  `token` is its id for
    those; None where it has none, or uses that id for something else too."""

    token: int | None
    special: frozenset[int]
    tokens: int = 0
    unknown: int = 0
    rows: int = 0

    @classmethod
    def to(cls, tokenizer: Any) -> Unknown:
        """None counted yet."""
        token = getattr(tokenizer, "unk_token_id", None)
        others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "sep", "cls", "mask")]
        return cls(None if token in others else token, frozenset(i for i in others if i is not None))

    def add(self, ids: Iterable[int]) -> None:
        text = [i for i in ids if i not in self.special]
        strange = sum(i == self.token for i in text)
        self.tokens, self.unknown = self.tokens + len(text), self.unknown + strange
        self.rows += strange > 0 and strange == len(text)

    def told(self, rows: int, name: str) -> Iterator[str]:
        """Raises ValueError where nothing else is there."""
        if self.unknown and self.unknown == self.tokens:
            raise ValueError(
                f"the tokenizer knows nothing of the {name} rows: all {self.tokens} tokens of {rows} rows are its "
                f"unknown token (id {self.token}). Take the tokenizer that belongs to the model and to this language"
            )
        if self.unknown > MANY * self.tokens:
            yield (
                f"{self.unknown} of {self.tokens} tokens of the {name} rows are unknown to the tokenizer (id "
                f"{self.token}), and {self.rows} of {rows} rows hold no other: is it the model's, of this language?"
            )


def table_of(model: nn.Module) -> int | None:
    """How many tokens a model with a table of positions can take; None for one that has no such table.  RoBERTa and its
    kin leave out the rows up to that of padding, OPT's and BART's begin at an offset."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe") and "relative" not in last:
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - int(skipped))
    return min(found, default=None)


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model is made for: by its table of positions, else by its configuration."""
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    table = table_of(model)
    return table if table is not None else said if isinstance(said, int) and said > 0 else None


def vocabulary(model: nn.Module) -> int | None:
    """How many ids the model has an embedding for; None where it has no one table of them."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def settle_pad(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> None:
    """Has configurations say what the tokenizer pads with; one that has nothing for it takes its end token.

    Raises ValueError for a tokenizer without any token to pad with.
    """
    if tokenizer.pad_token is None:
        spare = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if spare is None:
            raise ValueError("the tokenizer has no token to pad with, nor an end token in its place: set pad_token")
        tokenizer.pad_token = spare
    for config in configs:
        config.pad_token_id = tokenizer.pad_token_id


def padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Sees to it that tokenizer and model agree on what pads (the tokenizer decides; one that has nothing for it takes
    its end token), and on how many tokens a row may have.

    Raises ValueError for a tokenizer without any token to pad with, or with one that the model has no row for.
    """
    settle_pad(tokenizer)
    pad, size = tokenizer.pad_token_id, vocabulary(model)
    if size is not None and pad >= size:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, id {pad}, but the model's embedding has {size} rows "
            f"(ids 0 to {size - 1}): choose another pad_token, or resize the model's embedding and save it"
        )
    configs = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    settle_pad(tokenizer, *(config for config in configs if config is not None))
    limit = positions(model)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if table_of(model) is not None:  # a row's positions would depend on its neighbours
        tokenizer.padding_side = "right"


class Read(Protocol):
    """Rows as examples, see `task.Examples`."""

    @property
    def task(self) -> Any: ...

    @property
    def rows(self) -> Any: ...

    @property
    def processor(self) -> Any: ...

    @property
    def seen(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def traced(self, i: int) -> Any: ...


def fits(examples: Read, model: PreTrainedModel, name: str) -> list[str]:
    """Looks at every row as the model will get it.  Returns sentences on what is cut.

    Raises ValueError for rows that are longer than the model's table of positions, or that have ids beyond its
    embedding, with both numbers; and where the tokenizer knows nothing of any row.
    """
    cuts, table, size = Cuts(), table_of(model), vocabulary(model)
    unknown = Unknown.to(examples.processor)
    lengths, largest, over, cut, ends = array("Q"), -1, 0, 0, 0
    for i in range(len(examples)):
        example, lost = examples.traced(i)
        ids = example["input_ids"]
        lengths.append(len(ids))
        largest = max(largest, max(ids, default=-1))
        cut += bool(lost)
        ends += any(END in what for what in lost)
        over += table is not None and len(ids) > table
        unknown.add(ids)
        for what, (had, kept) in lost.items():
            cuts.add(what, had, kept)
    examples.seen.update(lengths=lengths, cut=cut, lost_ends=ends)
    if table is not None and over:
        raise ValueError(
            f"{over} of {len(examples)} {name} rows are longer than the model can take: the longest has "
            f"{max(lengths)} tokens, the model has {table} positions. {_asked(examples.task)}"
        )
    if size is not None and largest >= size:
        token = examples.processor.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{name} rows hold the token {token!r} with the id {largest}, but the model's embedding has {size} rows "
            f"(ids 0 to {size - 1}): take the tokenizer that belongs to the model, or resize the model's embedding"
        )
    empty, had, kept = cuts.found.get(NOTHING, (0, 0, 0))
    if empty and empty == len(examples):
        raise ValueError(
            f"nothing is left to learn of any of the {empty} {name} rows: the longest has {had} tokens, {kept} of them "
            f"kept. {_asked(examples.task, 'Raise') or NO_ROOM}"
        )
    return [*cuts.told(len(examples), name), *unknown.told(len(examples), name)]


NO_ROOM = "Take shorter rows, or a model with more positions"


def _asked(task: Any, how: str = "Lower") -> str:
    names = ("max_length", "max_completion")
    set_to = [f"{n}={v}" for n in names if (v := getattr(task, n, None)) is not None]
    return f"{how} {' or '.join(set_to)}, or leave it out: rows are then cut to what the model takes" if set_to else ""
