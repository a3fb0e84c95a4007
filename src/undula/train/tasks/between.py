"""A model's norms, rotations, gates and dropouts with fewer passes, for as long as it trains.

Nothing is known of a model by its name: its own code is run on a few numbers, small and large, in training and in
evaluation mode, and what gives the values and the gradients of `kernels.between` is replaced by it.  A module that has
more than the law needs (parameters, buffers, hooks within it) is none, and one that is given more than the law takes
runs by its own code, as what is trained, or not on a CPU.  Dropout draws the entries that fall out, not a mask: see
`kernels.holes`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import between, holes

LEAST = 1 << 24  # parameters of a model: for a smaller one nothing is compiled
CLOSE = 1e-5  # of the size of what is compared, float32
ROTATION = "apply_rotary_pos_emb"  # as transformers' files call theirs
GATE = ("gate_proj", "up_proj", "down_proj")
LARGE = 100.0  # where a law that cuts off what is large would be seen
BOOKS = {*nn.Module().__dict__}  # what every module has
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Forward = Callable[..., Any]


@contextlib.contextmanager
def one_pass(model: nn.Module) -> Iterator[None]:
    """Within, they are taken so."""
    with torch.random.fork_rng([]):  # of a model's own code that draws
        changed = list(_changed(model))
    try:
        for module, forward in changed:
            module.forward = forward
        yield
    finally:
        for module, forward in changed:
            if module.__dict__.get("forward") is forward:  # nobody else's
                del module.forward


def _changed(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu":
        return
    large = sum(p.numel() for p in model.parameters()) >= LEAST
    in_c = large and first.dtype in between.SUFFIX and between.passes() is not None
    makers = (_still, *((_dropout,) if large else ()), *((_norm, _gate, _rotation) if in_c else ()))
    seen: dict[Any, bool] = {}
    for module in model.modules():
        if "forward" not in module.__dict__:
            for made in makers:
                with contextlib.suppress(Exception):  # of someone's own code, run as it was not meant to be
                    if (forward := made(module, seen)) is not None:
                        yield module, types.MethodType(forward, module)  # bound: a copy of the model has its own
                        break


def _still(module: nn.Module, seen: dict[Any, bool]) -> Forward | None:
    """Of a batch norm that keeps its statistics and does not learn x * a + b is left, and backward one product; torch's
    backward sums over x as well."""

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        kept = (self.weight, self.bias, self.running_mean, self.running_var)
        learns = self.training or not torch.is_grad_enabled() or self.weight.requires_grad or self.bias.requires_grad
        plain = _alone(given, named) and {t.dtype for t in (*given, *kept)} in ({torch.float32}, {torch.float64})
        if learns or not plain:
            return type(self).forward(self, *given, **named)
        (x,) = given
        a = self.weight * torch.rsqrt(self.running_var + self.eps)
        shape = (-1, *(1,) * (x.ndim - 2))
        return torch.addcmul((self.bias - self.running_mean * a).view(shape), x, a.view(shape))

    known = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return forward if known and module.affine and module.running_mean is not None else None


def _dropout(module: nn.Module, seen: dict[Any, bool]) -> Forward | None:
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        if self.training and not self.inplace and _alone(given, named) and holes.few(given[0], self.p):
            return holes.dropped(given[0], self.p)
        return type(self).forward(self, *given, **named)

    return forward if type(module) is nn.Dropout and module.p > 0 else None


def _norm(module: nn.Module, seen: dict[Any, bool]) -> Forward | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or list(module._parameters) != ["weight"] or module._modules or module._buffers:
        return None
    if (kind := _kind(module)) not in seen:
        weight = torch.linspace(0.5, 2, 24, dtype=torch.float32, device="cpu")
        like = _copied(module, _parameters={"weight": nn.Parameter(weight, requires_grad=False)})
        sizes = (eps**0.5, 1.0, LARGE)
        seen[kind] = _same(like, lambda x: between.norm(x, weight, eps), *(s * _numbers(2, 5, 24) for s in sizes))
    if not seen[kind]:
        return None

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        w = self.weight
        if not _alone(given, named) or w.requires_grad or w.shape != given[0].shape[-1:] or not _learns(*given, w):
            return type(self).forward(self, *given, **named)
        return between.norm(given[0], w, eps)

    return forward


def _gate(module: nn.Module, seen: dict[Any, bool]) -> Forward | None:
    others = {name: m for name, m in module._modules.items() if name not in GATE}
    if not set(GATE) <= set(module._modules) or _holds(module) or any(m and _more(m) for m in others.values()):
        return None
    if (kind := _kind(module)) not in seen:
        gate, up, down = map(_Product, (_numbers(6, 20), _numbers(6, 20).flip(0), _numbers(20, 6)))
        parts = copy.deepcopy(others) | dict(zip(GATE, (gate, up, down), strict=True))
        like = _copied(module, _modules=parts)
        sizes = (2.0, LARGE)
        seen[kind] = _same(like, lambda x: down(between.gated(gate(x), up(x))), *(s * _numbers(1, 5, 6) for s in sizes))
    if not seen[kind]:
        return None

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        if not _alone(given, named) or not _learns(*given):
            return type(self).forward(self, *given, **named)
        a, b = self.gate_proj(*given), self.up_proj(*given)
        return self.down_proj(between.gated(a, b) if a.shape == b.shape and between.applies(a, b) else F.silu(a) * b)

    return forward


def _rotation(module: nn.Module, seen: dict[Any, bool]) -> Forward | None:
    """The module's forward with another function where its file says `apply_rotary_pos_emb`."""
    written = type(module).forward
    own = getattr(written, "__globals__", {}).get(ROTATION)
    if own is None or ROTATION not in written.__code__.co_names:
        return None
    if own not in seen:
        q, k, cos, sin = _numbers(1, 3, 5, 8), _numbers(1, 1, 5, 8), _numbers(1, 5, 8), _numbers(1, 5, 8).flip(1)
        ours = lambda *x: tuple(between.turned(t, cos, sin) for t in x)  # noqa: E731
        seen[own] = _equal(lambda *x: own(*x, cos, sin), ours, q, k)
    if not seen[own]:
        return None

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or not _turns(q, k, cos, sin):
            return own(q, k, cos, sin, *rest, **named)
        return between.turned(q, cos, sin), between.turned(k, cos, sin)

    made = types.FunctionType(written.__code__, {**written.__globals__, ROTATION: turned}, written.__name__,
                              written.__defaults__, written.__closure__)  # fmt: skip
    made.__kwdefaults__ = written.__kwdefaults__
    return made


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    shape = (1, q.shape[-2], q.shape[-1])
    fits = q.ndim == k.ndim == 4 and len(q) == len(k) == 1 and q.shape[2:] == k.shape[2:] and shape[-1] % 2 == 0
    angles = cos.shape == sin.shape == shape and cos.is_contiguous() and sin.is_contiguous()
    return fits and angles and not (cos.requires_grad or sin.requires_grad) and _learns(q, k, cos, sin)


