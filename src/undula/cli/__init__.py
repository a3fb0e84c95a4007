"""The command-line tool: verbs that map one to one to library functions.  Names become objects here, nowhere deeper."""

from .main import app

__all__ = ["app"]
