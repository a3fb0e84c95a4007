"""A server under everything at once, for a while: is every reply the asked adapter's, and does nothing grow?

    python bench/soak.py --minutes 30 --clients 40 --json bench/results/soak.json

Adapters answer with their own tags (tags.py), through the cache.  Clients ask them on loopback, streaming or not, by
completion or chat, some vanish mid-stream, one reads slowly; meanwhile adapters are added, replaced, removed, torn on
disk and written to a full one, and the server is ended by SIGTERM and started again.  The budget holds few adapters of
many.  What is counted as a fault: a reply with another tag than one that its name had while it ran, a reply that was
begun and not ended, a request from before SIGTERM that got none, a status that nothing explains, a first token later
than the bound.  Memory: the slope of each of the server's lives after its first fifth, and the mean's 95 % interval.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import tags
from record import record

MEMORY, RUNNING, WAITING, DEADLINE = "16kB", 16, 64, 20.0
SLACK = 3.0  # seconds that a reply may come after its bound, where everything shares two cores
FAULTS = 40  # that are kept in words


class Names:
    """What each name may answer, and when: a change holds from its begin, what it replaced until its end."""

    def __init__(self) -> None:
        self.spans: dict[str, list[list[Any]]] = {}
        self.torn: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def change(self, name: str, tag: int | None) -> Iterator[None]:
        """Within, it may still be what it was, or already what it will be; its files may be no longer those that were
        registered."""
        spans = self.spans.setdefault(name, [[-math.inf, math.inf, None]])
        before, began = spans[-1], time.monotonic()
        spans.append([began, math.inf, tag])
        del spans[:-50]
        torn = self.torn.get(name, (math.inf, -math.inf))
        self.torn[name] = (min(began, torn[0]) if torn[1] == math.inf else began, math.inf)
        yield
        before[1] = time.monotonic()
        self.torn[name] = (self.torn[name][0], before[1])

    @contextlib.contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Within, its files may be damaged: a server that starts does not know it then."""
        unknown = [time.monotonic(), math.inf, None]
        self.torn[name] = (unknown[0], math.inf)
        self.spans[name].insert(-1, unknown)
        yield
        unknown[1] = time.monotonic()

    def may(self, name: str, begun: float, ended: float) -> set[int | None]:
        return {tag for a, b, tag in self.spans[name] if a <= ended and b >= begun}

    def broken(self, name: str, begun: float, ended: float) -> bool:
        """Whether its files changed meanwhile, or lay torn."""
        a, b = self.torn.get(name, (math.inf, -math.inf))
        return a <= ended and b >= begun

    def now(self) -> list[str]:
        return [name for name, spans in self.spans.items() if spans[-1][2] is not None]


class Outside:
    """The server as a process of its own, as `undula serve` starts it.  Its log goes to a disk that is full."""

    def __init__(self, root: Path, threads: int):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url, self.root, self.threads = f"http://127.0.0.1:{self.port}", root, threads
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        words = ["serve", self.root / "base", "--adapters", self.root / "adapters", "--port", self.port, "--memory",
                 MEMORY, "--cache", "8MiB", "--running", RUNNING, "--max-waiting", WAITING, "--deadline", DEADLINE,
                 "--threads", self.threads]  # fmt: skip
        with open("/dev/full", "wb") as full:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "undula", *map(str, words)], stdout=full, stderr=full, stdin=subprocess.DEVNULL
            )
        async with httpx.AsyncClient() as client:
            while True:
                assert self.process.poll() is None, "the server has ended"
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(self.url + "/ready")).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(self.process.wait, 120)
        assert code == 0, f"exit code {code} after SIGTERM"

    def memory(self) -> int | None:
        """Bytes that it has in memory."""
        assert self.process is not None
        with contextlib.suppress(OSError, ValueError):
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return None


class Inside:
    """The server in a thread of this process: for a short look, in which memory is not measured."""

    def __init__(self, root: Path, threads: int):
        self.root, self.url = root, ""

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        import threading

        from undula.cli.sizes import bytes_of
        from undula.serve.jobs import Limits
        from undula.serve.server.bounds import Bounds
        from undula.serve.server.opening import Plan, opened
        from undula.serve.server.places import Places
        from undula.serve.server.running import Server, address, bound

        limits = Limits(running=RUNNING, waiting=WAITING, cache=2**23)
        plan = Plan(
            str(self.root / "base"), Places.of((self.root / "adapters",)), memory=bytes_of(MEMORY, ""), limits=limits,
            bounds=Bounds(deadline=DEADLINE),
        )  # fmt: skip
        self.served, _ = opened(plan, lambda _: None)
        self.listening = bound("127.0.0.1", 0)
        self.server = Server(self.served)
        self.served.engine.start()
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = address(self.listening)

    async def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        await asyncio.to_thread(self.thread.join, 60)
        assert not self.thread.is_alive(), "it does not end after SIGTERM"
        self.served.engine.stop()
        self.served.shelf.close()
        self.listening.close()

    def memory(self) -> int | None:
        return None


