"""Installations with the declared core dependencies alone, or with one extra: what needs no more works, the rest says
which extra it needs."""

import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch import nn

import undula
from undula.core import extras

ROOT = Path(__file__).parents[2]

# All finders, for which whatever the core does not bring is not there.
BARE = """
import sys
class Without:
    def __init__(self, finder, absent):
        self.finder, self.absent = finder, absent
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder, {absent!r}) for finder in sys.meta_path]
"""

LIBRARY = """
import pathlib, sys
import torch
from torch import nn
import undula
from tests.support.zoo import ZOO

folder = pathlib.Path(sys.argv[1])
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7))
x = torch.randn(40, 12)
first = list({type(m): m for m in reversed(ZOO)}.values())
for i, m in enumerate(first):
    model = net()
    probe = undula.Probe([x], loss=lambda model, batch: model(batch).square().mean())
    adapter = undula.attach(model, m, probe=probe)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimiser.step()
    y = model.eval()(x).detach()
    undula.diagnose(model, [x])
    adapter.save(folder / str(i))
    if isinstance(m, undula.LowRank):
        undula.io.export_lora(adapter, folder / f"{i}.lora")
    undula.collapse(model, undula.LeastSquares(2, [x]), held_out=[x])
    if isinstance(m, undula.Reweight):
        undula.merge(model)
        undula.unmerge(model)
    other = net().eval()
    undula.attach(other, undula.Adapter.load(folder / str(i)))
    torch.testing.assert_close(other(x), y)
print(len(first), "methods")
"""

COMMANDS = """
import sys
from typer.testing import CliRunner
from undula.cli import app
for words in [["methods"], ["assets"], ["show", "{d}/lora"], ["show", "{d}/vera"], ["compare", "--help"],
              ["export", "{d}/lora", "--out", "{d}/out"], ["study", "--help"]]:
    run = CliRunner().invoke(app, [w.format(d=sys.argv[1]) for w in words])
    assert run.exit_code == 0, (words, run.output, run.exception)
for words, extra in {needs}:
    run = CliRunner().invoke(app, [w.format(d=sys.argv[1]) for w in words])
    assert run.exit_code == 2 and f"pip install 'undula[{extra}]'" in run.output, (words, run.output, run.exception)
"""


def brought(*extras):
    """The distributions that the declared dependencies, and those of the extras, bring, as pip would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, left = set(), [*project["dependencies"], *(f"undula[{extra}]" for extra in extras)]
    while left:
        asked = Requirement(left.pop())
        name = re.sub(r"[-_.]+", "-", asked.name).lower()
        if name == "undula":
            left.extend(r for extra in asked.extras for r in project["optional-dependencies"][extra])
            continue
        if name in found or (asked.marker is not None and not asked.marker.evaluate({"extra": ""})):
            continue
        try:
            left.extend(importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
    return found


owners = functools.cache(importlib.metadata.packages_distributions)  # {module: the packages that bring it}


def absent(*extras):
    """The installed modules that the core and the extras do not bring."""
    there = brought(*extras)
    named = {m: {re.sub(r"[-_.]+", "-", d).lower() for d in ds} for m, ds in owners().items()}
    return sorted(m for m, ds in named.items() if not ds & (there | {"undula"}))


def bare(code, *arguments, extras=(), without=()):
    """Runs code where only the core and the extras are installed, and `without` is not even if they bring it."""
    code = BARE.format(absent={*absent(*extras), *without}) + code
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_core_is_torch_alone():
    beside = {"numpy", "safetensors", "typer", "rich", "transformers", "peft", "scipy", "matplotlib"}
    assert not brought() & beside
    assert {"typer", "rich"} <= brought("cli")
    assert not brought("hf") & {"scikit-learn", "scipy", "rouge-score", "pillow", "matplotlib"}
    assert {"typer", "transformers", "scikit-learn", "rouge-score", "pillow"} <= brought("train")
    assert {"typer", "transformers", "matplotlib", "scipy", "pyarrow"} <= brought("study") - {"optuna", "ray"}


@pytest.mark.parametrize("extra", extras.BROUGHT)
def test_the_advice_knows_what_each_extra_brings(extra):
    """Every package that it speaks of comes with the extra that it names."""
    if not set(extras.BROUGHT[extra]) & set(owners()):
        pytest.skip(f"the extra {extra} is not installed")
    for package in extras.packages(extra):
        assert {re.sub(r"[-_.]+", "-", d).lower() for d in owners()[package]} & brought(extra), package


def test_every_method_trains_saves_loads_and_leaves(tmp_path):
    number, _ = bare(LIBRARY, tmp_path).split()
    assert int(number) >= 27


CONSOLE = """
import runpy
sys.argv = ["undula", "methods"]
try:
    runpy.run_module("undula", run_name="__main__")
