"""What stands under `undula` in a directory's configuration, read and checked against the tensors beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from ..core.method import Factors, Method
from ..host.apart import check_theirs
from ..host.build import rebuilt
from ..host.checks import check_shapes
from ..host.views import outline
from ..kernels import frozen
from . import files
from .packing import unpacked

VERSION = 1
TYPE, MARK = "UNDULA", ".undula_factors."
ABOUT = ("classes", "created_by", "training")  # of `Adapter.about`, what no other reader knows
OWN = {"version", "methods", "sites", "order", "kernels", "apart", "tied", "rebuilt", "frozen", "quantised", *ABOUT}
LARGEST_SIDE = 1 << 31  # rows or columns of a layer
MOST_CHOICES, DEEPEST = 20_000, 100  # methods within methods, and what they are made of

# Numbers that a file may have made anew, for each that it holds: what is loaded stays in proportion to the files.
EACH, EACH_SITE, FREE, MOST = 2048, 128, 1 << 20, 1 << 28

Shapes = Mapping[str, tuple[int, int]]


def key_of(site: str, factor: str) -> str:
    """The key on disk of a factor."""
    return f"{files.PREFIX}{site}{MARK}{factor}"


def in_proportion(methods: Mapping[str, Method], shapes: Shapes, stored: int, sites: set[str] | None = None) -> bool:
    """Whether the factors that seeds give are not too many for a file with so many numbers in it.  Computes none."""
    made = {id(t): t for _, _, t in rebuilt(methods, shapes, sites, device="meta")}
    return sum(t.numel() for t in made.values()) <= min(MOST, FREE + EACH * (stored + EACH_SITE * len(methods)))


def rebuild(
    methods: Mapping[str, Method], shapes: Shapes, checksums: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str, Tensor]]:
    """(site, factor, tensor) of what the file leaves to be made anew.  Raises ValueError where a checksum differs."""
    if not checksums:
        return
    left = dict(checksums)
    for site, name, t in rebuilt(methods, shapes, {str(split(key)[0]) for key in checksums}):
        wanted = left.pop(key_of(site, name), None)
        if wanted is not None and wanted != frozen.checksum(t):
            raise ValueError(
                f"{path}: {site}.{name} is rebuilt from its seed with the checksum {frozen.checksum(t)}; the file says "
                f"{str(wanted)!r:.40}: it was changed by hand, or a later version of undula draws other numbers"
            )
        if wanted is not None:
            yield site, name, t
    if left:
        raise ValueError(f"{path}: {next(iter(left))!r:.100} cannot be rebuilt from a seed, and is not in the file")


def read_sites(own: Mapping[str, Any], path: str) -> tuple[dict[str, Method], dict[str, tuple[int, int]]]:
    """Method and shape of every site, from the config's `undula` object.  Raises ValueError or LookupError."""
    if own.get("version") != VERSION:
        raise ValueError(f"{path} has format version {own.get('version')!r:.40}; this undula reads version {VERSION}")
    unknown = sorted(set(own) - OWN)
    if unknown:
        raise ValueError(f"{path}: the config says {unknown[0]!r:.80}, which this undula does not know")
    listed, sites = own.get("methods"), own.get("sites")
    if not isinstance(listed, list) or not isinstance(sites, dict):
        raise ValueError(f"{path}: the config lists no methods or no sites")
    check_sizes(listed, path)
    kinds = [_decoded(m, path) for m in listed]
    methods, shapes = {}, {}
    for site, entry in sites.items():
        if site:
            files.check_name(site, "site")
        match entry:
            case [int(number), int(O), int(I)] if not any(isinstance(n, bool) for n in entry):
                pass
            case _:
                raise ValueError(f"{path}: site {site!r:.100} is [method, O, I]; found {entry!r:.80}")
        if not (0 <= number < len(kinds) and 0 < O < LARGEST_SIDE and 0 < I < LARGEST_SIDE):
            raise ValueError(f"{path}: site {site!r:.100} is [method of {len(kinds)}, O, I]; found {entry!r:.80}")
        methods[site], shapes[site] = kinds[number], (O, I)
    order = own.get("order", list(sites))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(sites):
        raise ValueError(f"{path}: `order` has other sites than `sites`")
    return {site: methods[site] for site in order}, {site: shapes[site] for site in order}


def _decoded(written: Any, path: str) -> Method:
    try:
        return Method.decode(written)
    except (ValueError, LookupError) as error:
        told = str(error.args[0]) if len(error.args) == 1 else str(error)
        raise (ValueError if isinstance(error, ValueError) else LookupError)(f"{path}: {told}") from None


