"""The second way to mount an adapter: on a weight that is read.

A layer that is called is adapted in its `forward` (see `slots`).  Other weights nobody calls: a parent computes from
`child.weight`, a module from matrices of its own (attention's `in_proj_weight`, an LSTM's `weight_ih_l0`), a mixture
from one stack for all its experts.  There the module that has the parameter gets a class of its own, for as long as an
adapter is selected, in which the parameter's name gives the adapted weight W' = weight(W, f): whoever reads it, in
training and in evaluation, computes what a merge would.  Within the forward of the module, or of the parent that reads,
W' is made once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Factors, LowRank, Reweight
from ..kernels.autocast import exact
from . import masters, quantised
from .sharded import PARALLEL, is_sharded
from .weights import Mounted, Read, own


class Below(nn.Module):
    """What hangs below a module with mounted weights: a slot for each of its sites."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[str, list[Any]] = {}  # the slots of each parameter

    def adapted(self, owner: nn.Module, leaf: str) -> Tensor:
        """The parameter with all that is mounted there, once within a forward."""
        laws = [(slot.layer, law) for slot in self.leaves[leaf] if (law := slot.law()) is not None]
        whole = own(owner, leaf)
        if not laws or is_sharded(whole):  # the last: `fully_shard` asks for what it has cut; none computes with that
            return whole
        if torch.compiler.is_compiling():
            return _made(owner, leaf, laws)
        for slot in self.leaves[leaf]:
            slot.__dict__["ran"] = True
        if _now.made is None:
            return _made(owner, leaf, laws)
        parts = [whole, *(t for _, (_, f) in laws for t in f.values())]
        key = (id(self), leaf, torch.is_grad_enabled(), *((id(t), t._version) for t in parts))
        if key not in _now.made:
            _now.made[key] = _made(owner, leaf, laws), parts  # which live on, so that no other gets their ids
        return _now.made[key][0]


def _made(owner: nn.Module, leaf: str, laws: list[tuple[Read, tuple[Reweight, Factors]]]) -> Tensor:
    W = own(owner, leaf)
    if not quantised.is_plain(W):
        raise RuntimeError(
            f"{laws[0][0].parameter} is a {type(W).__name__} of {W.dtype} now: an adapter on a weight that is read "
            "needs it as plain numbers, without quantisation"
        )
    with exact(W.device):
        if laws[0][0].at is None:
            ((layer, (method, f)),) = laws
            W_OI = layer.weight
            return layer.oriented(layer.stays(W_OI, method.weight(W_OI, f))).to(W.dtype)
        new = _stack_of_pairs(W, laws)
        if new is None:
            new = torch.stack(
                [layer.oriented(method.weight(layer.weight, f)).to(W.dtype) for layer, (method, f) in laws]
            )
        places = [layer.at for layer, _ in laws]
        if places == list(range(len(W))):
            return new
        every = dict(enumerate(W.unbind())) | dict(zip(places, new.unbind(), strict=True))
        return torch.stack(list(every.values()))  # by places on the device each step would wait for their copy


def _stack_of_pairs(W: Tensor, laws: list[tuple[Read, tuple[Reweight, Factors]]]) -> Tensor | None:
    """W_E + B_E A_E for all experts in one product; None where their methods have no pairs of one shape."""
    if not all(isinstance(method, LowRank) for _, (method, _) in laws):
        return None
    pairs = [method.pair(f) for _, (method, f) in laws]  # type: ignore[attr-defined]
    if len({(B.shape, A.shape) for B, A in pairs}) > 1:
        return None
    B_EOR, A_ERI = torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
    dW = (B_EOR @ A_ERI).transpose(1, 2) if laws[0][0].turned else B_EOR @ A_ERI  # type: ignore[attr-defined]
    places = [layer.at for layer, _ in laws]
    mine = W if places == list(range(len(W))) else W[places]
    return (mine + dW).to(W.dtype)


class _Now(threading.local):
    made: dict[Any, tuple[Tensor, list[Tensor]]] | None = (
        None  # the adapted weights of the forward that this thread is in
    )


