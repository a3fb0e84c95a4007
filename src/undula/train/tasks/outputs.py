"""A pretrained model's own head: whether it has one for classes of the data, in which order, and what it is given."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.columns import plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")


def own_names(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The classes of the head that a base has, in order; None where it has none."""
    kinds = getattr(config, "architectures", None) or ()
    names = getattr(config, "id2label", None) or {}
    if not any(kind.endswith(HEADS) for kind in kinds) or sorted(names) != list(range(len(names))):
        return None
    return tuple(str(names[i]) for i in range(len(names)))


def head_of(config: PretrainedConfig, ending: str) -> bool:
    """Whether a configuration is that of a whole model whose class has such a name."""
    return any(str(kind).endswith(ending) for kind in getattr(config, "architectures", None) or ())


def order_of(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The number that each of `names` has in the base, where they are the same set; None where they are not.

    Compared as people read them: without case and white space, `LABEL_3` is 3; whole numbers from 0 are the base's
    numbers whatever it calls them.  As in transformers' run_glue.py, but for any spelling of the numbers.
    """
    if len(own) != len(names):
        return None
    for known in ([_bare(n) for n in own], [str(i) for i in range(len(own))]):
        wanted = [_bare(n) for n in names]
        if sorted(known) == sorted(wanted) and len(set(known)) == len(known):
            return [known.index(n) for n in wanted]
    return None


def _bare(name: str) -> str:
    made = re.sub(r"^label[_ ](?=\d+$)", "", plain(name))
    return str(int(made)) if re.fullmatch(r"\d+", made) else made


def with_head(auto: Any, path: str, names: Sequence[str], **options: Any) -> Any:
    """What `auto.from_pretrained` gives for the classes `names` (see `output_loading_info`).  A head that
    the base has for these classes stays, its outputs in their order; one for other classes gives way to a new one,
    whatever its size."""
    from transformers import AutoConfig

    own = own_names(AutoConfig.from_pretrained(path))
    made = auto.from_pretrained(path, ignore_mismatched_sizes=True, **options)
    model: PreTrainedModel = made[0] if isinstance(made, tuple) else made
    if own is None or len(own) != len(names):
        return made  # from_pretrained has made a new one
    order = order_of(own, names)
    if order == list(range(len(own))):
        return made
    for name, dim in _outputs(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if order is None:
            _renew(model, module)
        else:
            with torch.no_grad():
                p = model.get_parameter(name)
                p.copy_(p.index_select(dim, torch.tensor(order, device=p.device)))
    return made


def _outputs(model: PreTrainedModel) -> dict[str, int]:
    """{parameter: dimension} of those whose shape has the number of classes in it: found by asking for one more."""
    shapes = []
    for more in (0, 1):
        config = copy.deepcopy(model.config)
        config.num_labels = int(config.num_labels or 0) + more
        with torch.device("meta"), contextlib.suppress(AttributeError):
            shapes.append({n: p.shape for n, p in type(model)(config).named_parameters()})
    one, other = shapes
    return {n: next(i for i, (a, b) in enumerate(zip(s, other[n], strict=True)) if a != b)
            for n, s in one.items() if s != other[n]}  # fmt: skip


def _renew(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Draws a module anew, as the model draws what a checkpoint lacks."""
    for thing in (module, *module.parameters(recurse=False)):
        if hasattr(thing, "_is_hf_initialized"):
            del thing._is_hf_initialized
    before = [p.clone() for p in module.parameters(recurse=False)]
    with torch.no_grad():
        model._init_weights(module)
        after = list(module.parameters(recurse=False))
        if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            module.reset_parameters()  # type: ignore[operator]


def logits_of(outputs: Any) -> Tensor:
    """A model's answers."""
    found: Tensor = outputs.logits
    return found


def with_embeddings(model: nn.Module, classes: int, given: Any) -> tuple[Tensor, Tensor]:
    """(logits, what the last linear layer of the head is given).  Raises TypeError where the head has none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no linear layer for {classes} classes at its end, so its rows have no "
            "prototypes: leave near and apart at 0"
        )
    seen: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = logits_of(model(**given))
    finally:
        handle.remove()
    return logits, seen[-1].flatten(1)