def check_sizes(listed: list[Any], path: str) -> None:
    """Raises ValueError for methods of more parts, or deeper within each other, than any adapter needs."""
    level: list[Any] = [listed]
    count = 0
    for _ in range(2 * DEEPEST + 1):  # a choice within a tuple is two levels down
        count += sum(isinstance(x, dict) for x in level)
        if count > MOST_CHOICES:
            raise ValueError(f"{path}: more than {MOST_CHOICES} methods and parts of methods")
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x) if isinstance(y, dict | list)]
        if not level:
            return
    raise ValueError(f"{path}: methods are nested more than {DEEPEST} deep")


def assemble(
    methods: dict[str, Method],
    shapes: dict[str, tuple[int, int]],
    own: Mapping[str, Any],
    tensors: dict[str, Tensor],
    said: Mapping[str, Any],
    path: str,
) -> Adapter:
    tied, checksums = (texts(own, name, path) for name in ("tied", "rebuilt"))
    stored: dict[str, dict[str, Tensor]] = {s: {} for s in methods}
    full: dict[str, Tensor] = {}
    for key, t in untied(tensors, tied, path).items():
        site, factor = split(key)
        if site is not None and site not in stored:
            raise ValueError(f"{path} holds a tensor for {site!r:.100}, which its config does not name")
        if site is None and not t.is_floating_point():
            raise ValueError(
                f"{path}: {factor!r:.100} is trained in full and holds {t.dtype}, no floating-point numbers"
            )
        place = full if site is None else stored[site]
        if factor in place:
            raise ValueError(f"{path} holds {factor!r:.100} of {site or 'the model'!r:.100} twice")
        place[files.check_name(factor, "parameter")] = t
    if not stored and not full:
        raise ValueError(f"{path} holds neither factors nor parameters")
    factors = _checked(methods, shapes, stored, own, checksums, path)
    _mark_frozen(factors, own.get("frozen", []), path)
    for t in full.values():
        t.requires_grad_()
    kernels, apart = _kernels(own.get("kernels", {}), shapes, path), texts(own, "apart", path)
    said = {k: v for k, v in said.items() if k not in ABOUT} | told(own, path)
    return Adapter(methods, factors, shapes, full, kernels, said, apart)


