"""Speech recognition: a sound to its text, by an encoder and a decoder (Whisper) or by CTC (wav2vec 2.0)."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.extras import needs
from ...core.ranges import Count
from ..base import lacking
from ..data.audio import opened, seconds, sounds
from ..data.columns import texts
from ..data.faults import Faults
from .answering import outputs, windows
from .causal_lm import IGNORED
from .decoders import START, greedy, settle_start, with_decoder_inputs
from .limits import END, HEARD, Cuts, Unknown, padding
from .outputs import head_of
from .seq2seq import room
from .shown import Piece, pieces
from .task import (
    Example,
    Examples,
    Processor,
    Task,
    Traced,
)
from .transcripts import Normaliser, error_rates

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel

INPUTS = ("input_features", "input_values")  # what a feature extractor makes of a sound
UNMASKED = "undula_unmasked"  # an attribute of a tokenizer: whether the model hears what fills a shorter sound up


@Task.register
@dataclass(frozen=True)
class SpeechRecognition(Task):
    """Sound to text: word and character error rates of greedy transcripts of all rows, and the loss.

    The kind of the model follows from its configuration: where transformers knows it as a speech model with a decoder,
    the decoder learns to write the text; else it learns by CTC.  Sounds are brought to the rate of the model.

    `normaliser`: what of both transcripts counts (None: every character, case and punctuation included).
    `language`: of a multilingual Whisper, such as "german" (None: it finds out).  max_text: tokens of a text.
    """

    roles: ClassVar = {
        "audio": ("audio", "file_name", "path", "file", "sound"),
        "text": ("text", "transcript", "transcription", "sentence"),
    }
    targets = ("text",)
    peft = None
    auto = "AutoModelForSpeechSeq2Seq"
    pipeline = "automatic-speech-recognition"
    headline = "wer"
    has_head = False
    mean_loss = True
    more_is_better = False

    audio: str | None = None
    text: str | None = None
    language: str | None = None
    normaliser: Normaliser | None = None
    max_text: Count | None = None

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        return cls() if head_of(config, "ForCTC") or (has_decoder(config) and head_of(config, "Generation")) else None

    def check(self, split: Dataset, faults: Faults) -> None:
        columns = self.columns(split.column_names, faults)
        if "audio" in columns:
            sounds(split, columns["audio"], faults)
        if "text" in columns:
            texts(split, columns["text"], faults)

    def rows(self, split: Dataset) -> Dataset:
        faults, columns = Faults(), self.columns(split.column_names)
        written = texts(split, columns["text"], faults)
        heard = self._heard(split, columns["audio"], faults)
        faults.check()
        return heard.add_column("text", written)

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        columns = self.inputs(split.column_names, faults)
        return self._heard(split, columns["audio"], faults) if columns else split

    def _heard(self, split: Dataset, column: str, faults: Faults) -> Dataset:
        made = sounds(split, column, faults).select_columns([column])
        return made if column == "audio" else made.rename_column(column, "audio")

    @needs("speech")
    def processor(self, path: str) -> Processor:
        """The feature extractor and the tokenizer together.  Raises ValueError for a folder that lacks one."""
        from transformers import AutoProcessor

        found = AutoProcessor.from_pretrained(path)
        for part in ("feature_extractor", "tokenizer"):
            if getattr(found, part, None) is None:
                raise ValueError(f"{path} has no {part}: a speech model needs it to make its inputs")
        if self.language is not None:
            if not hasattr(found.tokenizer, "set_prefix_tokens"):
                raise ValueError(f"language={self.language!r}, but {type(found.tokenizer).__name__} knows no languages")
            found.tokenizer.set_prefix_tokens(language=self.language, task="transcribe")
        return found

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCTC, AutoModelForSpeechSeq2Seq

        if has_decoder(AutoConfig.from_pretrained(path)):
            return AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=dtype, **quantised)
        said = {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}  # else a batch's sum, infinite by one row
        return AutoModelForCTC.from_pretrained(path, dtype=dtype, **quantised, **said)

    def agree(self, processor: Processor, model: PreTrainedModel) -> None:
        padding(processor.tokenizer, model)
        # whose first layer normalises over all of a sound ("group"), it does so over what fills it up, mask or not
        processor.tokenizer.__dict__[UNMASKED] = getattr(model.config, "feat_extract_norm", None) == "group"
        if has_decoder(model.config):
            settle_start(processor.tokenizer, model)

    def head(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The layer over the letters, where the model's files have none."""
        return tuple(n for n in lacking(model) if not n.startswith(f"{model.base_model_prefix}."))

    def example(self, row: Mapping[str, Any], processor: Processor) -> Example:
        return self.traced(row, processor)[0]

    def traced(self, row: Mapping[str, Any], processor: Processor) -> Traced:
        maker = processor.feature_extractor
        samples = opened(row["audio"], maker.sampling_rate)
        made = maker(samples, sampling_rate=maker.sampling_rate, return_tensors="pt")
        found = {name: made[name][0] for name in (*INPUTS, "attention_mask") if name in made}
        limit, lost = longest(processor), dict[str, tuple[int, int]]()
        if limit is not None and len(samples) > limit * maker.sampling_rate:
            lost[HEARD] = round(len(samples) / maker.sampling_rate), round(limit)
        if "text" not in row:
            return found, lost
        ids, most = self._ids(row["text"], processor), self._most(processor)
        return {**found, "labels": ids[:most]}, lost

    def _ids(self, text: str, processor: Processor) -> list[int]:
        """The tokens of a text; what the decoder begins with is none of them."""
        ids = list(processor.tokenizer(text, verbose=False)["input_ids"])
        start = processor.tokenizer.__dict__.get(START)
        return ids[1:] if start is not None and ids[:1] == [start] else ids

    def _most(self, processor: Processor) -> int:
        return self.max_text or room(processor.tokenizer)

    def shown(self, row: Mapping[str, Any], processor: Processor) -> list[Piece]:
        return pieces(self.example(row, processor), processor, row["text"])

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        """Looks at lengths, by the files' headers, and at texts.  Raises ValueError for sounds that are too short for
        the model, for texts that its layer over the letters does not know, and as `Unknown` does."""
        processor, limit, cuts = examples.processor, longest(examples.processor), Cuts()
        unknown, most, size = Unknown.to(processor.tokenizer), self._most(processor), model.config.vocab_size
        rate, crowded, short = processor.feature_extractor.sampling_rate, 0, list[int]()
        for number, row in enumerate(examples.rows):
            ids, length = self._ids(row["text"], processor), seconds(row["audio"])
            unknown.add(ids)
            if max(ids, default=0) >= size:
                raise ValueError(
                    f"a {name} text has the id {max(ids)}, but the model knows {size} (0 to {size - 1}): take the "
                    "tokenizer that belongs to the model"
                )
            if len(ids) > most:
                cuts.add(f"the text is cut at its end, {END}", len(ids), most)
            if limit is not None and length > limit:
                cuts.add(HEARD, round(length), round(limit))
            steps = None if has_decoder(model.config) else heard(model, length, rate)
            if steps is not None:
                short += [number] if steps < 1 else []
                crowded += steps < len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        if short:
            raise ValueError(
                f"{len(short)} of {len(examples)} {name} sounds are too short for the model to hear anything, the "
                f"first of them row {short[0] + 1} ({seconds(examples.rows[short[0]]['audio']):.3f} s): remove them"
            )
        few = (
            f"{crowded} of {len(examples)} {name} rows have more letters than the model has steps in their sound: "
            "nothing is learned of them"
        )
        return [*([few] if crowded else []), *cuts.told(len(examples), name), *unknown.told(len(examples), name)]

    def collator(self, processor: Processor) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        def together(examples: list[Example]) -> Mapping[str, torch.Tensor]:
            names = [name for name in (*INPUTS, "attention_mask") if name in examples[0]]
            fill = {"attention_mask": 0.0}
            padded = processor.feature_extractor.padding_value
            batch = {name: stacked([e[name] for e in examples], fill.get(name, padded)) for name in names}
            if "labels" not in examples[0]:
                return batch
            batch["labels"] = stacked([torch.tensor(e["labels"]) for e in examples], IGNORED)
            return with_decoder_inputs(batch, processor.tokenizer)

        return together

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """In the order of the rows; one batch at a time is in memory.  Where the model would hear what fills a shorter
        sound up, those of one length alone come together, so that no answer depends on the others."""
        own = examples.processor.tokenizer.__dict__.get(UNMASKED)
        for start in range(0, len(examples), size):
            alike = defaultdict[int, list[tuple[int, Example]]](list)
            for i in range(start, min(start + size, len(examples))):
                example = examples[i]
                length = next(len(example[name]) for name in INPUTS if name in example)
                alike[length if own or "attention_mask" not in example else 0].append((i, example))
            for each in alike.values():
                yield [i for i, _ in each], [example for _, example in each]

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        decoded = "decoder_input_ids" in batch  # else by CTC, whose loss is a mean over rows
        return int((batch["labels"] != IGNORED).sum()) if decoded else len(batch["labels"])

    def score(self, model: PreTrainedModel, examples: Examples, batch: int) -> dict[str, float]:
        total, count, found = 0.0, 0, dict[int, str]()
        for numbers, inputs, logits in outputs(model, examples, batch, labels=True):
            items = self.items(inputs)
            total, count = total + items * float(loss_of(model, inputs, logits)), count + items
            found |= dict(zip(numbers, self._transcribed(model, inputs, logits, examples.processor), strict=True))
        return {"loss": total / max(count, 1), **self._rates(examples, found)}

    def choose(self, model: PreTrainedModel, examples: Examples, batch: int) -> float:
        return self.score(model, examples, batch)[self.headline]

    def _rates(self, examples: Examples, found: Mapping[int, str]) -> dict[str, float]:
        same: Callable[[str], str] = self.normaliser or str
        wanted = examples.rows["text"][:]
        return error_rates([same(text) for text in wanted], [same(found[i]) for i in range(len(wanted))])

    def _transcribed(
        self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor | None,
        processor: Processor,
    ) -> Sequence[str]:  # fmt: skip
        """The transcripts of a batch; by CTC those of the `logits`."""
        if not has_decoder(model.config):
            found = logits if logits is not None else model(**inputs).logits
            return [text.strip() for text in processor.batch_decode(found.argmax(-1).cpu())]
        given = {k: v for k, v in inputs.items() if k in (*INPUTS, "attention_mask")}
        several = getattr(model.generation_config, "is_multilingual", False)
        asked = {"language": self.language, "task": "transcribe"} if self.language and several else {}
        begins = len(processor.tokenizer("")["input_ids"])
        most = max(1, min(self._most(processor), room(processor.tokenizer) - begins - 1))
        with greedy(model):
            ids = model.generate(**given, **asked, max_new_tokens=most)  # type: ignore[operator]
        return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def answers(
        self, model: PreTrainedModel, rows: Iterable[Mapping[str, Any]], processor: Processor, batch: int
    ) -> Iterator[dict[str, Any]]:
        """{text}: the likeliest transcript.  Raises ValueError for a sound that is too short for the model."""
        count, by_steps = 0, not has_decoder(model.config)
        for window in windows(self, rows, processor, batch):
            found = dict[int, str]()
            if by_steps:
                check_heard(model, window, count)
                for numbers, inputs, logits in outputs(model, window, batch):
                    found |= zip(numbers, self._transcribed(model, inputs, logits, processor), strict=True)
            else:
                for numbers, made in self.batches(window, batch):
                    inputs = {k: v.to(model.device) for k, v in self.collator(processor)(made).items()}
                    found |= zip(numbers, self._transcribed(model, inputs, None, processor), strict=True)
            yield from ({"text": found[i]} for i in range(len(window)))
            count += len(window)


