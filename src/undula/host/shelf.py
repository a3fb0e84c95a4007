"""Adapters that do not train, many of one form in one stack a site: what `rows` computes with has nothing to gather.

Attached with `frozen=True` an adapter lies with those of its like: at each site one stack (K, R, I) of what goes down,
one (K, O, R) of what goes up, and what stands between and after (see `core.method.Settled`).  Nothing but the host
holds them, so entering a batch costs its rows, and no forward looks whether anybody trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Live
from ..core.method import Factors, LowRank, Method
from ..kernels.autocast import exact
from .share import Share
from .views import LinearView

LARGER = 4  # a pair that an adapter does not have itself is kept where it is so many times its factors at most
Mark = tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """What a shelf has at one site, in words that compare."""

    path: str
    parts: tuple[tuple[str, torch.Size, torch.dtype], ...]  # of its stacks, without the adapters' own dimension
    s: float = 1.0
    own: tuple[str, str] | None = None  # the factors B and A that lie there themselves; None of what is made of them
    bend: Method | None = None  # whose `bent` stands between A and B
    drops: bool = False


Places = tuple[Place, ...]
Parts = dict[str, dict[str, Tensor]]  # {site: {part: tensor}}


class Shelf:
    """Adapters with equal places: a stack for each part at each site, in which each adapter has its number k."""

    def __init__(self, form: Places, device: Callable[[str], torch.device]):
        self.form = form
        self.free: list[int] = []
        self.stacks = {
            p.path: {n: torch.empty(0, *size, dtype=dtype, device=device(p.path)) for n, size, dtype in p.parts}
            for p in form
        }
        self.marks: dict[str, Mark] = {}  # of the weights that gains were made of

    def __len__(self) -> int:
        """How many numbers there are, free ones among them."""
        return len(self.stacks[self.form[0].path]["A"])

    @torch.no_grad()
    def put(self, parts: Parts) -> int:
        """Copies an adapter's parts to a free number, which it returns."""
        if not self.free:
            size = len(self)
            self.free = list(range(size, max(1, 2 * size)))[::-1]
            for stacks in self.stacks.values():
                stacks |= {name: _grown(t, self.free) for name, t in stacks.items()}
        k = self.free.pop()
        for path, mine in parts.items():
            for name, t in mine.items():
                self.stacks[path][name][k] = t
        return k

    def take(self, k: int) -> None:
        """Makes the number free."""
        self.free.append(k)

    def to(self, path: str, device: torch.device) -> None:
        """Puts the stacks of one site on a device."""
        stacks = self.stacks[path]
        if stacks["A"].device != device:
            stacks |= {name: t.to(device) for name, t in stacks.items()}


def _grown(stack: Tensor, numbers: list[int]) -> Tensor:
    return torch.cat([stack, stack.new_zeros(len(numbers), *stack.shape[1:])])


def marked(layer: LinearView) -> Mark:
    """What tells that a layer's weight is another one, or was written into."""
    W = layer.module.weight
    return id(W), W.data_ptr(), W._version, W.dtype


def placed(adapter: Adapter, layers: Mapping[str, LinearView]) -> tuple[Places, Parts]:
    """What of an adapter can lie on a shelf: plain pairs as they are, unless sites share them; of other methods what
    `settled` makes of them, where that is not much larger."""
    uses = Counter(id(t) for _, _, t in adapter.tensors())
    places: list[Place] = []
    parts: Parts = {}
    for path, method in adapter.methods.items():
        f = adapter.factors[path]
        plain = method.plain() if isinstance(method, LowRank) else None
        if plain is not None and uses[id(f[plain[1]])] == uses[id(f[plain[2]])] == 1:
            parts[path] = {"A": f[plain[2]], "B": f[plain[1]]}
            told = Place(path, _words(parts[path]), plain[0], plain[1:], drops=method.drops)
        else:
            settled = method.settled(layers[path], f)
            if settled is None or settled.A.numel() + settled.B.numel() > LARGER * sum(t.numel() for t in f.values()):
                continue
            gain = {} if settled.gain is None else {"gain": settled.gain}
            parts[path] = {"A": settled.A, "B": settled.B, **gain, **settled.bent}
            bend = method.undropped() if settled.bent else None
            told = Place(path, _words(parts[path]), bend=bend, drops=method.drops)
        places.append(told)
    return tuple(places), parts


def _words(parts: Mapping[str, Tensor]) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    return tuple((name, t.shape, t.dtype) for name, t in parts.items())


