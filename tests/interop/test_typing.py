"""undula as a user's type checker and editor see it."""

import os
import subprocess
import sys
from pathlib import Path

import undula

SOURCES = Path(undula.__file__).parent

USER = """
from pathlib import Path
from torch import nn
import undula
from undula import LoRA, Run, VeRA
from undula.train import CausalLM, Prepared

model = nn.Sequential(nn.Linear(8, 8))
adapter: undula.Adapter = undula.attach(model, LoRA(r=2), where=["0"])
errors: dict[str, float] = undula.merge(model)
run = Run(model="m", data="d", task=CausalLM(), method=VeRA(r=2), out=Path("o"))
report: dict[str, object] = undula.train(run, resume=True)
other = undula.train.Classification(names=("a", "b"))
ready: Prepared = undula.train.prepare(run)
opened = undula.train.restored("o")
done = undula.study("s.toml", out="runs")
study = undula.study.read("s.toml")
names: list[str] = list(undula.methods())
loss: float = undula.collapse(model, undula.Truncate(2)).error
callback = undula.allocating(undula.ranks.AdaLoRA(target=2))
config = undula.peft_config(LoRA())
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
    names = {m.__name__ for m in undula.Method.registry.values()}
    assert names | {"peft_config", "enable_peft", "allocating", "train", "study", "methods"} <= set(dir(undula))
    assert {m for m in names if getattr(undula, m).__module__.startswith("undula.")} <= set(undula.__all__)
    allocators = undula.ranks.Allocator.registry.values()
    assert {a.__name__ for a in allocators if a.__module__.startswith("undula.")} <= set(undula.ranks.__all__)