def heard(model: PreTrainedModel, length: float, rate: int) -> int | None:
    """In how many steps a CTC model hears a sound of `length` seconds; None where it does not say."""
    steps = getattr(model, "_get_feat_extract_output_lengths", None)
    return None if steps is None else int(steps(torch.tensor(round(length * rate))))


def check_heard(model: PreTrainedModel, asked: Examples, before: int) -> None:
    """Raises ValueError for sounds in which the model has no step; `before`: how many rows came before these."""
    rate = asked.processor.feature_extractor.sampling_rate
    for number, row in enumerate(asked.rows, before + 1):
        length = seconds(row["audio"])
        steps = heard(model, length, rate)
        if steps is not None and steps < 1:
            raise ValueError(f"row {number} ({length:.4f} s) is too short for the model to hear anything: remove it")


def has_decoder(config: PretrainedConfig) -> bool:
    """Whether the configuration is that of a speech model with a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    return getattr(config, "model_type", None) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES


def longest(processor: Processor) -> float | None:
    """How many seconds the feature extractor keeps of a sound; None for one that keeps all."""
    maker = processor.feature_extractor
    samples = getattr(maker, "n_samples", None)
    return None if samples is None else samples / maker.sampling_rate


def loss_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch: by its logits, where a decoder wrote them, else by CTC, which the model itself does."""
    if has_decoder(model.config):
        labels = inputs["labels"]
        return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).loss
    return found


def stacked(parts: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """(N, T, ...) of tensors (T, ...) that differ in their first dimension at most, padded at its end."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)