class OfShelf(Share):
    """The rows of adapters that lie on one shelf: their stacks are there."""

    def __init__(self, shelf: Shelf, count: int):
        super().__init__(shelf.form, count)
        self.shelf = shelf
        self._numbers: dict[torch.device, Tensor | None] = {}

    def change(self, path: str, x_NTI: Tensor, y_NTO: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        place, parts = self.sites[path], self._parts(path)
        with exact(x_NTI.device):
            z_KTR = self.down(x_NTI, parts["A"])
            if place.bend is not None:
                bent = {name: t for name, t in parts.items() if name not in ("A", "B", "gain")}
                z_KTR = torch.vmap(place.bend.bent)(z_KTR, bent)
            c_KTO = torch.bmm(z_KTR * place.s, parts["B"].transpose(1, 2))
            if "gain" in parts:  # gain (y - b + c) + b, as what it adds to y
                y_KTO = y_NTO().reshape(c_KTO.shape).to(c_KTO.dtype)
                gain_K1O = parts["gain"][:, None]
                c_KTO = gain_K1O * c_KTO + (gain_K1O - 1) * (y_KTO if bias is None else y_KTO - bias)
        return c_KTO.view(*x_NTI.shape[:2], c_KTO.shape[2])

    def _parts(self, path: str) -> dict[str, Tensor]:
        """The stacks at one site, of its adapters in turn."""
        stacks = self.shelf.stacks[path]
        device = stacks["A"].device
        if device not in self._numbers:
            found = [a.k for a in self.adapters]
            whole = found == list(range(len(self.shelf)))
            with torch.inference_mode(False):  # a later forward of the batch may want gradients
                self._numbers[device] = None if whole else torch.tensor(found, device=device)
        numbers = self._numbers[device]
        return stacks if numbers is None else {name: t[numbers] for name, t in stacks.items()}


class OnShelf(Mapping[str, Any]):
    """The factors of the adapter number k of a shelf: plain pairs as parameters that lie in its stacks, and `rest`."""

    def __init__(self, shelf: Shelf | None, k: int, rest: Mapping[str, Factors], sites: Sequence[str]):
        self.shelf, self.k, self.rest, self.sites = shelf, k, rest, sites
        self.own = {} if shelf is None else {p.path: p.own for p in shelf.form if p.own is not None}

    def __getitem__(self, path: str) -> Factors:
        if path not in self.own or self.shelf is None:
            return self.rest[path]
        (B, A), stacks = self.own[path], self.shelf.stacks[path]
        pair = {A: stacks["A"][self.k], B: stacks["B"][self.k]}
        return {**{name: nn.Parameter(t, requires_grad=False) for name, t in pair.items()}, **self.rest.get(path, {})}

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class Held(Live):
    """A live adapter that does not train, on a shelf."""

    shelf: Shelf | None
    k: int
    trained: frozenset[tuple[str, str]]  # (site or "", factor or parameter): what may train again once it is off

    @classmethod
    @torch.no_grad()
    def on(cls, adapter: Adapter, layers: Mapping[str, LinearView], shelves: list[Shelf]) -> Self:
        """Puts `adapter`, whose tensors are nobody else's, on one of the shelves or on a new one of them."""
        held, (places, parts) = cls.of(adapter), placed(adapter, layers)
        held.shelf, held.k = None, 0
        if places:
            held.shelf = next((s for s in shelves if s.form == places), None)
            if held.shelf is None:
                held.shelf = Shelf(places, lambda path: layers[path].device)
                shelves.append(held.shelf)
            held.k = held.shelf.put(parts)
            held.shelf.marks |= {path: marked(layers[path]) for path, mine in parts.items() if "gain" in mine}
        named = [*adapter.tensors(), *(("", n, t) for n, t in adapter.full.items())]
        held.trained = frozenset((site, name) for site, name, t in named if t.requires_grad)
        lying = {(p.path, name) for p in places for name in p.own or ()}
        rest: dict[str, dict[str, Tensor]] = {}
        for path, name, t in named:
            t.requires_grad_(False)
            if path and (path, name) not in lying:
                rest.setdefault(path, {})[name] = t
        held.factors = OnShelf(held.shelf, held.k, rest, list(adapter.factors))  # type: ignore[assignment]
        return held

    @torch.no_grad()
    def settle(self, layers: Mapping[str, LinearView]) -> None:
        """Makes anew what depends on the weights of these layers, which were written into since."""
        assert self.shelf is not None
        for path, layer in layers.items():
            settled = self.methods[path].settled(layer, self.factors[path])
            if settled is None or settled.gain is None:
                raise RuntimeError(
                    f"the weight of {path} was changed since {self.methods[path]!r} was attached with frozen=True, so "
                    "that its norms cancel now: detach it and attach it again"
                )
            self.shelf.stacks[path]["gain"][self.k] = settled.gain

    def off(self, shelves: list[Shelf]) -> Adapter:
        """Takes it off its shelf.  Returns what was attached, as a value of its own."""
        made = self.copy()
        for site, name, t in [*made.tensors(), *(("", n, t) for n, t in made.full.items())]:
            t.requires_grad_((site, name) in self.trained)
        if self.shelf is not None:
            self.shelf.take(self.k)
            if len(self.shelf.free) == len(self.shelf):
                shelves.remove(self.shelf)
        return made