except SystemExit as end:
    print(end.code)
"""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_console_script_without_its_packages_says_what_to_install(missing):
    """In one line, without a traceback."""
    code = BARE.format(absent={missing}) + CONSOLE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "2\n"
    said = [line for line in done.stderr.splitlines() if "undula[" in line]
    assert said == [f"this needs the package {missing}, which is not installed: pip install 'undula[cli]'"]
    assert "Traceback" not in done.stderr
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"undula": "undula.__main__:main"}


BRIDGE = """
import pathlib
import peft, torch
from torch import nn
import undula
D = pathlib.Path(sys.argv[1])
net = lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
torch.manual_seed(0)
base = net()
state = {{k: v.clone() for k, v in base.state_dict().items()}}
model = peft.get_peft_model(base, undula.peft_config(undula.LoRAN(r=2), target_modules=["0", "2"]))
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(5, 8)
for _ in range(3):
    model(x).square().mean().backward()
    optimiser.step()
model.save_pretrained(D / "peft")
other = net()
other.load_state_dict(state)
undula.enable_peft()
loaded = peft.PeftModel.from_pretrained(other, D / "peft")
torch.testing.assert_close(loaded(x), model(x))
torch.testing.assert_close(loaded.merge_and_unload()(x), model(x))
print("done")
"""


def test_the_peft_bridge_needs_nothing_of_plots_metrics_and_command_lines(tmp_path):
    """transformers happens to bring typer and rich; the bridge does without."""
    without = ("typer", "rich", "matplotlib", "sklearn", "scipy", "rouge_score", "PIL", "pyarrow", "datasets", "pandas")
    assert bare(BRIDGE.replace("{{", "{").replace("}}", "}"), tmp_path, extras=["hf"], without=without) == "done\n"


NEEDS = [
    (["train", "--model", "{d}", "--data", "{d}/x.jsonl", "--task", "classification", "--out", "{d}/run"], "train"),
    (["merge", "{d}/lora", "--out", "{d}/merged"], "train"),
    (["show", "{d}/lora", "--plot", "{d}/x.svg"], "plot"),
]


CALLS = [
    ("undula.train(undula.Run(model='m', data='d', task=CausalLM(), method=undula.LoRA(), out=P))", "train"),
    ("undula.evaluate(D / 'lora')", "train"),
    ("restored(D / 'lora')", "train"),
    ("undula.study('studies/three.toml', out=P)", "study"),
    ("undula.peft_config(undula.LoRA())", "hf"),
    ("undula.enable_peft()", "hf"),
    ("undula.allocating(undula.ranks.AdaLoRA(target=1))", "hf"),
    ("bundled.enable()", "hf"),
    ("draw([{'site': '', 'spectrum': [1], 'effective_rank': None, 'nonlinearity': None}], 'x.svg')", "plot"),
]
PYTHON = """
import pathlib
D = pathlib.Path(sys.argv[1])
P = D / "python"
for what, extra in {calls}:
    try:
        eval(what)
    except ImportError as error:
        assert f"pip install 'undula[{extra}]'" in str(error), (what, error)
    else:
        raise AssertionError(what)
print("done")
"""


def test_what_needs_an_extra_says_which(tmp_path):
    """On the command line and in Python; and what needs none works."""
    for m in (undula.LoRA(r=2), undula.VeRA(r=2)):
        adapter = undula.attach(nn.Sequential(nn.Linear(8, 8)), m)
        adapter.save(tmp_path / type(m).__name__.lower(), base="nowhere", task="CAUSAL_LM")
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": "b"}\n')
    code = (COMMANDS + PYTHON).replace("{needs}", repr(NEEDS)).replace("{calls}", repr(CALLS))
    names = "import undula\nfrom undula import bundled\nfrom undula.observe.figure import draw\n"
    names += "from undula.train import CausalLM, restored\n"
    assert bare(names + code, tmp_path, extras=["cli"]) == "done\n"
