"""A tokenizer in the form in which llama.cpp reads it: a byte-level BPE, or a BPE over SentencePiece's pieces.

llama.cpp has its own code for splitting texts before the merges and knows it by name (`tokenizer.ggml.pre`).  A
tokenizer is written where its own splitting is one of those, piece by piece; any other would be read as another
tokenizer, without a word, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
ELSEWHERE = "llama.cpp's convert_hf_to_gguf.py knows more kinds: run it on the merged folder (`undula merge`)"

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WHOLE, _BYTES = ("ByteLevel", False, True), ("ByteLevel", False, False)  # add_prefix_space, use_regex


@dataclass(frozen=True)
class Splitting:
    """How texts are split before the merges: the steps of tokenizers, and llama.cpp's name for them."""

    name: str
    steps: tuple[tuple[Any, ...], ...]
    whole_first: bool = False  # a piece that is a token itself is not merged (`ignore_merges`)
    normal: str | None = None  # the normaliser


SPLITTINGS = (
    Splitting("gpt-2", (_WHOLE,)),
    Splitting("smollm", (("Digits", True), _WHOLE)),
    Splitting("llama-bpe", (("Split", _LETTERS + r"\p{N}{1,3}" + _REST, "Isolated", False), _BYTES), whole_first=True),
    Splitting("qwen2", (("Split", _LETTERS + r"\p{N}" + _REST, "Isolated", False), _BYTES), normal="NFC"),
)


@dataclass(frozen=True)
class Words:
    """What a GGUF file says of a tokenizer, by the keys behind `tokenizer.`."""

    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos ...
    adds: dict[str, bool] = field(default_factory=dict)  # bos, eos: put there by the tokenizer; space_prefix
    template: str | None = None


def words_of(tokenizer: Any, size: int, ends: Sequence[int] = ()) -> Words:
    """The tokenizer of a model with `size` embeddings, whose generation ends at the tokens `ends` beside the
    tokenizer's own.  Raises ValueError for a tokenizer that llama.cpp would read as another one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer, whose parts could be written. {ELSEWHERE}")
    made = json.loads(backend.to_str())
    if made["model"].get("type") != "BPE":
        raise ValueError(f"the tokenizer is a {made['model'].get('type')}, and only BPE is written. {ELSEWHERE}")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in made["model"]["merges"]]
    tokens, types = _tokens(made, size, len(tokenizer))
    ids = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    others = [end for end in dict.fromkeys(ends) if end != ids.get("eos")]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    if len(others) > 2 or any(not 0 <= end < size for end in others):
        raise ValueError(f"generation ends at the tokens {list(ends)}: llama.cpp has places for three, below {size}")
    adds, template = _adds(tokenizer, ids), tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if made["model"].get("byte_fallback"):
        adds["space_prefix"] = _prefixed(made)
        scores = _scores(tokens, merges)
        return Words("llama", "default", tokens, types, scores=scores, ids=ids, adds=adds, template=template)
    adds["space_prefix"] = False
    pre = _splitting(made).name
    return Words("gpt2", pre, tokens, types, [" ".join(m) for m in merges], ids=ids, adds=adds, template=template)


def _tokens(made: dict[str, Any], size: int, count: int) -> tuple[list[str], list[int]]:
    """Texts and types by id.  Ids of the embedding without a token are there, unused."""
    if count > size:
        raise ValueError(f"the tokenizer has {count} tokens, the model's embedding {size}: the file would not load")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    unknown, pieces = made["model"].get("unk_token"), made["model"].get("byte_fallback")
    for token, i in made["model"]["vocab"].items():
        is_byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if is_byte else UNKNOWN if token == unknown else NORMAL
    for added in made["added_tokens"]:
        # `normalized` says nothing where the normaliser changes nothing of it
        odd = [flag for flag in ("lstrip", "rstrip", "single_word") if added.get(flag)]
        if odd:
            raise ValueError(
                f"the added token {added['content']!r} has {', '.join(odd)}, which llama.cpp does not follow: texts "
                f"around it would become other tokens. {ELSEWHERE}"
            )
        kind = CONTROL if added["special"] else OWN
        tokens[added["id"]] = added["content"]
        types[added["id"]] = UNKNOWN if added["content"] == unknown and pieces else kind
    return tokens, types


def _adds(tokenizer: Any, ids: dict[str, int]) -> dict[str, bool]:
    """Whether texts get a token before and behind them: seen at one, whatever the post-processor is."""
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    first = bool(full[:1] != plain[:1] and full[:1] == [ids.get("bos")])
    last = bool(full[-1:] != plain[-1:] and full[-1:] == [ids.get("eos")])
    if full[first : len(full) - last] != plain:
        raise ValueError(
            f"the tokenizer puts more around a text than its bos and eos tokens: {full} of {plain}. {ELSEWHERE}"
        )
    return {"bos": first, "eos": last}


def _steps(made: dict[str, Any] | None) -> list[dict[str, Any]]:
    if made is None:
        return []
    inner = made.get("pretokenizers", made.get("normalizers"))
    return [made] if inner is None else [step for one in inner for step in _steps(one)]


def _step(made: dict[str, Any]) -> tuple[Any, ...]:
    kind = made["type"]
    if kind == "ByteLevel":
        return kind, made.get("add_prefix_space", True), made.get("use_regex", True)
    if kind == "Digits":
        return kind, made["individual_digits"]
    if kind == "Split":
        return kind, made["pattern"].get("Regex"), made["behavior"], made["invert"]
    return kind, json.dumps(made, sort_keys=True)


def _splitting(made: dict[str, Any]) -> Splitting:
    steps = tuple(_step(one) for one in _steps(made["pre_tokenizer"]))
    normal = [one["type"] for one in _steps(made["normalizer"])]
    first = bool(made["model"].get("ignore_merges"))
    for known in SPLITTINGS:
        if known.steps == steps and known.whole_first == first and normal in ([], [known.normal]):
            return known
    raise ValueError(
        "llama.cpp has no name that this knows for how the tokenizer splits texts before its merges: "
        f"{[*normal, *steps]}{', ignore_merges' if first else ''}; known are "
        f"{', '.join(s.name for s in SPLITTINGS)}. {ELSEWHERE}"
    )


SPACE = "\u2581"  # SentencePiece's


def _prefixed(made: dict[str, Any]) -> bool:
    """Whether a text gets a space before it, of a tokenizer over SentencePiece's pieces.  Refuses other ones."""
    normal, steps = _steps(made["normalizer"]), _steps(made["pre_tokenizer"])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not steps and normal == [{"type": "Prepend", "prepend": SPACE}, replaced]:
        return True
    if not steps and normal == [replaced]:
        return False
    if not normal and len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split", True):
        scheme = steps[0].get("prepend_scheme", "always")
        if steps[0]["replacement"] == SPACE and scheme in ("first", "never"):
            return bool(scheme == "first")
    raise ValueError(
        f"the tokenizer prepares texts by {normal or steps}, which is not SentencePiece's way. {ELSEWHERE}"
    )


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece merges the neighbours whose piece has the highest score, a BPE those whose merge comes first: a
    piece's score is minus the place of its first merge.  Refuses merges of one piece that others come between."""
    place: dict[str, int] = {}
    last = ""
    for i, pair in enumerate(merges):
        piece = "".join(pair)
        if piece in place and piece != last:
            raise ValueError(f"{piece!r} is merged at several places of the order, which no score can say. {ELSEWHERE}")
        last = piece
        place.setdefault(piece, i)
    return [-float(place.get(token, len(merges))) for token in tokens]