_now = _Now()


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Within it an adapted weight is made once."""
    if _now.made is not None:
        yield
        return
    _now.made = {}
    try:
        yield
    finally:
        _now.made = None


class Weighed(Mounted):
    """Mixed into the class of a module whose parameters `leaves` are read adapted, and of one that reads them."""

    leaves: tuple[str, ...]

    def forward(self, *args: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **named)  # type: ignore[misc]
        with once():
            return super().forward(*args, **named)  # type: ignore[misc]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raises RuntimeError for a shard, as an adapted layer does."""
        if name in self.leaves and is_sharded(param):
            raise RuntimeError(PARALLEL.format(self._modules["undula"].leaves[name][0].path))  # type: ignore[attr-defined]
        super().register_parameter(name, param)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (*masters.parts(self.original), self.leaves), self.__getstate__()


class Recurrent(Weighed):
    """An LSTM, GRU or RNN keeps a list of its weights, which kernels are given: that of the adapted ones."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, n, None) for n in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None: ...

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def flatten_parameters(self) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None:
        """Past what keeps that list, and without a look at what is there: sharding puts one parameter after another."""
        if name in self.leaves and isinstance(value, nn.Parameter):
            self._parameters[name] = value  # type: ignore[attr-defined]
        else:
            nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[arg-type]
        self.__dict__["_flat_weight_refs"] = []


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _weighed(original: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    if (original, leaves) not in _classes:
        kind = Recurrent if issubclass(original, nn.RNNBase) else Weighed
        own = {"original": original, "leaves": leaves, **{leaf: property(_reader(leaf)) for leaf in leaves}}
        _classes[original, leaves] = type(f"Weighed{original.__name__}", (kind, original), own)
    return _classes[original, leaves]


def _reader(leaf: str) -> Callable[[Any], Tensor]:
    def get(module: Any) -> Tensor:
        below = module._modules.get("undula")
        if below is None or "_is_replica" in module.__dict__:
            raise RuntimeError(
                "nn.DataParallel copies an adapted model wrongly (its copies have no parameters): use one device "
                "(CUDA_VISIBLE_DEVICES=0), or DistributedDataParallel (torchrun)"
            )
        try:
            return below.adapted(module, leaf)
        except AttributeError as error:  # nn.Module would answer with the base's own weight
            raise RuntimeError(f"the adapted {leaf} could not be made: {error}") from error

    return get


def _revive(narrow: type[nn.Module], cast: tuple[str, ...], leaves: tuple[str, ...]) -> nn.Module:
    cls = _weighed(masters.cast_class(narrow, cast), leaves)
    return cls.__new__(cls)


READS = "_undula_reads"  # in a module whose forward reads weights of others: their slots


def _dress(module: nn.Module) -> None:
    """Gives the module the class for what is mounted on it and read by it now."""
    below = module._modules.get("undula")
    leaves = tuple(sorted(below.leaves)) if isinstance(below, Below) else ()
    original = module.original if isinstance(module, Weighed) else type(module)
    if leaves or module.__dict__.get(READS):
        module.__class__ = _weighed(original, leaves)
        return
    module.__class__ = original
    module.__dict__.pop(READS, None)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def mount(slot: Any) -> None:
    """Whoever reads the slot's weight reads the adapted one from now on."""
    layer: Read = slot.layer
    below = layer.owner._modules.setdefault("undula", Below())
    assert isinstance(below, Below)
    below._modules[layer.key] = slot
    slots = below.leaves.setdefault(layer.leaf, [])
    slots.append(slot)
    slots.sort(key=lambda each: each.layer.at or 0)
    slot.train(layer.owner.training)
    _dress(layer.owner)
    if layer.scope is not layer.owner:
        layer.scope.__dict__.setdefault(READS, []).append(slot)
        _dress(layer.scope)


def unmount(slot: Any) -> None:
    """Undoes `mount`."""
    layer: Read = slot.layer
    below: Any = layer.owner._modules["undula"]
    del below._modules[layer.key]
    below.leaves[layer.leaf].remove(slot)
    if not below.leaves[layer.leaf]:
        del below.leaves[layer.leaf]
    if not below.leaves:
        del layer.owner._modules["undula"]
    _dress(layer.owner)
    if layer.scope is not layer.owner:
        layer.scope.__dict__[READS].remove(slot)
        _dress(layer.scope)
