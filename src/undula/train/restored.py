"""Opening what a run left: its base with the adapter attached; and evaluate(path)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.adapter import Adapter
from ..core.extras import needs
from ..host.host import attach, detach
from ..io import files
from ..io.importing import load_for, needs_base, partly
from ..io.places import place
from .asking import Question, columns_named, is_conversation, question
from .base import config_of, lacking, model_folder, open_model, same_base
from .data.conversation import question as turns
from .data.faults import Faults
from .data.load import load_data, sample, split_of, with_validation
from .foreign import (
    CONFIG,
    Unmeasured,
    base_of,
    named_as,
    own_name,
    roles_of,
    task_of,
)
from .rows import LOG
from .run import RUN, Run, read_run
from .tasks.causal_lm import CausalLM, Chat, Plain
from .tasks.generation import Sampling, write
from .tasks.generation import stream as streamed
from .tasks.heads import HeadTask
from .tasks.task import Examples, Processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@needs("train")
def evaluate(
    path: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    rows: int | None = None,
    skip_faulty: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The metrics of the adapter that a run left in `path`; which rows: see `Restored.examples`.

    skip_faulty: see `Run`; None: of the training's own data what the training left out, of others nothing.
    columns: {role: column}, where other data call theirs otherwise than the training's.

    Raises LookupError for a split that does not exist, and what `restored` raises.
    """
    return restored(path).reading(columns or {}).score(data, split, rows, skip_faulty)


