"""PEFT's own tests of custom models with undula's configurations in the place of `LoraConfig`.

    git clone --branch v0.21.2 https://github.com/huggingface/peft     # the installed version; or its sdist, unpacked
    python bench/peft_suite.py --tests peft/tests --methods LoRA,LoRAN --out bench/results/peft-suite.json

The tests are copied to a temporary folder; nothing of them stays here.  Of their cases those are run whose options
undula has: layers and modules to save (rank and scale go to the method).  Each failure needs a reason in
`bench/peft_suite_reasons.json` (a regular expression of the test's name, the methods, and why); others are listed and
make the exit code 1.  `--methods PEFT` runs PEFT's own LoRA on the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
REASONS = HERE / "peft_suite_reasons.json"
OPTIONS = {"target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"}
OURS = {"r", "lora_alpha", "init_lora_weights", "task_type", "inference_mode"}  # the method's, or without effect
METHODS = (
    "LoRA",
    "LoRAN",
    "SineLoRA",
    "AuroRA",
    "AuroRAStatic",
    "VeRA",
    "SHiRA",
    "LoRAXS",
    "LoRTA",
    "GatedLoRA",
    "DoRA",
)

PLUGIN = '''
import importlib.util, os, sys, types
import peft
import pytest
import torch
import undula
from undula.integrations.peft import UndulaConfig, UndulaModel, hosts

sys.path.insert(0, {here!r})
from peft_suite import OPTIONS, OURS

NAME, LORA = os.environ["UNDULA_SUITE_METHOD"], peft.LoraConfig
if importlib.util.find_spec("diffusers") is None:  # imported by a helper of theirs that these tests do not use
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {{}})
    sys.modules["diffusers"].__spec__ = importlib.util.spec_from_loader("diffusers", None)
undula.enable_peft()


class Stand(UndulaConfig):
    """LoraConfig's place: rank and rules from its options, everything else from the method."""

    def __init__(self, method=None, r=8, lora_alpha=8, init_lora_weights=True, undula_=None, **rules):
        if method is None and rules.get("undula") is None:
            method = getattr(undula, NAME)()
        self.away = not init_lora_weights
        if isinstance(rules.get("target_modules"), str) and hasattr(rules["target_modules"], "pattern"):
            rules["target_modules"] = rules["target_modules"].pattern
        UndulaConfig.__init__(self, method=method, **rules)


def inject(self, model, adapter_name, *args, inject=UndulaModel.inject_adapter, **kwargs):
    """`init_lora_weights=False`: not at the base, so that a test sees the adapter."""
    inject(self, model, adapter_name, *args, **kwargs)
    if getattr(self.peft_config[adapter_name], "away", False):
        for layer in hosts(model).values():
            for p in layer.undula_factors[adapter_name].parameters() if adapter_name in layer else ():
                if not p.is_meta:
                    p.data.add_(0.1 * torch.randn_like(p))


UndulaModel.inject_adapter = inject
if NAME != "PEFT":
    peft.LoraConfig = Stand
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[undula.integrations.peft.UNDULA] = Stand


def wanted(item):
    spec = getattr(item, "callspec", None)
    if spec is None or spec.params.get("config_cls") is not peft.LoraConfig:
        return False
    return set(spec.params.get("config_kwargs") or {{}}) <= OPTIONS | OURS


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if wanted(item)]


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ["UNDULA_SUITE_LOG"], "a") as f:
            text = str(getattr(report.longrepr, "reprcrash", "") or "") if report.failed else ""
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            f.write(repr((report.nodeid.rpartition("::")[2], outcome, text[-400:])) + "\\n")
'''


def run(tests: Path, method: str, select: str | None) -> list[tuple[str, str, str]]:
    """[(test, outcome, error)] of one method."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copytree(tests, home / "tests")
        (home / "tests" / "__init__.py").touch()
        (home / "stand_in.py").write_text(PLUGIN.format(here=str(HERE)))
        log = home / "log"
        path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"UNDULA_SUITE_METHOD": method, "UNDULA_SUITE_LOG": str(log), "PYTHONPATH": path}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "stand_in", "-p", "no:cacheprovider"]
        command += ["tests/test_custom_models.py", *(["-k", select] if select else [])]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
        if not log.exists():
            raise SystemExit(f"no test ran:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
        return [eval(line) for line in log.read_text().splitlines()]  # written by the plugin, above


def explained(test: str, error: str, method: str, reasons: list[dict]) -> str | None:
    """The reason listed for a failure."""
    for r in reasons:
        if re.search(r["test"], test) and re.search(r.get("error", ""), error) and method in r.get("methods", [method]):
            return r["reason"]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tests", type=Path, required=True, help="the folder `tests` of PEFT's sources")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--select", help="pytest's -k")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import peft

    reasons, results, open_ = json.loads(REASONS.read_text()), {}, 0
    for method in given.methods.split(","):
        rows = run(given.tests.resolve(), method, given.select)
        counts = Counter(outcome for _, outcome, _ in rows)
        failed = [(t, e) for t, o, e in rows if o == "failed"]
        why = Counter(explained(t, e, method, reasons) or f"no reason: {t}: {e}" for t, e in failed)
        results[method] = {"counts": dict(counts), "failures": dict(why)}
        open_ += sum(n for reason, n in why.items() if reason.startswith("no reason"))
        print(method, dict(counts), *(f"\n  {n} x {reason}" for reason, n in why.items()), flush=True)
    if given.out:
        data = {"peft": peft.__version__, "tests": "test_custom_models.py", "methods": results}
        given.out.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if open_ else 0


if __name__ == "__main__":
    sys.exit(main())
