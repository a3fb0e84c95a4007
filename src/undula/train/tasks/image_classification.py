"""Image classification: an image to one of several classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch

from ...core.ranges import Range
from ..data.faults import Faults
from ..data.images import frames, images, opened
from .between import one_pass
from .heads import Classes
from .outputs import head_of, own_names, with_head
from .step import Step
from .task import Example, Examples, Task
from .weighing import Weights

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel


@Task.register
@dataclass(frozen=True)
class ImageClassification(Classes):
    """Image to one of several classes, see `Classes`.

    `size` is the side in pixels to which images are brought, in the place of the one that the model's own image
    processor has; with it a network of convolutions takes small images as they are.
    """

    roles: ClassVar = {"image": ("image", "img", "file_name"), "label": ("label", "labels")}
    peft = None
    auto = "AutoModelForImageClassification"
    pipeline = "image-classification"

    image: str | None = None
    label: str | None = None
    size: Annotated[int, Range(least=1, most=1 << 16)] | None = None
    names: tuple[str, ...] = ()
    class_weights: Weights = None

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self | None:
        if not head_of(config, "ForImageClassification") or config.problem_type == "multi_label_classification":
            return None
        return cls(names=own_names(config) or tuple(map(str, range(int(config.num_labels or 0)))))

    def check(self, split: Dataset, faults: Faults) -> None:
        columns = self.columns(split.column_names, faults)
        if "image" in columns:
            images(split.select_columns([columns["image"]]), columns["image"], faults)
        if "label" in columns:
            self.check_labels(split, columns["label"], faults)

    def rows(self, split: Dataset) -> Dataset:
        from datasets import ClassLabel

        faults = Faults()
        columns = self.columns(split.column_names)
        labels = self.labels(split, columns["label"], faults)
        pictures = self._pictures(split, columns["image"], faults)
        faults.check()
        return pictures.add_column("label", labels, feature=ClassLabel(names=list(self.names)))

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        column = self.inputs(split.column_names, faults).get("image")
        if column is None:
            raise faults.error()
        return self._pictures(split, column, faults)

    def _pictures(self, split: Dataset, column: str, faults: Faults) -> Dataset:
        found = images(split.select_columns([column]), column, faults)
        return found if column == "image" else found.rename_column(column, "image")

    def processor(self, path: str) -> BaseImageProcessor:
        from transformers import AutoImageProcessor

        own = AutoImageProcessor.from_pretrained(path)
        if self.size is None:
            return own
        sides = {name: _sides(getattr(own, name, None), self.size) for name in ("size", "crop_size")}
        if not any(sides.values()):
            raise ValueError(f"size={self.size}, but the image processor {type(own).__name__} has no size to set")
        return AutoImageProcessor.from_pretrained(path, **{name: new for name, new in sides.items() if new})

    def agree(self, processor: BaseImageProcessor, model: PreTrainedModel) -> None:
        """Nothing: images of one size need no padding."""

    def model(self, path: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
        from transformers import AutoModelForImageClassification as Auto

        return with_head(Auto, path, self.names, dtype=dtype, **quantised, **self.outputs())

    def fits(self, examples: Examples, model: PreTrainedModel, name: str) -> list[str]:
        """Images are brought to one size; what the image processor cuts off at the edges is said, and of images of
        several frames that the first alone is taken."""
        notes, processor = [], examples.processor
        if getattr(processor, "do_center_crop", False):
            notes.append(f"{name} images: the image processor keeps their middle alone ({_shown(processor.crop_size)})")
        several = sum(frames(image) > 1 for image in examples.rows["image"])
        if several:
            notes.append(f"{several} of {len(examples)} {name} images have several frames: the first alone is taken")
        return notes

    def example(self, row: Mapping[str, Any], processor: BaseImageProcessor, /) -> Example:
        made = processor(opened(row["image"]), return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0], "labels": row["label"]}

    def collator(self, processor: BaseImageProcessor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        return _together

    def step(self, examples: Examples, model: PreTrainedModel) -> Step:
        return Step(around=one_pass)

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """In the order of the rows; one batch at a time is in memory."""
        for start in range(0, len(examples), size):
            numbers = list(range(start, min(start + size, len(examples))))
            yield numbers, [examples[i] for i in numbers]


def _shown(size: Any) -> str:
    return " x ".join(str(v) for v in dict(size or {}).values() if v is not None) + " pixels"


def _sides(own: Any, size: int) -> dict[str, int]:
    """An image processor's {side: pixels} with `size` at every side that it has."""
    return {side: size for side, pixels in dict(own or {}).items() if pixels is not None}


def _together(examples: list[Example]) -> dict[str, torch.Tensor]:
    """{pixel_values (N, 3, H, W), labels (N)}.  Raises ValueError for images of several sizes."""
    sizes = {tuple(e["pixel_values"].shape) for e in examples}
    if len(sizes) > 1:
        raise ValueError(
            "the model's image processor leaves images of different sizes "
            f"({', '.join(map(str, sorted(sizes)[:3]))}), which make no batch: crop or resize them first"
        )
    pixels = torch.stack([e["pixel_values"] for e in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([e["labels"] for e in examples])}
