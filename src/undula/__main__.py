"""The command-line tool: `undula`, or `python -m undula`."""

from __future__ import annotations

import sys

from .core.extras import BROUGHT, advice


def main() -> None:
    """Needs the extra `cli`; without it, it says so."""
    try:
        from .cli.main import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BROUGHT["cli"]:
            raise
        print(advice(error.name), file=sys.stderr)
        sys.exit(2)
    app(prog_name="undula")


if __name__ == "__main__":
    main()