def told(own: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What the config's `undula` object says of the adapter as a whole: the names of a head's classes in order, what
    made it, and its training in figures; without what is not there.  Raises ValueError."""
    classes, maker, training = (own.get(name, none) for name, none in zip(ABOUT, ([], "", {}), strict=True))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: `classes` lists texts; found {classes!r:.80}")
    if not isinstance(maker, str):
        raise ValueError(f"{path}: `created_by` is a text; found {maker!r:.80}")
    if not isinstance(training, dict):
        raise ValueError(f"{path}: `training` maps names to figures; found {training!r:.80}")
    return {name: value for name, value in zip(ABOUT, (classes, maker, training), strict=True) if value}


def _checked(
    methods: dict[str, Method],
    shapes: dict[str, tuple[int, int]],
    stored: dict[str, dict[str, Tensor]],
    own: Mapping[str, Any],
    checksums: Mapping[str, Any],
    path: str,
) -> dict[str, Factors]:
    """All factors, those made anew included.  Nothing is made before what is stored has the names, shapes and types
    that the config claims, and is in proportion to what would be made."""
    outlines = {site: outline(site, shapes[site]) for site in methods}
    lacking: dict[str, dict[str, Tensor]] = {site: {} for site in methods}
    for key in checksums:
        site, factor = split(key)
        made = methods[site].rebuilt(outlines[site]) if site in methods else {}
        if site is None or factor not in made:
            raise ValueError(f"{path}: {key!r:.100} cannot be rebuilt from a seed, and is not in the file")
        if factor in stored[site]:
            raise ValueError(f"{path}: {site}.{factor} is rebuilt from a seed, and in the file as well")
        lacking[site][factor] = made[factor]
    once: dict[int, Tensor] = {}
    for site, f in stored.items():
        wanted = methods[site].init(outlines[site])
        f = stored[site] = unpacked(f, wanted, own.get("quantised"), f"{path}: {site}", once)
        f.update(with_dimension(f, wanted))
        check_shapes(f"{path}: {site}", {**f, **lacking[site]}, wanted)
    held = sum({id(t): t.numel() for f in stored.values() for t in f.values()}.values())
    if checksums and not in_proportion(methods, shapes, held, {s for s, f in lacking.items() if f}):
        raise ValueError(
            f"{path} holds {held} numbers and claims layers for which more would be rebuilt from seeds than such a "
            "file may ask for"
        )
    if any(t.is_meta for f in stored.values() for t in f.values()):  # an outline: there are no numbers to look at
        for site, factor, t in rebuilt(methods, shapes, {s for s, f in lacking.items() if f}, device="meta"):
            if factor in lacking[site]:
                stored[site][factor] = t
        return dict(stored)
    for site, factor, t in rebuild(methods, shapes, checksums, path):
        stored[site][factor] = t
    for site, f in stored.items():
        methods[site].check(outlines[site], f)
    return dict(stored)


def with_dimension(found: Mapping[str, Tensor], wanted: Factors) -> dict[str, Tensor]:
    """Factors of one number that were written without a dimension, and have one now: FSDP2 takes no others."""
    lone = {k: t for k, t in found.items() if t.ndim == 0 and k in wanted and wanted[k].shape == (1,)}
    return {k: t.reshape(1) for k, t in lone.items()}


def texts(own: Mapping[str, Any], name: str, path: str) -> dict[str, str]:
    """A mapping of texts to texts in the config's `undula` object; empty where there is none.  Raises ValueError."""
    found = own.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{path}: `{name}` maps keys to texts; found {found!r:.80}")
    return found


def _mark_frozen(factors: Mapping[str, Factors], still: Any, path: str) -> None:
    names = {f"{site}.{name}" for site, f in factors.items() for name in f}
    if not isinstance(still, list) or not all(isinstance(n, str) and n in names for n in still):
        raise ValueError(f"{path}: `frozen` lists factors of the adapter; found {still!r:.80}")
    frozen_ones = set(still)
    for site, f in factors.items():
        for name, t in f.items():
            t.requires_grad_(t.is_floating_point() and f"{site}.{name}" not in frozen_ones)


def as_recorded(adapter: Adapter, own: Mapping[str, Any], path: str) -> Adapter:
    """The adapter with the ties and frozen marks of a config, whose shapes it must have."""
    apart = texts(own, "apart", path)
    for site, shape in read_sites(own, path)[1].items():
        if adapter.shapes[site] != shape:
            raise ValueError(f"{site} is {adapter.shapes[site]} (O, I) in this model, {shape} in the adapter")
        check_theirs(site, adapter.apart.get(site), apart.get(site))
    for site, factor, t in adapter.tensors():
        t.requires_grad_(t.is_floating_point() and f"{site}.{factor}" not in own.get("frozen", []))
    for _ in rebuild(adapter.methods, adapter.shapes, own.get("rebuilt", {}), path):
        pass  # the checksums hold
    every = {key_of(s, k): t for s, k, t in adapter.tensors()}
    factors = {s: dict(f) for s, f in adapter.factors.items()}
    for key, target in own.get("tied", {}).items():
        if key not in every or target not in every or every[key].shape != every[target].shape:
            raise ValueError(f"{path}: {key!r:.100} is tied to {target!r:.100}, which does not fit")
        at, factor = split(key)
        factors[str(at)][factor] = every[target]
    return replace(adapter, factors=factors)


def _kernels(found: Any, shapes: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: `kernels` maps sites to sizes; found {found!r:.80}")
    for site, kernel in found.items():
        sizes = isinstance(kernel, list) and len(kernel) <= 4 and all(type(n) is int for n in kernel)
        if site not in shapes or not sizes or not _fits(kernel, shapes[site][1]):
            raise ValueError(f"{path}: the kernel {kernel!r:.80} of {site!r:.100} does not fit its sites")
    return {site: tuple(kernel) for site, kernel in found.items()}


def _fits(kernel: list[int], I: int) -> bool:
    if len(kernel) > 1:
        return min(kernel) > 0 and math.prod(kernel) == I
    return all(0 <= row < I for row in kernel)


def split(key: str) -> tuple[str | None, str]:
    """(site, factor) of a factor's key on disk; (None, parameter) of what was trained in full."""
    name = key.removeprefix(files.PREFIX)
    site, mark, factor = name.rpartition(MARK)
    if not mark and name.startswith(MARK[1:]):  # the model itself is the one adapted layer
        return "", name.removeprefix(MARK[1:])
    return (site, factor) if mark else (None, name)


def untied(tensors: Mapping[str, Tensor], tied: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors of a file with those that are stored once for several sites under each of their keys."""
    return {**tensors, **{k: _target(tensors, k, v, path) for k, v in tied.items()}}


def _target(tensors: Mapping[str, Tensor], key: str, target: Any, path: str) -> Tensor:
    if target not in tensors or key in tensors:
        raise ValueError(f"{path}: {key!r:.100} is tied to {target!r:.100}, which is not in the file")
    return tensors[target]
