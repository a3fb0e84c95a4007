"""The device that tests compute on: UNDULA_DEVICE, or the CPU.  All that tests know of it stands here.

    UNDULA_DEVICE=cuda python -m pytest tests/laws tests/oracles
    UNDULA_DEVICE=other python -m pytest tests/laws tests/oracles  # no accelerator at hand: see other.py

On another device than the CPU torch's default device is that one, from before the tests are collected, so that what
they make lies there; what cannot run there is deselected, and said.
"""

import functools
import os
from pathlib import Path

import torch

ASKED = os.environ.get("UNDULA_DEVICE", "cpu")
FOLDERS = ("laws", "oracles")  # the others are about files, processes, and packages that have devices of their own
CPU_ONLY = {  # a module or a test of one, and why
    "laws/test_attention_by_request.py": "its attention is torch's of the CPU",
    "laws/test_devices.py": "has a device of its own",
    "laws/test_disk.py": "is about files",
    "laws/test_files.py": "is about files",
    "laws/test_fuzz.py": "is about files",
    "laws/test_frozen.py::test_tables_with_room_for_a_budget_are_not_copied_to_grow": "room is free on a CPU alone",
    "laws/test_int8.py": "int8 products are for CPUs",
    "laws/test_narrow.py": "is about the types of CPUs",
    "laws/test_packing.py": "is about collators, which are on the CPU",
    "laws/test_ranges.py": "is about settings",
    "laws/test_rebuilt.py": "is about files",
    "laws/test_settings.py": "is about settings",
    "laws/test_values.py::test_what_is_made_of_a_live_adapter_is_untouched_by_its_training": "reads by NumPy",
    "laws/test_words.py": "is about texts",
    "oracles/test_archive.py": "is about files",
    "oracles/test_ctranslate2.py": "another runtime",
    "oracles/test_frozen_numbers.py": "compares with NumPy",
    "oracles/test_gated.py": "compares with NumPy",
    "oracles/test_methods.py": "compares with NumPy",
    "oracles/test_policies.py": "computes with Python's numbers",
    "oracles/test_planner.py": "computes with Python's numbers",
    "oracles/test_procedures.py::test_states_of_earlier_versions_go_on": "is about files",
    "oracles/test_starts.py": "compares with NumPy",
    "oracles/test_statistics.py": "computes with NumPy",
    "oracles/test_study_choices.py": "computes with Python's numbers",
    "oracles/test_study_report.py": "is about files",
    "oracles/test_tags.py": "computes with Python's numbers",
    "oracles/test_tensor.py": "compares with NumPy",
}

left_out: dict[str, int] = {}  # how many tests for each reason


def there():
    """Whether torch has the device that was asked for."""
    if ASKED == "other":
        return True
    kind = torch.device(ASKED).type
    return kind == "cpu" or (kind in ("cuda", "mps", "xpu") and getattr(torch, kind).is_available())


def choose():
    """Before the tests are collected."""
    if ASKED == "other":
        from . import other  # of newer torches alone

        other.load()
    if ASKED != "cpu" and there():
        torch.set_default_device(ASKED)
        torch.empty(0)  # here torch notes which functions follow the default device
        for name in ("rand", "randn", "randint", "randperm"):
            setattr(torch, name, drawn(getattr(torch, name)))


def drawn(function):
    """The same numbers as on a CPU where a generator of the CPU draws them: a device refuses it."""

    @functools.wraps(function)
    def run(*given, generator=None, device=None, **more):
        if generator is None or device is not None or generator.device.type != "cpu":
            return function(*given, generator=generator, device=device, **more)
        return function(*given, generator=generator, device="cpu", **more).to(ASKED)

    return run


def deselect(config, items):
    """Leaves out what cannot run on the device."""
    kept = []
    for item in items:
        why = reason(item)
        if why is None:
            kept.append(item)
        else:
            left_out[why] = left_out.get(why, 0) + 1
    if left_out:
        chosen = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = kept


def reason(item):
    """Why a test is not for the device; None where it is."""
    if ASKED == "cpu":
        return None
    if not there():
        return f"torch {torch.__version__} finds no such device here"
    path = Path(item.path)
    if path.parent.name not in FOLDERS:
        return f"only tests/{' and tests/'.join(FOLDERS)} follow it"
    module = f"{path.parent.name}/{path.name}"
    return CPU_ONLY.get(module) or CPU_ONLY.get(f"{module}::{item.originalname}")


def report():
    """Said when the tests are collected."""
    if ASKED == "cpu":
        return []
    return [f"UNDULA_DEVICE={ASKED}", *(f"  {n} tests are left out: {why}" for why, n in sorted(left_out.items()))]
