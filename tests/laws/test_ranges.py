"""Every number of every choice has a declared range, and every door refuses what lies outside it in the same words."""

import collections.abc
import dataclasses
import importlib
import importlib.util
import json
import math
import pkgutil
import re
import typing

import pytest
import torch
from torch import nn

import undula
from undula.core import given, options
from undula.core.choice import Choice
from undula.core.given import Checked
from undula.core.ranges import FLOAT32, INT64, Among, Range
from undula.train import Classification
from undula.train.run import Run

WHOLE = (-(10**30), -1, 0, 2**62, 2**63, 10**30, math.nan, math.inf)
TRIED = {int: WHOLE, float: (-1e300, -1.0, 0.0, 1e300, math.nan, math.inf, -math.inf)}


def checked_classes():
    """Every class whose fields are checked: choices, runs, studies and their parts."""
    found, needing = {}, {"triton": "undula.kernels.triton_", "flwr": "undula.federated.flower"}
    left = tuple(start for package, start in needing.items() if not importlib.util.find_spec(package))
    for module in pkgutil.walk_packages(undula.__path__, "undula."):
        if not module.name.endswith("__main__") and not module.name.startswith(left):
            names = vars(importlib.import_module(module.name)).values()
            found |= {c: None for c in names if isinstance(c, Checked) and c.__module__.startswith("undula.")}
    return [c for c in found if dataclasses.is_dataclass(c)]


def numbers(hint):
    """(kind, range) of each number in a field's type: inside tuples and options too."""
    bare, declared = given.within(hint)
    if bare in (int, float):
        return [(bare, declared)]
    return [each for part in typing.get_args(bare) if part is not Ellipsis for each in numbers(part)]


CLASSES = checked_classes()
FIELDS = [(c, f, *number) for c in CLASSES for f in dataclasses.fields(c) for number in numbers(given.hints(c)[f.name])]


def outside(kind, within):
    """Those of the tried numbers that do not lie in a range."""
    return [n for n in TRIED[kind] if not (math.isfinite(n) and n in within and (kind is float or abs(n) <= INT64))]


def put(cls, field, number):
    """`number` as the field takes it: in a tuple or a table where it takes one."""
    bare = given.within(given.hints(cls)[field.name])[0]
    kinds = {typing.get_origin(kind) for kind in (bare, *typing.get_args(bare))}
    if collections.abc.Mapping in kinds:
        return {"a": number}
    return (number,) if tuple in kinds else number


def place(cls, field):
    """How a message calls that."""
    return f"{cls.__name__.lstrip('_')}.{field.name}" + "['a']" * isinstance(put(cls, field, 1), dict)


def test_there_is_something_to_check():
    names = {f"{c.__name__}.{f.name}" for c, f, _, _ in FIELDS}
    assert {"LoRA.r", "AdaLoRA.beta1", "ALoRA.first", "Geometric.first", "CausalLM.max_completion", "Run.lr",
            "Training.batch", "Sinter.w", "Listed.lambdas", "Randomised.iterations", "Rule.alpha"} <= names  # fmt: skip
    assert len(FIELDS) > 150


def test_every_number_declares_its_range_and_its_default_lies_in_it():
    """A field without one would take a value that fails later, or never."""
    for cls, f, _, within in FIELDS:
        where = f"{cls.__name__}.{f.name}"
        bounded = max(within.least, within.above) > -math.inf and min(within.most, within.below) < math.inf
        assert bounded or isinstance(within, Among), f"{where} has no range"
        if isinstance(f.default, int | float):
            assert given.checked(cls, f.name, f.default) == f.default, where


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: f"{c.__module__[7:]}.{c.__name__}")
def test_what_lies_outside_is_refused_by_class_field_value_and_range(cls):
    for f, kind, within in [each[1:] for each in FIELDS if each[0] is cls]:
        refused = outside(kind, within)
        for number in set(TRIED[kind]) - set(refused):
            assert given.checked(cls, f.name, put(cls, f, number)) == put(cls, f, number)
        for number in refused:
            where = f"{place(cls, f)} is "
            with pytest.raises(ValueError, match=f"^{re.escape(where)}") as caught:
                cls(**{f.name: put(cls, f, number)})
            told = str(caught.value)
            assert f"found {given.shown(number)}" in told
            assert within.told(number if math.isfinite(number) else math.nan) in told
            assert not told.startswith(f"{where},"), "says what is right instead"


