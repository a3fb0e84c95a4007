"""The folder of an app, which `flwr run` and `submitted` send to a SuperLink: what undula has by name, or a file of
one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...io.files import write_text

NAME = "undula_app"
PROJECT = f"""\
[project]
name = "undula-federation"
version = "1.0.0"
description = "Rounds of an adapter"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "undula"

[tool.flwr.app.components]
serverapp = "{NAME}:server"
clientapp = "{NAME}:client"
"""
APP = """\
from undula.federated.flower import client_app, server_app

client = client_app()
server = server_app()
"""


def write_app(folder: str | Path, source: str | Path | None = None) -> Path:
    """Writes the app anew, and returns its folder.  source: a Python file that names a `client` and a `server`, in the
    place of those without mods and strategies.  Raises FileNotFoundError."""
    folder = Path(folder)
    if source is not None and not Path(source).is_file():
        raise FileNotFoundError(
            f"{source} is no file of an app: it names client = client_app(...), server = server_app(...)"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "pyproject.toml", PROJECT)
    write_text(folder / f"{NAME}.py", APP if source is None else Path(source).read_text(encoding="utf-8"))
    return folder
