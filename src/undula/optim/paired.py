"""Optimisers that see the pairs of an adapter, each over any other optimiser that takes the steps.

    optimizer = LoRAPro(adapter.parameters(), model, lr=1e-3)                        # over torch.optim.AdamW
    optimizer = LoRAPro(groups, model, base=torch.optim.SGD, lr=0.1, momentum=0.9)   # over another

What is made is an instance of a class that is both, `LoRAPro` and the base: its state is the base's, with what is the
method's own beside it, and learning rate schedules, allocators, gradient scalers and checkpoints take it for what they
know.  Pairs are looked up in every step, so what an allocator or a restart has changed is seen.

Parameters narrower than float32 train through float32 copies, which the state holds: an optimiser's step of 1e-4 on a
bfloat16 weight of 0.05 would round to nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..host.host import selected
from ..host.masters import wide
from ..host.sharded import check_whole
from ..host.state import host_of
from .pairs import Pair, pairs

UNSEEN = (  # what to do where layers were not heard
    "call model.train(), and the model itself, not a copy. torch.compile's graphs of earlier passes know nothing of "
    "this optimiser: make it before the first pass, or call torch._dynamo.reset()"
)
MASTER = "undula_master"  # in the state of a narrow parameter: what it is a rounded copy of

Params = Iterable[Any]


class Paired(torch.optim.Optimizer):
    """params: parameters or groups of them, among them all factors; model: with the adapter selected; base: the class
    that takes the steps, options: its own; max_norm: clip the gradients, as they are after the method's change of them,
    to this norm (0: never).

    Raises TypeError and ValueError as `pairs` does, for a base that calls the loss itself (L-BFGS), for sharded
    parameters, and where a factor is not among the parameters.
    """

    both: ClassVar[bool] = True  # whether both factors of each pair have to train
    alone: ClassVar[bool] = False  # whether the loss's gradients are all that it can follow
    lacks: tuple[str, ...] = ()  # options of the base that its own part of a step would pass over

    def __new__(cls, *_: Any, base: type[torch.optim.Optimizer] = torch.optim.AdamW, **__: Any) -> Any:
        return object.__new__(cls if cls in _made.values() else over(cls, base))  # a copy is of the class that it is of

    def __init__(
        self,
        params: Params,
        adapted: nn.Module,
        *,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        max_norm: float = 0.0,
        **options: Any,
    ):
        self.adapter: Adapter = selected(adapted)
        check_whole(self.adapter.parameters(), f"training with {type(self).__name__}")
        self.max_norm = max_norm
        self.given: list[tuple[Tensor, Tensor | None]] = []  # gradients that others stand for in this step
        self.beside: dict[int, Tensor] = {}  # of parameters (by id), the part of their gradients that `pull` has added
        super().__init__(params, **options)
        self._step_supports_amp_scaling = False  # a gradient scaler unscales first, and skips what is not finite
        for name in self.lacks:
            if any(group.get(name) for group in self.param_groups):
                raise ValueError(f"{name} is an option of the base, and {self.called} goes without it")
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for site, _, t in self.adapter.tensors():
            if t.requires_grad and id(t) not in known:
                raise ValueError(f"{site}: its factors train and are not among the parameters of the optimiser")
        for pair in self.pairs():
            if self.both and not pair.trains:
                still = "A" if pair.B.requires_grad else "B"
                raise ValueError(f"{pair.site}: the factor {still} does not train, and {self.called} moves both")

    @property
    def called(self) -> str:
        """The method's name."""
        return type(self).__mro__[1].__name__

    def pairs(self) -> list[Pair]:
        """Those of the adapter as it is now."""
        return pairs(self.adapter)

    def following(self) -> list[Pair]:
        """The pairs that this step moves: those that have gradients.  Raises RuntimeError where one factor alone has
        one."""
        found = []
        for pair in self.pairs():
            if (pair.A.grad is None) != (pair.B.grad is None):
                without = "A" if pair.A.grad is None else "B"
                raise RuntimeError(f"{pair.site}: the factor {without} has no gradient, and {self.called} needs both")
            if pair.A.grad is not None:
                found.append(pair)
        return found

    def adjust(self) -> None:
        """Changes the gradients, which are there, unscaled and of all accumulated batches."""

    def moved(self) -> None:
        """After the base's step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the base along the changed gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self.widened():
            try:
                with self._solved():
                    self.adjust()
                if self.max_norm:
                    nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.max_norm)
                self.base_step()
                with self._solved():
                    self.moved()
            finally:
                for p, grad in self.given:
                    p.grad = grad
                self.given, self.beside = [], {}
        return loss

    @contextlib.contextmanager
    def _solved(self) -> Iterator[None]:
        """No solver takes factors that are not finite: the step goes on without it, and the training tells of them."""
        try:
            yield
        except torch.linalg.LinAlgError:
            if all(torch.isfinite(t).all() for p in self.pairs() for t in (p.A, p.B)):
                raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.beside = {}

    def apart(self, those: list[Pair]) -> tuple[Tensor | float, Tensor | float]:
        """What `gradients` of these pairs have that is not the loss's; 0 where there is nothing."""
        if not self.beside:
            return 0.0, 0.0
        dtype = torch.promote_types(those[0].A.dtype, torch.float32)
        A, B = (
            torch.stack([self.beside.get(id(t), torch.zeros_like(t)).to(t) for t in factors])
            for factors in ([p.A for p in those], [p.B for p in those])
        )
        return A.to(dtype), B.to(dtype)

    def follow(self, those: list[Tensor], gradients: Tensor) -> None:
        """Gives the base gradients[i] for those[i], until its step is made: then the gradients are again what they
        were, for allocators that score by them."""
        for p, new in zip(those, gradients.unbind(), strict=True):
            self.given.append((p, p.grad))
            p.grad = new.to(p.dtype)

    def base_step(self) -> None:
        """The base's step, whose hooks are this step's."""
        step: Any = super().step
        getattr(step.__func__, "__wrapped__", step.__func__)(self) if getattr(step, "hooked", False) else step()

    @contextlib.contextmanager
    def widened(self) -> Iterator[None]:
        """Meanwhile narrow parameters are their float32 copies, and so are their gradients."""
        narrow = [p for g in self.param_groups for p in g["params"] if p.dtype != wide(p.dtype)]
        types = {id(p): p.dtype for p in narrow}
        for p in narrow:
            grad, p.grad = p.grad, None
            kept = self.state[p].get(MASTER) if p in self.state else None
            same = kept is not None and kept.shape == p.shape and torch.equal(kept.to(p.dtype), p.detach())
            p.data = kept if same else p.data.to(wide(p.dtype))
            p.grad = None if grad is None else grad.to(p.dtype)
        try:
            yield
        finally:
            for p in narrow:
                grad, p.grad = p.grad, None
                if self.state.get(p):  # never the first thing there: optimisers begin a state that is empty; who
                    # moves a parameter without a state of its own gives it one
                    self.state[p][MASTER] = p.data
                p.data = p.data.to(types[id(p)])
                p.grad = None if grad is None else grad.to(p.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base's; the state of narrow parameters stays wide."""
        narrow = [p for g in self.param_groups for p in g["params"] if p.dtype != wide(p.dtype)]
        types = {id(p): p.dtype for p in narrow}
        for p in narrow:
            p.grad, p.data = None, p.data.to(wide(p.dtype))
        try:
            super().load_state_dict(state_dict)
        finally:
            for p in narrow:
                p.data = p.data.to(types[id(p)])


def kind_of(layer: nn.Module) -> str:
    """The name of the class that a layer had before it was adapted."""
    return getattr(type(layer), "original", type(layer)).__name__


def computes_in(model: nn.Module) -> Callable[[], bool]:
    """What tells whether the adapter that is selected now is the one that a pass goes through."""
    host = host_of(model)
    name = host.selected
    return lambda: host.selected == name


@torch.no_grad()
def check_went(moved: list[Tensor], copies: list[Tensor], length: Tensor, called: str) -> None:
    """Raises ValueError where a move of that length was lost, by half or more, in numbers narrower than float32."""
    if all(t.dtype == wide(t.dtype) for t in moved):
        return
    went = torch.stack([(t.float() - was.float()).norm() for t, was in zip(moved, copies, strict=True)]).norm()
    if went < length / 2:
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in moved}))
        raise ValueError(
            f"{called} moves {sum(t.numel() for t in moved)} numbers by {float(length):.2g} in all, of which {kinds} "
            f"keeps {float(went):.2g}: keep the factors in float32 (change the model's type before attach), or take a "
            "larger rho"
        )