NEEDED = {undula.Dropout: {"inner": "lora"}, undula.Sum: {"parts": "lora"}}
NOT_ALONE = (*NEEDED, undula.LoRASB)  # need another method, or a probe
MEMBERS = [(c, f, k, w) for c, f, k, w in FIELDS if issubclass(c, Choice) and c.registry.get(c.__name__.lower()) is c]


DOORS = {
    "command line": lambda cls, texts, _: options.build(cls.family, cls.__name__, texts),
    "table": lambda cls, _, table: options.build_from(cls.family, cls.__name__, table),
    "json": lambda cls, _, table: cls.family.decode({"is": cls.__name__, **table}),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_the_same(door):
    """--set, the tables of a study file, and JSON."""
    told = 0
    for cls, f, kind, within in MEMBERS:
        needed = NEEDED.get(cls, {})
        for number in outside(kind, within):
            placed = put(cls, f, number)
            value = list(placed) if isinstance(placed, tuple) else placed
            said = f"{f.name}.a" if isinstance(placed, dict) else f.name
            texts = [f"{k}={v}" for k, v in ({said: number} | needed).items()]
            with pytest.raises(ValueError, match=f"^{re.escape(place(cls, f))} is "):
                DOORS[door](cls, texts, {f.name: value} | needed)
            told += 1
    assert told > 300


def test_what_is_allowed_at_the_ends_works():
    """The largest seed of every method and allocator reaches its generator."""
    for cls, f, _, within in MEMBERS:
        if f.name == "seed" and issubclass(cls, undula.Method):
            model = nn.Sequential(nn.Linear(8, 8))
            undula.attach(model, dataclasses.replace(cls(), seed=int(within.most)))
            assert torch.isfinite(model(torch.randn(2, 8))).all()


def test_a_directory_whose_numbers_are_damaged_is_refused(tmp_path):
    """Whatever field of whatever method: a ValueError that names the file, the class and the field."""
    for cls in dict.fromkeys(c for c, *_ in MEMBERS if issubclass(c, undula.Method) and c not in NOT_ALONE):
        model = nn.Sequential(nn.Linear(24, 24))
        undula.attach(model, cls()).save(tmp_path / cls.__name__)
        path = tmp_path / cls.__name__ / "adapter_config.json"
        sound = path.read_text()
        for f, kind, within in [each[1:] for each in MEMBERS if each[0] is cls]:
            bad = next((n for n in outside(kind, within) if abs(n) < FLOAT32), None)
            if bad is None:  # every finite number is right
                continue
            data = json.loads(sound)
            damage(data, cls.__name__, f.name, bad)
            assert json.dumps(data) != json.dumps(json.loads(sound)), (cls, f.name)
            path.write_text(json.dumps(data))
            with pytest.raises(ValueError, match=rf"{cls.__name__}\.{f.name} is ") as caught:
                undula.Adapter.load(path.parent)
            assert str(path.parent) in str(caught.value)


def damage(data, name, field, bad):
    """Puts `bad` into that field of every choice of that name."""
    if isinstance(data, dict):
        if data.get("is") == name:
            data[field] = bad
        for each in data.values():
            damage(each, name, field, bad)
    for each in data if isinstance(data, list) else ():
        damage(each, name, field, bad)


def test_a_run_file_with_such_numbers_is_refused(tmp_path):
    run = Run("m", "d", Classification(), undula.LoRA(), tmp_path)
    sound = json.loads(json.dumps(run.encode()))
    for f, kind, within in [each[1:] for each in FIELDS if each[0] is Run]:
        for number in outside(kind, within):
            with pytest.raises(ValueError, match=rf"\b{f.name} is "):
                Run.decode(sound | {f.name: number}, tmp_path)


def test_a_field_of_another_package_may_declare_and_need_not():
    @dataclasses.dataclass(frozen=True)
    class Thirds(undula.starts.Start):
        share: typing.Annotated[float, Range(least=0, below=2), "two would be all"] = 0.5
        free: float = 1.0

        def __call__(self, site, r, s=1.0):
            raise NotImplementedError

    given.hints.cache_clear()
    with pytest.raises(ValueError, match=r"Thirds\.share is at least 0 and below 2 \(two would be all\), found 2"):
        Thirds(share=2)
    assert Thirds(free=-1e300).free == -1e300
    with pytest.raises(ValueError, match=r"Thirds\.free is a finite number, found nan"):
        Thirds(free=math.nan)
