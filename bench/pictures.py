"""Two sets of pictures in ten classes, the first five of which are taught and the others new.

fashion   Fashion-MNIST (MIT): grey photographs of 28 x 28 pixels
emoji     Noto Color Emoji (OFL-1.1) drawn on white, in groups of Unicode's list (Unicode licence); Debian alone
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undula.bundled import dataset
from undula.bundled.apt import check_apt, download_package, unpack_package
from undula.bundled.asset import Asset

SIZE = 96
FASHION = (
    "t-shirt: a collarless light shirt with short sleeves",
    "trousers: a garment that covers both legs from the waist to the ankles",
    "pullover: a sweater that is put on by pulling it over the head",
    "dress: a one-piece garment for a woman, with a skirt and a bodice",
    "coat: an outer garment with long sleeves that is open in front",
    "sandal: a light shoe held on by straps",
    "shirt: a garment for the upper body with a collar and buttons",
    "sneaker: a canvas shoe with a rubber sole, for sport",
    "bag: a container with a handle, for carrying things",
    "ankle boot: a shoe that covers the whole foot and the ankle",
)
EMOJI = {
    "mammal: a warm-blooded animal with fur": ("animal-mammal",),
    "plant: a living thing with leaves, such as a tree or a flower": ("plant-flower", "plant-other"),
    "fruit or vegetable: an edible part of a plant": ("food-fruit", "food-vegetable"),
    "dish: food that was cooked and is served": ("food-prepared", "food-asian"),
    "building: a structure with a roof and walls": ("place-building", "place-religious"),
    "vehicle: a car, train or bicycle that moves on land": ("transport-ground",),
    "weather: the sky with sun, moon, clouds or rain": ("sky & weather",),
    "sports equipment: a ball, or gear needed to play a game": ("sport",),
    "clothing: something to wear, such as a hat, a shoe or a dress": ("clothing",),
    "household object or tool: furniture, or an implement for work": ("household", "tool"),
}
TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


@dataclass(frozen=True)
class Pictures:
    """pixels (N, 3, SIZE, SIZE) as EfficientNet takes them, and labels (N), of each part."""

    prompts: list[str]
    parts: dict[str, tuple[Tensor, Tensor]]


def pixels(images: list[Any]) -> Tensor:
    from PIL import Image

    small = [np.asarray(i.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) for i in images]
    return (torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255 - 0.498) / 0.502


def fashion(pool: int, validation: int, test: int) -> Pictures:
    """So many pictures of each class: of the taught ones alone for training."""
    data, parts = dataset("fashion-mnist"), {}
    for part, each, classes in (("train", pool, 5), ("validation", validation, 10), ("test", test, 10)):
        labels = np.asarray(data[part]["label"])
        draws = np.random.default_rng(0)
        at = np.concatenate([draws.permutation(np.flatnonzero(labels == k))[:each] for k in range(classes)])
        parts[part] = pixels(data[part].select(at)["image"][:]), torch.from_numpy(labels[at])
    return Pictures(list(FASHION), parts)


def emoji() -> Pictures:
    """All of them, under `all`."""
    images, labels = [], []
    with tempfile.TemporaryDirectory() as scratch:
        share = _unpacked(Path(scratch)) / "usr" / "share"
        for k, text in _listed(share / "unicode" / "emoji" / "emoji-test.txt"):
            images.append(_drawn(text, share / "fonts" / "truetype" / "noto" / "NotoColorEmoji.ttf"))
            labels.append(k)
    return Pictures(list(EMOJI), {"all": (pixels(images), torch.tensor(labels))})


def _unpacked(scratch: Path) -> Path:
    packages = {
        "fonts-noto-color-emoji=2.042-0+deb12u1": "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        "unicode-data=15.0.0-1": "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
    }
    for source, sha256 in packages.items():
        asset = Asset("emoji", "data", "pictures", "OFL-1.1, Unicode", source, sha256, 9_000_000, build=lambda *_: None)
        check_apt(asset, "read from a package", "leave the set out: --sets fashion")
        (into := scratch / source.partition("=")[0]).mkdir()
        unpack_package(download_package(asset, into, print), scratch / "files")
    return scratch / "files"


def _listed(path: Path) -> list[tuple[int, str]]:
    """(class, characters) of the emoji of the classes, in no other skin than their first."""
    group = {name: k for k, names in enumerate(EMOJI.values()) for name in names}
    found, current = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            current = line.partition(":")[2].strip()
        elif "; fully-qualified" in line and current in group:
            codes = line.partition(";")[0].split()
            if not TONES & set(codes):
                found.append((group[current], "".join(chr(int(c, 16)) for c in codes)))
    return found


def _drawn(text: str, font: Path) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (136, 136), "white")
    ImageDraw.Draw(image).text((0, 4), text, font=ImageFont.truetype(str(font), 109), embedded_color=True)
    return image
