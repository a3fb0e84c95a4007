"""PEFT's `target_parameters`: LoRAs on parameters, for the experts of a mixture all in one pair of matrices.

PEFT wraps the module once for each of its parameters, the first innermost, and names the factors of all but the last by
`base_layer`.  A (E r, I) has the experts below one another, B (O, r E) side by side, the rank outside
(`peft.tuners.lora.layer.ParamWrapper`, 0.21.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

ORDER = ("gate_up_proj", "down_proj")  # in which the experts of transformers have their parameters
INNER = ".base_layer"

Found = Mapping[str, Mapping[str, Tensor]]


def named(config: Mapping[str, Any], path: str) -> list[str]:
    """The parameters that a configuration names.  Raises ValueError for what are no names."""
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path}: target_parameters are names of parameters, found {names!r:.80}")
    if not all("." in name for name in names):
        raise ValueError(
            f"{path}: of target_parameters={names!r:.80} undula reads names with their module's (experts.down_proj): "
            "without it the file does not tell which of its factors are a layer's"
        )
    return sorted(set(names))


def split(
    found: Found, names: list[str], rank: Callable[[str], float], path: str
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
    """(the factors of each site, {site on a parameter: the parameter}).  Raises ValueError for factors that are not as
    PEFT stores them."""
    levels: dict[str, list[str]] = {}  # of each module, the innermost first
    for site in sorted(found, key=lambda site: -site.count(INNER)):
        levels.setdefault(module_of(site), []).append(site)
    lost = [name for name in names if not any(is_of(module, name) for module in levels)]
    if lost:
        raise ValueError(f"{path}: target_parameters name {', '.join(lost[:3])}; it holds no factors for that")
    made: dict[str, Mapping[str, Tensor]] = {}
    parameters: dict[str, str] = {}
    for module, sites in levels.items():
        leaves = {name.rpartition(".")[2] for name in names if is_of(module, name)}
        if not leaves:
            made |= {site: found[site] for site in sites}
            continue
        order = [leaf for leaf in ORDER if leaf in leaves] if len(leaves) > 1 else list(leaves)
        if set(order) != leaves or len(order) != len(sites):
            raise ValueError(
                f"{path}: {module} has factors for {len(sites)} of its parameters, target_parameters name "
                f"{', '.join(sorted(leaves))}; undula knows in which order PEFT puts one, and {' and '.join(ORDER)}"
            )
        for leaf, site in zip(order, sites, strict=True):
            parameter = f"{module}.{leaf}"
            new = _each(parameter, found[site], rank(parameter), path)
            made |= new
            parameters |= dict.fromkeys(new, parameter)
    return made, parameters


def module_of(site: str) -> str:
    """The module whose factors PEFT names so: several parameters of it are wrapped around each other."""
    while site.endswith(INNER):
        site = site.removesuffix(INNER)
    return site


def is_of(module: str, name: str) -> bool:
    """Whether a name means a parameter of this module, as PEFT matches it."""
    full = f"{module}.{name.rpartition('.')[2]}"
    return full == name or full.endswith(f".{name}")


def _each(parameter: str, leaves: Mapping[str, Tensor], rank: float, path: str) -> dict[str, Mapping[str, Tensor]]:
    """The factors of one parameter, of each matrix of a stack."""
    A, B = leaves.get("lora_A"), leaves.get("lora_B")
    seen = {k: tuple(t.shape) for k, t in leaves.items()}
    if A is None or B is None or len(leaves) != 2 or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{path}: {parameter} needs lora_A (E r, I) and lora_B (O, r E); found {seen}")
    r = int(rank)
    if r < 1 or r != rank or not A.shape[0] or A.shape[0] % r:
        raise ValueError(f"{path}: {parameter} has factors of {A.shape[0]} ranks, no multiple of its rank {rank:g}")
    count = A.shape[0] // r
    if count == 1:
        return {parameter: leaves}
    A_ERI, B_ORE = A.reshape(count, r, A.shape[1]), B.reshape(B.shape[0], r, count)
    return {f"{parameter}.{i}": {"lora_A": A_ERI[i], "lora_B": B_ORE[:, :, i].contiguous()} for i in range(count)}
