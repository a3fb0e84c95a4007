"""Adapter directories one layer at a time: what is read, made and written never fills more memory than a layer of each,
and what layers share.

    with ExitStack() as stack, Writer(out) as writer:
        adapters = [stack.enter_context(Opened(path)) for path in paths]
        for site, parts in walk(adapters):  # of each adapter its part there, or None
            writer.add(parts[0].site(site) ...)
        writer.finish()
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from ..host import views
from ..kernels import frozen
from . import diffusers, files, lora_parameters, places, tensorfile
from .files import PREFIX
from .native import README, Once, checked
from .outline import Head
from .packing import SCALE, Packing
from .peft import is_copy, placed, read_lora
from .reading import TYPE, key_of, rebuild
from .spool import Spool


class Opened:
    """An adapter directory of any form that `Adapter.load` reads, as it was when it was opened: a save over it changes
    nothing here.  `outline` is the adapter with factors on the meta device; `site` and `parameter` read numbers.

    Opening it reads the configuration and the header of the tensors, checked as `Adapter.load` checks them.  What
    sites share is kept once it was read.  Raises FileNotFoundError, ValueError or LookupError as `Adapter.load`.
    """

    def __init__(self, path: str | Path):
        with contextlib.ExitStack() as stack, files.door(str(path)):
            self.path = places.place(path)
            self.head, self._file, self._name = _open(self.path, stack)
            self.outline = self.head.outline()
            self._read_site = _Own(self) if self.head.config.get("peft_type") == TYPE else _PlainLoRA(self)
            self._stack = stack.pop_all()

    @property
    def methods(self) -> Mapping[str, Method]:
        return self.outline.methods

    def site(self, name: str) -> Adapter:
        """The part of one layer, without parameters in full, as `Adapter.load` would have it.  Raises LookupError, and
        ValueError for numbers that no adapter holds."""
        part = self.outline.site(name)
        with files.door(str(self.path)), torch.no_grad():
            return replace(part, factors={name: self._read_site(name)})

    def parameter(self, name: str) -> Tensor:
        """What is trained in full under this name."""
        with files.door(str(self.path)):
            return self.tensors({self._read_site.parameters[name]})[self._read_site.parameters[name]].requires_grad_()

    def tensors(self, keys: set[str]) -> dict[str, Tensor]:
        """These of the file's tensors.  Raises ValueError for NaN or infinity."""
        found = tensorfile.read(self._file, {k: e for k, e in self.head.entries.items() if k in keys}, self._name)
        files.check_finite(found, self._name)
        return found

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path, stack: contextlib.ExitStack) -> tuple[Head, Any, str]:
    """(the head, the open file of its tensors, what that is called)."""
    file = places.pipeline_file(path)
    if file is None:
        config, opened, entries = files.of_one_save(path, stack)
        return Head(path, config, entries, b""), opened, str(path / files.TENSORS)
    own = stack.enter_context(file.open("rb"))
    entries, metadata = tensorfile.entries(own, str(file))
    return Head(path, {diffusers.METADATA: metadata.get(diffusers.METADATA)}, entries, b""), own, str(file)


class _Own:
    """Factors in undula's own form."""

    def __init__(self, opened: Opened):
        self.opened = opened
        own = opened.head.config["undula"]
        self.tied, self.rebuilt = own.get("tied", {}), own.get("rebuilt", {})
        several = Counter(self.rebuilt.values())
        self.often = set(self.tied.values()) | {checksum for checksum, n in several.items() if n > 1}
        self.kept: dict[tuple[str, torch.Size], Tensor] = {}
        self.parameters = {name: PREFIX + name for name in opened.outline.full}

    def __call__(self, site: str) -> dict[str, Tensor]:
        outline = self.opened.outline
        found = {name: self._one(site, name, like) for name, like in outline.factors[site].items()}
        outline.methods[site].check(views.outline(site, outline.shapes[site]), found)
        return found

    def _one(self, site: str, name: str, like: Tensor) -> Tensor:
        key = key_of(site, name)
        key = self.tied.get(key, key)
        once = self.rebuilt.get(key, key), like.shape  # a checksum, where it is not stored
        if once in self.kept:
            return self.kept[once]
        if key in self.rebuilt:
            outline, only = self.opened.outline, {key: self.rebuilt[key]}
            ((_, _, t),) = rebuild(outline.methods, outline.shapes, only, str(self.opened.path))
        else:
            t = self._read(key, like)
        t.requires_grad_(like.requires_grad)
        if once[0] in self.often:
            self.kept[once] = t
        return t

    def _read(self, key: str, like: Tensor) -> Tensor:
        """A factor of the file, of integers where it holds these."""
        if key + SCALE not in self.opened.head.entries:
            return self.opened.tensors({key})[key].reshape(like.shape)
        found = self.opened.tensors({key, key + SCALE})
        said = self.opened.head.config["undula"].get("quantised")
        how = Packing.decode(said, str(self.opened.path))
        return how.unpack(found[key], found[key + SCALE], like.shape, f"{self.opened.path}: {key}")


