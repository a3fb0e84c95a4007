"""Modules in the place of others: a body that is computed elsewhere, and those that some rows have for themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUTS = ("output_hidden_states", "output_attentions")


class Given(nn.Module):
    """In the place of a body: the output that another one computed of the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *args: Any, **named: Any) -> Any:
        asked = [name for name in OUTPUTS if named.get(name)]
        if asked:
            raise TypeError(f"the head asks its body for {', '.join(asked)}, which a shared body does not give")
        return self.output


def odd(model: PreTrainedModel) -> set[str]:
    """The modules that see something else than the rows of a batch first (positions, distances): where two rows, or
    two adapters, have one input.  Told by a batch of three texts; those that it does not reach are among them."""
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            first = args[0] if args else next(iter(named.values()), None)
            rows = all(isinstance(t, Tensor) and t.shape[:1] == (3,) for t in (first, out))
            seen[name] = seen.get(name, True) and rows

        return hook

    weighted = {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    handles = [m.register_forward_hook(look(n), with_kwargs=True) for n, m in weighted.items()]
    try:
        with torch.no_grad():
            model(**_three(model))
    finally:
        for handle in handles:
            handle.remove()
    return {n for n in weighted if not seen.get(n, False)}


def _three(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of three rows of any content."""
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.ones(3, 5, dtype=torch.long, device=model.device)}
    size, channels = getattr(model.config, "image_size", 32), getattr(model.config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return {model.main_input_name: torch.zeros(3, channels, height, width, device=model.device, dtype=model.dtype)}


Split = list[tuple[slice, nn.Module]]


@contextlib.contextmanager
def exchanged(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within, a module computes by this forward."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def own_modules(body: nn.Module, inner: Mapping[str, Split]) -> Iterator[None]:
    """Within, rows of a batch go through modules of their own in the place of the body's; slices in their order."""
    with contextlib.ExitStack() as stack:
        for path, own in inner.items():
            module = body.get_submodule(path)
            stack.enter_context(exchanged(module, _splitting(module, module.__dict__.get("forward"), own)))
        yield


def _splitting(module: nn.Module, before: Any, own: Split) -> Any:
    def forward(x: Tensor) -> Tensor:
        y = type(module).forward(module, x) if before is None else before(x)
        parts, at = [], 0
        for rows, mine in own:
            parts += [y[at : rows.start], mine(x[rows])]
            at = rows.stop
        return torch.cat([*parts, y[at:]])

    return forward
