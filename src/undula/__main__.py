"""`python -m undula` is the command-line tool."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="undula")