@torch.no_grad()
def pull(optimizer: Any, those: list[Tensor], by: list[Tensor]) -> None:
    """Adds to the gradients of `those`, which are there, what is not the loss's but the numbers' own, such as a
    penalty's.  Optimisers that change the loss's gradients are told of it."""
    if not those:
        return
    there: Any = [p.grad for p in those]
    torch._foreach_add_(there, by)
    bare = getattr(optimizer, "optimizer", optimizer)  # accelerate's has it inside
    if isinstance(bare, Paired):
        for p, g in zip(those, by, strict=True):
            before = bare.beside.get(id(p))
            bare.beside[id(p)] = g if before is None else before + g


_made: dict[tuple[Any, Any], type[Paired]] = {}


def over(method: type[Paired], base: type[torch.optim.Optimizer]) -> type[Paired]:
    """The class that is `method` and `base`.  Raises TypeError for a base that it cannot be over."""
    if (made := _made.get((method, base))) is not None:
        return made
    if not (inspect.isclass(base) and issubclass(base, torch.optim.Optimizer)) or issubclass(base, Paired):
        raise TypeError(f"{method.__name__} goes over a class of optimisers such as torch.optim.AdamW, not {base!r}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{method.__name__} changes the gradients of a step, and {base.__name__} computes several itself within "
            "one: take a base whose step needs no closure, such as torch.optim.AdamW or SGD"
        )
    made = type(f"{method.__name__}Over{base.__name__}", (method, base), {"__module__": method.__module__})
    return _made.setdefault((method, base), made)


def gradients(those: list[Pair]) -> tuple[Tensor, Tensor]:
    """(of A (N, R, I), of B (N, O, R)) of pairs of equal shapes, at least float32."""
    dtype = torch.promote_types(those[0].A.dtype, torch.float32)
    A, B = ([p.A.grad for p in those], [p.B.grad for p in those])
    return torch.stack(A).to(dtype), torch.stack(B).to(dtype)  # type: ignore[arg-type]
