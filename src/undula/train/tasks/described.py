"""Classification without a head that trains: a class is told by its description, and a text is near one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ...core.ranges import Count, Positive
from .classification import LENGTH, TextTask
from .heads import Classes
from .packing import Flat, beginnings, cut, longest
from .step import Step, apart_in_one_pass, packed
from .task import Examples, Task
from .weighing import Weights

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel


@Task.register
@dataclass(frozen=True)
class DescribedClassification(Classes, TextTask):
    """Text to the class whose description is nearest: logits_c = scale cos(h(x), h0(d_c)).

    h(x) (d): the mean of the last layer's states over the tokens of x, with the adapter; h0(d_c): the same of the
    class's description, of the base as it is, fixed.  No head trains: the base answers without any training (a zero
    adapter is the base), and an adapter can be asked about the classes of any other such task.  After the prompts of
    CLIP (Radford et al. 2021, arXiv:2103.00020), on the pooled vectors of a text encoder.

    descriptions: {class: text}; a class that has none is described by its name.  scale: 1 / temperature.

    Raises ValueError for a description that is blank, and for one that two classes have: nothing tells them apart.
    """

    has_head = False
    mean_loss = True
    peft: ClassVar[str | None] = None
    auto = "AutoModel"

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    max_length: Count | None = None
    names: tuple[str, ...] = ()
    class_weights: Weights = None
    descriptions: Mapping[str, str] = field(default_factory=dict)
    scale: Positive = 20.0

    def __post_init__(self) -> None:
        told = {name: self.descriptions.get(name) or name for name in (*self.names, *self.descriptions)}
        if blank := [name for name in self.descriptions if not self.descriptions[name].strip()]:
            raise ValueError(f"the class {blank[0]!r} has a blank description: say what it is, or leave it out")
        first: dict[str, str] = {}
        for name, text in told.items():
            if (other := first.setdefault(" ".join(text.split()), name)) != name:
                raise ValueError(f"the classes {other!r} and {name!r} have one description, {text!r:.80}")

    def fitted(self, train: Dataset) -> Self:
        made = super().fitted(train)
        if odd := [name for name in self.descriptions if name not in made.names]:
            raise ValueError(
                f"descriptions tell of {', '.join(map(repr, odd[:5]))}, and the classes are "
                f"{', '.join(map(repr, made.names[:8]))}: call them as the data do"
            )
        return made

    @property
    def prompts(self) -> list[str]:
        """The description of each class, in their order."""
        return [self.descriptions.get(name) or name for name in self.names]

    def outputs(self) -> dict[str, Any]:
        return {**super().outputs(), "class_prompts": self.prompts, "class_scale": self.scale}

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> Any:
        from transformers import AutoModel

        from .prompted import prompted, vectors

        made = AutoModel.from_pretrained(path, dtype=dtype, **quantised)
        body, told = made if isinstance(made, tuple) else (made, {})
        tokenizer = self.processor(path)
        self.agree(tokenizer, body)
        limit = self.max_length or min(LENGTH, tokenizer.model_max_length)
        whole = prompted(body, vectors(body, tokenizer, self.prompts, limit), self.scale)
        self._name(whole.config)
        prefix = whole.base_model_prefix
        unread = {f"{prefix}.{key}" for key in told.get("missing_keys", ()) if not str(key).startswith("pooler.")}
        return (whole, {**told, "missing_keys": unread}) if isinstance(made, tuple) else whole

    def outline(self, config: PretrainedConfig) -> PreTrainedModel:
        from transformers import AutoModel

        from .prompted import prompted

        body = AutoModel.from_config(config)
        return prompted(body, torch.empty(len(self.names) or 2, config.get_text_config().hidden_size), self.scale)

    def _name(self, config: PretrainedConfig) -> None:
        for name, value in self.outputs().items():
            setattr(config, name, value)

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        padded = self.collator(examples.processor)
        flats = [Flat(lambda rows: {"labels": padded(rows)["labels"]}, begin) for begin in beginnings(model)]
        rows = cut(longest(examples))
        return packed(model, flats, padded, apart_in_one_pass, [*rows, rows[0]])
