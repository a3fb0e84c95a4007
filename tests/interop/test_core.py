"""An installation with the declared core dependencies alone: everything that needs no extra works, the rest says which
extra it needs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from torch import nn

import undula

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
from tests.laws.zoo import ZOO

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


def core():
    """The distributions that the declared dependencies bring, as pip would."""
    found, left = set(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    while left:
        asked = Requirement(left.pop())
        name = re.sub(r"[-_.]+", "-", asked.name).lower()
        if name in found or (asked.marker is not None and not asked.marker.evaluate({"extra": ""})):
            continue
        try:
            left.extend(importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
    return found


def absent():
    """The installed modules that the core does not bring."""
    there = core()
    assert "numpy" in there
    assert not there & {"transformers", "peft", "scipy"}
    owners = importlib.metadata.packages_distributions()
    named = {m: {re.sub(r"[-_.]+", "-", d).lower() for d in ds} for m, ds in owners.items()}
    return sorted(m for m, ds in named.items() if not ds & (there | {"undula"}))


def bare(code, *arguments):
    """Runs code where only the core is installed."""
    code = BARE.format(absent=set(absent())) + code
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_method_trains_saves_loads_and_leaves(tmp_path):
    number, _ = bare(LIBRARY, tmp_path).split()
    assert int(number) >= 27


NEEDS = [
    (["train", "--model", "{d}", "--data", "{d}/x.jsonl", "--task", "classification", "--out", "{d}/run"], "hf"),
    (["merge", "{d}/lora", "--out", "{d}/merged"], "hf"),
    (["show", "{d}/lora", "--plot", "{d}/x.svg"], "plot"),
]


CALLS = [
    ("undula.train(undula.Run(model='m', data='d', task=CausalLM(), method=undula.LoRA(), out=P))", "hf"),
    ("undula.evaluate(D / 'lora')", "hf"),
    ("restored(D / 'lora')", "hf"),
    ("undula.peft_config(undula.LoRA())", "hf"),
    ("undula.enable_peft()", "hf"),
    ("undula.allocating(undula.ranks.AdaLoRA(target=1))", "hf"),
    ("bundled.enable()", "hf"),
    ("undula.observe.figure.draw([{'site': 'x', 'spectrum': [1.0], 'effective_rank': None}], 'x.svg')", "plot"),
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
    names = "import undula\nfrom undula import bundled\nfrom undula.train import CausalLM, restored\n"
    assert bare(names + code, tmp_path) == "done\n"
