"""Who may ask: keys, the adapters that each may use, how often, and who may change what is served."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..request import Busy
from .errors import Wrong

ASKING, CHANGING = "UNDULA_KEYS", "UNDULA_ADMIN_KEYS"  # of the environment
SHORTEST = 16  # letters: a key that can be guessed is none
FIELDS = ("key", "sha256", "adapters", "base", "rate", "burst", "admin", "metrics")
LARGEST = 4 << 20


def digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class Key:
    """Who asks.

    adapters: names, or patterns as of files (`legal-*`), of those that it may use; None: all.  base: whether it may
    ask the base alone.  rate: answers a second in the long run; None: no bound.  burst: answers at once after a pause.
    admin: it may load and unload adapters.  metrics: it may read /metrics.
    """

    name: str
    sha256: bytes = field(repr=False)
    adapters: tuple[str, ...] | None = None
    base: bool = True
    rate: float | None = None
    burst: float = 1.0
    admin: bool = False
    metrics: bool = False

    def may(self, adapter: str) -> bool:
        """Whether it may use this adapter."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYONE = Key("", b"", admin=True, metrics=True)  # who asks a server without keys


class Bucket:
    """Answers that may be asked for now: `rate` come in a second, up to `burst`.  Whoever has one may ask for several
    at once, and waits the longer afterwards."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self.left, self.at = burst, clock()
        self.lock = threading.Lock()

    def take(self, count: int) -> float | None:
        """None; or where there are none, the seconds until there is one."""
        with self.lock:
            now = self.clock()
            self.left, self.at = min(self.burst, self.left + (now - self.at) * self.rate), now
            if self.left < 1:
                return (1 - self.left) / self.rate
            self.left -= count
            return None


class Keys:
    """All keys of a server; of none, everyone may do everything."""

    def __init__(self, keys: Iterable[Key] = (), clock: Callable[[], float] = time.monotonic):
        self.keys = tuple(keys)
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two keys are called {', '.join(twice)}: give each its own name")
        sums = [key.sha256 for key in self.keys]
        if len(set(sums)) < len(sums):
            raise ValueError(f"two of the keys {', '.join(names[:10])} are the same: who asks could not be told")
        self.buckets = {k.name: Bucket(k.rate, k.burst, clock) for k in self.keys if k.rate is not None}

    def __len__(self) -> int:
        return len(self.keys)

    def who(self, authorization: str | None) -> Key:
        """Whose key the header `Authorization: Bearer KEY` has.  All are compared, each in constant time, so that how
        long this takes tells nothing of them.  Raises Wrong (401)."""
        if not self.keys:
            return ANYONE
        scheme, _, said = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not said.strip():
            raise Wrong(
                "this server wants a key: send the header 'Authorization: Bearer KEY' (the OpenAI client's api_key)",
                status=401,
                code="missing_api_key",
            )
        asked, found = digest(said.strip()), None
        for key in self.keys:
            if hmac.compare_digest(asked, key.sha256):
                found = key
        if found is None:
            raise Wrong("this key is not known here", status=401, code="invalid_api_key")
        return found

    def spend(self, key: Key, answers: int) -> None:
        """Counts answers that are asked for.  Raises Busy."""
        bucket = self.buckets.get(key.name)
        wait = None if bucket is None else bucket.take(answers)
        if wait is not None:
            raise Busy(f"this key may ask for {key.rate:g} answers a second: wait {wait:.1f} seconds", wait)


def keys_of(path: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file and of the environment.  Raises FileNotFoundError, ValueError that names the line or field,
    never the key."""
    found = [] if path is None else _of_file(path)
    for variable, admin in ((ASKING, False), (CHANGING, True)):
        for i, key in enumerate(environment.get(variable, "").replace(",", " ").split()):
            found.append(_made(f"{variable.lower()}-{i + 1}", {"key": key, "admin": admin}, variable))
    return Keys(found)