class _PlainLoRA:
    """Factors under PEFT's names, those of diffusers' files included."""

    def __init__(self, opened: Opened):
        self.opened = opened
        config, keys = opened.head.config, {k: k for k in opened.head.entries}
        if diffusers.METADATA in config:
            metas = {k: torch.empty(e.shape, dtype=e.dtype, device="meta") for k, e in opened.head.entries.items()}
            text = config[diffusers.METADATA]
            config, own = diffusers.as_lora(opened.path, None, metas, text)
            part = next(iter(metas)).partition(".")[0]
            keys = {name: f"{part}.{name}" for name in own}
        self.config, self.keys = config, keys
        self.parameters: dict[str, str] = {}
        self.modules: dict[str, set[str]] = {}  # the keys of each module: factors of stacks are cut of one tensor
        self.raw: set[str] = set()
        for name, key in keys.items():
            if is_copy(name, keys):
                continue
            site, leaf = placed(name)
            if site is None:
                self.parameters[leaf] = key
            else:
                self.raw.add(site)
                self.modules.setdefault(lora_parameters.module_of(site), set()).add(name)
        self.sites: dict[str, list[str]] = {}
        for site in opened.methods:
            self.sites.setdefault(self._module(site), []).append(site)
        self.last: tuple[str, Adapter] | None = None

    def __call__(self, site: str) -> Factors:
        module = self._module(site)
        if self.last is None or self.last[0] != module:
            self.last = None  # the memory is that of one module
            self.last = module, self._read(module)
        return self.last[1].factors[site]

    def _module(self, site: str) -> str:
        """The module that has a site: itself, or one whose parameter, or matrix of a parameter, the site is."""
        if site in self.raw:
            return lora_parameters.module_of(site)
        while site not in self.modules:
            site = site.rpartition(".")[0]
        return site

    def _read(self, module: str) -> Adapter:
        """The adapter of one module, by the loader; patterns are left out but for what they say of this module."""
        names = {self.keys[name]: name for name in self.modules[module]}
        tensors = {names[key]: t for key, t in self.opened.tensors(set(names)).items()}
        ranks, alphas = {}, {}
        for site in self.sites[module]:
            law = self.opened.methods[site].unwrapped()
            told = f"^{re.escape(site if site in self.raw else _parameter(site))}$"
            ranks[told], alphas[told] = law.r, law.alpha  # type: ignore[attr-defined]
        targets = [n for n in self.config.get("target_parameters") or [] if lora_parameters.is_of(module, n)]
        own = {"rank_pattern": ranks, "alpha_pattern": alphas, "target_parameters": targets}
        return read_lora({**self.config, **own}, tensors, str(self.opened.path))


def _parameter(site: str) -> str:
    """The parameter that a site is, or one matrix of."""
    above, _, last = site.rpartition(".")
    return above if last.isdecimal() else site


def walk(adapters: Sequence[Adapter | Opened]) -> Iterator[tuple[str, list[Adapter | None]]]:
    """(layer, of each adapter its part there, or None) for every layer that one of them adapts, in the order in which
    they come.  Raises ValueError where their shapes differ: the adapters are for different models."""
    for site in dict.fromkeys(s for a in adapters for s in a.methods):
        parts = [a.site(site) if site in a.methods else None for a in adapters]
        shapes = dict.fromkeys(part.shapes[site] for part in parts if part is not None)
        if len(shapes) > 1:
            raise ValueError(
                f"the adapters are for different models: {site} is {' and '.join(map(str, shapes))} (O, I)"
            )
        yield site, parts


class Writer:
    """An adapter directory that is written a few layers at a time; `finish` puts it in place.

    Whenever this ends before, or is killed, the directory holds what it held; after that, the new adapter (see
    `undula.io.files.write`).  Tensors that parts share by being the same object are stored once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self.spool = Spool(self.path)
        self.parts: list[Adapter] = []
        self.checksums: dict[int, str] = {}  # by the identity of outlines, which live as long as this
        self.keep = Once(self._put)
        self.next = ""

    def add(self, part: Adapter) -> None:
        """Takes some layers of the adapter, each once.  Raises ValueError."""
        factors: dict[str, dict[str, Tensor]] = {}
        for site, f in part.factors.items():
            made = part.methods[site].rebuilt(views.outline(site, part.shapes[site]))
            factors[site] = {}
            for name, t in f.items():
                self.next = key_of(site, name)
                outline = factors[site][name] = self.keep(t)
                if name in made and id(outline) not in self.checksums:
                    self.checksums[id(outline)] = frozen.checksum(t)
        self.parts.append(replace(part, factors=factors, full={}))

    def _put(self, t: Tensor) -> Tensor:
        return self.spool.put(self.next, t)

    def _stored(self, config: dict[str, Any], keys: set[str]) -> set[str]:
        """What the file holds for these keys of the adapter; `config` is written with it."""
        return keys

    def finish(
        self,
        full: Mapping[str, Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
        weight: float = 1.0,
    ) -> Adapter:
        """Puts the adapter in place; `about` and `weight` are as in `Adapter`.  Returns its outline.  Raises what
        `Adapter.save` raises."""
        held = {name: self.spool.put(PREFIX + name, t) for name, t in (full or {}).items()}
        named = ("methods", "factors", "shapes", "kernels", "apart")
        merged = {n: {k: v for part in self.parts for k, v in getattr(part, n).items()} for n in named}
        outline = Adapter(**merged, full=held, about=about or {}, weight=weight)
        config, tensors = checked(outline, None, None, str(self.path), lambda t: self.checksums.get(id(t), ""))
        for key in set(self.spool.outlines) - self._stored(config, set(tensors)):
            self.spool.drop(key)  # made anew from a seed
        files.place(self.path, config, self.spool.contents(), self.spool.write, README)
        self.made = False
        return outline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.spool.__exit__()
        if self.made:
            with contextlib.suppress(OSError):  # somebody put something there
                self.path.rmdir()
