"""Some hundred damaged files; `bench/fuzz.py` makes as many as are wanted, of the same kinds."""

import importlib
from pathlib import Path


def test_damaged_files_are_refused_as_documented_and_cost_little(tmp_path, monkeypatch):
    """No other error and no memory out of proportion to the files; what is accepted attaches and runs."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    tally = importlib.import_module("fuzz").run(500, seed=11, folder=tmp_path)
    assert not tally.faults, tally.faults
    assert tally.ended["ValueError"] > 200
    assert tally.ended["accepted"] > 20