def _of_file(path: Path) -> list[Key]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of keys {path}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: that is no file of keys")
    if path.suffix.lower() == ".toml":
        found = _of_toml(path)
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8") from None
        found = [_of_line(line, f"{path}, line {i}", i) for i, line in enumerate(lines, 1) if _says(line)]
    if not found:
        raise ValueError(f"{path} holds no keys: a line each, or in TOML [keys.NAME] with key = ...")
    return found


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _of_line(line: str, where: str, number: int) -> Key:
    words = line.split()
    if len(words) > 2:
        raise ValueError(f"{where} has {len(words)} words: a line is KEY, or NAME KEY; more is said in a file of TOML")
    name = words[0] if len(words) == 2 else f"key-{number}"
    return _made(name, {"key": words[-1]}, where)


def _of_toml(path: Path) -> list[Key]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    tables = found.get("keys")
    if not isinstance(tables, dict) or set(found) != {"keys"}:
        raise ValueError(
            f"{path}: keys are tables [keys.NAME] and nothing else; it has: {', '.join(found) or 'nothing'}"
        )
    return [_made(name, table, f"{path}, [keys.{name}]") for name, table in tables.items()]


def _made(name: str, said: Any, where: str) -> Key:
    """A key of what is said of it.  Raises ValueError."""
    if not isinstance(said, dict):
        raise ValueError(f"{where} has to be a table, with key = ...")
    if unknown := set(said) - set(FIELDS):
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; a key has: {', '.join(FIELDS)}")
    adapters = said.get("adapters")
    if adapters is not None and not (isinstance(adapters, list) and all(isinstance(a, str) and a for a in adapters)):
        raise ValueError(f"{where}: adapters is a list of names")
    rate = _number(said, "rate", None, where)
    burst = _number(said, "burst", None if rate is None else max(1.0, rate), where)
    if rate is None and "burst" in said:
        raise ValueError(f"{where}: a burst is what comes at once where there is a rate, and none is given")
    if burst is not None and burst < 1:
        raise ValueError(f"{where}: burst is 1 answer or more, found {burst:g}")
    return Key(
        name=name,
        sha256=_sum(said, where),
        adapters=None if adapters is None else tuple(adapters),
        base=_flag(said, "base", adapters is None, where),
        rate=rate,
        burst=burst or 1.0,
        admin=(admin := _flag(said, "admin", False, where)),
        metrics=_flag(said, "metrics", admin, where),
    )


def _sum(said: Mapping[str, Any], where: str) -> bytes:
    if ("key" in said) == ("sha256" in said):
        raise ValueError(f"{where} needs one of key = ... and sha256 = ... (the key's SHA-256 in hexadecimal)")
    if "sha256" in said:
        try:
            found = bytes.fromhex(said["sha256"])
        except (TypeError, ValueError):
            found = b""
        if len(found) != 32:
            raise ValueError(f"{where}: sha256 is 64 hexadecimal digits")
        return found
    key = said["key"]
    if not isinstance(key, str) or len(key) < SHORTEST or not key.isascii() or any(c.isspace() for c in key):
        raise ValueError(
            f"{where}: a key is {SHORTEST} or more letters of ASCII without spaces, so that nobody guesses it"
        )
    return digest(key)


def _flag(said: Mapping[str, Any], name: str, usual: bool, where: str) -> bool:
    found = said.get(name, usual)
    if not isinstance(found, bool):
        raise ValueError(f"{where}: {name} is true or false, found {found!r}")
    return found


def _number(said: Mapping[str, Any], name: str, usual: float | None, where: str) -> float | None:
    found = said.get(name, usual)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e9):
        raise ValueError(f"{where}: {name} is a number above 0, found {found!r}")
    return found


def readable_by_others(path: Path) -> bool:
    """Whether others on this machine may read a file of keys."""
    return os.name == "posix" and bool(path.stat().st_mode & 0o077)
