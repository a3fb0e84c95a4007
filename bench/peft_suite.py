"""PEFT's own tests of custom models and of decoders with undula's configurations in the place of `LoraConfig`.

    pip download --no-binary :all: --no-deps peft==0.21.2 && tar xzf peft-0.21.2.tar.gz     # the installed version
    python bench/peft_suite.py --tests peft-0.21.2/tests --methods PEFT,LoRA,LoRAN --out bench/results/peft-suite.json

The tests are copied to a temporary folder; nothing of them stays here.  The decoders' models come from a hub: models of
the same classes with random weights are written beside the tests under those names.  Of the cases those are run whose
options undula has: layers, modules to save, dropout (rank and scale go to the method).  Each failure needs a reason in
`bench/peft_suite_reasons.json` (regular expressions of the test's name and of the error, the methods, and why); others
are listed and make the exit code 1.  The method PEFT is PEFT's own LoRA on the same cases.  What `--out` names keeps
the methods and parts that are not run now.
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
from typing import Any

HERE = Path(__file__).resolve().parent
REASONS = HERE / "peft_suite_reasons.json"
OPTIONS = {"target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"}
OURS = {"r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "task_type", "inference_mode"}
PARTS = {"custom": "test_custom_models.py", "decoder": "test_decoder_models.py"}
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
import importlib.util, os, re, sys, types
import peft
import pytest
import torch
import undula
from undula.integrations.peft import UndulaConfig, UndulaModel, hosts

sys.path.insert(0, {here!r})
from peft_suite import OPTIONS, OURS

LAYERS = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
NAME, LORA = os.environ["UNDULA_SUITE_METHOD"], peft.LoraConfig
if importlib.util.find_spec("diffusers") is None:  # imported by a helper of theirs that these tests do not use
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {{}})
    sys.modules["diffusers"].__spec__ = importlib.util.spec_from_loader("diffusers", None)
undula.enable_peft()


class Stand(UndulaConfig):
    """LoraConfig's place: rank and rules from its options, everything else from the method."""

    def __init__(self, method=None, r=8, lora_alpha=8, lora_dropout=0.0, init_lora_weights=True, **rules):
        if method is None and rules.get("undula") is None:
            method = getattr(undula, NAME)()
            method = undula.Dropout(method, lora_dropout) if lora_dropout else method
        self.away = not init_lora_weights
        if isinstance(rules.get("target_modules"), str) and hasattr(rules["target_modules"], "pattern"):
            rules["target_modules"] = rules["target_modules"].pattern
        UndulaConfig.__init__(self, method=method, **rules)


def inject(self, model, adapter_name, *args, inject=UndulaModel.inject_adapter, **kwargs):
    """`init_lora_weights=False`: not at the base, so that a test sees the adapter.  No targets: LoRA's own."""
    config = self.peft_config[adapter_name]
    if isinstance(config, Stand) and config.target_modules is None and config.rule is None and not config.sites:
        config.target_modules = sorted(LAYERS[self.get_model_config(model)["model_type"]])
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


SELECT = re.compile(os.environ["UNDULA_SUITE_SELECT"])


def wanted(item):
    spec = getattr(item, "callspec", None)
    if spec is None or spec.params.get("config_cls") is not peft.LoraConfig:
        return False
    if not SELECT.search(item.name):
        return False
    options = spec.params.get("config_kwargs") or {{}}
    return set(options) <= OPTIONS | OURS and options.get("bias", "none") == "none"


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if wanted(item)]


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ["UNDULA_SUITE_LOG"], "a") as f:
            text = str(getattr(report.longrepr, "reprcrash", "") or "") if report.failed else ""
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            f.write(repr((report.nodeid.rpartition("::")[2], outcome, text[-400:])) + "\\n")
'''


def models(home: Path) -> None:
    """What the decoders' tests open from a hub, as folders of these names: the classes and sizes of PEFT's."""
    import torch
    import transformers as t

    wide = {"initializer_range": 0.2}  # with less, outputs of models so small differ by less than the tests ask for
    sizes = wide | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
    llama = sizes | {"intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 128}
    gpt = wide | {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
    opt = sizes | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.2}
    made = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": t.OPTConfig(**opt),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": t.GPT2Config(**gpt),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": t.GPTJConfig(**gpt, rotary_dim=4),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": t.LlamaConfig(**llama),
        "peft-internal-testing/tiny-dummy-qwen2": t.Qwen2Config(**llama),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": t.Gemma3TextConfig(**llama, head_dim=8),
    }
    for name, config in made.items():
        torch.manual_seed(0)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 2, 5  # 1 and 2 are in the tests
        t.AutoModelForCausalLM.from_config(config).save_pretrained(home / name)


def run(tests: Path, part: str, method: str, select: str) -> list[tuple[str, str, str]]:
    """[(test, outcome, error)] of one method."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copytree(tests, home / "tests")
        (home / "tests" / "__init__.py").touch()
        (home / "stand_in.py").write_text(PLUGIN.format(here=str(HERE)))
        if part == "decoder":
            models(home)
        log = home / "log"
        path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"UNDULA_SUITE_METHOD": method, "UNDULA_SUITE_LOG": str(log), "PYTHONPATH": path}
        env["UNDULA_SUITE_SELECT"] = select
        command = [sys.executable, "-m", "pytest", "-q", "-p", "stand_in", "-p", "no:cacheprovider"]
        command += [f"tests/{PARTS[part]}"]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
        if not log.exists() or done.returncode not in (0, 1):  # 1: some have failed; else it did not come to its end
            told = f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
            raise SystemExit(f"pytest ended with {done.returncode}, not after all tests:\n{told}")
        return [eval(line) for line in log.read_text().splitlines()]  # written by the plugin, above


def explained(test: str, error: str, method: str, reasons: list[dict[str, Any]]) -> str | None:
    """The reason listed for a failure."""
    for r in reasons:
        if re.search(r["test"], test) and re.search(r.get("error", ""), error) and method in r.get("methods", [method]):
            return r["reason"]
    return None


def judged(
    rows: list[tuple[str, str, str]], method: str, reasons: list[dict[str, Any]]
) -> tuple[dict[str, int], Counter[str], list[str]]:
    """(counts of outcomes, how often each reason counts, the failures that none explains)."""
    failed = [(t, e) for t, o, e in rows if o == "failed"]
    told = [(t, e, explained(t, e, method, reasons)) for t, e in failed]
    why = Counter(reason for _, _, reason in told if reason is not None)
    return dict(Counter(o for _, o, _ in rows)), why, [f"{t}: {e}" for t, e, reason in told if reason is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tests", type=Path, required=True, help="the folder `tests` of PEFT's sources")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--parts", default=",".join(PARTS), help="custom, decoder")
    parser.add_argument("--select", default="", help="a regular expression of the tests' names, as in 'MLP 4|Conv2d 2'")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import peft

    reasons, unexplained = json.loads(REASONS.read_text()), 0
    data: dict[str, Any] = {"peft": peft.__version__}
    if given.out and given.out.is_file():
        data |= json.loads(given.out.read_text())
    for part in given.parts.split(","):
        for method in given.methods.split(","):
            counts, why, others = judged(run(given.tests.resolve(), part, method, given.select), method, reasons)
            unexplained += len(others)
            print(part, method, counts, *(f"\n  {n} x {reason}" for reason, n in why.items()), flush=True)
            print(*(f"  no reason: {text}" for text in others), sep="\n", flush=True)
            found = {"select": given.select, "counts": counts, "reasons": dict(why), "unexplained": others}
            data.setdefault(part, {})[method] = found
            if given.out:
                given.out.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