@dataclass(frozen=True)
class Restored:
    """A finished run: its base with the adapter attached, and what reads its data."""

    run: Run
    model: PreTrainedModel
    processor: Processor
    adapter: Adapter  # of no layers, where it is a whole model
    roles: tuple[str, ...] = ()  # that the rows of the training had; empty where nothing says it

    def __repr__(self) -> str:
        """In a few words: a model's own has hundreds of lines, and a notebook shows it of its last line."""
        names = getattr(self.run.task, "names", None) or ()
        some = ", ".join(names[:5]) + (f" ... {len(names)} in all" if len(names) > 5 else "")
        labels = f", labels: {some}" if names else ""
        return (
            f"Restored({self.run.out}: {type(self.run.task).__name__} with {type(self.model).__name__} of "
            f"{self.run.model}{labels}, adapter: {self.adapter!r})"
        )

    @property
    def folder(self) -> str:
        """The base, as `from_pretrained` takes it."""
        return model_folder(self.run.model)

    def reading(self, columns: Mapping[str, str]) -> Restored:
        """The same, its task reading these columns, {role: column}.  Raises LookupError for a role that it has not."""
        task = columns_named(self.run.task, columns)
        return replace(self, run=replace(self.run, task=task)) if columns else self

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs.  Raises AttributeError where there are none."""
        names: tuple[str, ...] | None = getattr(self.run.task, "names", None)
        if names is None:
            raise AttributeError(f"{type(self.run.task).__name__} has no labels: it answers with no classes")
        return names

    def predict(self, given: Any, *, batch: int = 32, columns: Mapping[str, str] | None = None) -> Any:
        """What the model says: a dict for one thing, a list of dicts for several, in their order.

        given: a text, a pair in a list [(a, b)], a prompt, messages, an image (its path, a PIL image, its bytes), a
        dict with the names of columns; a list of one kind of these; a DataFrame, a `Dataset`, {column: values}; the
        path of a file as `undula train` reads it, of a text file (a row a line) or of a folder of images.
        columns: {role: column} where these have other names than the training looked for.

        A class is {label, probability, probabilities}, a number {value}, a text {text, ended}.  The numbers are the
        same whatever `batch` is, but for rounding.  Raises TypeError, ValueError or LookupError for rows that cannot be
        answered, with all that is wrong with them.
        """
        task = columns_named(self.run.task, columns or {})
        asked = question(task, given, self.roles)
        found = list(task.answers(self.model, asked.asked, self.processor, batch))
        return found[0] if asked.single else found

    def answers(self, asked: Question, batch: int = 32, **options: Any) -> Iterator[dict[str, Any]]:
        """The same, one by one, for rows that have been read (see `question`)."""
        return self.run.task.answers(self.model, asked.asked, self.processor, batch, **options)

    def generate(
        self,
        prompt: str | Sequence[Any],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        raw: bool = False,
        stream: bool = False,
        batch: int = 8,
    ) -> Any:
        """What a language model writes after a prompt (a text), or in answer to messages ([{role, content}, ...]): a
        text; for a list of these a list of texts; with `stream`, an iterator over the pieces of one.

        The prompt is put to the model as in training (its chat template, or instruction and line break); `raw`: as it
        is.  `system`: a message that goes before, for models with a chat template.  temperature 0 is the likeliest
        token each time; else tokens are drawn, by `seed` and the prompt's place in the list alone (see `Sampling`).
        Raises TypeError for a model that writes no text, ValueError for a prompt that leaves no place.
        """
        self.check_writes()
        rows = self.written_rows(prompt, system, raw)
        single = isinstance(prompt, str) or is_conversation(prompt)
        most = max_new_tokens or self.run.task.max_completion or Sampling.max_new_tokens  # type: ignore[attr-defined]
        how = Sampling(most, temperature, top_p, seed)
        ids = [self.run.task.asked_ids(row, self.processor, most) for row in rows]  # type: ignore[attr-defined]
        if stream:
            if not single:
                raise ValueError("stream=True is for one prompt; found a list")
            return streamed(self.model, ids[0], self.processor, how)
        made = [found.text for found in write(self.model, ids, self.processor, batch, how)]
        return made[0] if single else made

    def check_writes(self) -> None:
        """Raises TypeError for a model that writes no text."""
        if not isinstance(self.run.task, CausalLM):
            name = type(self.run.task).__name__
            raise TypeError(f"generate is for language models; this is {name}: ask it with predict(...)")

    def written_rows(self, prompt: Any, system: str | None = None, raw: bool = False) -> list[dict[str, Any]]:
        """Prompts or conversations as rows to go on with, {prompt}, {messages} or {text}."""
        task = self.run.task
        assert isinstance(task, CausalLM)
        every = [prompt] if isinstance(prompt, str) or is_conversation(prompt) else list(prompt)
        if raw and (system is not None or not all(isinstance(each, str) for each in every)):
            raise ValueError("raw=True puts one text to the model as it is: it takes no messages and no system message")
        return [self._row(task, each, system, raw) for each in every]

    def _row(self, task: CausalLM, prompt: Any, system: str | None, raw: bool) -> dict[str, Any]:
        before = [] if system is None else [{"role": "system", "content": system}]
        if not isinstance(prompt, str):
            return {"messages": [*before, *turns(list(prompt))]}
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if system is not None:
            said = (task.format.instruction if isinstance(task.format, Chat) else "") + prompt
            if isinstance(task.format, Plain) or not self.processor.chat_template:
                raise ValueError(
                    "a system message needs a chat template, and this model is asked without one: write it into the "
                    "prompt"
                )
            return {"messages": [*before, {"role": "user", "content": said}]}
        trained = self.roles
        whole = raw or ("text" in trained and "prompt" not in trained)  # trained to go on, not to answer
        return {"text" if whole else "prompt": prompt}

    def examples(
        self,
        data: str | None = None,
        split: str | None = None,
        rows: int | None = None,
        skip_faulty: float | None = None,
    ) -> Examples:
        """Rows of a split as examples: by default those on which the training was measured.

        Other `data` give their validation split, else test, else what they have.  `rows` is how many at most;
        `skip_faulty` as for `evaluate`.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"rows is how many at most, 1 or more; found {rows}")
        if data is None and not self.run.data:
            raise ValueError(f"{self.run.out} was not made by `undula train`: say on which data (data=..., or --data)")
        if skip_faulty is None and data is None:
            skip_faulty = self.run.skip_faulty
        faults = Faults(replace(self.run, skip_faulty=skip_faulty).skip_faulty, self.run.encoding)  # which checks it
        every = load_data(self.run.data if data is None else data, faults)
        of_clients = data is None and self._of_clients()  # then nobody has trained on these rows
        if of_clients and split is None:
            split = "validation" if "validation" in every else "train"
        if data is None and split in (None, "train", "validation") and not of_clients:
            parts = self.run.task.splits(every, "train", "validation", faults=faults)
            parts = with_validation(parts, self.run.seed, by_chance=bool(self.run.by_chance))
            part = parts[split or "validation"]
        else:
            name = split or next((n for n in ("validation", "test", "train") if n in every), next(iter(every)))
            split_of(every, name)  # refuses one that is not there
            part = self.run.task.splits(every, name, faults=faults)[name]
        examples = Examples(self.run.task, sample(part, rows or self.run.eval_rows, self.run.seed), self.processor)
        for note in (*faults.told(), *self.run.task.fits(examples, self.model, "given")):
            LOG.warning(note)
        return examples

    def _of_clients(self) -> bool:
        path = self.run.out
        return (path / RUN).is_file() and read_run(path).get("rounds") == "clients"

    def batches(self, examples: Examples) -> Iterator[dict[str, torch.Tensor]]:
        """The examples as the model's inputs, without labels: what `collapse` and `diagnose` run on."""
        collate = self.run.task.collator(self.processor)
        for start in range(0, len(examples), self.run.batch):
            made = [examples[i] for i in range(start, min(start + self.run.batch, len(examples)))]
            yield {k: v.to(self.model.device) for k, v in collate(made).items() if k != "labels"}

    def score(
        self,
        data: str | None = None,
        split: str | None = None,
        rows: int | None = None,
        skip_faulty: float | None = None,
    ) -> dict[str, float]:
        """The metrics on such examples, of the model as it is now."""
        return self.run.task.score(self.model, self.examples(data, split, rows, skip_faulty), self.run.batch)