@dataclasses.dataclass
class Soak:
    """One run: its names, what came of the requests, and when the server was away."""

    root: Path
    house: Outside | Inside
    random: random.Random
    names: Names = dataclasses.field(default_factory=Names)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    away: list[list[float]] = dataclasses.field(default_factory=list)  # [SIGTERM, ready again]
    lives: list[list[tuple[float, int]]] = dataclasses.field(default_factory=lambda: [[]])
    open: bool = True
    disk: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.prefixes = [[f"w{self.random.randrange(64)}" for _ in range(n)] for n in (3, 17, 33, 48, 80, 120)]
        self.tag = 0
        (self.root / "adapters").mkdir()
        tags.base(self.root / "base")
        self.maker = tags.Maker(self.root / "base")

    def fault(self, kind: str, what: str) -> None:
        self.counts[f"fault: {kind}"] += 1
        if len(self.faults) < FAULTS:
            self.faults.append(f"{kind}: {what}")

    def near(self, begun: float, ended: float) -> bool:
        """Whether the server was going, away or coming meanwhile."""
        return any(a <= ended and begun <= b for a, b in self.away)

    # What the disk and the server hold

    def write(self, name: str, tag: int) -> None:
        """An adapter of any rung; the directory is replaced as a whole."""
        new, path = self.root / "new", self.root / "adapters" / name
        shutil.rmtree(new, ignore_errors=True)
        self.maker.adapter(new, tag, self.random.choice(tags.METHODS))
        if path.exists():
            path.rename(old := self.root / "old")
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)

    def next(self) -> int:
        self.tag = (self.tag + 1) % tags.TAGS
        return self.tag

    async def call(self, client: httpx.AsyncClient, what: str, **body: Any) -> int:
        """The status of a change, made until the server takes it."""
        while True:
            begun = time.monotonic()
            try:
                done = await client.post(f"{self.house.url}/v1/{what}_lora_adapter", json=body, timeout=60)
                if done.status_code != 503:
                    return done.status_code
            except httpx.HTTPError as error:
                if not self.near(begun, time.monotonic()):
                    self.fault("change", f"{what} {body}: {error!r}")
                    return 0
            await asyncio.sleep(0.2)

    async def put(self, client: httpx.AsyncClient, name: str) -> None:
        """Adds or replaces one."""
        with self.names.change(name, tag := self.next()):
            async with self.disk:
                await asyncio.to_thread(self.write, name, tag)
            status = await self.call(client, "load", lora_name=name, load_inplace=True)
        self.counts["put"] += 1
        if status != 200:
            self.fault("change", f"loading {name} got {status}")

    async def remove(self, client: httpx.AsyncClient, name: str) -> None:
        with self.names.change(name, None):
            async with self.disk:
                (self.root / "adapters" / name).rename(old := self.root / "old")
                shutil.rmtree(old)
            status = await self.call(client, "unload", lora_name=name)
        self.counts["removed"] += 1
        if status not in (200, 404):  # a server that has started since does not know it
            self.fault("change", f"unloading {name} got {status}")

    async def tear(self, client: httpx.AsyncClient, name: str) -> None:
        """Cuts the file of a registered adapter short, where it lies; later a whole one is put there."""
        file = self.root / "adapters" / name / "adapter_model.safetensors"
        with self.names.cut(name):
            os.truncate(file, file.stat().st_size // 2)
            await asyncio.sleep(1)
            if await self.call(client, "load", lora_name=name, load_inplace=True) != 400:
                self.fault("change", f"a torn {name} was taken")
            await self.put(client, name)
        self.counts["torn"] += 1

    async def full(self, client: httpx.AsyncClient) -> None:
        """A disk is full while an adapter is written: nothing is left of it, and its name stays unknown."""

        def none(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        kept, os.fsync = os.fsync, none
        try:
            self.maker.adapter(self.root / "adapters" / "never", 0, tags.METHODS[0])
            self.fault("disk", "a full disk was not noticed")
        except OSError:
            self.counts["full disk"] += 1
        finally:
            os.fsync = kept
        if await self.call(client, "load", lora_name="never") not in (400, 404):
            self.fault("disk", "what was never written was loaded")

    async def change(self) -> None:
        """Changes without end: about three in a second."""
        async with httpx.AsyncClient() as client:
            for i in range(10**9):
                if not self.open:
                    return
                known = self.names.now()
                what = self.random.random()
                if what < 0.25 and len(known) < 48:
                    await self.put(client, f"a{i}")
                elif what < 0.4 and len(known) > 16:
                    await self.remove(client, self.random.choice(known))
                elif what < 0.45:
                    await self.tear(client, self.random.choice(known))
                elif what < 0.5:
                    await self.full(client)
                else:
                    await self.put(client, self.random.choice(known))
                await asyncio.sleep(self.random.expovariate(4))

    async def restart(self, every: float) -> None:
        """SIGTERM and a new start, in the middle of everything: after so many seconds and a few answers."""
        while self.open:
            since, answers = time.monotonic(), self.counts["answered"]
            while time.monotonic() < since + every or self.counts["answered"] < answers + 40:
                await asyncio.sleep(0.05)
                if not self.open:
                    return
            self.away.append([time.monotonic(), math.inf])
            await self.house.stop()
            async with self.disk:  # what it finds there is whole
                await self.house.start()
            self.away[-1][1] = time.monotonic()
            self.lives.append([])
            self.counts["restarts"] += 1

    async def watch(self) -> None:
        while self.open:
            size = self.house.memory()
            if size is not None and not self.near(time.monotonic(), time.monotonic()):
                self.lives[-1].append((time.monotonic(), size))
            await asyncio.sleep(1)

    # Clients

    async def client(self) -> None:
        async with httpx.AsyncClient(timeout=httpx.Timeout(DEADLINE + 60)) as client:
            while self.open:
                await self.ask(client)
                await asyncio.sleep(self.random.expovariate(20))

    async def ask(self, client: httpx.AsyncClient) -> None:
        """One request of any kind, and whether what came is what may come."""
        kind, known = self.random.random(), self.names.now()
        name = self.random.choice(known)
        words = [*self.random.choice(self.prefixes), *(f"w{self.random.randrange(64)}" for _ in range(3))]
        body: dict[str, Any] = {
            "model": name, "max_tokens": self.random.randint(1, 24), "temperature": self.random.choice([0, 0.5]),
            "stream": self.random.random() < 0.5, "stream_options": {"include_usage": True},
        }  # fmt: skip
        where = self.random.choice(["completions", "completions", "chat/completions"])
        body |= {"prompt": " ".join(words)} if where == "completions" else {
            "messages": [{"role": "user", "content": " ".join(words)}]
        }  # fmt: skip
        if not body["stream"]:
            del body["stream_options"]
        if kind < 0.05:
            name, body["model"] = "", "base"
        elif kind < 0.08:
            name = body["model"] = "nobody"
        elif kind < 0.13:  # with a little of another
            other = self.random.choice(known)
            body |= {
                "model": "base",
                "adapters": [{"name": name}, {"name": other, "scale": 0.1}] if other != name else [{"name": name}],
            }
        begun = time.monotonic()
        try:
            if body["stream"]:
                seen = await self.streamed(client, where, body, vanishing=kind > 0.9)
            else:
                done = await client.post(f"{self.house.url}/v1/{where}", json=body)
                seen = done.status_code, done.json()
        except httpx.HTTPError as error:
            self.unanswered(begun, error, body)
            return
        if seen is not None:
            self.judge(name, body, begun, *seen)
            if seen[0] in (429, 503):
                await asyncio.sleep(0.5)

    def unanswered(self, begun: float, error: Exception, body: Any) -> None:
        """No status came, or not all of an answer: meant only where the request came while the server was away."""
        ended = time.monotonic()
        came_late = any(a - 0.05 <= begun <= b for a, b in self.away)
        refused = isinstance(error, httpx.ConnectError) and self.near(begun, ended)
        if came_late or refused:
            self.counts["away"] += 1
        else:
            self.fault("lost", f"{error!r} after {ended - begun:.2f} s of {body}")

    async def streamed(
        self, client: httpx.AsyncClient, where: str, body: Any, vanishing: bool
    ) -> tuple[int, Any] | None:
        """(status, an answer as if it had come at once); None of one that this client left."""
        begun, text, last, usage, done = time.monotonic(), "", None, None, False
        async with client.stream("POST", f"{self.house.url}/v1/{where}", json=body) as stream:
            if stream.status_code != 200:
                await stream.aread()
                return stream.status_code, stream.json()
            async for line in stream.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if vanishing:
                    self.counts["vanished"] += 1
                    return None
                if line == "data: [DONE]":
                    done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    return 200, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    said = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if said and not text:
                        self.first.append(time.monotonic() - begun)
                    text, last = text + said, choice.get("finish_reason") or last
        if not done:
            raise httpx.ReadError("the stream ended before [DONE]")
        return 200, {"choices": [{"text": text, "finish_reason": last}], "usage": usage}

    def judge(self, name: str, body: Any, begun: float, status: int, answer: Any) -> None:
        ended = time.monotonic()
        self.whole.append(ended - begun)
        if ended - begun > DEADLINE + SLACK + 30:
            self.fault("waited", f"{ended - begun:.1f} s for {body}")
        names = [part["name"] for part in body.get("adapters", ())] or [name]
        error = answer.get("error")
        if status == 200 and error is None:
            self.counts["answered"] += 1
            self.read(name, names, body, begun, ended, answer)
            return
        code, what = (error or {}).get("code"), f"{status} {error} for {body}"
        self.counts[f"{status} {code}"] += 1
        known = [n for n in names if n in self.names.spans]
        meant = {
            "model_not_found": name == "nobody" or any(None in self.names.may(n, begun, ended) for n in known),
            "adapter_failed": any(self.names.broken(n, begun, ended) for n in known),
            "shutting_down": self.near(begun, ended),
            "deadline_exceeded": True,  # also before it, where it would pass
            "rate_limit_exceeded": True,
        }
        alone = status == 400 and len(names) > 1 and "is served alone" in what  # of a rung without an update dW
        if not alone and not meant.get(code, False):
            self.fault("status", what)

    def read(self, name: str, names: list[str], body: Any, begun: float, ended: float, answer: Any) -> None:
        """Whether an answer is whole, and of an adapter that its name meant."""
        choice = answer["choices"][0]
        said = (choice.get("text") or (choice.get("message") or {}).get("content") or "").split()
        if name == "":
            may = {"base"}
        elif name == "nobody":
            may = set()
        else:
            may = {f"tag{tag}" for tag in self.names.may(name, begun, ended) if tag is not None}
        usage = (answer.get("usage") or {}).get("completion_tokens")
        if len(set(said)) != 1 or not set(said) <= may:
            self.fault("wrong adapter", f"{said} instead of {may} for {body}")
        elif not len(said) == usage == body["max_tokens"] or choice["finish_reason"] != "length":
            self.fault("lost", f"{len(said)} words, usage {usage}, {choice['finish_reason']} for {body}")

    async def slow(self) -> None:
        """Reads a long stream by a few bytes at a time, from a window as small as there is."""
        while self.open:
            name, begun = self.random.choice(self.names.now()), time.monotonic()
            body = json.dumps({"model": name, "prompt": "w1 w2", "max_tokens": 300, "stream": True, "logprobs": 5,
                               "temperature": 0})  # fmt: skip
            text = await self._trickle(body)
            ended = time.monotonic()
            if b"[DONE]" in text:
                may = {f"tag{tag}" for tag in self.names.may(name, begun, ended) if tag is not None}
                events = [json.loads(e[6:]) for e in text.decode().splitlines() if e.startswith("data: {")]
                said = "".join(c.get("text", "") for e in events for c in e.get("choices", ())).split()
                if len(said) != 300 or len(set(said)) != 1 or not set(said) <= may:
                    self.fault("wrong adapter", f"slow: {Counter(said)} instead of {may}")
                self.counts["slow"] += 1
            elif text and not self.near(begun, ended) and not self.names.broken(name, begun, ended):
                self.fault("lost", f"slow: {text[-300:]!r}")
            await asyncio.sleep(0.5)

    async def _trickle(self, body: str) -> bytes:
        text, port = b"", int(self.house.url.rpartition(":")[2])
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/"
                f"json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            until = time.monotonic() + 5
            while more := await asyncio.wait_for(reader.read(2048), 120):
                text += more
                if time.monotonic() < until:
                    await asyncio.sleep(0.05)
            writer.close()
        head, _, rest = text.partition(b"\r\n\r\n")
        return b"".join(_chunks(rest)) if b"chunked" in head.lower() else rest

    async def run(
        self, seconds: float, clients: int, every: float, adapters: int, enough: Callable[[Counter[str]], bool]
    ) -> None:
        for i in range(adapters):
            with self.names.change(f"n{i}", tag := self.next()):
                self.write(f"n{i}", tag)
        await self.house.start()
        others = [asyncio.ensure_future(t) for t in (self.change(), self.restart(every), self.watch(), self.slow())]
        every_one = [*others, *(asyncio.ensure_future(self.client()) for _ in range(clients))]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not enough(self.counts) and not any(t.done() for t in every_one):
            await asyncio.sleep(0.05)
        self.open = False
        done, stuck = await asyncio.wait(every_one, timeout=180)
        for task in stuck:
            task.cancel()
            self.fault("stuck", repr(task))
        for task in done:
            if task.exception() is not None:
                self.fault("soak", repr(task.exception()))
        await self.house.stop()


def _chunks(data: bytes) -> Iterator[bytes]:
    """What HTTP's chunks hold."""
    while data:
        size, _, data = data.partition(b"\r\n")
        with contextlib.suppress(ValueError):
            if count := int(size, 16):
                yield data[:count]
                data = data[count + 2 :]
                continue
        return


def slope(life: list[tuple[float, int]]) -> float | None:
    """Bytes a second, by least squares, without a life's first fifth; None of a short one."""
    life = life[len(life) // 5 :]
    if len(life) < 20:
        return None
    return statistics.linear_regression([t for t, _ in life], [float(b) for _, b in life]).slope


def interval(values: list[float]) -> dict[str, float]:
    """The mean with its 95 % interval of Student's t."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = (
        t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "lives": len(values)}


def share(values: list[float], p: float) -> float:
    return sorted(values)[min(len(values) - 1, int(p * len(values)))] if values else math.nan


def told(soak: Soak, seconds: float, clients: int) -> dict[str, Any]:
    """What came of it."""
    slopes = [s for life in soak.lives if (s := slope(life)) is not None]
    waits = {f"p{round(100 * p)}": share(soak.first, p) for p in (0.5, 0.95, 0.99, 1)}
    kinds = ("wrong adapter", "lost", "status", "waited", "change", "disk", "stuck", "soak")
    targets: dict[str, float] = {f"{kind} = 0": soak.counts[f"fault: {kind}"] for kind in kinds}
    met = {n: v == 0 for n, v in targets.items()}
    targets |= {"seconds to the first token <= bound": waits["p100"]}
    met |= {"seconds to the first token <= bound": waits["p100"] <= DEADLINE + SLACK}
    memory: dict[str, Any] = {}
    if slopes:
        memory = {"bytes a second": interval(slopes), "of each life": slopes}
        longest = max(soak.lives, key=len)
        memory["MiB of the longest life, over its seconds"] = [
            (round(t - longest[0][0]), round(b / 2**20, 2)) for t, b in longest[:: max(1, len(longest) // 60)]
        ]
        memory["MiB at the ends of lives"] = [round(life[-1][1] / 2**20, 1) for life in soak.lives if life]
        memory["MiB an hour, upper bound"] = memory["bytes a second"]["high"] * 3600 / 2**20
    return {
        "seconds": seconds,
        "clients": clients,
        "targets_met": all(met.values()),
        "met": met,
        "targets": targets,
        "counts": dict(sorted(soak.counts.items())),
        "faults": soak.faults,
        "seconds to the first token": waits,
        "seconds of a request": {f"p{round(100 * p)}": share(soak.whole, p) for p in (0.5, 0.95, 0.99, 1)},
        "away": [round(b - a, 2) for a, b in soak.away],
        "memory": memory,
    }


def soaked(
    seconds: float,
    clients: int,
    every: float,
    adapters: int = 24,
    inside: bool = False,
    seed: int = 0,
    enough: Callable[[Counter[str]], bool] = lambda counts: False,
) -> dict[str, Any]:
    """A whole run: of so many seconds, or until what was counted is enough."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), (Inside if inside else Outside)(Path(folder), 1), random.Random(seed))
        asyncio.run(soak.run(seconds, clients, every, adapters, enough))
        return told(soak, seconds, clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--restart-every", type=float, default=170, help="seconds between SIGTERMs")
    parser.add_argument("--inside", action="store_true", help="the server in this process, memory not measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = soaked(60 * args.minutes, args.clients, args.restart_every, inside=args.inside, seed=args.seed)
    for name, value in result.items():
        print(f"{name}: {json.dumps(value, indent=1)}")
    if args.json:
        record(args.json, result)
    sys.exit(not result["targets_met"])


if __name__ == "__main__":
    main()
