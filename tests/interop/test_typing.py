"""undula as a user's type checker and editor see it."""

import tomllib
import types
from pathlib import Path

import undula

SOURCES = Path(undula.__file__).parent

ROOT = Path(__file__).parents[2]


def test_a_users_module_is_checked_with_the_sources():
    """By mypy in `make lint`: right calls strictly, and of each wrong one that it is found."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["files"] == ["src", "tests/user.py"]
    (strict,) = (rule for rule in mypy["overrides"] if rule["module"] == "tests.user")
    assert strict["warn_unused_ignores"]
    assert (ROOT / "tests/user.py").read_text().count("  # type: ignore[") == 3


def test_the_marker_is_there():
    """Checkers read the types of an installed package only beside this file (PEP 561)."""
    assert (SOURCES / "py.typed").is_file()


def test_an_editor_is_offered_every_method_and_allocator():
    own = {m.__name__ for m in undula.Method.registry.values() if m.__module__.startswith("undula.")}
    assert own | {"peft_config", "enable_peft", "allocating", "train", "study", "methods"} <= set(undula.__all__)
    assert set(undula.__all__) <= set(dir(undula))
    allocators = undula.ranks.Allocator.registry.values()
    assert {a.__name__ for a in allocators if a.__module__.startswith("undula.")} <= set(undula.ranks.__all__)


def test_verbs_are_functions_and_names_are_those_that_stand_there():
    """Nothing is looked up when it is asked for, and no module is called; a verb hides a package of its name, whose
    modules are still imported in every way."""
    assert not {"__getattr__", "__dir__"} & {*vars(undula), *vars(undula.ranks)}
    verbs = [undula.methods, undula.study, undula.train]
    assert all(isinstance(verb, types.FunctionType) for verb in verbs)
    import undula.methods.lora as method
    from undula.study import spec
    from undula.train import recipe

    assert [m.__name__ for m in (method, spec, recipe)] == [
        "undula.methods.lora",
        "undula.study.spec",
        "undula.train.recipe",
    ]
    assert [undula.methods, undula.study, undula.train] == verbs