class _Product(nn.Module):
    """In a linear layer's place; unlike a new one's its numbers take none of torch's generator."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.W = W

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W


def _learns(*given: Tensor) -> bool:
    """Whether a step is under way, and the passes take these: what is measured is what the model computes elsewhere."""
    return torch.is_grad_enabled() and between.applies(*given)


def _alone(given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a module is given x and nothing else."""
    return len(given) == 1 and not named and isinstance(given[0], Tensor)


def _holds(module: nn.Module) -> bool:
    """Whether it has numbers of its own, beside those of what it consists of."""
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _more(module: nn.Module) -> bool:
    """Whether it, or a part of it, has numbers or hooks."""
    return any(_holds(m) or any(m.__dict__.get(name) for name in ("forward", *HOOKS)) for m in module.modules())


def _kind(module: nn.Module) -> Any:
    """What its law follows from, its weights apart: so many layers of a model are looked at once.  Of what is no number
    or text it is which object it is."""
    own = {k: v for k, v in module.__dict__.items() if k not in BOOKS}
    said = [(k, v if isinstance(v, int | float | str) else id(v)) for k, v in sorted(own.items())]
    parts = [type(m) if k in GATE or m is None else _kind(m) for k, m in module._modules.items()]
    return type(module), tuple(said), tuple(parts)


def _copied(module: nn.Module, **parts: Any) -> nn.Module:
    """The module with other parts, the module itself unchanged."""
    made = copy.copy(module)
    made.__dict__.update(parts)
    return made


def _numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _same(like: nn.Module, other: Forward, *given: Tensor) -> bool:
    """Whether a module that nobody else has computes the other's law of each of these, in both modes."""
    for mode, x in itertools.product((True, False), given):
        for part in like.modules():
            part.training = mode
        if not _equal(like.forward, other, x):
            return False
    return True


def _equal(own: Forward, other: Forward, *given: Tensor) -> bool:
    """Whether both have the same values and gradients."""
    with torch.enable_grad():
        found = [_differentiated(law, [t.clone().requires_grad_() for t in given]) for law in (own, other)]
    pairs = list(zip(*found, strict=True))
    return all(a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * a.abs().max()) for a, b in pairs)


def _differentiated(law: Forward, given: list[Tensor]) -> list[Tensor]:
    found = law(*given)
    values = [found] if isinstance(found, Tensor) else list(found)
    total = torch.stack([(t * _numbers(*t.shape)).sum() for t in values]).sum()
    return [*(t.detach() for t in values), *torch.autograd.grad(total, given)]
