"""`python -m undula.bundled fetch NAME...` fills the cache at set-up; `list` shows what there is."""

import argparse
import sys

from . import ASSETS, AssetError, fetch, table


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code (1 if an asset cannot be had)."""
    parser = argparse.ArgumentParser(prog="python -m undula.bundled", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="put assets into the cache")
    fetching.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of: {', '.join(ASSETS)}")
    commands.add_parser("list", help="show all assets, and which are in the cache")
    options = parser.parse_args(argv)
    if options.command == "list":
        for row in table():
            state = "cached" if row["cached"] else "-"
            print(f"{row['name']:16} {row['kind']:6} {row['size']:>8} {state:7} {row['title']}")
        return 0
    try:
        for name in options.names:
            print(fetch(name))
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
