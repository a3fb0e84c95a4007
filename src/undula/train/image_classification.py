"""Image classification: an image to one of several classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .heads import Classes
from .images import images, opened
from .task import Example, Examples, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel


@Task.register
@dataclass(frozen=True)
class ImageClassification(Classes):
    """Image to one of several classes, see `Classes`.

    `size` is the side in pixels to which images are brought, in the place of the one that the model's own image
    processor has; with it a network of convolutions takes small images as they are.
    """

    roles: ClassVar = {"image": ("image", "img"), "label": ("label", "labels")}
    peft = None

    image: str | None = None
    label: str | None = None
    size: int | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is a number of pixels, 1 or more; found size={self.size}")

    def rows(self, split: Dataset) -> Dataset:
        from datasets import ClassLabel

        columns = self.columns(split.column_names)
        labels = self.labels(split, columns["label"])
        pictures = images(split.select_columns([columns["image"]]), columns["image"])
        if columns["image"] != "image":
            pictures = pictures.rename_column(columns["image"], "image")
        return pictures.add_column("label", labels, feature=ClassLabel(names=list(self.names)))

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

        return Auto.from_pretrained(path, dtype=dtype, ignore_mismatched_sizes=True, **quantised, **self.outputs())

    def example(self, row: Mapping[str, Any], processor: BaseImageProcessor, /) -> Example:
        made = processor(opened(row["image"]), return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0], "labels": row["label"]}

    def collator(self, processor: BaseImageProcessor, /) -> Callable[[list[Example]], Mapping[str, torch.Tensor]]:
        return _together

    def batches(self, examples: Examples, size: int) -> Iterator[tuple[list[int], list[Example]]]:
        """In the order of the rows; one batch at a time is in memory."""
        for start in range(0, len(examples), size):
            numbers = list(range(start, min(start + size, len(examples))))
            yield numbers, [examples[i] for i in numbers]


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