@needs("train")
def restored(path: str | Path, model: str | None = None, dtype: torch.dtype | None = None) -> Restored:
    """The model that the adapter in `path` is for, with the adapter attached; in another `dtype` than the run's where
    one is named.

    What a run left says by itself what it is for; of any other adapter directory the config says it, or `model` names
    the base.  Raises FileNotFoundError where something is missing, ValueError when the adapter does not fit.
    """
    path = place(path)
    adapter = partly(path)
    run = described(path, adapter, model)
    run = run if dtype is None else replace(run, dtype=dtype)
    base, processor = open_model(model or run.model, run.task, run.dtype, run.seed, run.bits)
    adapter = load_for(path, base) if needs_base(path) else adapter
    if not (path / RUN).is_file():
        if isinstance(run.task, HeadTask | Unmeasured):
            named_as(base.config, path, config_of(run.model))
        if (path / "tokenizer_config.json").is_file():
            processor = run.task.processor(str(path))  # the one that it was trained with: its tokens may be more
            run.task.agree(processor, base)
    missing = [n for n in lacking(base) if n not in adapter.full]
    if missing:
        warnings.warn(
            f"the base's files lack {', '.join(missing[:5])}, and the adapter in {path} does not hold them: random "
            "numbers stand there, and the adapter computes with others wherever it is opened. Train it again",
            stacklevel=2,
        )
    return Restored(run, base, processor, attach(base, adapter), roles_of(path, adapter))


def described(path: Path, adapter: Adapter, model: str | None = None) -> Run:
    """The run that left an adapter directory, or the one that could have where it has no run.json; `model` names
    another base.  Raises ValueError where nothing says what the adapter is for or two files say two things,
    FileNotFoundError for an unknown base.
    """
    check_agreed(path, adapter, model)
    if (path / RUN).is_file():
        run = Run.load(path)
        return run if model is None else replace(run, model=model)
    base = base_of(path, adapter.about, model)
    method = next(iter(adapter.methods.values()), None)
    return Run(model=base, data="", task=task_of(path, adapter.about, adapter, base), method=method, out=path)


def check_agreed(path: Path, adapter: Adapter, model: str | None = None) -> None:
    """Raises ValueError where two files of a directory say that the adapter is for different things: one of them has
    been edited, and nothing tells which is meant.  A base that is named, `model`, counts before both."""
    base, task = adapter.about.get("base_model_name_or_path"), adapter.about.get("task_type")
    run = Run.load(path) if (path / RUN).is_file() else None
    other, own = (path / CONFIG, own_name(path)) if run is None else (path / RUN, run.model)
    if model is None and base is not None and own is not None and not same_base(own, base):
        raise ValueError(
            f"{other} says that the base is {own}, {path / files.CONFIG} says {base}: make them agree, or name the "
            "base (model=..., or --model)"
        )
    if run is not None and task is not None and task != run.task.peft:
        raise ValueError(
            f"{path / RUN} says {type(run.task).__name__} (task_type {run.task.peft}), {path / files.CONFIG} says "
            f"task_type {task}: make them agree"
        )


def dense(opened: Restored) -> Restored:
    """The same on ordinary weights: a quantised base is dequantised, any other returned as it is."""
    if not getattr(opened.model, "is_quantized", False):
        return opened
    adapter = detach(opened.model)
    model = opened.model.dequantize()
    model.__dict__.pop("_weight_conversions", None)  # how to quantise on saving: transformers 5.23 forgets to forget it
    return replace(opened, model=model, adapter=attach(model, adapter))
