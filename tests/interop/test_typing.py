"""undula as a user's type checker and editor see it."""

import os
import subprocess
import sys
import types
from pathlib import Path

import undula

SOURCES = Path(undula.__file__).parent

USER = """
from collections.abc import Mapping
from pathlib import Path
from torch import Tensor, nn
import undula
from undula import LoRA, Run, VeRA
from undula.study.read import read
from undula.train import CausalLM, Classification, Prepared, prepare, restored

model = nn.Sequential(nn.Linear(8, 8))
adapter: undula.Adapter = undula.attach(model, LoRA(r=2), where=["0"])
errors: dict[str, float] = undula.merge(model)
run = Run(model="m", data="d", task=CausalLM(), method=VeRA(r=2), out=Path("o"))
report: dict[str, object] = undula.train(run, resume=True)
other = Classification(names=("a", "b"))
ready: Prepared = prepare(run)
opened = restored("o")
done = undula.study("s.toml", out="runs")
study = read("s.toml")
names: list[str] = list(undula.methods())
loss: float = undula.collapse(model, undula.Truncate(2)).error
callback = undula.allocating(undula.ranks.AdaLoRA(target=2))
config = undula.peft_config(LoRA())
centred: undula.Method = undula.Centred(LoRA(), undula.starts.PiSSA())


class Mine(undula.Additive):
    def init(self, site: undula.Site) -> dict[str, Tensor]:
        return {}

    def delta(self, f: Mapping[str, Tensor]) -> Tensor:
        return f["A"]
"""
WRONG = 'undula.train("m")\nundula.study(resume=True)\nundula.LoRa(r=2)\n'
MYPY = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,datasets.*,peft.*,numpy.*,scipy.*,pyarrow.*,PIL.*,safetensors.*,rich.*,typer.*,trl.*]
follow_imports = skip
"""


def test_a_users_mypy_knows_the_verbs_and_the_methods(tmp_path):
    """Strict, with undula's sources where an installation has them: nothing to complain about in right calls (other
    packages are skipped, which costs a minute less), and each wrong one found."""
    (tmp_path / "user.py").write_text(USER + WRONG)
    (tmp_path / "mypy.ini").write_text(MYPY)
    run = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "--config-file", "mypy.ini", "user.py"]
    env = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    lines = [int(line.split(":")[1]) for line in done.stdout.splitlines() if " error: " in line]
    first = USER.count("\n") + 1
    assert lines == list(range(first, first + 3)), done.stdout + done.stderr


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
