"""The page to look at: one file without anything from outside, held to that by its own policy."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = (files(__package__) / "page.html").read_text(encoding="utf-8")


def _sums(tag: str) -> str:
    """What of the page may run, or dress it, by its hash."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_sums('script')}; style-src {_sums('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}
