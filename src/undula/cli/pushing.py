"""`undula push`: a directory to the hub, without what is of this machine alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.extras import needs
from ..io import files
from ..train.base import called_elsewhere
from ..train.card import quoted
from ..train.run import CHECKPOINTS, REPORT, RUN
from . import shell
from .predicting import Saved

NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MODEL = "config.json"
OFFLINE = "HF_HUB_OFFLINE is set, so nothing can be sent: unset it"
UNKNOWN = "the hub asks who sends this: `hf auth login`, or set HF_TOKEN"
# What a model is made of, and its tokenizer; no pickles, no rows, no reports with this machine's paths
SUFFIXES = {".json", ".safetensors", ".model", ".jinja", ".md"}
TEXTS = {"vocab.txt", "merges.txt", "added_tokens.json"}
OWN = {REPORT, "run.toml", "trainer_state.json", "optimizer.json"}


def push(
    path: Saved,
    name: Annotated[str, typer.Argument(help="USER/NAME on the hub, or NAME for one's own.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Nobody else can see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with undula",
) -> None:
    """Send an adapter or a merged model to the Hugging Face hub: its weights, configuration, tokenizer and card; no
    checkpoints, no data, no paths of this machine.  Needs a token (`hf auth login`, or HF_TOKEN)."""
    _check_name(name)
    _check(path)
    with tempfile.TemporaryDirectory(prefix=".undula-push-", dir=path.resolve().parent) as place:
        sent = list(_staged(path, Path(place), name))
        shell.show([{"file": str(p), "bytes": (Path(place) / p).stat().st_size} for p in sent])
        left = sorted(str(p) for p in _all(path) if p not in sent)
        if left:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            shell.note(f"not sent: {', '.join(left[:8])}{more}")
        for note in _worries(Path(place)):
            shell.remark(note)
        if dry_run:
            shell.note(f"nothing was sent to {name} (--dry-run)")
            return
        shell.note(f"Sent to {_uploaded(Path(place), name, private, message)}")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a model on the hub is called USER/NAME, found {name!r}")


@needs("train")
def check_promised(name: str) -> None:
    """Raises ValueError or RuntimeError where it is known already that nothing could be sent: before a training, not
    after it."""
    from huggingface_hub import constants, get_token

    _check_name(name)
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(OFFLINE)
    if get_token() is None:
        raise RuntimeError(UNKNOWN)


def _check(path: Path) -> None:
    """Raises FileNotFoundError for what is no directory of an adapter or a model."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    if not any((path / name).is_file() for name in (files.CONFIG, MODEL)):
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{path} holds neither an adapter ({files.CONFIG}) nor a model ({MODEL}); it has: {there}"
        )


def _all(path: Path) -> Iterator[Path]:
    """The files of a directory, but those of checkpoints, relative to it."""
    for file in sorted(path.rglob("*")):
        below = file.relative_to(path)
        if file.is_file() and CHECKPOINTS not in below.parts[:-1]:
            yield below


def _staged(path: Path, place: Path, name: str) -> Iterator[Path]:
    """What is sent, as it is sent: laid out in `place`."""
    for below in _all(path):
        hidden = any(part.startswith(".") for part in below.parts)
        wanted = below.suffix.lower() in SUFFIXES or below.name in TEXTS
        if hidden or not wanted or below.name in OWN or len(below.parts) > 2:
            continue
        to = place / below
        to.parent.mkdir(parents=True, exist_ok=True)
        if below == Path("README.md"):
            text = (path / below).read_text(encoding="utf-8")
            to.write_text(text.replace(quoted(path.resolve().name), quoted(name)), encoding="utf-8")
        elif below == Path(RUN):
            to.write_text(json.dumps(_abroad(path / below), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            _linked(path / below, to)
        yield below


def _abroad(path: Path) -> dict[str, Any]:
    """A run without this machine's paths: a base and data that lie elsewhere too keep their names."""
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    run = said["run"]
    run.pop("begin_from", None)
    run["model"] = called_elsewhere(run["model"])
    run["data"] = Path(run["data"]).name if Path(run["data"]).is_absolute() else run["data"]
    return said


def _linked(file: Path, to: Path) -> None:
    """A large file is not copied where the disk can do without."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def _worries(place: Path) -> Iterator[str]:
    base = None
    if (place / files.CONFIG).is_file():
        base = json.loads((place / files.CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_absolute():
        yield (
            f"the base is the folder {base} of this machine: nobody else has it. Merge the adapter (`undula merge`) "
            "and push that, or train over a base of the hub"
        )
    if not (place / "README.md").is_file():
        yield "there is no README.md: others will not know what it is"


@needs("train")
def _uploaded(place: Path, name: str, private: bool, message: str) -> str:
    """The address of the model on the hub.  Raises RuntimeError with what the hub said."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=message)
    except OfflineModeIsEnabled as error:
        raise RuntimeError(OFFLINE) from error
    except LocalTokenNotFoundError as error:
        raise RuntimeError(UNKNOWN) from error
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().split("\n")[0][:300]
        advice = " Log in first: `hf auth login`, or set HF_TOKEN" if "401" in said or "403" in said else ""
        raise RuntimeError(f"the hub did not take it: {type(error).__name__}: {said}.{advice}") from error
    return str(made)
